"""The dispatcher operator ``mmvmamba::depthwise_conv2d``: fake kernels, autograd, plain PyTorch fallback.

The compiled kernels are in ``csrc/cpu/depthwise_conv.cpp``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmvmamba.ops.checks import LOW_PRECISION
from mmvmamba.ops.depthwise_conv.reference import ACTIVATIONS, depthwise_conv2d_reference
from mmvmamba.ops.library import refuse_second_derivative, register_fallback

_Optional = Tensor | None


def _fallback_forward(x: Tensor, weight: Tensor, bias: _Optional, activation: int) -> Tensor:
    with torch.no_grad():
        return depthwise_conv2d_reference(x, weight, bias, activation).contiguous()


def _fallback_backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, bias: _Optional, activation: int,
    need_x: bool, need_weight: bool, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Call PyTorch's own backward operators: below the dispatcher's autograd nothing can be recorded."""
    needs = (need_x, need_weight, need_bias and bias is not None)
    inputs = (x, weight, bias)
    if x.numel() == 0:
        zeros = [
            v.new_zeros(v.shape) if v is not None and n else x.new_empty(0) for v, n in zip(inputs, needs, strict=True)
        ]
        return zeros[0], zeros[1], zeros[2]
    d, _, kh, kw = weight.shape
    wide = torch.float32 if x.device.type == "cpu" and x.dtype in LOW_PRECISION else x.dtype
    dz = grad_out.to(wide).permute(0, 3, 1, 2)
    image, kernel = x.to(wide).permute(0, 3, 1, 2), weight.to(wide)
    if ACTIVATIONS[activation] == "silu":
        z = depthwise_conv2d_reference(x.to(wide), kernel, None if bias is None else bias.to(wide), 0)
        dz = torch.ops.aten.silu_backward(dz, z.permute(0, 3, 1, 2))
    grads = torch.ops.aten.convolution_backward(
        dz, image, kernel, [d], [1, 1], [kh // 2, kw // 2], [1, 1], False, [0, 0], d, list(needs)
    )
    channels_last = (None if grads[0] is None else grads[0].permute(0, 2, 3, 1), grads[1], grads[2])
    dx, dweight, dbias = (
        x.new_empty(0) if grad is None or not needed else grad.to(x.dtype).contiguous()
        for grad, needed in zip(channels_last, needs, strict=True)
    )
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
refuse_second_derivative("depthwise_conv2d")
