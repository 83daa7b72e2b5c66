"""The depthwise convolution in PyTorch's own operators: the specification."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmvmamba.ops.checks import LOW_PRECISION

ACTIVATIONS = ("none", "silu")
"""What may follow the convolution; the position in this tuple is the code of the dispatcher operator and of
``csrc/cpu/depthwise_conv.cpp``."""


def depthwise_conv2d_reference(x: Tensor, weight: Tensor, bias: Tensor | None, activation: int) -> Tensor:
    """Convolve every channel of a map with a kernel of its own, stride 1, and apply the activation.

    Args:
        x: Map (b, h, w, d).
        weight: Kernels (d, 1, kh, kw) with odd sides; half of a side, rounded down, is the zero padding.
        bias: Added to every pixel (d), or None.
        activation: Position in `ACTIVATIONS`.

    Returns:
        The map (b, h, w, d) in the dtype of ``x``. On a CPU the computation is float32 for float16 and bfloat16, since
        PyTorch's CPU kernels add up gradients in those; its GPU kernels do not.
    """
    if x.device.type == "cpu" and x.dtype in LOW_PRECISION:
        with torch.autocast("cpu", enabled=False):  # it would cast back
            out = depthwise_conv2d_reference(
                x.float(), weight.float(), None if bias is None else bias.float(), activation
            )
        return out.to(x.dtype)
    d, _, kh, kw = weight.shape
    if x.numel() == 0:
        # PyTorch refuses maps without rows, columns or channels; the products connect the output with its inputs.
        nothing = x * weight.sum()
        return nothing if bias is None else nothing + bias
    out = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=(kh // 2, kw // 2), groups=d)
    if ACTIVATIONS[activation] == "silu":
        out = F.silu(out)
    return out.permute(0, 2, 3, 1)
