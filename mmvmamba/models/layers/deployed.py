"""How folded convolutions run on a CPU: activation and residual in the operators, nothing else on the way to them.

Small networks spend a good part of their time between operators. A folded layer (``conv_bn.py``) has weights that
nothing writes to, in the order in memory that its operator reads, which at few pixels saves oneDNN most of its time
(16 pixels, 1504 to 448 channels, one thread: 0.13 ms instead of 0.48 ms).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmvmamba.models.layers.observers import is_unobserved
from mmvmamba.models.layers.onednn import serves_float32
from mmvmamba.models.layers.pointwise import PointwiseConv2d
from mmvmamba.ops.backends import choose_backend

# Multiplications below which F.linear is as fast, see ``onednn.py``.
_MIN_WORK = 2**20
_HAS_CONV = hasattr(torch.ops.mkldnn, "_convolution_pointwise")


def runs_directly(x: Tensor, *layers: nn.Module) -> bool:
    """Return whether the functions below may take a map ``x`` through folded ``layers`` (the modules and theirs).

    In eager mode, in float32, on a CPU, without gradients, and where nobody watches the modules.
    """
    return (
        not torch.is_grad_enabled()
        and serves_float32(x)
        and x.numel() > 0
        and all(layer.weight.dtype is torch.float32 for layer in layers if isinstance(layer, nn.Conv2d))
        and is_unobserved(*layers)
    )


def in_operator_order(conv: nn.Conv2d) -> None:
    """Lay the weight of a convolution out in memory as its operator reads it; its values and shape stay."""
    weight = conv.weight.detach()
    if type(conv) is PointwiseConv2d:
        ordered = weight.flatten(1).t().contiguous().t().view(weight.shape)
    elif conv.groups == 1:
        ordered = weight.contiguous(memory_format=torch.channels_last)
    else:
        return
    conv.weight = nn.Parameter(ordered, requires_grad=False)


def multiply_rows(rows: Tensor, conv: nn.Conv2d, relu: bool = False, residual: Tensor | None = None) -> Tensor:
    """Return what a 1x1 convolution makes of pixels ``rows`` (m, c), with a ReLU or plus a ``residual`` (m, c')."""
    weight = conv.weight.flatten(1)
    if len(rows) * weight.numel() < _MIN_WORK:
        out = torch.nn.functional.linear(rows, weight, conv.bias)
        if relu:
            return out.relu_()
        return out if residual is None else out.add_(residual)
    if residual is not None:
        return torch.ops.mkldnn._linear_pointwise.binary(rows, residual, weight, conv.bias, "add")
    return torch.ops.mkldnn._linear_pointwise.default(rows, weight, conv.bias, "relu" if relu else "none", [], "")


def convolve(x: Tensor, conv: nn.Conv2d, relu: bool = False) -> Tensor:
    """Return what a convolution makes of a map ``x`` (b, h, w, c), with a ReLU if asked for; (b, h', w', c')."""
    if type(conv) is PointwiseConv2d:
        b, h, w, c = x.shape
        return multiply_rows(x.reshape(-1, c), conv, relu).view(b, h, w, -1)
    if conv.groups == x.shape[-1] and conv.stride == (1, 1) and choose_backend(None, "cpu").name == "compiled":
        out: Tensor = torch.ops.mmvmamba.depthwise_conv2d.default(x, conv.weight, conv.bias, 0)
        return out.relu_() if relu else out
    image = x.permute(0, 3, 1, 2)
    if not _HAS_CONV:
        out = conv._conv_forward(image, conv.weight, conv.bias).permute(0, 2, 3, 1)
        return out.relu_() if relu else out
    out = torch.ops.mkldnn._convolution_pointwise.default(
        image, conv.weight, conv.bias, conv.padding, conv.stride, conv.dilation, conv.groups,
        "relu" if relu else "none", [], "",
    )  # fmt: skip
    return out.permute(0, 2, 3, 1)
