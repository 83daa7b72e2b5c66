"""Timing that a noisy machine can bear: contestants interleaved in one process, checked first, compared as ratios."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mmvmamba.analysis.environment import cpu_facts, instruction_set
from mmvmamba.analysis.environment import environment as versions_and_processor
from mmvmamba.analysis.timing import TURN, Timing, interleave
from mmvmamba.testing import relative_error

__all__ = [
    "GEMM",
    "GEMM_SIDE",
    "TURN",
    "DisagreementError",
    "Notes",
    "Timing",
    "check",
    "cpu_facts",
    "environment",
    "gemm",
    "instruction_set",
    "interleave",
    "save",
]

GEMM_SIDE = 512
"""Side of the square float32 matrix product that runs in every round as the yardstick of the machine."""
GEMM = "GEMM"


class DisagreementError(RuntimeError):
    """A contestant does not compute what it is timed for."""


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


def environment() -> dict[str, object]:
    """What a result depends on."""
    git = shutil.which("git")
    command = [git or "git", "describe", "--always", "--dirty"]
    root = Path(__file__).parent
    commit = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root).stdout if git else ""  # noqa: S603
    return {"commit": commit.strip() or None} | versions_and_processor()


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
