"""Timing that a noisy machine can bear: contestants interleaved in one process, compared as ratios."""

from __future__ import annotations

import json
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of one contestant over all rounds."""

    minimum: float
    median: float
    rounds: int


def interleave(contestants: Mapping[str, Callable[[], object]], seconds: float, most_rounds: int) -> dict[str, Timing]:
    """Run every contestant once per round, A B C A B C, so that a disturbance hits all of them.

    Args:
        contestants: What to time, by name. Each is run once before the clock starts.
        seconds: Stop after the round in which this much time has passed.
        most_rounds: Stop after this many rounds.
    """
    for run in contestants.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in contestants}
    begin = time.perf_counter()
    for _ in range(most_rounds):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
        if time.perf_counter() - begin > seconds:
            break
    return {name: Timing(min(t), statistics.median(t), len(t)) for name, t in times.items()}


def environment() -> dict[str, object]:
    """What a result depends on."""
    git = shutil.which("git")
    command = [git or "git", "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout if git else ""  # noqa: S603
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    cpu = [line for line in lines if line.startswith("model name")]
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit.strip() or None,
        "device": cpu[0].split(":", 1)[1].strip() if cpu else platform.machine(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }


def save(path: Path, rows: list[dict[str, object]]) -> None:
    """Write the rows and the environment as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")


def as_fields(timing: Timing) -> dict[str, object]:
    """The fields of a timing, for a row."""
    return asdict(timing)
