"""Depthwise convolutions of channels-last maps, by our operator where that is faster."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor, nn

from mmvmamba.models.layers.conv import ChannelsLastConv2d
from mmvmamba.models.layers.observers import is_unobserved
from mmvmamba.models.layers.onednn import is_traced
from mmvmamba.ops import depthwise_conv2d
from mmvmamba.ops.backends import choose_backend


def convolve_depthwise(conv: nn.Module, x: Tensor, act: nn.Module | None = None) -> Tensor:
    """Return ``act(conv(x))`` for a map ``x`` (b, h, w, d), which may be some channels of a wider map.

    On a CPU with the compiled extension a depthwise convolution of stride 1 that keeps the size of the map is one
    operator, with a SiLU that follows it.

    Args:
        conv: The convolution; any module that maps (b, h, w, d).
        x: The map.
        act: What follows, or None for nothing.

    Returns:
        (b, h, w, d).
    """
    if can_fuse_depthwise(conv, x, act):
        return depthwise_conv2d(x, conv.weight, conv.bias, activation="none" if act is None else "silu")
    y: Tensor = conv(x)
    return y if act is None else act(y)


def can_fuse_depthwise(conv: nn.Module, x: Tensor, act: nn.Module | None = None) -> TypeGuard[ChannelsLastConv2d]:
    """Return whether `convolve_depthwise` is one operator for ``x``: on a CPU, where its kernel is compiled.

    A trace keeps PyTorch's operators, which compilers and other runtimes know.
    """
    return (
        type(conv) is ChannelsLastConv2d
        and conv.groups == conv.in_channels == conv.out_channels
        and conv.stride == conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
        and all(side % 2 == 1 for side in conv.kernel_size)
        and conv.padding == tuple(side // 2 for side in conv.kernel_size)
        and (act is None or type(act) is nn.SiLU)
        and x.device.type == "cpu"
        and not is_traced()
        and (x.dtype == conv.weight.dtype or torch.is_autocast_enabled("cpu"))
        and is_unobserved(conv, *(() if act is None else (act,)))
        and choose_backend(None, "cpu").name == "compiled"
    )
