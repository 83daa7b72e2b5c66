"""The decision of the performance gate: from seconds of rounds to passed or failed, without a clock of its own.

Two ratios of one run are looked at, ours / GEMM and ours / reference, lower is better. What a noisy machine does to
them is answered in four ways. The ratios are of minima over many interleaved rounds. The noise is what these minima
vary by between thirds of the rounds, and is added to what is allowed (up to a cap, so that noise cannot excuse
everything). A case with a loss in either ratio is measured again, and the minima of all its attempts count. A slower
kernel raises both ratios, a disturbed yardstick only one: after the last attempt a loss must show in both, unless one
alone loses more than three times what is allowed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

OURS, GEMM, REFERENCE = "ours", "GEMM", "reference"
YARDSTICKS = (GEMM, REFERENCE)
ALLOWED_LOSS = 0.15
MOST_NOISE = 0.05
"""With it a kernel that takes 30 % longer fails on any machine whose minima are right to 8 %."""
ALONE = 3.0
"""One ratio by itself fails beyond this many times what is allowed for both."""
ATTEMPTS = 3
FLOOR = 1.0
"""Ours / reference that no machine may reach: compiled kernels beat the reference everywhere."""
STRANGER_FACTOR = 2.0
"""On a machine that is not recorded, how many times the worst recorded ours / reference of its instruction set is the
floor of a case."""
THIRDS = 3


@dataclass(frozen=True)
class Rounds:
    """Seconds of every round of one case, by contestant: `OURS`, `GEMM` and `REFERENCE`."""

    seconds: Mapping[str, Sequence[float]]

    def best(self, contestant: str) -> float:
        """The quickest round."""
        return min(self.seconds[contestant])

    def ratio(self, yardstick: str) -> float:
        """Ours over a yardstick."""
        return self.best(OURS) / self.best(yardstick)

    def noise(self, yardstick: str) -> float:
        """How much the minima of thirds of the rounds vary, both contestants added."""
        return self._variation(OURS) + self._variation(yardstick)

    def _variation(self, contestant: str) -> float:
        seconds = self.seconds[contestant]
        # Every third round, not three blocks: a disturbance of a second is in all of them, and no part of the estimate.
        minima = [min(seconds[start::THIRDS]) for start in range(min(THIRDS, len(seconds)))]
        return max(minima) / min(minima) - 1

    def joined(self, other: Rounds) -> Rounds:
        """The rounds of two attempts."""
        return Rounds({name: [*values, *other.seconds[name]] for name, values in self.seconds.items()})


@dataclass(frozen=True)
class Verdict:
    """What the gate says about one case."""

    case: str
    passed: bool
    found: dict[str, float]
    expected: dict[str, float] | None
    allowed: dict[str, float]
    attempts: int
    floor: float = FLOOR

    def losses(self) -> dict[str, float]:
        """How much larger each ratio is than expected; empty without an expectation."""
        if self.expected is None:
            return {}
        return {yardstick: self.found[yardstick] / self.expected[yardstick] - 1 for yardstick in YARDSTICKS}

    def is_clear(self) -> bool:
        """Whether it passed with no loss in either ratio: another attempt could say nothing else."""
        return self.passed and all(loss <= self.allowed[yardstick] for yardstick, loss in self.losses().items())

    def line(self) -> str:
        """One line for people."""
        state = "ok  " if self.passed else "FAIL"
        parts = []
        for yardstick in YARDSTICKS:
            text = f"ours/{yardstick} {self.found[yardstick]:.4g}"
            if self.expected is not None:
                text += f" (expected {self.expected[yardstick]:.4g}, {self.losses()[yardstick]:+.1%}, "
                text += f"allowed {self.allowed[yardstick]:+.1%})"
            parts.append(text)
        return f"{state} {self.case}: {', '.join(parts)}, attempts {self.attempts}"


def judge(
    case: str, rounds: Rounds, expected: Mapping[str, float] | None, attempts: int, floor: float = FLOOR
) -> Verdict:
    """Decide on one case.

    Args:
        case: Its name.
        rounds: All rounds so far.
        expected: The ratios that were recorded, by yardstick, or None if there are none for this machine.
        attempts: How many measurements the rounds come from.
        floor: Ours / reference that must not be reached.
    """
    found = {yardstick: rounds.ratio(yardstick) for yardstick in YARDSTICKS}
    allowed = {yardstick: ALLOWED_LOSS + min(rounds.noise(yardstick), MOST_NOISE) for yardstick in YARDSTICKS}
    wanted = None if expected is None else {yardstick: expected[yardstick] for yardstick in YARDSTICKS}
    verdict = Verdict(case, True, found, wanted, allowed, attempts, floor)
    excess = [loss / allowed[yardstick] for yardstick, loss in verdict.losses().items()]
    lost = bool(excess) and (min(excess) > 1 or max(excess) > ALONE)
    return dataclasses.replace(verdict, passed=found[REFERENCE] < floor and not lost)


def decide(
    case: str,
    measure: Callable[[], Rounds],
    expected: Mapping[str, float] | None,
    attempts: int = ATTEMPTS,
    floor: float = FLOOR,
) -> Verdict:
    """Measure a case until it passes clearly, at most ``attempts`` times; the quickest rounds of all attempts count."""
    rounds = measure()
    verdict = judge(case, rounds, expected, 1, floor)
    for attempt in range(2, attempts + 1):
        if verdict.is_clear():
            break
        rounds = rounds.joined(measure())
        verdict = judge(case, rounds, expected, attempt, floor)
    return verdict


def failure_message(verdict: Verdict) -> str:
    """Name case, found, expected and what to do."""
    found = ", ".join(f"ours/{yardstick} {verdict.found[yardstick]:.4g}" for yardstick in YARDSTICKS)
    if verdict.found[REFERENCE] >= FLOOR:
        expected = f"ours/{REFERENCE} below {FLOOR:g} on every machine"
        advice = (
            "The compiled kernel is no faster than plain PyTorch: look at it; this cannot be accepted with --update."
        )
    elif verdict.found[REFERENCE] >= verdict.floor:
        expected = (
            f"ours/{REFERENCE} below {verdict.floor:.4g}, {STRANGER_FACTOR:g} times the worst of recorded machines"
        )
        advice = (
            "Repair the kernel, or record this machine: python -m benchmarks.gate --update where nothing else runs."
        )
    else:
        assert verdict.expected is not None  # for the type checker: only a recorded ratio can be lost
        recorded = ", ".join(f"ours/{y} {verdict.expected[y]:.4g} ({verdict.losses()[y]:+.1%})" for y in YARDSTICKS)
        expected = f"{recorded}; allowed {', '.join(f'{verdict.allowed[y]:+.1%}' for y in YARDSTICKS)} with noise"
        advice = (
            "Repair the kernel, or accept the loss: python -m benchmarks.gate --update on a quiet machine, and say in "
            "the commit message why it is slower."
        )
    return f"{verdict.case}: found {found} after {verdict.attempts} attempts, expected {expected}. {advice}"


def floors(machines: Sequence[Mapping[str, Any]], instruction_set: str | None) -> dict[str, float]:
    """Ours / reference, by case, that a machine which is not recorded must stay below, from those that are."""
    worst: dict[str, float] = {}
    for machine in machines:
        if machine["instruction_set"] == instruction_set:
            for case, ratios in machine["ratios"].items():
                worst[case] = max(worst.get(case, 0.0), ratios[REFERENCE])
    return {case: min(FLOOR, STRANGER_FACTOR * ratio) for case, ratio in worst.items()}


def updated(machines: Sequence[Mapping[str, Any]], machine: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the recorded machines with one replaced or added, in a stable order."""
    others = [dict(m) for m in machines if key_of(m) != key_of(machine)]
    return sorted([*others, dict(machine)], key=lambda m: str(key_of(m)))


def key_of(machine: Mapping[str, Any]) -> tuple[str, ...]:
    """What must be equal for recorded ratios to hold: instruction set, CPU model, release of PyTorch and its GEMM."""
    return tuple(str(machine[name]) for name in ("instruction_set", "cpu", "torch"))
