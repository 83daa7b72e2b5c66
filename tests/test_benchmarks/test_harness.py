"""Timing, checking, memory and tables."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import memory, table
from benchmarks.backbones import slope
from benchmarks.cases import CASES, choose_cases
from benchmarks.harness import TURN, DisagreementError, Notes, Timing, check, environment, interleave, save
from benchmarks.models import check_shapes, parse_size
from benchmarks.ops import model_rows

MIB = 1 << 20


def test_timing_summarises_rounds() -> None:
    timing = Timing.of([4.0, 1.0, 2.0, 3.0, 5.0])
    assert (timing.minimum, timing.median, timing.rounds) == (1.0, 3.0, 5)
    assert timing.spread == pytest.approx(2 / 3)
    assert Timing.of([2.0]).spread == 0


class Clock:
    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def run(self, name: str, seconds: float) -> None:
        self.order.append(name)
        self.now += seconds


def test_contestants_are_interleaved_and_slow_ones_drop_out() -> None:
    clock = Clock()
    runs = {"a": lambda: clock.run("a", 1.0), "b": lambda: clock.run("b", 2.0), "slow": lambda: clock.run("slow", 9.0)}
    timings = interleave(runs, seconds=1e9, most_rounds=3, fewer_rounds={"slow": 1}, clock=lambda: clock.now)
    # One run each before the clock starts, but for what is asked for fewer rounds.
    assert "".join(clock.order) == "ab" + "abslow" + "ab" + "ab"
    assert timings["a"] == Timing(1.0, 1.0, 0.0, 3)
    assert timings["slow"] == Timing(9.0, 9.0, 0.0, 1)


def test_time_limit_ends_after_a_whole_round() -> None:
    clock = Clock()
    runs = {"a": lambda: clock.run("a", 1.0), "b": lambda: clock.run("b", 1.0)}
    timings = interleave(runs, seconds=6.5, most_rounds=50, clock=lambda: clock.now)
    assert timings["a"].rounds == timings["b"].rounds == 4
    timings = interleave(runs, seconds=0.0, most_rounds=50, clock=lambda: clock.now)
    assert timings["a"].rounds == timings["b"].rounds == 3


def test_a_turn_of_a_fast_contestant_is_several_calls() -> None:
    clock = Clock()
    runs = {"fast": lambda: clock.run("f", TURN / 3.5), "slow": lambda: clock.run("s", 2 * TURN)}
    timings = interleave(runs, seconds=0.0, most_rounds=50, clock=lambda: clock.now)
    assert "".join(clock.order) == "fs" + 3 * ("ffff" + "s")
    assert (timings["fast"].rounds, timings["slow"].rounds) == (12, 3)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"out": torch.ones(2) * 1.1}, r"differs from the reference by 1.0\de-01"),
        ({"out": torch.tensor([1.0, float("nan")])}, "differs from the reference by inf"),
        ({"out": torch.ones(3)}, r"shape \(3,\), expected \(2,\)"),
        ({}, "returned no 'out'"),
    ],
)
def test_a_contestant_that_disagrees_is_an_error(found: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(DisagreementError, match=f"somebody: .*{message}"):
        check("somebody", found, {"out": torch.ones(2).double()}, {"out": 1e-2})
    check("somebody", {"out": torch.ones(2) * 1.001}, {"out": torch.ones(2).double()}, {"out": 1e-2})


def test_environment_names_what_a_result_depends_on() -> None:
    facts = environment()
    assert {"date", "commit", "device", "torch", "versions", "threads", "instruction_set"} <= set(facts)
    assert set(facts["versions"]) >= {"mmcv", "mmdet", "mmpretrain"}
    json.dumps(facts)


def test_notes_are_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    notes = Notes()
    notes.skip("x", "because")
    notes.skip("x", "because")
    assert notes.lines == ["skipped: x: because"]
    assert capsys.readouterr().out == "skipped: x: because\n"


def test_sizes_and_shapes() -> None:
    assert parse_size("224") == (224, 224)
    assert parse_size("800x1216") == (800, 1216)
    for wrong in ("", "x", "0", "1x2x3", "a"):
        with pytest.raises(ValueError, match="size is"):
            parse_size(wrong)
    maps = [torch.zeros(1, 1, 64 // s, 96 // s) for s in (4, 8, 16, 32)]
    check_shapes("m", maps, 64, 96)
    for wrong in (maps[:3], maps[::-1], [*maps[:3], maps[3] / 0 * 0]):
        with pytest.raises(DisagreementError):
            check_shapes("m", wrong, 64, 96)


def test_slope_is_that_of_a_power_of_the_pixels() -> None:
    sides = [224, 512, 1536]
    assert slope(sides, [3e-9 * (side * side) ** 1.1 for side in sides]) == pytest.approx(1.1)


def test_every_shape_can_be_chosen_by_name_and_group() -> None:
    assert choose_cases(None) == list(CASES)
    assert [case.shape for case in choose_cases(["224"])] == [
        [1, 56, 56, 96], [1, 28, 28, 192], [1, 14, 14, 384], [1, 7, 7, 768],
    ]  # fmt: skip
    assert [case.shape for case in choose_cases(["800x1216"])][3] == [1, 25, 38, 768]
    assert sum(case.blocks for case in choose_cases(["512"])) == 14
    assert choose_cases(["sequence 16K"])[0].shape == [2, 1536, 16384]
    with pytest.raises(ValueError, match="found 'nothing'"):
        choose_cases(["nothing"])


def test_model_rows_weight_stages_with_blocks_and_leave_out_who_missed_one() -> None:
    cases = choose_cases(["224"])
    rows = [
        {"case": case.name, "group": case.group, "boundary": "core", "pass": "forward", "dtype": "float32",
         "contestant": name, "blocks": case.blocks, "minimum": seconds, "median": 2 * seconds, "spread": 0.1,
         "rounds": 4}
        for case in cases
        for name, seconds in (("compiled", 1.0), ("reference", 10.0), ("upstream path", 20.0))
        if not (name == "upstream path" and case is cases[0])
    ]  # fmt: skip
    sums = {row["contestant"]: row for row in model_rows(rows, cases)}
    assert set(sums) == {"compiled", "reference"}
    assert sums["compiled"]["case"] == "VMamba-T core at 224"
    assert sums["compiled"]["minimum"] == 14 and sums["compiled"]["median"] == 28
    assert sums["compiled"]["over_reference"] == 10 and sums["compiled"]["over_upstream"] is None


def test_memory_of_a_step_is_measured_in_a_fresh_process() -> None:
    ballast = torch.ones(600 * MIB, dtype=torch.uint8)  # of this process; must not show in the other
    arguments = {"mebibytes": 100, "built": 300}
    peak = memory.measure("benchmarks.memory", "allocate", arguments, repeats=2)
    assert peak.method == "VmHWM"
    assert 99 * MIB < peak.step < 112 * MIB
    assert peak.peak == peak.before + peak.step
    assert peak.peak < 600 * MIB + len(ballast) / 2


def test_memory_reports_a_failing_case() -> None:
    with pytest.raises(RuntimeError, match="(?s)ended with 1, expected 0.*unexpected keyword"):
        memory.measure("benchmarks.memory", "allocate", {"wrong": 1})


def test_table_prints_one_table_for_each_kind_of_figure(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    base = {"case": "224", "pass": "forward", "dtype": "float32", "contestant": "VMamba-T"}
    rows = [base | Timing(0.1234, 0.2, 0.05, 7).fields() | {"over_swin": 0.98765}, base | {"scan_share": 0.1234}]
    save(tmp_path / "a.json", "backbones", rows, ["skipped: X: not installed"])
    assert table.main([str(tmp_path / "a.json")]) == 0
    text = capsys.readouterr().out
    assert "| 224 | forward | float32 | VMamba-T | 123.4 | 200.0 | 5.0 % | 7 | 0.988 |" in text
    assert "| 224 | forward | float32 | VMamba-T | 12.3 % |" in text
    assert "* skipped: X: not installed" in text
    assert "**backbones**" in text


@pytest.mark.parametrize("text", [None, "nothing", "[]", '{"rows": []}'])
def test_table_refuses_other_files(tmp_path, text: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.json"
    if text is not None:
        path.write_text(text)
    assert table.main([str(path)]) == 2
    assert "a.json" in capsys.readouterr().err
