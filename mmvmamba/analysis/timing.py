"""Timing that a noisy machine can bear: contestants interleaved in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

TURN = 0.01
"""Seconds of one turn of a contestant that is faster."""
LEAST_ROUNDS = 3


@dataclass(frozen=True)
class Timing:
    """Seconds of one contestant over its calls, ``rounds`` of them; ``spread`` is interquartile range over median."""

    minimum: float
    median: float
    spread: float
    rounds: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        """Summarise the seconds of all rounds, at least one."""
        middle = statistics.median(seconds)
        spread = 0.0
        if len(seconds) > 1 and middle > 0:
            low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
            spread = (high - low) / middle
        return cls(min(seconds), middle, spread, len(seconds))

    def fields(self) -> dict[str, object]:
        """The fields, for a row."""
        return {"minimum": self.minimum, "median": self.median, "spread": self.spread, "rounds": self.rounds}


def interleaved_seconds(
    contestants: Mapping[str, Callable[[], object]],
    seconds: float,
    most_rounds: int,
    fewer_rounds: Mapping[str, int] | None = None,
    clock: Callable[[], float] = time.perf_counter,
    measure: Callable[[Callable[[], object]], float] | None = None,
    turn_seconds: float = TURN,
    least_rounds: int = LEAST_ROUNDS,
) -> dict[str, list[float]]:
    """Give every contestant a turn per round, A B C A B C, so that a disturbance hits all of them.

    A turn is one call, or several in a row while they take less than ``turn_seconds`` together, all of them recorded:
    the first finds the caches full of the contestant before, the others find them as a layer in a model does.

    Args:
        contestants: What to time, by name. Each is run once before the clock starts, unless ``fewer_rounds`` names it
            (what is too slow for many rounds was run by its check).
        seconds: Stop after the round in which this much time has passed, but not before ``least_rounds``.
        most_rounds: Stop after this many rounds.
        fewer_rounds: A contestant named here drops out after so many rounds.
        clock: Seconds since some moment.
        measure: Runs a contestant once and returns its seconds; by ``clock`` if None.
        turn_seconds: A turn goes on while its calls are shorter together; with 0 it is one call.
        least_rounds: Number of rounds that ``seconds`` does not cut short.

    Returns:
        The seconds of every call, by contestant.
    """

    def by_clock(run: Callable[[], object]) -> float:
        start = clock()
        run()
        return clock() - start

    once = by_clock if measure is None else measure
    limits = fewer_rounds or {}
    for name, run in contestants.items():
        if name not in limits:
            run()
    times: dict[str, list[float]] = {name: [] for name in contestants}
    begin = clock()
    for index in range(most_rounds):
        for name, run in contestants.items():
            if index >= limits.get(name, most_rounds):
                continue
            turn = 0.0
            while True:
                turn += (elapsed := once(run))
                times[name].append(elapsed)
                if turn >= turn_seconds or elapsed <= 0:  # or a clock that stands still
                    break
        if clock() - begin > seconds and index >= least_rounds - 1:
            break
    return times


def interleave(
    contestants: Mapping[str, Callable[[], object]],
    seconds: float,
    most_rounds: int,
    fewer_rounds: Mapping[str, int] | None = None,
    clock: Callable[[], float] = time.perf_counter,
    measure: Callable[[Callable[[], object]], float] | None = None,
    turn_seconds: float = TURN,
    least_rounds: int = LEAST_ROUNDS,
) -> dict[str, Timing]:
    """Summarise what `interleaved_seconds` returns for the same arguments."""
    times = interleaved_seconds(
        contestants, seconds, most_rounds, fewer_rounds, clock, measure, turn_seconds, least_rounds
    )
    return {name: Timing.of(t) for name, t in times.items()}


def percentile(seconds: Sequence[float], percent: float) -> float:
    """Return the value below which ``percent`` of the seconds lie, interpolated between the two nearest.

    Args:
        seconds: At least one.
        percent: 0 to 100.
    """
    return float(np.percentile(seconds, percent))
