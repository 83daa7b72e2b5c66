"""The operators ``mmvmamba::scan2d`` and its Triton twin: fake kernels, autograd, plain PyTorch fallback.

The compiled kernels are in ``csrc/cpu/scan2d.cpp`` and ``csrc/cuda``, Triton's beside this file.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmvmamba.errors import OpInputError
from mmvmamba.ops.library import chunk_count
from mmvmamba.ops.scan2d.orders import ScanOrder, order_to_permutation
from mmvmamba.ops.scan2d.reference import scan2d_backward_reference, scan2d_reference
from mmvmamba.ops.scan_operator import ScanParts, declare

_Optional = Tensor | None


def routes_as_permutation(x: Tensor, orders: list[int], permutation: _Optional) -> Tensor:
    """Return the pixels every route visits (k, l), int64, whichever way they were given."""
    if permutation is not None:
        return permutation
    h, w = x.shape[1:3]
    return torch.stack([order_to_permutation(ScanOrder(order), h, w, x.device) for order in orders])


def _fallback_forward(
    x: Tensor, projections: Tensor, dt_weight: Tensor, dt_bias: _Optional, A: Tensor, D: _Optional,
    orders: list[int], permutation: _Optional, delta_softplus: bool, out_dtype: torch.dtype, save_carries: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run the reference without recording it; the backward computes it again, so no states are saved."""
    pixels = routes_as_permutation(x, orders, permutation)
    with torch.no_grad():
        out = scan2d_reference(x, projections, dt_weight, dt_bias, A, D, pixels, delta_softplus)
    return out.to(out_dtype), out.new_zeros(_carries_shape(x, A, permutation, save_carries))


def _fallback_backward(
    grad_out: Tensor, x: Tensor, projections: Tensor, dt_weight: Tensor, dt_bias: _Optional, A: Tensor, D: _Optional,
    orders: list[int], permutation: _Optional, delta_softplus: bool, carries: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Run the hand-written gradients of the reference."""
    inputs = (x, projections, dt_weight, dt_bias, A, D)
    pixels = routes_as_permutation(x, orders, permutation)
    grads = scan2d_backward_reference(grad_out, *inputs, pixels, delta_softplus)
    return tuple(
        A.new_empty(0) if grad is None or value is None else grad.to(value.dtype).contiguous()
        for grad, value in zip(grads, inputs, strict=True)
    )


def _carries_shape(x: Tensor, A: Tensor, permutation: _Optional, save_carries: bool) -> tuple[int, ...]:
    """(b, k, chunks, n, d), or nothing."""
    if not save_carries:
        return (0,)
    b, h, w = x.shape[:3]
    length = h * w if permutation is None else permutation.shape[1]
    return (b, A.shape[0], chunk_count(length), A.shape[2], A.shape[1])


def _fake_forward(
    x: Tensor, projections: Tensor, dt_weight: Tensor, dt_bias: _Optional, A: Tensor, D: _Optional,
    orders: list[int], permutation: _Optional, delta_softplus: bool, out_dtype: torch.dtype, save_carries: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    carries = A.new_empty(_carries_shape(x, A, permutation, save_carries))
    return x.new_empty((*x.shape[:3], x.shape[-1]), dtype=out_dtype), carries


def _fake_backward(
    grad_out: Tensor, x: Tensor, projections: Tensor, dt_weight: Tensor, dt_bias: _Optional, A: Tensor, D: _Optional,
    orders: list[int], permutation: _Optional, delta_softplus: bool, carries: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    inputs = (x, projections, dt_weight, dt_bias, A, D)
    return tuple(A.new_empty(0) if value is None else value.new_empty(value.shape) for value in inputs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, orders, permutation, delta_softplus, _out_dtype, save_carries = inputs
    if not save_carries:
        raise OpInputError("mmvmamba::scan2d was called with save_carries=False on inputs that require grad")
    ctx.orders, ctx.delta_softplus = orders, delta_softplus
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, permutation, output[1])


def _backward(operator: Any, ctx: Any, grad_out: Tensor, _grad_carries: Tensor) -> tuple[Any, ...]:
    *tensors, permutation, carries = ctx.saved_tensors
    grads = operator(grad_out, *tensors, ctx.orders, permutation, ctx.delta_softplus, carries)
    wanted = (
        grad if needed and tensor is not None else None
        for grad, needed, tensor in zip(grads, ctx.needs_input_grad[:6], tensors, strict=True)
    )
    return (*wanted, None, None, None, None, None)


declare(
    "scan2d",
    ScanParts(
        forward=_fallback_forward,
        backward=_fallback_backward,
        fake_forward=_fake_forward,
        fake_backward=_fake_backward,
        setup_context=_setup_context,
        autograd=_backward,
        gradients=1,
        streams=(0, 1),
    ),
)
