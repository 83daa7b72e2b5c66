"""Pyramids of maps for detectors and segmentors from backbones that have one resolution only.

Papers: "Exploring Plain Vision Transformer Backbones for Object Detection" (https://arxiv.org/abs/2203.16527) for
`SimpleFeaturePyramid`, BEiT (https://arxiv.org/abs/2106.08254) for `FourScalePyramid`. Upstream: both as hustvl/Vim has
them, det/detectron2/modeling/backbone/vit.py (``SimpleFeaturePyramid``) and seg/backbone/vim.py (``fpn1`` to ``fpn4``).
Names of parameters are theirs. Differences: a side of one cell stays one cell where it would be halved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn import functional as F

from mmvmamba.errors import ConfigError, OpInputError
from mmvmamba.models.layers.checks import check_choice
from mmvmamba.models.layers.norm import LayerNorm
from mmvmamba.registry import MODELS

MapNorm = Literal["batch_norm", "sync_batch_norm"]
MAP_NORMS: tuple[str, ...] = get_args(MapNorm)
_LEVELS = 4
#: Of every layer norm of the simple feature pyramid.
_EPS = 1e-6


@MODELS.register_module()
class ChannelNorm(LayerNorm):
    """Layer norm over the channels of a map (b, c, h, w).

    Heads of mmdet and mmseg have it by ``norm_cfg=dict(type="mmvmamba.ChannelNorm")``, with an eps of 1e-5 if none is
    named.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised ``x`` (b, c, h, w), contiguous."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()


class NormedConv(nn.Conv2d):
    """A convolution without bias that keeps the size, and its norm."""

    def __init__(self, in_channels: int, channels: int, kernel: int) -> None:
        super().__init__(in_channels, channels, kernel, padding=kernel // 2, bias=False)
        self.norm = ChannelNorm(channels, eps=_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (b, c, h, w) to (b, c', h, w)."""
        out: Tensor = self.norm(super().forward(x))
        return out


class Halve(nn.Module):
    """The largest of every ``factor`` x ``factor`` cells; floor(n / factor) a side remain, but at least one."""

    def __init__(self, factor: int = 2) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (b, c, h, w) to (b, c, h', w')."""
        window = (min(self.factor, x.shape[2]), min(self.factor, x.shape[3]))
        return F.max_pool2d(x, window, self.factor)


@MODELS.register_module()
class SimpleFeaturePyramid(BaseModule):
    """ViTDet's pyramid of one map: two transposed convolutions, one, none, or a pooling, then two normed convolutions.

    Args:
        in_channels: Channels d of the map, a multiple of 4; a list of the one number will do, too.
        out_channels: Channels of all outputs.
        num_outs: Outputs: those at 4, 2, 1 and 1/2 times the resolution of the map, and behind them every second cell
            of the output before.
        init_cfg: MMEngine's initialisation; PyTorch's own unless given.

    Raises:
        ConfigError: If a number is impossible.
    """

    def __init__(
        self,
        in_channels: int | Sequence[int],
        out_channels: int = 256,
        num_outs: int = 5,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        d = _one_width("SimpleFeaturePyramid", in_channels)
        if d % 4:
            raise ConfigError(
                f"SimpleFeaturePyramid: in_channels is {d}, expected a multiple of 4: the finest map has a quarter of "
                "them. Use another width."
            )
        for name, value, least in (("out_channels", out_channels, 1), ("num_outs", num_outs, _LEVELS)):
            if not isinstance(value, int) or value < least:
                raise ConfigError(
                    f"SimpleFeaturePyramid: {name} is {value!r}, expected an integer of at least {least}. Raise it."
                )
        self.num_outs = num_outs
        self.simfp_2 = nn.Sequential(
            nn.ConvTranspose2d(d, d // 2, 2, stride=2),
            ChannelNorm(d // 2, eps=_EPS),
            nn.GELU(),
            nn.ConvTranspose2d(d // 2, d // 4, 2, stride=2),
            NormedConv(d // 4, out_channels, 1),
            NormedConv(out_channels, out_channels, 3),
        )
        self.simfp_3 = nn.Sequential(
            nn.ConvTranspose2d(d, d // 2, 2, stride=2),
            NormedConv(d // 2, out_channels, 1),
            NormedConv(out_channels, out_channels, 3),
        )
        self.simfp_4 = nn.Sequential(NormedConv(d, out_channels, 1), NormedConv(out_channels, out_channels, 3))
        self.simfp_5 = nn.Sequential(Halve(), NormedConv(d, out_channels, 1), NormedConv(out_channels, out_channels, 3))

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return ``num_outs`` maps (b, out_channels, h', w'), the finest first, of one map (b, d, h, w) in a sequence.

        Raises:
            OpInputError: If there is another number of maps.
        """
        if len(maps) != 1:
            raise OpInputError(
                f"SimpleFeaturePyramid got {len(maps)} maps, expected one. Set out_indices of the backbone to its last "
                "layer."
            )
        outs = [level(maps[0]) for level in (self.simfp_2, self.simfp_3, self.simfp_4, self.simfp_5)]
        while len(outs) < self.num_outs:
            outs.append(F.max_pool2d(outs[-1], 1, 2))
        return tuple(outs)


@MODELS.register_module()
class FourScalePyramid(BaseModule):
    """BEiT's pyramid of maps from four depths: each at a resolution of its own, strides 4, 8, 16, 32 of the image.

    A single map is taken for all four. No output has a norm or an activation at its end.

    Args:
        in_channels: Channels of every map, which the outputs keep; a list of equal numbers will do, too.
        stride: Pixels of the image per cell of the maps along a side, 16 or 8.
        norm: Kind of the one norm, between the transposed convolutions of the finest map.
        init_cfg: MMEngine's initialisation; PyTorch's own unless given.

    Raises:
        ConfigError: If an option is impossible.
    """

    def __init__(
        self,
        in_channels: int | Sequence[int],
        stride: int = 16,
        norm: MapNorm = "batch_norm",
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        d = _one_width("FourScalePyramid", in_channels)
        check_choice("norm", norm, MAP_NORMS)
        if stride not in (8, 16):
            raise ConfigError(f"FourScalePyramid: stride is {stride!r}, expected 8 or 16. Use the backbone's stride.")
        self.fpn1, self.fpn2, self.fpn3, self.fpn4 = _four_scales(d, stride, norm)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return one map (b, d, h', w') per map (b, d, h, w), the finest first; all four of a single one.

        Raises:
            OpInputError: If there are none or more than four.
        """
        levels = (self.fpn1, self.fpn2, self.fpn3, self.fpn4)
        if not 1 <= len(maps) <= _LEVELS:
            raise OpInputError(
                f"FourScalePyramid got {len(maps)} maps, expected one to four. Name so many layers in out_indices of "
                "the backbone."
            )
        each = maps if len(maps) > 1 else [maps[0]] * _LEVELS
        return tuple(level(x) for level, x in zip(levels, each, strict=False))


def _four_scales(d: int, stride: int, norm: str) -> tuple[nn.Module, nn.Module, nn.Module, nn.Module]:
    double = nn.Sequential(nn.ConvTranspose2d(d, d, 2, stride=2))
    if stride == 8:
        return double, nn.Identity(), Halve(), Halve(4)
    between: nn.Module = (nn.BatchNorm2d if norm == "batch_norm" else nn.SyncBatchNorm)(d)
    quadruple = nn.Sequential(
        nn.ConvTranspose2d(d, d, 2, stride=2), between, nn.GELU(), nn.ConvTranspose2d(d, d, 2, stride=2)
    )
    return quadruple, double, nn.Identity(), Halve()


def _one_width(neck: str, in_channels: int | Sequence[int]) -> int:
    widths = {in_channels} if isinstance(in_channels, int) else set(in_channels)
    width = next(iter(widths), None)
    if len(widths) != 1 or not isinstance(width, int) or width < 1:
        raise ConfigError(
            f"{neck}: in_channels is {in_channels!r}, expected a positive integer, the width of a columnar backbone. "
            "Correct it."
        )
    return width
