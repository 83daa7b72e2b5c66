"""Peak memory of one step by measurement: a fresh process builds the case, runs it once, and reads its high-water mark.

``python -m benchmarks.memory MODULE FUNCTION JSON`` is that process: ``MODULE.FUNCTION(**JSON)`` builds the case and
returns the step. Where ``/proc`` allows it, the mark is reset just before the step and read from ``VmHWM``: it is the
counter behind ``ru_maxrss``, without two of its faults. ``ru_maxrss`` of a new process starts at the size of the
process that started it, and it cannot forget a peak of the building that was above what the step needs.
"""

from __future__ import annotations

import gc
import importlib
import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mmvmamba.analysis.memory import reset_mark, return_freed_memory, status_bytes

MARK = "peak-memory:"


@dataclass(frozen=True)
class Peak:
    """Bytes of resident memory: just before the step, at its highest, and how the latter was read."""

    before: int
    peak: int
    method: str

    @property
    def step(self) -> int:
        """What the step added."""
        return self.peak - self.before


def run_here(module: str, function: str, arguments: dict[str, object]) -> Peak:
    """Build a case in this process, run its step once, read the peak."""
    step = getattr(importlib.import_module(module), function)(**arguments)
    gc.collect()
    return_freed_memory()
    if reset_mark():
        before = status_bytes("VmRSS")
        step()
        return Peak(before, status_bytes("VmHWM"), "VmHWM")
    before = _ru_maxrss()
    step()
    return Peak(before, _ru_maxrss(), "ru_maxrss")


def _ru_maxrss() -> int:
    kilobytes_or_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes_or_bytes if sys.platform == "darwin" else kilobytes_or_bytes * 1024


def allocate(mebibytes: int, built: int = 0) -> Callable[[], object]:
    """A case of known need, to show that the measurement is right: bytes are written, so they become resident.

    Args:
        mebibytes: What the step allocates.
        built: What building it allocates and frees.
    """
    unit = 1 << 20
    bytearray(b"1") * (built * unit)
    return lambda: bytearray(b"1") * (mebibytes * unit)


def measure(module: str, function: str, arguments: dict[str, object], repeats: int = 1) -> Peak:
    """Run a case in fresh processes; the one with the median step is returned.

    Args:
        module: Where the function is, such as ``benchmarks.backbones``.
        function: Called with ``arguments``; returns the step to run, which takes nothing.
        arguments: Must survive JSON.
        repeats: Number of processes, one after the other.

    Raises:
        RuntimeError: A process failed; its error is in the message.
    """
    command = [sys.executable, "-m", "benchmarks.memory", module, function, json.dumps(arguments)]
    peaks = []
    for _ in range(repeats):
        root = Path(__file__).parents[1]
        result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)  # noqa: S603
        lines = [line for line in result.stdout.splitlines() if line.startswith(MARK)]
        if result.returncode != 0 or not lines:
            raise RuntimeError(
                f"measuring the memory of {module}.{function}({arguments}) ended with {result.returncode}, expected 0. "
                f"Run the command by hand: {' '.join(command)}\n{result.stderr[-2000:]}"
            )
        peaks.append(Peak(**json.loads(lines[-1][len(MARK) :])))
    middle = statistics.median_low([peak.step for peak in peaks])
    return next(peak for peak in peaks if peak.step == middle)


def main(arguments: list[str] | None = None) -> int:
    """Measure in this process and print one marked line of JSON."""
    values = sys.argv[1:] if arguments is None else arguments
    if len(values) != 3:
        print(f"found {len(values)} arguments, expected MODULE FUNCTION JSON. See --help of what calls this.")
        return 2
    peak = run_here(values[0], values[1], json.loads(values[2]))
    print(MARK + json.dumps({"before": peak.before, "peak": peak.peak, "method": peak.method}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
