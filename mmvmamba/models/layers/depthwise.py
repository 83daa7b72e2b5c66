"""Depthwise convolutions of channels-last maps, by our operator where that is faster."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from mmvmamba.models.layers.conv import ChannelsLastConv2d
from mmvmamba.models.layers.observers import is_unobserved
from mmvmamba.models.layers.onednn import is_traced
from mmvmamba.ops import depthwise_conv2d
from mmvmamba.ops.backends import choose_backend


def convolve_depthwise(conv: nn.Module, x: Tensor, act: nn.Module | None = None) -> Tensor:
    """Return ``act(conv(x))`` for a map ``x`` (b, h, w, d), which may be some channels of a wider map.

    On a CPU with the compiled extension a depthwise convolution that pads by half its kernel is one operator, with a
    SiLU that follows it. A larger stride leaves out pixels of its result, which still is several times as fast as
    PyTorch's kernel (7x7 with stride 2, 56x56x192, one thread: 0.51 ms instead of 2.1 ms).

    Args:
        conv: The convolution; any module that maps (b, h, w, d).
        x: The map.
        act: What follows, or None for nothing.

    Returns:
        (b, h', w', d), where h' is ceil(h / stride) with the padding above.
    """
    if can_fuse_depthwise(conv, x, act):
        if _is_checked(conv, x):
            # What the function would check is known here; on small maps that takes longer than the convolution.
            y = torch.ops.mmvmamba.depthwise_conv2d.default(x, conv.weight, conv.bias, 0 if act is None else 1)
        else:
            y = depthwise_conv2d(x, conv.weight, conv.bias, activation="none" if act is None else "silu")
        rows, columns = conv.stride
        return y if rows == columns == 1 else y[:, ::rows, ::columns].contiguous()
    y = conv(x)
    return y if act is None else act(y)


def can_fuse_depthwise(conv: nn.Module, x: Tensor, act: nn.Module | None = None) -> TypeGuard[ChannelsLastConv2d]:
    """Return whether `convolve_depthwise` is one operator for ``x``: on a CPU, where its kernel is compiled.

    A trace keeps PyTorch's operators, which compilers and other runtimes know.
    """
    return (
        type(conv) is ChannelsLastConv2d
        and conv.groups == conv.in_channels == conv.out_channels
        and conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
        and all(side % 2 == 1 for side in conv.kernel_size)
        and conv.padding == tuple(side // 2 for side in conv.kernel_size)
        and (act is None or type(act) is nn.SiLU)
        and _serves(x, conv.weight)
        and is_unobserved(conv, *(() if act is None else (act,)))
    )


def _is_checked(conv: nn.Conv2d, x: Tensor) -> bool:
    """Return whether the operator itself can take what `can_fuse_depthwise` allows: no cast, no tangents."""
    return (
        x.ndim == 4
        and x.shape[3] == conv.in_channels
        and forward_ad._current_level < 0
        and not torch.is_autocast_enabled("cpu")
    )


def convolve_depthwise_by(weight: Tensor, x: Tensor) -> Tensor:
    """Return the convolution of a map ``x`` (b, h, w, d) by kernels ``weight`` (d, 1, kh, kw), odd, of equal size.

    For weights that are no module's, such as a parameter in another order; `convolve_depthwise` otherwise.
    """
    if _serves(x, weight):
        return depthwise_conv2d(x, weight)
    padding = (weight.shape[2] // 2, weight.shape[3] // 2)
    return F.conv2d(x.permute(0, 3, 1, 2), weight, padding=padding, groups=len(weight)).permute(0, 2, 3, 1)


def _serves(x: Tensor, weight: Tensor) -> bool:
    """Return whether our operator can take these and is the faster."""
    return (
        x.device.type == "cpu"
        and not is_traced()
        and (x.dtype == weight.dtype or torch.is_autocast_enabled("cpu"))
        and choose_backend(None, "cpu").name == "compiled"
    )
