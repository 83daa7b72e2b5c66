"""The 1x1 convolution of channels-last maps, which is a linear map with the weights of a convolution."""

from __future__ import annotations

from torch import Tensor, nn

from mmvmamba.models.layers.onednn import linear


class PointwiseConv2d(nn.Conv2d):
    """``nn.Conv2d`` with a kernel of 1x1 that maps (..., c) to (..., c') as one matrix product.

    Weights, names and initialisation are those of the convolution; ``Linear`` is for where upstream has a linear map.

    Args:
        in_channels: Channels c of the input.
        out_channels: Channels c' of the output.
        bias: Whether it adds one.
    """

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (..., c) to (..., c')."""
        return linear(x, self.weight.flatten(1), self.bias)
