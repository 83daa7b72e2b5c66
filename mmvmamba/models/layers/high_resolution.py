"""What a high-resolution network consists of beside its blocks: maps of several strides that exchange what they hold.

Paper: HRNet (https://arxiv.org/abs/1908.07919). Upstream: HRNet/HRNet-Image-Classification, lib/models/cls_hrnet.py,
as HRVMamba has it. Differences: maps are channels-last, and a convolution and its batch norm are one module.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Collection, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional as F

from mmvmamba.errors import ConfigError
from mmvmamba.models.layers.conv_bn import ConvBN

#: How many times wider the output of a bottleneck is than its middle.
EXPANSION = 4


class Bottleneck(nn.Module):
    """ResNet's residual block: narrow, convolve, widen, each with its batch norm.

    Args:
        channels: Channels of the input.
        hidden: Channels of the middle; the output has four times as many.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        out_channels = EXPANSION * hidden
        self.conv1 = ConvBN(channels, hidden, relu=True)
        self.conv2 = ConvBN(hidden, hidden, 3, relu=True)
        self.conv3 = ConvBN(hidden, out_channels)
        self.shortcut = nn.Identity() if channels == out_channels else ConvBN(channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (b, h, w, c) to (b, h, w, c')."""
        return torch.relu(self.conv3(self.conv2(self.conv1(x))) + self.shortcut(x))


class Descent(nn.Sequential):
    """Convolutions of stride 2 in a row, each a depthwise and a pointwise one; a ReLU between, none after the last.

    Args:
        channels: Channels of the input, kept up to the last step.
        out_channels: Channels of the output.
        steps: How many times the sides are halved, rounding up.
    """

    def __init__(self, channels: int, out_channels: int, steps: int) -> None:
        super().__init__()
        for step in range(steps):
            last = step == steps - 1
            self.append(
                nn.Sequential(
                    ConvBN(channels, channels, 3, stride=2, groups=channels),
                    ConvBN(channels, out_channels if last else channels, relu=not last),
                )
            )


class HighResolutionModule(nn.Module):
    """Branches of blocks, one per stride, then every branch receives the sum of all, resized.

    Args:
        branches: The blocks of every branch; branch j has half the sides of the one before it.
        dims: Channels of every branch.
        outputs: Branches that receive the sum; the others end here.
    """

    def __init__(self, branches: Sequence[Sequence[nn.Module]], dims: Sequence[int], outputs: Collection[int]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.ModuleList(blocks) for blocks in branches)
        self.fuse = nn.ModuleDict()
        for i in sorted(outputs):
            row = [self._build(dims, j, i) for j in range(len(dims))]
            self.fuse[str(i)] = nn.ModuleList(row)

    @staticmethod
    def _build(dims: Sequence[int], source: int, target: int) -> nn.Module:
        if source == target:
            return nn.Identity()
        if source > target:
            return ConvBN(dims[source], dims[target])
        return Descent(dims[source], dims[target], target - source)

    def exchange(self, maps: Sequence[Tensor], outputs: Collection[int]) -> dict[int, Tensor]:
        """Return the sums (b, h_i, w_i, c_i) for some branches i from what the blocks made of all, ``maps``."""
        fused: dict[int, Tensor] = {}
        for i in sorted(outputs):
            layers = cast("nn.ModuleList", self.fuse[str(i)])
            rows, columns = maps[i].shape[1:3]
            terms = (layer(x) for layer, x in zip(layers, maps, strict=True))
            resized = (enlarge(y, 2 ** (j - i), rows, columns) if j > i else y for j, y in enumerate(terms))
            fused[i] = torch.relu(functools.reduce(operator.add, resized))
        return fused


class ScaleFusion(nn.Module):
    """HRNet's neck: every branch is widened, and from the finest on each is halved and added to the next.

    Args:
        dims: Channels of every branch.
        widths: Channels that they are widened to, multiples of 4.
        out_channels: Channels of the last output.

    Raises:
        ConfigError: If a width is no multiple of 4, of which a quarter is the middle of a bottleneck.
    """

    def __init__(self, dims: Sequence[int], widths: Sequence[int], out_channels: int) -> None:
        super().__init__()
        if any(width % EXPANSION for width in widths):
            raise ConfigError(
                f"arch: neck_dims is {tuple(widths)}, expected multiples of {EXPANSION}, for the middle of their "
                "bottlenecks is a quarter as wide. Round them."
            )
        pairs = zip(dims, widths, strict=True)
        self.increase = nn.ModuleList(Bottleneck(dim, width // EXPANSION) for dim, width in pairs)
        steps = itertools.pairwise(widths)
        self.downsample = nn.ModuleList(ConvBN(dim, wider, 3, stride=2, relu=True) for dim, wider in steps)
        self.final = ConvBN(widths[-1], out_channels, relu=True)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Return the fused maps (b, h_i, w_i, c_i') of the first branches, ``maps`` (b, h_i, w_i, c_i)."""
        outs = [self.increase[0](maps[0])]
        for downsample, increase, x in zip(self.downsample, self.increase[1:], maps[1:], strict=False):
            outs.append(downsample(outs[-1]) + increase(x))
        if len(outs) == len(self.increase):
            outs[-1] = self.final(outs[-1])
        return outs

    def unused(self, last: int) -> list[nn.Module]:
        """Return what is not needed where output ``last`` is the last one wanted."""
        behind = [*self.increase[last + 1 :], *self.downsample[last:]]
        return [*behind, self.final] if last < len(self.increase) - 1 else behind


def enlarge(x: Tensor, factor: int, rows: int, columns: int) -> Tensor:
    """Return ``x`` (b, h, w, c) enlarged bilinearly by a factor, then to (b, rows, columns, c) if it is not that yet.

    The second step is upstream's way with maps whose finer branch has odd sides.
    """
    y = F.interpolate(
        x.permute(0, 3, 1, 2), size=(factor * x.shape[1], factor * x.shape[2]), mode="bilinear", align_corners=False
    )
    # A size that a trace leaves open must not be looked at; the second step may then change nothing.
    if not (statically_known_true(y.shape[2] == rows) and statically_known_true(y.shape[3] == columns)):
        y = F.interpolate(y, size=(rows, columns), mode="bilinear", align_corners=False)
    return y.permute(0, 2, 3, 1)
