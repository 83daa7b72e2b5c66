"""Timing that a noisy machine can bear: contestants interleaved in one process, checked first, compared as ratios."""

from __future__ import annotations

import json
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

from mmvmamba.ops.extension import HAS_EXTENSION
from mmvmamba.testing import relative_error
from mmvmamba.version import __version__

GEMM_SIDE = 512
"""Side of the square float32 matrix product that runs in every round as the yardstick of the machine."""
GEMM = "GEMM"
TURN = 0.01
"""Seconds of one turn of a contestant that is faster."""
_LEAST_ROUNDS = 3

_DISTRIBUTIONS = {
    "mmengine": ("onedl-mmengine", "mmengine"),
    "mmcv": ("onedl-mmcv", "mmcv"),
    "mmdet": ("onedl-mmdetection", "mmdet"),
    "mmseg": ("onedl-mmsegmentation", "mmsegmentation"),
    "mmpretrain": ("onedl-mmpretrain", "mmpretrain"),
}
"""Module: the distributions it comes from."""


class DisagreementError(RuntimeError):
    """A contestant does not compute what it is timed for."""


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


def interleave(
    contestants: Mapping[str, Callable[[], object]],
    seconds: float,
    most_rounds: int,
    fewer_rounds: Mapping[str, int] | None = None,
    clock: Callable[[], float] = time.perf_counter,
    measure: Callable[[Callable[[], object]], float] | None = None,
    turn_seconds: float = TURN,
    least_rounds: int = _LEAST_ROUNDS,
) -> dict[str, Timing]:
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
    return {name: Timing.of(t) for name, t in times.items()}


def check(
    contestant: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor], bounds: Mapping[str, float]
) -> None:
    """Compare what a contestant computed with the reference.

    Args:
        contestant: Its name.
        found: Its tensors by name.
        expected: The reference's, in float64, of the same names.
        bounds: Largest error of each, relative to the largest value.

    Raises:
        DisagreementError: One differs by more, has another shape, or is missing.
    """
    for name, wanted in expected.items():
        if name not in found:
            raise DisagreementError(f"{contestant}: returned no {name!r}, expected one of shape {tuple(wanted.shape)}")
        if found[name].shape != wanted.shape:
            shapes = f"shape {tuple(found[name].shape)}, expected {tuple(wanted.shape)}"
            raise DisagreementError(f"{contestant}: {name} has {shapes}")
        error = relative_error(found[name], wanted)
        if not error <= bounds[name]:
            raise DisagreementError(
                f"{contestant}: {name} differs from the reference by {error:.2e} of its largest value, expected at "
                f"most {bounds[name]:.0e}; it is not timed. Run tests/test_ops first."
            )


def gemm() -> Callable[[], object]:
    """Return the yardstick: one float32 matrix product of `GEMM_SIDE`."""
    square = torch.randn(GEMM_SIDE, GEMM_SIDE)
    return lambda: square @ square


def instruction_set() -> str | None:
    """The instruction set our compiled kernels run on; None where they are not loaded."""
    return str(torch.ops.mmvmamba.cpu_capability()) if HAS_EXTENSION else None


def cpu_facts() -> dict[str, str]:
    """The first processor of ``/proc/cpuinfo``; empty where there is none."""
    cpuinfo = Path("/proc/cpuinfo")
    first = cpuinfo.read_text().split("\n\n", 1)[0] if cpuinfo.is_file() else ""
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def _version(distributions: Sequence[str]) -> str | None:
    for distribution in distributions:
        try:
            return f"{distribution} {metadata.version(distribution)}"
        except metadata.PackageNotFoundError:
            continue
    return None


def environment() -> dict[str, object]:
    """What a result depends on."""
    git = shutil.which("git")
    command = [git or "git", "describe", "--always", "--dirty"]
    root = Path(__file__).parent
    commit = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root).stdout if git else ""  # noqa: S603
    facts = cpu_facts()
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit.strip() or None,
        "device": facts.get("model name", platform.machine()),
        "cpu": {key: facts[key] for key in ("vendor_id", "cpu family", "model") if key in facts},
        "mmvmamba": __version__,
        "instruction_set": instruction_set(),
        "torch": torch.__version__,
        "torch_instruction_set": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "versions": {module: _version(names) for module, names in _DISTRIBUTIONS.items()},
        "threads": torch.get_num_threads(),
    }


def save(
    path: Path,
    benchmark: str,
    rows: Sequence[Mapping[str, object]],
    notes: Sequence[str] = (),
    device: Mapping[str, object] | None = None,
) -> None:
    """Write the rows, what was left out and why, and the environment as JSON.

    Args:
        path: The file; missing folders are made.
        benchmark: Name of the benchmark, for ``python -m benchmarks.table``.
        rows: One per measured figure.
        notes: What was skipped and why.
        device: What the result depends on besides `environment`, such as the GPU.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = environment() | dict(device or {})
    content = {"benchmark": benchmark, "environment": facts, "notes": list(notes), "rows": list(rows)}
    path.write_text(json.dumps(content, indent=1) + "\n")


class Notes:
    """What is left out: printed as it happens, once, and kept for the JSON file."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def skip(self, what: str, reason: str) -> None:
        """Say that ``what`` is skipped."""
        line = f"skipped: {what}: {reason}"
        if line not in self.lines:
            self.lines.append(line)
            print(line, flush=True)
