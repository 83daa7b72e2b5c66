"""Triton backend of the causal form: step sizes, buffers, launches. No host synchronisation anywhere.

Source of the algorithm: Dao and Gu, "Transformers are SSMs" (arXiv 2405.21060), section 6.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from mmvmamba.ops.ssd.causal.operator import _backward, _forward, carries_shape
from mmvmamba.ops.ssd.causal.triton_chunks import chunk_backward_kernel, chunk_forward_kernel
from mmvmamba.ops.ssd.heads import accumulation, sum_heads
from mmvmamba.ops.ssd.reference import CHUNK, log_decays, step_sizes

_Optional = Tensor | None

LARGEST_BLOCK = 64
"""States of a tile."""
CHANNELS = 16
"""Channels of a tile; with 32, and with longer chunks, the forward spills registers (scripts/check_triton.py)."""
POSITIONS = 16
"""Positions of a chunk; states are saved every `CHUNK` positions, as the compiled kernels do."""


def _tiles(n: int, p: int) -> dict[str, Any]:
    block_n = max(16, min(LARGEST_BLOCK, triton.next_power_of_2(n)))
    block_p = max(16, min(CHANNELS, triton.next_power_of_2(p)))
    return {"BLOCK_N": block_n, "BLOCK_P": block_p, "CHUNK": POSITIONS, "SAVED": CHUNK // POSITIONS}


def _sizes(x: Tensor, b_in: Tensor, tiles: dict[str, Any]) -> tuple[int, ...]:
    """Numbers a kernel takes: entries, length, heads, groups, n, p, tiles of n and p, chunks."""
    b, length, k, p = x.shape
    g, n = b_in.shape[2:]
    return (
        b, length, k, g, n, p, -(-n // tiles["BLOCK_N"]), -(-p // tiles["BLOCK_P"]), -(-length // POSITIONS),
    )  # fmt: skip


def _strided(value: Tensor) -> tuple[Any, ...]:
    return value, *value.stride()


def _rates(dt: Tensor, decay: Tensor, dt_bias: _Optional, dt_softplus: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Step sizes before and after softplus and logarithms of decays, contiguous (b, l, k)."""
    raw, step = step_sizes(dt, dt_bias, dt_softplus, torch.float32)
    return raw, step.contiguous(), log_decays(step, decay).contiguous()


def forward(
    x: Tensor, dt: Tensor, decay: Tensor, b_in: Tensor, c_out: Tensor, skip: _Optional, dt_bias: _Optional,
    initial_state: _Optional, dt_softplus: bool, blocked: bool, out_dtype: torch.dtype, save_carries: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Run the scan; see `mmvmamba.ops.ssd`.

    Returns:
        The output (b, l, k, p), the last state (b, k, n, p) and the states before every chunk (b, chunks, k, n, p),
        (0,) if not saved.
    """
    if x.numel() == 0:
        rest = (skip, dt_bias, initial_state, dt_softplus, blocked, out_dtype, save_carries)
        return _forward(x, dt, decay, b_in, c_out, *rest)
    tiles = _tiles(b_in.shape[3], x.shape[3])
    b, _, k, _, n, p, blocks_n, blocks_p, _ = sizes = _sizes(x, b_in, tiles)
    dtype = accumulation(x.dtype)
    last_state = x.new_empty((b, k, n, p), dtype=dtype)
    carries = x.new_empty(carries_shape(x, b_in, save_carries), dtype=dtype)
    _, step, rate = _rates(dt, decay, dt_bias, dt_softplus)
    parts = x.new_empty((blocks_n, *x.shape), dtype=out_dtype if blocks_n == 1 else torch.float32)
    chunk_forward_kernel[(b * k * blocks_n * blocks_p,)](
        *_strided(x), *_strided(b_in), *_strided(c_out), step, rate, step if skip is None else skip.contiguous(),
        step if initial_state is None else initial_state.contiguous(), parts, last_state, carries, *sizes,
        HAS_SKIP=skip is not None, HAS_START=initial_state is not None, SAVE=save_carries, BLOCKED=blocked,
        num_warps=4, **tiles,
    )  # fmt: skip
    return parts[0] if blocks_n == 1 else parts.sum(0).to(out_dtype), last_state, carries


def backward(
    grad_out: _Optional, grad_last_state: _Optional, x: Tensor, dt: Tensor, decay: Tensor, b_in: Tensor, c_out: Tensor,
    skip: _Optional, dt_bias: _Optional, initial_state: _Optional, dt_softplus: bool, blocked: bool, carries: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of x, dt, decay, b_in, c_out, skip, dt_bias and initial_state; (0,) for an absent one."""
    inputs = (x, dt, decay, b_in, c_out, skip, dt_bias, initial_state)
    if x.numel() == 0:
        return _backward(grad_out, grad_last_state, *inputs, dt_softplus, blocked, carries)
    tiles = _tiles(b_in.shape[3], x.shape[3])
    b, length, k, g, n, p, blocks_n, blocks_p, _ = sizes = _sizes(x, b_in, tiles)
    raw, step, rate = _rates(dt, decay, dt_bias, dt_softplus)
    dy = x.new_zeros(1).expand(x.shape) if grad_out is None else grad_out
    dx = x.new_empty((blocks_n, *x.shape), dtype=x.dtype if blocks_n == 1 else torch.float32)
    db, dc = (step.new_empty((blocks_p, b, length, k, n)) for _ in range(2))
    rows = step.new_empty((3, blocks_n * blocks_p, b, length, k))
    dstart = step.new_empty((b, k, n, p))
    chunk_backward_kernel[(b * k * blocks_n * blocks_p,)](
        *_strided(x), *_strided(b_in), *_strided(c_out), *_strided(dy), step, rate,
        step if skip is None else skip.contiguous(), step if grad_last_state is None else grad_last_state.contiguous(),
        carries, dx, db, dc, rows, dstart, *sizes,
        HAS_SKIP=skip is not None, HAS_LAST=grad_last_state is not None, BLOCKED=blocked, num_warps=4, **tiles,
    )  # fmt: skip
    drate, from_inputs, products = rows.sum(1)
    dstep = drate * decay + from_inputs
    ddt = torch.where(raw > 20, dstep, dstep * torch.sigmoid(raw)) if dt_softplus else dstep
    grads = (
        dx.sum(0) if blocks_n > 1 else dx[0], ddt, (drate * step).sum((0, 1)),
        sum_heads(db.sum(0), g, blocked), sum_heads(dc.sum(0), g, blocked), products.sum((0, 1)), ddt.sum((0, 1)),
        dstart,
    )  # fmt: skip
    return tuple(
        x.new_empty(0, dtype=accumulation(x.dtype)) if value is None else grad.to(value.dtype).contiguous()
        for grad, value in zip(grads, inputs, strict=True)
    )
