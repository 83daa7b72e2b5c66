"""The shortest time a GPU could need, from what an operator must move and compute.

Three limits, the largest counts: bytes (every tensor of the operator read or written once by each pass that needs it),
special functions (exp2, log2, reciprocal; 16 lanes of a multiprocessor per clock) and instructions (128 lanes). An
element-direction is one channel of one position on one route. What one needs:

* special functions: forward 2 + n (softplus: exp2 and log2; a decay for each state), backward one more (the
  derivative of softplus; the rest of the forward is computed again);
* instructions at n = 1: forward 20, backward 52, the figures of the design study (step sizes and channel sums on tensor
  cores); every further state adds 5 and 12, counted by hand from the recurrence and not from machine code.

Partial sums, halo reads and second passes of a real kernel are not in it: they are what a kernel may be blamed for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.cases import BACKWARD, CORE, ROUTES, SEQUENCE, Case
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


def work(case: Case, boundary: str, passes: str, dtype: torch.dtype) -> Work:
    """Count what a case needs at a boundary: activations of ``dtype``, parameters and output float32."""
    sequence = boundary == SEQUENCE
    routes, n = 1 if sequence else ROUTES, case.n
    elements = case.b * case.length * case.d
    directions = routes * elements
    instructions = FORWARD_INSTRUCTIONS + FORWARD_INSTRUCTIONS_PER_STATE * (n - 1)
    special = 2 + n
    if passes == BACKWARD:
        instructions += BACKWARD_INSTRUCTIONS + BACKWARD_INSTRUCTIONS_PER_STATE * (n - 1)
        special += 3 + n
    size = torch.empty(0, dtype=dtype).element_size()
    return Work(_bytes(case, boundary, passes == BACKWARD, size), special * directions, instructions * directions)


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
