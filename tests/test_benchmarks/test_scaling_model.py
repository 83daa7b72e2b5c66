"""The communication model: cases that can be told by hand, and the tables of docs/scaling.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.scaling_model import BETWEEN, MIB, WITHIN, Link, all_reduce_seconds, bucket_sizes, main, step

PAGE = Path(__file__).parents[2] / "docs/scaling.md"
SLOW = Link("one byte per second", 1.0, 0.0)
FREE = Link("free", float("inf"), 0.0)


@pytest.mark.parametrize(
    ("gpus", "nodes", "within", "between", "seconds"),
    [
        (1, 1, SLOW, SLOW, 0.0),
        (4, 1, SLOW, FREE, 2 * 3 / 4 * 12),  # a ring: 2 (n - 1) / n of all bytes through each link
        (1, 4, FREE, SLOW, 2 * 3 / 4 * 12),
        (4, 3, FREE, SLOW, 2 * 2 / 3 * 12 / 4),  # each GPU its fourth
        (4, 3, FREE, Link("shared", 1.0, 0.0, per_node=True), 2 * 2 / 3 * 12),
        (4, 3, Link("late", float("inf"), 1.0), Link("late", float("inf"), 10.0), 2 * 3 * 1 + 2 * 2 * 10),
    ],
)
def test_time_of_an_average(gpus, nodes, within, between, seconds):
    assert all_reduce_seconds(12, gpus, nodes, within, between, 1.0) == pytest.approx(seconds)
    half = all_reduce_seconds(12, gpus, nodes, within, between, 0.5)
    assert seconds <= half <= 2 * seconds


def test_buckets():
    assert bucket_sizes(10) == [10]
    assert bucket_sizes(60 * MIB) == [1 * MIB, 25 * MIB, 25 * MIB, 9 * MIB]


def _step(alone, size, within, **options):
    return step(alone, 0.5, size, 8, 1, within, FREE, 1.0, **options)


def test_what_fits_into_the_backward_pass_is_hidden_but_for_the_last_bucket():
    size = 51 * MIB
    found = _step(1000, size, Link("", size * 2 * 7 / 8, 0.0))  # all of it in one second
    assert found.communication == pytest.approx(1.0)
    assert found.exposed == pytest.approx(25 / 51)
    assert found.efficiency == pytest.approx(1000 / (1000 + 25 / 51))


def test_what_does_not_fit_is_waited_for():
    size = 51 * MIB
    rate = size * 2 * 7 / 8 / 10  # ten seconds of communication for half a second of backward pass
    found = _step(1.0, size, Link("", rate, 0.0))
    second_ready = 0.5 * 26 / 51  # the first, of 1 MiB, is through by then
    assert found.exposed == pytest.approx(second_ready + 10 * 50 / 51 - 0.5)
    assert found.efficiency == pytest.approx(1 / (1 + found.exposed))
    often = _step(1.0, size, Link("", rate, 0.0), accumulated=4)
    assert often.exposed == found.exposed and often.efficiency == pytest.approx(4 / (4 + found.exposed))


def test_one_gpu_waits_for_nobody():
    assert step(1.0, 0.5, 1e8, 1, 1, SLOW, SLOW, 1.0).efficiency == 1.0


def test_more_nodes_never_help_a_single_step():
    for between in BETWEEN.values():
        rows = [step(0.1, 0.6, 2e8, 8, nodes, WITHIN["nvlink"], between, 0.7).efficiency for nodes in (1, 2, 4, 8, 16)]
        assert rows == sorted(rows, reverse=True)


def test_tables_of_the_page_are_what_the_commands_print(capsys):
    blocks = re.findall(r"```\n\$ python -m benchmarks\.scaling_model (.*?)\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 3
    for arguments, table in blocks:
        main(arguments.split())
        assert capsys.readouterr().out == table
