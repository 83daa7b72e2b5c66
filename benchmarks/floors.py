"""The shortest time a GPU could need, from what an operator must move and compute.

Three limits, the largest counts: bytes (every tensor of the operator read or written once by each pass that needs it),
special functions (exp2, log2, reciprocal; 16 lanes of a multiprocessor per clock) and instructions (128 lanes). An
element-direction is one channel of one position on one route. What one needs:

* special functions: forward 2 + n (softplus: exp2 and log2; a decay for each state), backward one more (the
  derivative of softplus; the rest of the forward is computed again);
* instructions at n = 1: forward 20, backward 52, the figures of the design study (step sizes and channel sums on tensor
  cores); every further state adds 5 and 12, counted by hand from the recurrence and not from machine code.

Partial sums, halo reads and second passes of a real kernel are not in it: they are what a kernel may be blamed for.

``python -m benchmarks.floors`` prints the floors of the shapes of `benchmarks.cases` for rates given on the command
line, by default those of an H200; no GPU is needed. With ``--instructions FORWARD BACKWARD`` the issue limit is that of
kernels that need so many, such as those that scripts/check_cuda.py counts in ours.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.cases import BACKWARD, CORE, DTYPES, PASSES, ROUTES, SEQUENCE, Case, choose_cases
from mmvmamba.ops.library import chunk_count

SPECIAL_LANES, ISSUE_LANES = 16, 128
FORWARD_INSTRUCTIONS, BACKWARD_INSTRUCTIONS = 20, 52
FORWARD_INSTRUCTIONS_PER_STATE, BACKWARD_INSTRUCTIONS_PER_STATE = 5, 12
_FLOAT = 4
"""Bytes of the output, of its gradient, of parameters and of saved states: all float32 at the boundaries timed."""


@dataclass(frozen=True)
class Rates:
    """What a GPU can do in a second."""

    bytes_per_second: float
    multiprocessors: int
    clock: float

    @property
    def special(self) -> float:
        """Special functions per second."""
        return self.multiprocessors * SPECIAL_LANES * self.clock

    @property
    def issue(self) -> float:
        """Instructions of one lane per second."""
        return self.multiprocessors * ISSUE_LANES * self.clock


@dataclass(frozen=True)
class Work:
    """What one call must do: bytes to move, special functions, instructions (of one lane each)."""

    bytes: int
    special: int
    instructions: int

    def floor(self, rates: Rates) -> tuple[float, str]:
        """Return the seconds of the floor and which limit it is."""
        limits = {
            "HBM": self.bytes / rates.bytes_per_second,
            "special": self.special / rates.special,
            "issue": self.instructions / rates.issue,
        }
        which = max(limits, key=lambda name: limits[name])
        return limits[which], which


def work(
    case: Case,
    boundary: str,
    passes: str,
    dtype: torch.dtype,
    base: tuple[float, float] = (FORWARD_INSTRUCTIONS, BACKWARD_INSTRUCTIONS),
) -> Work:
    """Count what a case needs at a boundary: activations of ``dtype``, parameters and output float32.

    Args:
        case: The shape.
        boundary: What is timed.
        passes: Forward alone or both.
        dtype: Of the activations.
        base: Instructions per element-direction with one state, forward and backward.
    """
    sequence = boundary == SEQUENCE
    routes, n = 1 if sequence else ROUTES, case.n
    elements = case.b * case.length * case.d
    directions = routes * elements
    instructions = base[0] + FORWARD_INSTRUCTIONS_PER_STATE * (n - 1)
    special = 2 + n
    if passes == BACKWARD:
        instructions += base[1] + BACKWARD_INSTRUCTIONS_PER_STATE * (n - 1)
        special += 3 + n
    size = torch.empty(0, dtype=dtype).element_size()
    moved = _bytes(case, boundary, passes == BACKWARD, size)
    return Work(moved, special * directions, round(instructions * directions))


def _bytes(case: Case, boundary: str, backward: bool, size: int) -> int:
    """Count bytes; ``size`` is that of an activation."""
    n, sequence = case.n, boundary == SEQUENCE
    routes = 1 if sequence else ROUTES
    map_bytes = case.b * case.length * case.d * size
    out_bytes = case.b * case.length * case.d * _FLOAT
    if sequence:
        streams = 2 * map_bytes + 2 * case.b * case.length * n * size  # u, delta; B, C
        parameters = case.d * (n + 2) * _FLOAT
    else:
        projections = case.b * case.length * routes * (case.r + 2 * n) * size
        streams = map_bytes + projections
        parameters = routes * case.d * (case.r + n + 2) * _FLOAT
    total = streams + parameters + out_bytes
    if backward:
        carries = case.b * routes * chunk_count(case.length) * n * case.d * _FLOAT
        total += carries  # written by the forward
        total += carries + out_bytes + streams + parameters  # read by the backward
        total += streams + parameters  # its gradients
    if boundary == CORE:
        weight = routes * (case.r + 2 * n) * case.d * _FLOAT
        total += map_bytes + projections + weight
        if backward:
            # The gradient of the map is added to that of the scan; the gradient of the weight reads both factors.
            total += 3 * map_bytes + 2 * projections + 2 * weight
    return total


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the floors in milliseconds; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bandwidth", type=float, default=4.3e12, help="bytes per second, read and written")
    parser.add_argument("--multiprocessors", type=int, default=132)
    parser.add_argument("--clock", type=float, default=1.98e9, help="Hz")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--boundary", choices=("scan", "core"), default="core")
    parser.add_argument("--shapes", nargs="+", metavar="NAME", default=["224", "512", "800x1216"])
    parser.add_argument("--instructions", nargs=2, type=float, metavar=("FORWARD", "BACKWARD"),
                        default=(FORWARD_INSTRUCTIONS, BACKWARD_INSTRUCTIONS))  # fmt: skip
    options = parser.parse_args(arguments)
    try:
        cases = choose_cases(options.shapes, "cuda")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    rates = Rates(options.bandwidth, options.multiprocessors, options.clock)
    print(f"{'case':20} {'pass':16} {'HBM ms':>8} {'special':>8} {'issue':>8} {'floor':>8}  limit")
    groups: dict[tuple[str, str], list[float]] = {}
    for passes in PASSES:
        for case in cases:
            boundary = options.boundary if options.boundary in case.boundaries else case.boundaries[0]
            needed = work(case, boundary, passes, DTYPES[options.dtype], tuple(options.instructions))
            limits = [needed.bytes / rates.bytes_per_second, needed.special / rates.special,
                      needed.instructions / rates.issue, needed.floor(rates)[0]]  # fmt: skip
            print(_line(case.name, passes, limits), needed.floor(rates)[1])
            if case.blocks:
                total = groups.setdefault((case.group, passes), [0.0] * len(limits))
                groups[case.group, passes] = [t + case.blocks * part for t, part in zip(total, limits, strict=True)]
    for (group, passes), limits in groups.items():
        print(_line(f"VMamba-T at {group}", passes, limits), "sum of its blocks")
    return 0


def _line(name: str, passes: str, seconds: Sequence[float]) -> str:
    return f"{name:20} {passes:16} " + " ".join(f"{1e3 * value:8.3f}" for value in seconds) + " "


if __name__ == "__main__":
    sys.exit(main())
