"""NonFiniteHook and InterruptHook in a training of two processes: what one meets, both answer in the same way."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mmengine")

from mmvmamba.checkpoints import read_checkpoint
from tests.test_engine.guarded_training import PLACES

ROOT = Path(__file__).parents[2]
VALUES = ("nan", "inf")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The results of both ranks for every case in which rank 1 alone is struck; one pair of processes runs them all."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("guarded_ranks.py")), str(folder)]
    ranks = [subprocess.Popen([*command, str(rank)], cwd=ROOT, env=environment) for rank in range(2)]
    assert [rank.wait(timeout=60) for rank in ranks] == [0, 0]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("place", [*PLACES, "constant"])
@pytest.mark.parametrize("value", VALUES)
def test_what_strikes_one_process_stops_both(two_processes, place, value):
    """D7, the last six cases. A bad constant in the loss is no gradient's, so no averaging of gradients spreads it."""
    messages = []
    for result in two_processes:
        outcome = result[f"{place}-{value}"]
        assert outcome["differing"] == []
        messages.append(outcome["message"])
    assert messages[0] == messages[1]
    # Both ranks' images are in the report, each under its rank.
    own = re.search(r" rank 0:\n(.*) rank 1:\n(.*?)\n  (gradients|learning)", messages[0], re.DOTALL)
    assert "images/008.jpg" in own[1] and "images/028.jpg" in own[2]
    if place != "gradient":
        assert re.search(r"loss_main \d", own[1]) and re.search(r"loss_main (nan|inf)", own[2])


def test_one_process_alone_may_leave_out_a_step_and_both_do(two_processes):
    ends = [result["skipped"] for result in two_processes]
    assert ends[0] == ends[1] and ends[0]["iter"] == 8 and ends[0]["finite"]


@pytest.mark.parametrize(
    ("case", "iteration", "validated"),
    [
        ("training", 4, 8),
        ("validation", 3, 1),
        ("validations of different lengths", 4, 6),  # the ranks cannot meet inside this one
    ],
)
def test_a_signal_to_one_process_stops_both_after_the_same_iteration(two_processes, case, iteration, validated):
    for result in two_processes:
        outcome = result[case]
        assert outcome["message"].startswith(f"SIGTERM has ended the training after iteration {iteration}; ")
        assert outcome["number"] == 15
    assert two_processes[1][case]["validated"] == validated
    assert read_checkpoint(Path(outcome["folder"], f"iter_{iteration}.pth"))["meta"]["iter"] == iteration
