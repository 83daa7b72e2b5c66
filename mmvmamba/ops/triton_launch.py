"""Host side of the Triton kernels: launch plan, buffers, launches. No host synchronisation anywhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from mmvmamba.ops.library import CHUNK, chunk_count
from mmvmamba.ops.triton_scan import carry_kernel, forward_kernel, merge_kernel
from mmvmamba.ops.triton_scan_backward import adjoint_kernel, backward_kernel
from mmvmamba.ops.triton_tile import tile_forward_kernel
from mmvmamba.ops.triton_tile_backward import tile_backward_kernel

TARGET_PROGRAMS = 2048
"""Programs of one warp that we expect to keep a large GPU busy (16 on each of 128 processors); not measured yet."""
SHORTEST_SEGMENT = 64
"""Positions below which cutting a route costs more than it gains."""
LARGEST_CODED = 31
"""Named orders that fit into one int64, two bits each; more are given as a permutation."""


TILE = CHUNK // 2
"""Positions of a tile; the kernels of the gradients go back half a chunk at a time."""
LARGEST_RANK = {False: 48, True: 24}
"""Features per step size up to which tiles are used, forward and backward: they keep all weights in registers."""


@dataclass(frozen=True)
class Plan:
    """How one scan is cut into programs; a function of shapes alone, so results are repeatable."""

    block_d: int
    blocks: int
    segments: int
    segment_length: int


def uses_tiles(n: int, rank: int, backward: bool) -> bool:
    """Whether the kernels for tiles of positions times channels run: one state, and step sizes made of features."""
    return n == 1 and 0 < rank <= LARGEST_RANK[backward]


def channels_per_program(d: int, n: int, rank: int, backward: bool = False) -> int:
    """One channel per lane, in the forward two: there that spills no registers (scripts/check_triton.py)."""
    if not uses_tiles(n, rank, backward):
        return 32
    if d <= 16:
        return 16
    return 64 if d > 32 and not backward else 32


def plan(chains: int, d: int, length: int, n: int = 1, rank: int = 0, backward: bool = False) -> Plan:
    """Cut a scan into blocks of channels and segments of positions.

    Args:
        chains: Batch entries times routes.
        d: Channels of a route.
        length: Positions of a route, at least 1.
        n: States of a channel.
        rank: Features per step size, 0 where the step sizes are given.
        backward: Whether it is cut for the gradients.
    """
    block_d = channels_per_program(d, n, rank, backward)
    blocks = -(-d // block_d)
    programs = max(1, chains * blocks)
    wanted = 1
    if 2 * programs < TARGET_PROGRAMS:  # above, the additional pass over the inputs costs more than it gains
        wanted = max(1, min(-(-TARGET_PROGRAMS // programs), length // SHORTEST_SEGMENT))
    segment_length = CHUNK * chunk_count(-(-length // wanted))
    return Plan(block_d, blocks, -(-length // segment_length), segment_length)


@dataclass(frozen=True)
class Routes:
    """How position t of a route becomes a pixel: codes of named orders, a list of pixels, or t itself."""

    kind: int
    codes: int
    pixels: Tensor | None
    h: int
    w: int


@dataclass(frozen=True)
class Problem:
    """A scan as the kernels see it: tensors (b, k, p, c) of any strides; parameters contiguous float32, A (k, n, d).

    ``step`` holds features of rank r where ``weight`` (k, r, d) is given, else the step sizes themselves. With a weight
    the channels of x are contiguous, and ``step``, ``B`` and ``C`` follow each other in contiguous rows.
    """

    x: Tensor
    step: Tensor
    B: Tensor
    C: Tensor
    weight: Tensor | None
    bias: Tensor | None
    A: Tensor
    D: Tensor | None
    routes: Routes
    length: int
    softplus: bool

    @property
    def rank(self) -> int:
        """Features per step size, 0 where the step sizes are given."""
        return 0 if self.weight is None else self.weight.shape[1]

    def constants(self) -> dict[str, Any]:
        """The compile-time choices that all kernels share."""
        return {
            "ROUTE": self.routes.kind,
            "SOFTPLUS": self.softplus,
            "HAS_BIAS": self.bias is not None,
            "RANK": triton.next_power_of_2(self.rank) if self.rank else 0,
            "BLOCK_N": triton.next_power_of_2(max(1, self.A.shape[1])),
            "num_warps": 1,
        }


def _tile_constants(problem: Problem, cut: Plan, maps: list[Tensor]) -> dict[str, Any]:
    """The compile-time choices of the kernels for tiles; ``maps`` are (b, k, p, c) with contiguous channels."""
    routes, d = problem.routes, problem.x.shape[3]
    strides = [stride for value in maps for stride in value.stride()[:3]]
    last = max(value.stride(2) for value in (*maps, problem.step)) * maps[0].shape[2] + d
    return {
        "ROUTE": routes.kind,
        "SHORT": min(routes.h, routes.w) < TILE,
        "SOFTPLUS": problem.softplus,
        "HAS_BIAS": problem.bias is not None,
        "HAS_D": problem.D is not None,
        "RANK": problem.rank,
        "TILE": TILE,
        "BLOCK_D": cut.block_d,
        # Two neighbouring channels per lane, if every row starts at an even offset
        "PAIR": 2 if cut.block_d == 64 and all(stride % 2 == 0 for stride in strides) else 1,
        "WIDE": last >= 2**31,
        "FULL": d % cut.block_d == 0,
        "num_warps": 1,
    }


def _map(value: Tensor) -> tuple[Any, ...]:
    """A map and its strides without that of the channels, which is 1."""
    return value, *value.stride()[:3]


def _with_strides(value: Tensor) -> tuple[Any, ...]:
    return value, *value.stride()


def _parameters(problem: Problem) -> tuple[Tensor, ...]:
    """Weight, bias, A; A stands in for what is absent and never read."""
    A = problem.A
    return (
        A if problem.weight is None else problem.weight,
        A if problem.bias is None else problem.bias,
        A,
    )


def _carry(starts: Tensor, sums: Tensor, init: Tensor | None, reverse: bool, interleave: Tensor) -> None:
    chains, segments, n, d = starts.shape
    block = 128
    carry_kernel[(chains * -(-n * d // block),)](
        starts, sums, interleave if init is None else init, d, n, n * d, segments,
        REVERSE=reverse, HAS_INIT=init is not None, BLOCK=block, num_warps=4,
    )  # fmt: skip


def scan_forward(problem: Problem, y: Tensor, carries: Tensor | None, last_state: Tensor | None) -> None:
    """Run the scan.

    Args:
        problem: What to scan; nothing in it is empty.
        y: Receives the outputs (b, k, places, d): a place is a pixel, or a position where routes are lists.
        carries: Receives the states (b, k, chunks, n, d) before every chunk, or None.
        last_state: Receives the last state (b, k d, n), or None.
    """
    x, A, routes = problem.x, problem.A, problem.routes
    b, k, _, d = x.shape
    n = A.shape[1]
    cut = plan(b * k, d, problem.length, n, problem.rank)
    starts = A.new_empty((b * k, cut.segments, n, d)) if cut.segments > 1 else A
    sums = torch.empty_like(starts) if cut.segments > 1 else A
    weight, bias, _ = _parameters(problem)

    def launch_rows(aggregate: bool) -> None:
        forward_kernel[(b * k * cut.blocks * cut.segments,)](
            *_with_strides(x), *_with_strides(problem.step), *_with_strides(problem.B), *_with_strides(problem.C),
            weight, bias, A, A if problem.D is None else problem.D, A if routes.pixels is None else routes.pixels,
            *_with_strides(y), A if carries is None else carries, starts, sums, A if last_state is None else last_state,
            routes.codes, k, d, n, problem.rank, problem.length, routes.h, routes.w, chunk_count(problem.length),
            cut.blocks, cut.segments, cut.segment_length,
            HAS_D=problem.D is not None, AGGREGATE=aggregate, SEGMENTED=cut.segments > 1,
            SAVE=carries is not None and not aggregate, HAS_LAST=last_state is not None, BLOCK_D=cut.block_d,
            **problem.constants(),
        )  # fmt: skip

    def launch_tiles(aggregate: bool) -> None:
        tile_forward_kernel[(b * k * cut.blocks * cut.segments,)](
            *_map(x), *_map(problem.step), weight, bias, A, A if problem.D is None else problem.D,
            A if routes.pixels is None else routes.pixels, *_map(y), A if carries is None else carries, starts, sums,
            routes.codes, k, d, problem.length, routes.h, routes.w, chunk_count(problem.length),
            cut.blocks, cut.segments, cut.segment_length, AGGREGATE=aggregate, SEGMENTED=cut.segments > 1,
            SAVE=carries is not None and not aggregate, **_tile_constants(problem, cut, [x, y]),
        )  # fmt: skip

    launch = launch_tiles if uses_tiles(n, problem.rank, False) else launch_rows
    if cut.segments > 1:
        launch(True)
        _carry(starts, sums, None, False, A)
    launch(False)


def scan_backward(
    problem: Problem,
    grad_out: Tensor,
    grad_last_state: Tensor | None,
    carries: Tensor,
    dx: Tensor,
    dstep: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Run the gradients of the scan.

    Args:
        problem: As given to `scan_forward`.
        grad_out: (b, k, p, d), read by pixel.
        grad_last_state: (b, k d, n) float32 contiguous, or None.
        carries: As saved by `scan_forward`.
        dx: Receives the gradients of x (b, k, places, d).
        dstep: Receives those of the step sizes (b, k, places, d) where there is no weight.

    Returns:
        Gradients of features, B and C, (b, k, places, r + 2 n), and of the parameters, (k, n + 2 + r, d) with rows
        of A, D, bias and weight; both float32.
    """
    x, A, routes = problem.x, problem.A, problem.routes
    b, k, _, d = x.shape
    n, r = A.shape[1], problem.rank
    cut = plan(b * k, d, problem.length, n, r, True)
    constants = problem.constants()
    places = dx.shape[2]
    programs = b * k * cut.blocks * cut.segments
    parts = A.new_empty((cut.blocks, b, k, places, r + 2 * n))
    params = A.new_empty((b, cut.segments, k, n + 2 + r, d))
    weight, bias, _ = _parameters(problem)
    pixels = A if routes.pixels is None else routes.pixels
    starts = A
    if cut.segments > 1:
        starts = A.new_empty((b * k, cut.segments, n, d))
        sums = torch.empty_like(starts)
        adjoint_kernel[(programs,)](
            *_with_strides(grad_out), *_with_strides(problem.step), *_with_strides(problem.C), weight, bias, A, pixels,
            starts, sums, routes.codes, k, d, n, r, problem.length, routes.h, routes.w, cut.blocks, cut.segments,
            cut.segment_length, BLOCK_D=cut.block_d, **constants,
        )  # fmt: skip
        _carry(starts, sums, grad_last_state, True, A)
    elif grad_last_state is not None:
        starts = grad_last_state.view(b * k, d, n).transpose(1, 2).contiguous()
    if uses_tiles(n, r, True):
        tile_backward_kernel[(programs,)](
            *_map(x), *_map(problem.step), *_map(grad_out), weight, bias, A, A if problem.D is None else problem.D,
            pixels, *_map(dx), parts, params, carries, starts,
            routes.codes, k, d, problem.length, places, routes.h, routes.w, chunk_count(problem.length),
            cut.blocks, cut.segments, cut.segment_length, b, HAS_START=cut.segments > 1,
            PADDED=max(8, constants["RANK"]), **_tile_constants(problem, cut, [x, grad_out, dx]),
        )  # fmt: skip
        return parts.sum(0), params.sum((0, 1))
    scratch = A.new_empty((programs, CHUNK, constants["BLOCK_N"], cut.block_d))
    backward_kernel[(programs,)](
        *_with_strides(x), *_with_strides(problem.step), *_with_strides(problem.B), *_with_strides(problem.C),
        *_with_strides(grad_out), weight, bias, A, A if problem.D is None else problem.D, pixels,
        *_with_strides(dx), *_with_strides(dx if dstep is None else dstep), parts, params, carries, starts, scratch,
        routes.codes, k, d, n, r, problem.length, places, routes.h, routes.w, chunk_count(problem.length),
        cut.blocks, cut.segments, cut.segment_length, b,
        HAS_D=problem.D is not None, HAS_START=cut.segments > 1 or grad_last_state is not None, BLOCK_D=cut.block_d,
        **constants,
    )  # fmt: skip
    return parts.sum(0), params.sum((0, 1))


def merge_visits(visits: Tensor, routes: Routes, groups: int, out: Tensor) -> None:
    """Sum the visits of every pixel in the order of routes, then positions.

    Args:
        visits: (b, k, l, c) float32 contiguous.
        routes: Given as lists of pixels.
        groups: 1 to sum over routes, k to keep them apart.
        out: Receives (b, pixels, groups, c), contiguous.
    """
    if routes.pixels is None:
        raise ValueError("merge_visits: routes have no list of pixels; expected one. Sum over routes instead.")
    b, k, length, c = visits.shape
    pixels = routes.h * routes.w
    in_order, visit = torch.sort(routes.pixels, dim=1, stable=True)
    edges = torch.arange(pixels + 1, device=visits.device).expand(k, -1).contiguous()
    first = torch.searchsorted(in_order, edges)
    block = min(128, triton.next_power_of_2(c))
    blocks = -(-c // block)
    merge_kernel[(b * pixels * groups * blocks,)](
        visits, visit, first, out, pixels, length, k, c, groups, blocks, BLOCK=block, num_warps=1
    )
