"""The performance gate, on machines whose time is made up."""

from __future__ import annotations

import json
import random

import pytest

from benchmarks import gate
from benchmarks.gate_logic import (
    ALLOWED_LOSS,
    ATTEMPTS,
    GEMM,
    MOST_NOISE,
    OURS,
    REFERENCE,
    Rounds,
    decide,
    failure_message,
    floors,
    judge,
    key_of,
    updated,
)
from mmvmamba.testing import requires_extension

SECONDS = {OURS: 0.002, GEMM: 0.005, REFERENCE: 0.08}
EXPECTED = {GEMM: 0.4, REFERENCE: 0.025}
SEEDS = range(60)


class Machine:
    """A clock that only moves when a contestant runs, by its time, disturbed now and then."""

    def __init__(self, seed: int = 0, disturbance: float = 0.0, held_up: float = 2 / 3, **factors: float) -> None:
        self.now = 0.0
        self.calls = 0
        self.random = random.Random(seed)  # noqa: S311 (no secrets here)
        self.disturbance, self.held_up = disturbance, held_up
        self.seconds = {name: seconds * factors.get(name, 1.0) for name, seconds in SECONDS.items()}

    def clock(self) -> float:
        return self.now

    def _run(self, name: str) -> None:
        self.calls += 1
        # That share of the runs is held up, by up to the disturbance; what is left varies by a percent.
        held_up = self.random.random() < self.held_up
        factor = 1 + 0.01 * self.random.random() + held_up * self.disturbance * self.random.random()
        self.now += self.seconds[name] * factor

    def case(self) -> gate.GateCase:
        return gate.GateCase("made up", lambda: {name: lambda name=name: self._run(name) for name in self.seconds})

    def problems(self, expected: dict[str, float] | None = EXPECTED) -> list[str]:
        recorded = None if expected is None else {"made up": expected}
        return gate.gate([self.case()], recorded, rounds=9, clock=self.clock)


@pytest.mark.parametrize("disturbance", [0.0, 0.2, 1.0])
def test_unchanged_kernel_passes(disturbance: float) -> None:
    assert [seed for seed in SEEDS if Machine(seed, disturbance).problems()] == []


@pytest.mark.parametrize("disturbance", [0.0, 0.2, 1.0])
def test_kernel_slowed_by_30_percent_fails(disturbance: float) -> None:
    assert [seed for seed in SEEDS if not Machine(seed, disturbance, ours=1.3).problems()] == []


def test_message_names_case_found_expected_and_cure() -> None:
    (message,) = Machine(ours=1.3).problems()
    assert "made up: found ours/GEMM 0.52" in message
    assert "expected ours/GEMM 0.4 (+30" in message
    assert f"after {ATTEMPTS} attempts" in message
    assert "--update" in message


@pytest.mark.parametrize("factors", [{GEMM: 0.8}, {REFERENCE: 0.8}, {GEMM: 1.3}, {REFERENCE: 1.3}])
def test_one_disturbed_yardstick_fails_nothing(factors: dict[str, float]) -> None:
    assert Machine(**factors).problems() == []


@pytest.mark.parametrize("yardstick", [GEMM, REFERENCE])
def test_a_large_loss_in_one_ratio_is_not_hidden_by_the_other(yardstick: str) -> None:
    assert Machine(**{OURS: 1.6, yardstick: 1.6}).problems() != []


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_slower_or_faster_machine_is_no_loss(factor: float) -> None:
    assert Machine(ours=factor, GEMM=factor, reference=factor).problems() == []


def test_gain_passes() -> None:
    assert Machine(ours=0.5).problems() == []


def test_a_case_disturbed_throughout_its_first_attempt_is_measured_again() -> None:
    quick, slow = ({name: [value] * 6 for name, value in SECONDS.items()} for _ in range(2))
    slow[OURS] = [1.5 * value for value in slow[OURS]]
    attempts = iter([Rounds(slow), Rounds(quick)])
    verdict = decide("case", lambda: next(attempts), EXPECTED)
    assert verdict.passed and verdict.attempts == 2
    assert "attempts 2" in verdict.line()


def test_a_lasting_loss_is_measured_three_times_and_fails() -> None:
    slow = Rounds({name: [value * (1.3 if name == OURS else 1)] * 6 for name, value in SECONDS.items()})
    verdict = decide("case", lambda: slow, EXPECTED)
    assert not verdict.passed and verdict.attempts == ATTEMPTS


def test_noise_is_how_far_the_minima_of_thirds_are_apart() -> None:
    steady = {GEMM: [1.0] * 9, REFERENCE: [1.0] * 9}
    assert Rounds({OURS: [1.0] * 9, **steady}).noise(GEMM) == 0
    assert Rounds({OURS: [1.0, 1.02, 1.04] * 3, **steady}).noise(GEMM) == pytest.approx(0.04)
    # A disturbance that leaves quick rounds in every third is no noise of the minimum.
    assert Rounds({OURS: [1.0] * 3 + [9.0] * 6, **steady}).noise(GEMM) == 0


def test_noise_widens_what_is_allowed_up_to_its_cap() -> None:
    def allowed(noise: float) -> float:
        rounds = Rounds({OURS: [1, 1 + noise, 1], GEMM: [1.0] * 3, REFERENCE: [99.0] * 3})
        return judge("case", rounds, EXPECTED, 1).allowed[GEMM]

    assert allowed(0.0) == pytest.approx(ALLOWED_LOSS)
    assert allowed(0.02) == pytest.approx(ALLOWED_LOSS + 0.02)
    assert allowed(3.0) == pytest.approx(ALLOWED_LOSS + MOST_NOISE)


def test_a_machine_without_a_record_is_held_to_the_floor() -> None:
    assert Machine(ours=30).problems(expected=None) == []
    (message,) = Machine(ours=50).problems(expected=None)
    assert "below 1 on every machine" in message
    assert "cannot be accepted" in message


def test_floor_holds_on_a_recorded_machine() -> None:
    assert Machine(ours=50).problems({GEMM: 100.0, REFERENCE: 100.0}) != []


def test_a_case_that_is_not_recorded_is_held_to_the_floor_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    machine = Machine(ours=30)
    assert gate.gate([machine.case()], {}, rounds=3, clock=machine.clock) == []
    assert "made up: not recorded for this machine" in capsys.readouterr().out


@requires_extension()
def test_update_records_what_the_next_run_expects(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gate.json"
    path.write_text('{"machines": []}')
    arguments = ["--file", str(path), "--rounds", "3"]

    def run(machine: Machine, *more: str) -> int:
        return gate.main([*arguments, *more], [machine.case()], machine.clock)

    assert run(Machine()) == 0
    assert "only a floor counts" in capsys.readouterr().out
    assert run(Machine(), "--update") == 0
    (recorded,) = json.loads(path.read_text())["machines"]
    assert recorded["ratios"]["made up"] == pytest.approx(EXPECTED, rel=0.02)
    assert run(Machine()) == 0
    assert "only the floor counts" not in capsys.readouterr().out
    assert run(Machine(ours=1.3)) == 1
    assert "made up: found" in capsys.readouterr().err
    # The loss is accepted, and is then what is expected.
    assert run(Machine(ours=1.3), "--update") == 0
    assert run(Machine(ours=1.3)) == 0


@requires_extension()
def test_update_does_not_record_a_kernel_slower_than_the_reference(tmp_path, capsys) -> None:
    path = tmp_path / "gate.json"
    path.write_text('{"machines": []}')
    machine = Machine(ours=50)
    assert gate.main(["--file", str(path), "--rounds", "3", "--update"], [machine.case()], machine.clock) == 2
    assert "Repair the kernel" in capsys.readouterr().err
    assert path.read_text() == '{"machines": []}'


@requires_extension()
def test_update_on_a_noisy_machine_records_nothing(tmp_path, capsys) -> None:
    path = tmp_path / "gate.json"
    path.write_text('{"machines": []}')
    # Every run is held up, so that no round shows what the kernels can do.
    machine = Machine(disturbance=4.0, held_up=1.0)
    assert gate.main(["--file", str(path), "--rounds", "3", "--update"], [machine.case()], machine.clock) == 2
    assert "Run where nothing else runs" in capsys.readouterr().err
    assert path.read_text() == '{"machines": []}'


@requires_extension()
@pytest.mark.parametrize(
    "text",
    [
        "no json",
        "[]",
        '{"machines": [{"cpu": "x"}]}',
        '{"machines": [{"cpu": "x", "torch": "2.11", "instruction_set": "avx2", "ratios": {"a": {"GEMM": 1}}}]}',
        '{"machines": [{"cpu": "x", "torch": "2.11", "instruction_set": "avx2",'
        ' "ratios": {"a": {"GEMM": 0, "reference": 1}}}]}',
    ],
)
def test_broken_record_is_an_error(tmp_path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gate.json"
    path.write_text(text)
    assert gate.main(["--file", str(path)], []) == 2
    assert "Restore it from git" in capsys.readouterr().err


def test_machines_are_told_apart_by_instruction_set_cpu_and_torch() -> None:
    machine = {"instruction_set": "avx2", "cpu": "a", "torch": "2.11", "ratios": {"x": EXPECTED}}
    others = [machine | {"instruction_set": "avx512"}, machine | {"cpu": "b"}, machine | {"torch": "2.12"}]
    assert len({key_of(m) for m in [machine, *others]}) == 4
    assert gate.expectation(others, machine) is None
    assert gate.expectation([*others, machine], machine) == {"x": EXPECTED}
    assert len(updated([*others, machine], machine | {"ratios": {}})) == 4


def test_shipped_record_names_cases_of_the_gate() -> None:
    names = {case.name for case in gate.CASES}
    assert len(names) == len(gate.CASES) == 12
    for machine in gate.load(gate.FILE):
        assert set(machine["ratios"]) <= names, machine["cpu"]


@requires_extension()
def test_a_real_case_is_checked_and_measured() -> None:
    (case,) = (case for case in gate.CASES if case.name == "selective_scan 192x1024 n=1, forward")
    rounds = gate.measure(case.build(), rounds=1)
    assert {name: len(seconds) for name, seconds in rounds.seconds.items()} == {OURS: 1, REFERENCE: 1, GEMM: 1}
    assert all(seconds > 0 for values in rounds.seconds.values() for seconds in values)


def test_a_stranger_is_held_to_its_instruction_set() -> None:
    machines = [
        {"instruction_set": "avx2", "ratios": {"case": {GEMM: 1.0, REFERENCE: 0.05}}},
        {
            "instruction_set": "avx2",
            "ratios": {"case": {GEMM: 1.0, REFERENCE: 0.03}, "other": {GEMM: 1.0, REFERENCE: 0.9}},
        },
        {"instruction_set": "neon", "ratios": {"case": {GEMM: 1.0, REFERENCE: 0.2}}},
    ]
    limits = floors(machines, "avx2")
    assert limits == {"case": pytest.approx(0.1), "other": 1.0}
    assert floors(machines, "avx512") == {}
    fast = Rounds({OURS: [0.08] * 3, GEMM: [1.0] * 3, REFERENCE: [1.0] * 3})
    slow = Rounds({OURS: [0.12] * 3, GEMM: [1.0] * 3, REFERENCE: [1.0] * 3})
    assert judge("case", fast, None, 1, limits["case"]).passed
    verdict = judge("case", slow, None, 1, limits["case"])
    assert not verdict.passed
    assert "below 0.1, 2 times the worst of recorded machines" in failure_message(verdict)
