"""Depthwise convolutions of several sizes, each for its own share of the channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmvmamba.errors import ConfigError
from mmvmamba.models.layers.conv import ChannelsLastConv2d
from mmvmamba.models.layers.depthwise import can_fuse_depthwise, convolve_depthwise
from mmvmamba.ops import depthwise_conv2d


class MixedDepthwise(nn.ModuleList):
    """Depthwise convolutions of equal shares of the channels, whose results are then shuffled.

    The first channels of all shares come first, then the second ones, and so on. On a CPU it is one convolution by
    our operator, with smaller kernels padded with zeros: more products, but one walk over the map in whole vectors,
    which beats four narrow ones (3x3 to 9x9 of 56x56x32, one thread: 0.5 ms instead of 0.8 ms, with gradients 1.8 ms
    instead of 3.3 ms).

    Args:
        channels: Channels of input and output.
        kernels: Sides of the kernels, odd.

    Raises:
        ConfigError: If the channels cannot be shared equally.
    """

    def __init__(self, channels: int, kernels: Sequence[int]) -> None:
        if channels % len(kernels):
            raise ConfigError(
                f"MixedDepthwise: {channels} channels for {len(kernels)} kernels, expected a multiple of their number. "
                "Round the width."
            )
        share = channels // len(kernels)
        super().__init__(
            ChannelsLastConv2d(share, share, kernel, padding=kernel // 2, groups=share) for kernel in kernels
        )
        self.largest = max(kernels)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (b, h, w, c) to (b, h, w, c)."""
        shares = x.chunk(len(self), dim=-1)
        if all(can_fuse_depthwise(conv, share) for conv, share in zip(self, shares, strict=True)):
            convs = cast("list[ChannelsLastConv2d]", list(self))
            weight = torch.cat([F.pad(conv.weight, [(self.largest - conv.kernel_size[0]) // 2] * 4) for conv in convs])
            bias = torch.cat([cast("Tensor", conv.bias) for conv in convs])
            y = depthwise_conv2d(x, weight, bias)
            return y.unflatten(-1, (len(self), -1)).transpose(-1, -2).flatten(-2)
        return torch.stack(
            [convolve_depthwise(conv, share) for conv, share in zip(self, shares, strict=True)], dim=-1
        ).flatten(-2)
