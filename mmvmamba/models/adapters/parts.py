"""What a ViT-adapter consists of, whatever trunk it is around: pyramid of convolutions, injector, extractor.

Paper: Vision Transformer Adapter for Dense Predictions (https://arxiv.org/abs/2205.08534). Names of parameters are
upstream's (``adapter_modules.py`` of PlainMamba's and ShuffleMamba's repositories). Difference: maps are channels-last.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmvmamba.errors import ConfigError
from mmvmamba.models.adapters.sync_batch_norm import SynchronisedBatchNorm
from mmvmamba.models.layers import (
    BatchNorm,
    ChannelsLastConv2d,
    DropPath,
    LayerNorm,
    Linear,
    PointwiseConv2d,
    convolve_depthwise,
)
from mmvmamba.models.layers.deformable_attention import DeformableAttention, Grid
from mmvmamba.models.layers.patch import image_to_channels_last

AdapterNorm = Literal["batch_norm", "synchronised_batch_norm"]
ADAPTER_NORMS: tuple[str, ...] = get_args(AdapterNorm)
#: Of every layer norm of an adapter.
NORM_EPS = 1e-6
#: Levels that the trunk sees: strides 8, 16, 32.
INJECTED_LEVELS = 3


def build_map_norm(kind: AdapterNorm, channels: int) -> nn.Module:
    """Return the norm of a map (b, h, w, c) called ``kind``, one of ``ADAPTER_NORMS``."""
    return BatchNorm(channels) if kind == "batch_norm" else SynchronisedBatchNorm(channels)


class MaxPool(nn.MaxPool2d):
    """``nn.MaxPool2d`` of a channels-last map."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (b, h, w, c) to (b, h', w', c)."""
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class SpatialPrior(nn.Module):
    """A small convolutional network that sees the image in strides 4, 8, 16 and 32.

    Args:
        in_channels: Channels of the image.
        width: Channels of its first map; the others have 2, 4 and 4 times as many.
        channels: Channels of what it returns.
        norm: Kind of its batch norms.
    """

    def __init__(self, in_channels: int, width: int, channels: int, norm: AdapterNorm = "batch_norm") -> None:
        super().__init__()
        self.stem = nn.Sequential(
            *_conv_norm_act(in_channels, width, norm, stride=2),
            *_conv_norm_act(width, width, norm),
            *_conv_norm_act(width, width, norm),
            MaxPool(3, stride=2, padding=1),
        )
        self.conv2 = nn.Sequential(*_conv_norm_act(width, 2 * width, norm, stride=2))
        self.conv3 = nn.Sequential(*_conv_norm_act(2 * width, 4 * width, norm, stride=2))
        self.conv4 = nn.Sequential(*_conv_norm_act(4 * width, 4 * width, norm, stride=2))
        self.fc1 = PointwiseConv2d(width, channels)
        self.fc2 = PointwiseConv2d(2 * width, channels)
        self.fc3 = PointwiseConv2d(4 * width, channels)
        self.fc4 = PointwiseConv2d(4 * width, channels)

    def forward(self, image: Tensor, has_first: bool = True) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
        """Return maps (b, h / 4, w / 4, c) to (b, h / 32, w / 32, c) of an image (b, c', h, w); the first if wanted."""
        x1 = self.stem(image_to_channels_last(image))
        x2 = self.conv2(x1)
        x3 = self.conv3(x2)
        x4 = self.conv4(x3)
        return self.fc1(x1) if has_first else None, self.fc2(x2), self.fc3(x3), self.fc4(x4)


class ConvFFN(nn.Module):
    """A perceptron over some maps at once whose hidden values are convolved depthwise, each map by itself.

    Args:
        channels: Channels of input and output.
        hidden: Channels between.

    Raises:
        ConfigError: If there are no hidden channels.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        if hidden < 1:
            raise ConfigError(f"ConvFFN: hidden is {hidden}, expected at least 1 channel. Raise ffn_ratio.")
        self.fc1 = Linear(channels, hidden)
        self.dwconv = DepthwiseOfMaps(hidden)
        self.act = nn.GELU()
        self.fc2 = Linear(hidden, channels)

    def forward(self, x: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Map the maps of ``grids`` one after another (b, l, c) to the same."""
        out: Tensor = self.fc2(self.act(self.dwconv(self.fc1(x), grids)))
        return out


class DepthwiseOfMaps(nn.Module):
    """One 3x3 depthwise convolution for some maps that stand one after another."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dwconv = ChannelsLastConv2d(channels, channels, 3, padding=1, groups=channels)

    def forward(self, x: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Convolve the maps of ``grids`` (b, l, c)."""
        maps = x.split([rows * columns for rows, columns in grids], dim=1)
        pairs = zip(maps, grids, strict=True)
        return torch.cat([convolve_depthwise(self.dwconv, m.unflatten(1, grid)).flatten(1, 2) for m, grid in pairs], 1)


class Injector(nn.Module):
    """Tokens of the trunk look at the pyramid; what they see is added with a learned weight per channel.

    Args:
        channels: Channels of both.
        num_heads, num_points, value_ratio: See ``DeformableAttention``.
        scale: Initial weight; 0 leaves the trunk as it was trained.
    """

    def __init__(self, channels: int, num_heads: int, num_points: int, value_ratio: float, scale: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((channels,), float(scale)))
        self.query_norm = LayerNorm(channels, eps=NORM_EPS)
        self.feat_norm = LayerNorm(channels, eps=NORM_EPS)
        self.attn = DeformableAttention(channels, num_heads, INJECTED_LEVELS, num_points, value_ratio)

    def forward(self, x: Tensor, places: Tensor, c: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Return ``x`` (b, q, c) with what its tokens at ``places`` (q, 2) see in the pyramid ``c`` of ``grids``."""
        seen = self.attn(self.query_norm(x), places, self.feat_norm(c), grids)
        return x + self.gamma * seen


class Extractor(nn.Module):
    """The pyramid looks at the tokens of the trunk, then a perceptron with convolutions; both are residual.

    Args:
        channels: Channels of both.
        num_heads, num_points, value_ratio: See ``DeformableAttention``.
        hidden: Hidden channels of the perceptron, or None for no perceptron.
        drop_path: Stochastic depth of the perceptron.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        num_points: int,
        value_ratio: float,
        hidden: int | None,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.query_norm = LayerNorm(channels, eps=NORM_EPS)
        self.feat_norm = LayerNorm(channels, eps=NORM_EPS)
        self.attn = DeformableAttention(channels, num_heads, 1, num_points, value_ratio)
        self.ffn: ConvFFN | None = None
        if hidden is not None:
            self.ffn = ConvFFN(channels, hidden)
            self.ffn_norm = LayerNorm(channels, eps=NORM_EPS)
            self.drop_path = DropPath(drop_path)

    def forward(self, c: Tensor, places: Tensor, x: Tensor, grid: Grid, grids: Sequence[Grid]) -> Tensor:
        """Return the pyramid ``c`` (b, l, c) with what its cells see in ``x`` (b, q, c).

        Args:
            c: The maps of ``grids``, one after another.
            places: Where their cells are (l, 2).
            x: Tokens of the trunk.
            grid: Rows and columns of these.
            grids: Rows and columns of the maps.
        """
        c = c + self.attn(self.query_norm(c), places, self.feat_norm(x), [grid])
        return c if self.ffn is None else c + self.drop_path(self.ffn(self.ffn_norm(c), grids))


class Interaction(nn.Module):
    """One injector before some layers of the trunk and one extractor, or more, after them.

    Args:
        injector, extractor: See the classes.
        extra_extractors: Further extractors, which see the same tokens.
    """

    def __init__(self, injector: Injector, extractor: Extractor, extra_extractors: Sequence[Extractor] = ()) -> None:
        super().__init__()
        self.injector, self.extractor = injector, extractor
        self.extra_extractors = nn.ModuleList(extra_extractors) if extra_extractors else None

    def extract(self, c: Tensor, places: Tensor, x: Tensor, grid: Grid, grids: Sequence[Grid]) -> Tensor:
        """Run all extractors; see ``Extractor``."""
        c = self.extractor(c, places, x, grid, grids)
        for extractor in self.extra_extractors or ():
            c = extractor(c, places, x, grid, grids)
        return c


class Doubling(nn.ConvTranspose2d):
    """Transposed 2x2 convolution of stride 2 of a channels-last map, which is one product per cell."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 2, stride=2)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:  # noqa: ARG002 (of the base class)
        """Map ``x`` (b, h, w, c) to (b, 2 h, 2 w, c')."""
        b, h, w, _ = x.shape
        weight = self.weight.permute(2, 3, 1, 0).flatten(0, 2)  # (4 c', c)
        bias = None if self.bias is None else self.bias.repeat(4)
        cells = F.linear(x, weight, bias).view(b, h, w, 2, 2, self.out_channels)
        return cells.permute(0, 1, 3, 2, 4, 5).reshape(b, 2 * h, 2 * w, self.out_channels)


@torch.no_grad()
def init_like_upstream_(module: nn.Module) -> None:
    """Draw new weights for a part of an adapter: convolutions by their outputs, norms one, attention by itself."""
    for child in module.modules():
        if isinstance(child, (nn.Conv2d, nn.ConvTranspose2d)):
            fan_out = child.kernel_size[0] * child.kernel_size[1] * child.out_channels // child.groups
            nn.init.normal_(child.weight, std=math.sqrt(2.0 / fan_out))
            if child.bias is not None:
                nn.init.zeros_(child.bias)


def _conv_norm_act(in_channels: int, channels: int, norm: AdapterNorm, stride: int = 1) -> list[nn.Module]:
    conv = ChannelsLastConv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
    return [conv, build_map_norm(norm, channels), nn.ReLU()]
