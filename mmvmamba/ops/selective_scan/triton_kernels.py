"""Triton backend of `selective_scan`: a group of channels is a route of `mmvmamba.ops.triton_scan`.

Source of the algorithm: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", algorithm 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmvmamba.ops.library import chunk_count
from mmvmamba.ops.triton_launch import Problem, Routes, scan_backward, scan_forward

_Optional = Tensor | None


def forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: _Optional, delta_bias: _Optional,
    delta_softplus: bool, out_dtype: torch.dtype, save_carries: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Scan sequences (b, d, l); see `mmvmamba.ops.selective_scan`.

    Returns:
        The output (b, d, l), the last state (b, d, n) and the carries (b, chunks, n, d), (0,) if not saved.
    """
    b, d, length = u.shape
    n, groups = A.shape[1], B.shape[1]
    out = torch.empty(u.shape, dtype=out_dtype, device=u.device)
    last_state = torch.zeros((b, d, n), dtype=torch.float32, device=u.device)
    by_route = last_state.new_empty((b, groups, chunk_count(length), n, d // groups)) if save_carries else None
    if out.numel() > 0:
        problem = _problem(u, delta, A, B, C, D, delta_bias, delta_softplus)
        scan_forward(problem, _routed(out, groups), by_route, last_state)
    if by_route is None:
        return out, last_state, last_state.new_empty(0)
    carries = by_route.permute(0, 2, 3, 1, 4).reshape(b, chunk_count(length), n, d)
    return out, last_state, carries.contiguous()


def backward(
    grad_out: Tensor, grad_last_state: _Optional, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: _Optional, delta_bias: _Optional, delta_softplus: bool, carries: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of u, delta, A, B, C, D and delta_bias; ``A.new_empty(0)`` for an absent one."""
    inputs = (u, delta, A, B, C, D, delta_bias)
    b, d, _ = u.shape
    n, groups = A.shape[1], B.shape[1]
    if u.numel() == 0:
        return tuple(A.new_empty(0) if v is None else v.new_zeros(v.shape) for v in inputs)
    problem = _problem(*inputs, delta_softplus)
    by_route = carries.view(b, -1, n, groups, d // groups).permute(0, 3, 1, 2, 4).contiguous()
    du, ddelta = (
        torch.empty(u.shape, dtype=u.dtype, device=u.device),
        torch.empty(delta.shape, dtype=delta.dtype, device=u.device),
    )
    last = None if grad_last_state is None else grad_last_state.float().contiguous()
    parts, params = scan_backward(
        problem, _routed(grad_out, groups), last, by_route, _routed(du, groups), _routed(ddelta, groups)
    )
    dB, dC = parts.transpose(2, 3).split([n, n], 2)
    dA, dD, dbias = params.split([n, 1, 1], 1)
    grads = (du, ddelta, dA.transpose(1, 2).reshape(d, n), dB, dC, dD.reshape(d), dbias.reshape(d))
    return tuple(
        A.new_empty(0) if value is None else grad.to(value.dtype).contiguous()
        for grad, value in zip(grads, inputs, strict=True)
    )


def _routed(value: Tensor, groups: int) -> Tensor:
    """View (b, d, l) as (b, groups, l, d / groups)."""
    return value.unflatten(1, (groups, value.shape[1] // groups)).transpose(2, 3)


def _problem(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: _Optional, delta_bias: _Optional,
    delta_softplus: bool,
) -> Problem:  # fmt: skip
    groups = B.shape[1]
    per_group = (groups, u.shape[1] // groups)
    length = u.shape[2]
    return Problem(
        x=_routed(u, groups),
        step=_routed(delta, groups),
        B=B.transpose(2, 3),
        C=C.transpose(2, 3),
        weight=None,
        bias=None if delta_bias is None else delta_bias.float().reshape(per_group).contiguous(),
        A=A.float().reshape(*per_group, A.shape[1]).transpose(1, 2).contiguous(),
        D=None if D is None else D.float().reshape(per_group).contiguous(),
        routes=Routes(0, 0, None, 1, length),
        length=length,
        softplus=delta_softplus,
    )
