"""The dispatcher operator ``mmvmamba::depthwise_conv2d``: fake kernels, autograd, plain PyTorch fallback.

The compiled kernels are in ``csrc/cpu/depthwise_conv.cpp``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmvmamba.errors import BackendError
from mmvmamba.ops.depthwise_conv.reference import depthwise_conv2d_reference
from mmvmamba.ops.library import register_fallback

_Optional = Tensor | None


def _fallback_forward(x: Tensor, weight: Tensor, bias: _Optional, activation: int) -> Tensor:
    with torch.no_grad():
        return depthwise_conv2d_reference(x, weight, bias, activation).contiguous()


def _fallback_backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, bias: _Optional, activation: int,
    need_x: bool, need_weight: bool, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Differentiate the reference, which is made of PyTorch's operators, by recording it again."""
    needs = (need_x, need_weight, need_bias and bias is not None)
    inputs = [
        None if value is None else value.detach().requires_grad_(needed)
        for value, needed in zip((x, weight, bias), needs, strict=True)
    ]
    wanted = [value for value, needed in zip(inputs, needs, strict=True) if value is not None and needed]
    with torch.enable_grad():
        out = depthwise_conv2d_reference(inputs[0], inputs[1], inputs[2], activation)  # type: ignore[arg-type]
        grads = iter(torch.autograd.grad(out, wanted, grad_out.to(out.dtype)) if wanted else ())
    dx, dweight, dbias = (next(grads).contiguous() if needed else x.new_empty(0) for needed in needs)
    return dx, dweight, dbias


register_fallback("depthwise_conv2d", _fallback_forward)
register_fallback("depthwise_conv2d_backward", _fallback_backward)


@torch.library.register_fake("mmvmamba::depthwise_conv2d")
def _fake_forward(x: Tensor, weight: Tensor, bias: _Optional, activation: int) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("mmvmamba::depthwise_conv2d_backward")
def _fake_backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, bias: _Optional, activation: int,
    need_x: bool, need_weight: bool, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        x.new_empty(x.shape if need_x else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
        weight.new_empty(0) if bias is None or not need_bias else bias.new_empty(bias.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
    x, weight, bias = ctx.saved_tensors
    needs = tuple(ctx.needs_input_grad[:3])
    grads = torch.ops.mmvmamba.depthwise_conv2d_backward(grad_out, x, weight, bias, ctx.activation, *needs)
    return (*(grad if needed else None for grad, needed in zip(grads, needs, strict=True)), None)


torch.library.register_autograd("mmvmamba::depthwise_conv2d", _backward, setup_context=_setup_context)


def _no_double_backward(ctx: Any, *grads: Any) -> None:
    raise BackendError(
        "mmvmamba::depthwise_conv2d has no second derivative; pass backend='reference', which can be differentiated "
        "any number of times"
    )


torch.library.register_autograd("mmvmamba::depthwise_conv2d_backward", _no_double_backward)
