"""The operator ``mmvmamba::ssd``: fake kernels, autograd, plain PyTorch fallback.

The compiled kernels are in ``csrc/cpu/ssd.cpp``, Triton's beside this file.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmvmamba.errors import OpInputError
from mmvmamba.ops.scan_operator import ScanParts, declare
from mmvmamba.ops.selective_scan.reference import full_precision
from mmvmamba.ops.ssd.heads import accumulation, per_head, sum_heads
from mmvmamba.ops.ssd.operator import _keep, _like, fake_like
from mmvmamba.ops.ssd.reference import (
    CHUNK,
    decays_within,
    into_chunks,
    log_decays,
    ssd_chunked_reference,
    step_sizes,
)

_Optional = Tensor | None


def carries_shape(x: Tensor, b_in: Tensor, save_carries: bool) -> tuple[int, ...]:
    """States before every chunk (b, chunks, k, n, p), or nothing."""
    b, length, k, p = x.shape
    return (b, (length + CHUNK - 1) // CHUNK, k, b_in.shape[3], p) if save_carries else (0,)


def _forward(
    x: Tensor, dt: Tensor, decay: Tensor, b_in: Tensor, c_out: Tensor, skip: _Optional, dt_bias: _Optional,
    initial_state: _Optional, dt_softplus: bool, blocked: bool, out_dtype: torch.dtype, save_carries: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Run the reference; the backward computes the states again, so none are saved."""
    out, last_state = ssd_chunked_reference(
        x, dt, decay, b_in, c_out, skip, dt_bias, initial_state, dt_softplus, blocked
    )
    carries = last_state.new_zeros(carries_shape(x, b_in, save_carries))
    # The reference may return its own input when there is nothing to add; an operator must not alias.
    return _like(out.to(out_dtype), out.to(out_dtype)), _like(last_state, last_state), carries


class _Chunks(NamedTuple):
    """What the gradients need, in chunks and by head."""

    inputs: Tensor  # (b, m, k, q, p), dt x
    B: Tensor  # (b, m, k, q, n)
    C: Tensor  # (b, m, k, q, n)
    within: Tensor  # (b, m, k, q, q), how much of position s is left at t
    from_start: Tensor  # (b, m, k, q, 1), of the state before the chunk
    to_end: Tensor  # (b, m, k, q, 1), how much is left after the chunk


def _chunks(step: Tensor, x: Tensor, decay: Tensor, b_in: Tensor, c_out: Tensor, blocked: bool) -> _Chunks:
    k = x.shape[2]
    rate = into_chunks(log_decays(step, decay), CHUNK).transpose(2, 3)
    B, C = (into_chunks(per_head(value.to(step.dtype), k, blocked), CHUNK).transpose(2, 3) for value in (b_in, c_out))
    within = decays_within(rate)
    inputs = into_chunks(x.to(step.dtype) * step.unsqueeze(-1), CHUNK).transpose(2, 3)
    return _Chunks(inputs, B, C, within, rate.cumsum(-1).exp().unsqueeze(-1), within[..., -1, :].unsqueeze(-1))


def _states(chunks: _Chunks, initial_state: _Optional) -> Tensor:
    """States before every chunk (b, m, k, n, p)."""
    added = (chunks.B * chunks.to_end).mT @ chunks.inputs
    state = torch.zeros_like(added[:, 0]) if initial_state is None else initial_state.to(added.dtype)
    before = []
    for keep, more in zip(chunks.from_start[..., -1:, :].unbind(1), added.unbind(1), strict=True):
        before.append(state)
        state = keep * state + more
    return torch.stack(before, 1)


def _adjoints(chunks: _Chunks, dy: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the states after every chunk (b, m, k, n, p), and of the one before the first."""
    read = (chunks.C * chunks.from_start).mT @ dy
    after = []
    for keep, more in zip(chunks.from_start[..., -1:, :].flip(1).unbind(1), read.flip(1).unbind(1), strict=True):
        after.append(last)
        last = keep * last + more
    return torch.stack(after[::-1], 1), last


def gradients_of_scan(
    grad_out: _Optional, grad_last_state: _Optional, x: Tensor, dt: Tensor, decay: Tensor, b_in: Tensor, c_out: Tensor,
    skip: _Optional, dt_bias: _Optional, initial_state: _Optional, dt_softplus: bool, blocked: bool,
) -> tuple[_Optional, ...]:  # fmt: skip
    """Gradients of x, dt, decay, b_in, c_out, skip, dt_bias and initial_state by hand, where nothing is recorded.

    The gradient of the logarithm of a decay is the sum of what passes its position: products of gradients and values
    on either side of it. Those are added up as they are; the shorter way, from differences of sums over all positions,
    cancels where decays are strong.
    """
    b, length, k, p = x.shape
    groups, n = b_in.shape[2:]
    raw, step = step_sizes(dt, dt_bias, dt_softplus, accumulation(x.dtype))
    chunks = _chunks(step, x, decay, b_in, c_out, blocked)
    gradient = torch.zeros_like(x, dtype=step.dtype) if grad_out is None else grad_out.to(step.dtype)
    dy = into_chunks(gradient, CHUNK).transpose(2, 3)
    last = step.new_zeros(b, k, n, p) if grad_last_state is None else grad_last_state.to(step.dtype)
    before = _states(chunks, initial_state)
    after, dinitial = _adjoints(chunks, dy, last)

    scores = (chunks.C @ chunks.B.mT) * chunks.within
    dscores = (dy @ chunks.inputs.mT) * chunks.within
    read, written = dy @ before.mT * chunks.from_start, chunks.inputs @ after.mT * chunks.to_end  # (b, m, k, q, n)
    dinputs = scores.mT @ dy + chunks.to_end * (chunks.B @ after)
    dC, dB = dscores @ chunks.B + read, dscores.mT @ chunks.C + written
    # What passes u: pairs s < u <= t; states read at t >= u; states written at s < u; the state passed through.
    pairs = dscores * (chunks.C @ chunks.B.mT)
    ahead = pairs.cumsum(-1) - pairs  # [t, u]: the sum over s < u
    drate = ahead.tril().sum(-2) + _sum_from(chunks.C, read) + _sum_before(chunks.B, written)
    drate = drate + ((after * before).sum((-2, -1)) * chunks.from_start[..., -1, 0]).unsqueeze(-1)

    def rows(value: Tensor) -> Tensor:
        """(b, m, k, q, ...) -> (b, l, k, ...)."""
        turned = value.transpose(2, 3)
        return turned.reshape(b, turned.shape[1] * turned.shape[2], *turned.shape[3:])[:, :length]

    drate, dinputs = rows(drate), rows(dinputs)
    dstep = drate * decay + (dinputs * x.to(step.dtype)).sum(-1)
    ddt = torch.where(raw > 20, dstep, dstep * torch.sigmoid(raw)) if dt_softplus else dstep
    dx = dinputs * step.unsqueeze(-1)
    if skip is not None:
        dx = dx + skip.unsqueeze(-1) * gradient
    return (
        dx, ddt, (drate * step).sum((0, 1)), sum_heads(rows(dB), groups, blocked), sum_heads(rows(dC), groups, blocked),
        None if skip is None else (gradient * x.to(step.dtype)).sum((0, 1, 3)),
        None if dt_bias is None else ddt.sum((0, 1)),
        None if initial_state is None else dinitial,
    )  # fmt: skip


def _sum_from(projection: Tensor, gradient: Tensor) -> Tensor:
    """For every position u the sum over t >= u of the products of rows: (..., q, n) -> (..., q)."""
    return (projection * gradient).sum(-1).flip(-1).cumsum(-1).flip(-1)


def _sum_before(projection: Tensor, gradient: Tensor) -> Tensor:
    """For every position u the sum over s < u of the products of rows: (..., q, n) -> (..., q)."""
    passed = (projection * gradient).sum(-1).cumsum(-1)
    return torch.nn.functional.pad(passed[..., :-1], (1, 0))


def _backward(
    grad_out: _Optional, grad_last_state: _Optional, x: Tensor, dt: Tensor, decay: Tensor, b_in: Tensor, c_out: Tensor,
    skip: _Optional, dt_bias: _Optional, initial_state: _Optional, dt_softplus: bool, blocked: bool, carries: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    inputs = (x, dt, decay, b_in, c_out, skip, dt_bias, initial_state)
    if x.shape[0] * x.shape[1] == 0:  # no chunk to stack
        grads: tuple[_Optional, ...] = tuple(None if v is None else torch.zeros_like(v) for v in inputs)
        if initial_state is not None and grad_last_state is not None:
            grads = (*grads[:-1], grad_last_state)
    else:
        with full_precision(x.device):
            grads = gradients_of_scan(grad_out, grad_last_state, *inputs, dt_softplus, blocked)
    nothing = decay.new_empty(0)
    return tuple(_like(nothing if grad is None else grad, v) for grad, v in zip(grads, inputs, strict=True))


def _fake_forward(
    x: Tensor, dt: Tensor, decay: Tensor, b_in: Tensor, c_out: Tensor, skip: _Optional, dt_bias: _Optional,
    initial_state: _Optional, dt_softplus: bool, blocked: bool, out_dtype: torch.dtype, save_carries: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    b, _, k, p = x.shape
    return (
        x.new_empty(x.shape, dtype=out_dtype),
        decay.new_empty((b, k, b_in.shape[3], p)),
        decay.new_empty(carries_shape(x, b_in, save_carries)),
    )


def _fake_backward(
    grad_out: _Optional, grad_last_state: _Optional, x: Tensor, dt: Tensor, decay: Tensor, b_in: Tensor, c_out: Tensor,
    skip: _Optional, dt_bias: _Optional, initial_state: _Optional, dt_softplus: bool, blocked: bool, carries: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    return tuple(fake_like(x, v) for v in (x, dt, decay, b_in, c_out, skip, dt_bias, initial_state))


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.dt_softplus, ctx.blocked, _out_dtype, save_carries = inputs
    if not save_carries:
        raise OpInputError("mmvmamba::ssd was called with save_carries=False on inputs that require grad")
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[2])


def _autograd(
    operator: Any, ctx: Any, grad_out: _Optional, grad_last_state: _Optional, _grad_carries: None
) -> tuple[Any, ...]:
    *tensors, carries = ctx.saved_tensors
    grads = operator(grad_out, grad_last_state, *tensors, ctx.dt_softplus, ctx.blocked, carries)
    return (*_keep(ctx, grads, tuple(tensors)), None, None, None, None)


declare(
    "ssd",
    ScanParts(
        forward=_forward,
        backward=_backward,
        fake_forward=_fake_forward,
        fake_backward=_fake_backward,
        setup_context=_context,
        autograd=_autograd,
        gradients=2,
        streams=(0, 3, 4),  # not the step sizes: they are few, and errors of theirs grow with the length
        package="ssd.causal",
        plain_is_good=True,
    ),
)
