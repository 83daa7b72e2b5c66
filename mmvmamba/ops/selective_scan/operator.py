"""The operators ``mmvmamba::selective_scan`` and its Triton twin: fake kernels, autograd, plain PyTorch fallback.

The compiled kernels are in ``csrc/cpu/selective_scan.cpp`` and ``csrc/cuda``, Triton's beside this file.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmvmamba.errors import OpInputError
from mmvmamba.ops.library import chunk_count
from mmvmamba.ops.scan_operator import ScanParts, declare
from mmvmamba.ops.selective_scan.reference import selective_scan_backward_reference, selective_scan_reference

_Optional = Tensor | None


def _fallback_forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: _Optional, delta_bias: _Optional,
    delta_softplus: bool, out_dtype: torch.dtype, save_carries: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Run the reference without recording it; the backward computes it again, so no states are saved."""
    with torch.no_grad():
        out, last_state = selective_scan_reference(u, delta, A, B, C, D, delta_bias, delta_softplus)
    carries = out.new_zeros(_carries_shape(u, A, save_carries))
    # The reference may return its own input when there is nothing to add; an operator must not alias.
    return out.to(out_dtype).clone(), last_state.clone(), carries


def _fallback_backward(
    grad_out: Tensor, grad_last_state: _Optional, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: _Optional, delta_bias: _Optional, delta_softplus: bool, carries: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Run the hand-written gradients of the reference."""
    inputs = (u, delta, A, B, C, D, delta_bias)
    grads = selective_scan_backward_reference(grad_out, grad_last_state, *inputs, delta_softplus)
    return tuple(
        A.new_empty(0) if grad is None or value is None else grad.to(value.dtype).contiguous()
        for grad, value in zip(grads, inputs, strict=True)
    )


def _carries_shape(u: Tensor, A: Tensor, save_carries: bool) -> tuple[int, ...]:
    """(b, chunks, n, d), or nothing."""
    return (u.shape[0], chunk_count(u.shape[2]), A.shape[1], u.shape[1]) if save_carries else (0,)


def _fake_forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: _Optional, delta_bias: _Optional,
    delta_softplus: bool, out_dtype: torch.dtype, save_carries: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    b, d, _ = u.shape
    return (
        u.new_empty(u.shape, dtype=out_dtype),
        A.new_empty(b, d, A.shape[1]),
        A.new_empty(_carries_shape(u, A, save_carries)),
    )


def _fake_backward(
    grad_out: Tensor, grad_last_state: _Optional, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: _Optional, delta_bias: _Optional, delta_softplus: bool, carries: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    inputs = (u, delta, A, B, C, D, delta_bias)
    return tuple(A.new_empty(0) if value is None else value.new_empty(value.shape) for value in inputs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, delta_softplus, _out_dtype, save_carries = inputs
    if not save_carries:
        raise OpInputError("mmvmamba::selective_scan was called with save_carries=False on inputs that require grad")
    ctx.delta_softplus = delta_softplus
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[2])


def _backward(
    operator: Any, ctx: Any, grad_out: _Optional, grad_last_state: _Optional, _grad_carries: None
) -> tuple[Any, ...]:
    *tensors, carries = ctx.saved_tensors
    u = tensors[0]
    if grad_out is None:
        grad_out = u.new_zeros(u.shape, dtype=carries.dtype)
    grads = operator(grad_out, grad_last_state, *tensors, ctx.delta_softplus, carries)
    wanted = (
        grad if needed and tensor is not None else None
        for grad, needed, tensor in zip(grads, ctx.needs_input_grad[:7], tensors, strict=True)
    )
    return (*wanted, None, None, None)


declare(
    "selective_scan",
    ScanParts(
        forward=_fallback_forward,
        backward=_fallback_backward,
        fake_forward=_fake_forward,
        fake_backward=_fake_backward,
        setup_context=_setup_context,
        autograd=_backward,
        gradients=2,
        streams=(0, 1, 3, 4),
    ),
)
