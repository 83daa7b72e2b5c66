"""The dispatcher operator ``mmvmamba::causal_conv1d``: fake kernels, autograd, plain PyTorch fallback.

The compiled kernels are in ``csrc/cpu/causal_conv.cpp``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmvmamba.ops.causal_conv.reference import causal_conv1d_reference
from mmvmamba.ops.checks import LOW_PRECISION
from mmvmamba.ops.depthwise_conv.reference import ACTIVATIONS
from mmvmamba.ops.library import refuse_second_derivative, register_fallback

_Optional = Tensor | None


def _fallback_forward(x: Tensor, weight: Tensor, bias: _Optional, reverse: list[int], activation: int) -> Tensor:
    with torch.no_grad():
        return causal_conv1d_reference(x, weight, bias, reverse, activation)


def _fallback_backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, bias: _Optional, reverse: list[int], activation: int,
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
    wide = torch.float32 if x.device.type == "cpu" and x.dtype in LOW_PRECISION else x.dtype
    dz = grad_out.to(wide)
    if ACTIVATIONS[activation] == "silu":
        z = causal_conv1d_reference(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide), reverse, 0)
        dz = torch.ops.aten.silu_backward(dz, z)
    directions = [
        _direction_backward(dz[:, :, i], x.to(wide), weight[i].to(wide), bool(backwards))
        for i, backwards in enumerate(reverse)
    ]
    return (
        torch.stack([dx for dx, _ in directions]).sum(0).to(x.dtype) if need_x else x.new_empty(0),
        torch.stack([dweight for _, dweight in directions]).to(weight.dtype) if need_weight else x.new_empty(0),
        dz.sum((0, 1)).to(x.dtype) if needs[2] else x.new_empty(0),
    )


def _direction_backward(dz: Tensor, x: Tensor, weight: Tensor, backwards: bool) -> tuple[Tensor, Tensor]:
    """Gradients of x (b, l, d) and of the weights (d, width) of one direction."""
    d, width = weight.shape
    # Padded on both sides, of which the results of one are dropped by a gradient of zeros.
    drop = (width - 1, 0) if backwards else (0, width - 1)
    padded = torch.nn.functional.pad(dz.transpose(1, 2), drop)
    kernel = (weight.flip(-1) if backwards else weight)[:, None]
    dx, dweight, _ = torch.ops.aten.convolution_backward(
        padded, x.transpose(1, 2), kernel, [0], [1], [width - 1], [1], False, [0], d, [True, True, False]
    )
    dweight = dweight[:, 0]
    return dx.transpose(1, 2).contiguous(), dweight.flip(-1) if backwards else dweight


register_fallback("causal_conv1d", _fallback_forward)
register_fallback("causal_conv1d_backward", _fallback_backward)


@torch.library.register_fake("mmvmamba::causal_conv1d")
def _fake_forward(x: Tensor, weight: Tensor, bias: _Optional, reverse: list[int], activation: int) -> Tensor:
    b, length, d = x.shape
    return x.new_empty((b, length, weight.shape[0], d))


@torch.library.register_fake("mmvmamba::causal_conv1d_backward")
def _fake_backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, bias: _Optional, reverse: list[int], activation: int,
    need_x: bool, need_weight: bool, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        x.new_empty(x.shape if need_x else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
        weight.new_empty(0) if bias is None or not need_bias else bias.new_empty(bias.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.reverse, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
    x, weight, bias = ctx.saved_tensors
    needs = tuple(ctx.needs_input_grad[:3])
    grads = torch.ops.mmvmamba.causal_conv1d_backward(
        grad_out, x, weight, bias, ctx.reverse, ctx.activation, *needs
    )  # fmt: skip
    return (*(grad if needed else None for grad, needed in zip(grads, needs, strict=True)), None, None)


torch.library.register_autograd("mmvmamba::causal_conv1d", _backward, setup_context=_setup_context)
refuse_second_derivative("causal_conv1d")
