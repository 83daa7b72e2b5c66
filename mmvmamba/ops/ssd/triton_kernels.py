"""Triton backend of the non-causal form: plans, buffers and launches. No host synchronisation anywhere.

Functions take the arguments of the operators' schemas (`mmvmamba.ops.library`). Results depend on shapes alone: partial
sums are added up in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from mmvmamba.envs import triton_interpreted
from mmvmamba.ops.ssd.heads import accumulation
from mmvmamba.ops.ssd.triton_products import (
    input_gradient_kernel,
    projection_gradient_kernel,
    read_kernel,
    state_kernel,
)

_Optional = Tensor | None

LARGEST_BLOCK = 64
"""Positions, states or channels of a tile."""
SUMMED = 32
"""The same along the axis that a kernel walks; 64 spilled registers on sm_80 (scripts/check_triton.py)."""
LONGEST_SEGMENT = 16
"""Tiles that one program adds up; longer sequences are cut, which makes programs and costs a small sum."""


def block(size: int, largest: int = LARGEST_BLOCK) -> int:
    """Extent of a tile: a power of two from 16, the least a product takes."""
    return max(16, min(largest, triton.next_power_of_2(size)))


def _ceil(size: int, part: int) -> int:
    return -(-size // part)


def _tiles(length: int, n: int, p: int, summed: str) -> dict[str, Any]:
    """Extents of the tiles; ``summed`` is the axis among l, n and p that a kernel walks in steps of `SUMMED`."""
    sizes = {"l": length, "n": n, "p": p}
    blocks = {
        f"BLOCK_{axis.upper()}": block(size, SUMMED if axis == summed else LARGEST_BLOCK)
        for axis, size in sizes.items()
    }
    return {**blocks, "num_warps": 4}


def _strided(value: Tensor) -> tuple[Any, ...]:
    return value, *value.stride()


def _weight(x: Tensor, weight: _Optional) -> tuple[Any, ...]:
    """A weight and its strides; x stands in for one that is absent and never read."""
    return (x, 0, 0, 0) if weight is None else _strided(weight)


def _exact(x: Tensor, weight: _Optional, projection: Tensor) -> bool:
    """Whether every product is one of two 16-bit values; Triton's interpreter has none for bfloat16."""
    if weight is not None or x.dtype != projection.dtype:
        return False
    return x.dtype == torch.float16 or (x.dtype == torch.bfloat16 and not triton_interpreted())


def _empty(x: Tensor) -> bool:
    return x.numel() == 0


def _sum_of_products(x: Tensor, weight: _Optional, b_in: Tensor, blocked: bool, dtype: torch.dtype) -> Tensor:
    """The sum over positions (b, k, n, p)."""
    b, length, k, p = x.shape
    g, n = b_in.shape[2:]
    if _empty(x):
        return x.new_zeros((b, k, n, p), dtype=dtype)
    tiles = _tiles(length, n, p, "l")
    blocks = _ceil(length, tiles["BLOCK_L"])
    steps = min(LONGEST_SEGMENT, triton.next_power_of_2(blocks))
    segments, blocks_n, blocks_p = _ceil(blocks, steps), _ceil(n, tiles["BLOCK_N"]), _ceil(p, tiles["BLOCK_P"])
    parts = x.new_empty((segments, b, k, n, p), dtype=dtype if segments == 1 else torch.float32)
    state_kernel[(b * segments * blocks_n * blocks_p * k,)](
        *_strided(x), *_weight(x, weight), *_strided(b_in), parts, b, length, k, g, n, p, blocks_n, blocks_p, segments,
        WEIGHTED=weight is not None, BLOCKED=blocked, EXACT=_exact(x, weight, b_in), STEPS=steps, **tiles,
    )  # fmt: skip
    return parts[0] if segments == 1 else parts.sum(0).to(dtype)


def _read(state: Tensor, c_out: Tensor, x: _Optional, skip: _Optional, blocked: bool, out_dtype: torch.dtype) -> Tensor:
    b, k, n, p = state.shape
    length, g = c_out.shape[1:3]
    out = state.new_empty((b, length, k, p), dtype=out_dtype)
    if _empty(out):
        return out
    tiles = _tiles(length, n, p, "n")
    blocks_l, blocks_p = _ceil(length, tiles["BLOCK_L"]), _ceil(p, tiles["BLOCK_P"])
    skipped = state if x is None else x
    read_kernel[(b * blocks_l * blocks_p * k,)](
        *_strided(c_out), *_strided(state), *_strided(skipped), state if skip is None else skip.contiguous(), out,
        length, k, g, n, p, blocks_l, blocks_p,
        HAS_SKIP=skip is not None, BLOCKED=blocked, STEPS_N=_ceil(n, tiles["BLOCK_N"]), **tiles,
    )  # fmt: skip
    return out


def _projection_gradient(rows: Tensor, weight: _Optional, state: Tensor, projection: Tensor, blocked: bool) -> Tensor:
    """Gradient of a projection (b, l, g, n) whose product with the rows (b, l, k, p) made a state, or read one."""
    b, length, k, p = rows.shape
    g, n = projection.shape[2:]
    out = torch.empty_like(projection, memory_format=torch.contiguous_format)
    if _empty(rows):
        return out.zero_()
    tiles = _tiles(length, n, p, "p")
    blocks_l, blocks_n = _ceil(length, tiles["BLOCK_L"]), _ceil(n, tiles["BLOCK_N"])
    projection_gradient_kernel[(b * blocks_l * blocks_n * g,)](
        *_strided(rows), *_weight(rows, weight), *_strided(state), out, length, k, g, n, p, blocks_l, blocks_n,
        WEIGHTED=weight is not None, BLOCKED=blocked, HEADS=k // g, STEPS_P=_ceil(p, tiles["BLOCK_P"]), **tiles,
    )  # fmt: skip
    return out


def _input_gradient(
    grad_state: Tensor, grad_out: _Optional, x: Tensor, weight: _Optional, b_in: Tensor, skip: _Optional, blocked: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and skip; (0,) for an absent one."""
    b, length, k, p = x.shape
    g, n = b_in.shape[2:]
    absent = x.new_empty(0, dtype=accumulation(x.dtype))
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dweight = absent if weight is None else torch.empty_like(weight, memory_format=torch.contiguous_format)
    if _empty(x):
        return dx, dweight.zero_(), absent if skip is None else torch.zeros_like(skip)
    tiles = _tiles(length, n, p, "n")
    blocks_l = _ceil(length, tiles["BLOCK_L"])
    parts = x.new_empty((b, blocks_l, k) if skip is not None else (0,), dtype=torch.float32)
    dy = x if grad_out is None else grad_out
    input_gradient_kernel[(b * blocks_l * k,)](
        *_strided(b_in), *_strided(grad_state), *_strided(x), *_weight(x, weight), *_strided(dy),
        x if skip is None else skip.contiguous(), dx, dweight, parts, length, k, g, n, p, blocks_l,
        WEIGHTED=weight is not None, HAS_SKIP=skip is not None, BLOCKED=blocked,
        STEPS_N=_ceil(n, tiles["BLOCK_N"]), STEPS_P=_ceil(p, tiles["BLOCK_P"]), **tiles,
    )  # fmt: skip
    return dx, dweight, absent if skip is None else parts.sum((0, 1)).to(skip.dtype)


def state_forward(x: Tensor, weight: _Optional, b_in: Tensor, blocked: bool) -> Tensor:
    """Sum over positions; see `mmvmamba.ops.ssd_state`."""
    return _sum_of_products(x, weight, b_in, blocked, accumulation(x.dtype))


def state_backward(
    grad_state: Tensor, x: Tensor, weight: _Optional, b_in: Tensor, blocked: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and b_in; (0,) for an absent weight."""
    dx, dweight, _ = _input_gradient(grad_state, None, x, weight, b_in, None, blocked)
    return dx, dweight, _projection_gradient(x, weight, grad_state, b_in, blocked)


def read_forward(state: Tensor, c_out: Tensor, blocked: bool, out_dtype: torch.dtype) -> Tensor:
    """Read a state at every position; see `mmvmamba.ops.ssd_read`."""
    return _read(state, c_out, None, None, blocked, out_dtype)


def read_backward(grad_out: Tensor, state: Tensor, c_out: Tensor, blocked: bool) -> tuple[Tensor, Tensor]:
    """Gradients of state and c_out."""
    dstate = _sum_of_products(grad_out, None, c_out, blocked, state.dtype)
    return dstate, _projection_gradient(grad_out, None, state, c_out, blocked)


def non_causal_forward(
    x: Tensor, weight: _Optional, b_in: Tensor, c_out: Tensor, skip: _Optional, blocked: bool, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Output (b, l, k, p) and state (b, k, n, p); see `mmvmamba.ops.ssd_non_causal`."""
    state = state_forward(x, weight, b_in, blocked)
    return _read(state, c_out, x, skip, blocked, out_dtype), state


def non_causal_backward(
    grad_out: Tensor, x: Tensor, weight: _Optional, b_in: Tensor, c_out: Tensor, skip: _Optional, blocked: bool,
    state: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of x, weight, b_in, c_out and skip; (0,) for an absent one."""
    dstate = _sum_of_products(grad_out, None, c_out, blocked, state.dtype)
    dx, dweight, dskip = _input_gradient(dstate, grad_out, x, weight, b_in, skip, blocked)
    db = _projection_gradient(x, weight, dstate, b_in, blocked)
    return dx, dweight, db, _projection_gradient(grad_out, None, state, c_out, blocked), dskip
