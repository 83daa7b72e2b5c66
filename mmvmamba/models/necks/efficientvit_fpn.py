"""The feature pyramid of the mobile families: backbones of strides 16, 32, 64 for detectors that want finer maps.

Paper: Liu et al., "EfficientViT: Memory Efficient Vision Transformer with Cascaded Group Attention"
(https://arxiv.org/abs/2305.07027). Upstream: ``EfficientViTFPN`` of microsoft/Cream and its copies in
mlvlab/EfficientViM, detection/efficientvit_fpn.py (which adds ``pre_norm``), and lewandofskee/MobileMamba,
downstream/det/backbones/efficientvit_fpn.py. Names of parameters are theirs. Differences: it also works without
transposed convolutions, and what no recipe uses (norms and activations of its convolutions, ``end_level``) is not here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn import functional as F

from mmvmamba.errors import ConfigError, OpInputError
from mmvmamba.models.layers.checks import check_choice
from mmvmamba.registry import MODELS

ExtraConvs = Literal["on_input", "on_lateral", "on_output"]
EXTRA_CONVS: tuple[str, ...] = get_args(ExtraConvs)
#: mmdet's own of a feature pyramid; transposed convolutions keep PyTorch's initialisation.
_XAVIER = {"type": "Xavier", "layer": "Conv2d", "distribution": "uniform"}


class Conv(nn.Module):
    """A convolution one name deeper, as in checkpoints, where it once could have a norm beside it.

    Args:
        conv: The convolution.
    """

    def __init__(self, conv: nn.Conv2d | nn.ConvTranspose2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (b, c, h, w) to (b, c', h', w')."""
        out: Tensor = self.conv(x)
        return out


class LayerNorm2d(nn.Module):
    """Layer norm over the channels of a map (b, c, h, w), with weights in the shape (1, c, 1, 1) of checkpoints.

    Args:
        channels: Channels of the map.
        eps: Added to the variance.
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised ``x`` (b, c, h, w), contiguous."""
        channels = self.weight.shape[1:2]
        weight, bias = self.weight.flatten(), self.bias.flatten()
        return F.layer_norm(x.permute(0, 2, 3, 1), channels, weight, bias, self.eps).permute(0, 3, 1, 2).contiguous()


@MODELS.register_module()
class EfficientViTFPN(BaseModule):
    """Feature pyramid whose finest maps come out of transposed convolutions. No norms but ``pre_norm``, no activations.

    Laterals of all maps are added from the coarsest to the finest (nearest neighbours, to the finer one's exact size);
    a 3x3 convolution of each is an output. A chain of transposed convolutions starts at the finest lateral, and every
    link of it has a 3x3 convolution and an output of its own. Outputs come from the finest to the coarsest.

    Args:
        in_channels: Channels of the backbone's maps, from the finest.
        out_channels: Channels of all outputs.
        num_outs: Number of outputs: those of the used maps, ``num_extra_trans_convs``, and behind them coarser ones.
        start_level: Index of the first map that is used.
        add_extra_convs: What the first of the coarser outputs is a 3x3 convolution of stride 2 of: the last map of
            the backbone ("on_input", also True; after ``pre_norm``), the last lateral or the last output before it.
            The next is one of the one before. False takes every second pixel of the output before instead.
        relu_before_extra_convs: Whether a ReLU is before these convolutions, but the first.
        num_extra_trans_convs: Number of outputs finer than the finest map, each by a factor 2.
        pre_norm: Whether every map of the backbone gets a layer norm before anything else.
        init_cfg: MMEngine's initialisation; as mmdet's feature pyramid unless given.

    Raises:
        ConfigError: If a number is impossible or these do not fit together.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int,
        num_outs: int,
        start_level: int = 0,
        add_extra_convs: bool | ExtraConvs = False,
        relu_before_extra_convs: bool = False,
        num_extra_trans_convs: int = 0,
        pre_norm: bool = False,
        init_cfg: dict | list[dict] | None = _XAVIER,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        _check_numbers(in_channels, out_channels, num_outs, start_level, num_extra_trans_convs)
        self.in_channels, self.out_channels, self.num_outs = tuple(in_channels), out_channels, num_outs
        self.start_level, self.num_extra_trans_convs = start_level, num_extra_trans_convs
        self.relu_before_extra_convs = relu_before_extra_convs
        self.add_extra_convs = "on_input" if add_extra_convs is True else add_extra_convs or None
        if self.add_extra_convs is not None:
            check_choice("add_extra_convs", self.add_extra_convs, EXTRA_CONVS)

        used = self.in_channels[start_level:]
        self.num_coarser = num_outs - len(used) - num_extra_trans_convs
        self.lateral_convs = nn.ModuleList(Conv(nn.Conv2d(width, out_channels, 1)) for width in used)
        self.fpn_convs = nn.ModuleList(_conv3x3(out_channels, out_channels) for _ in used)
        if self.add_extra_convs is not None:
            first = used[-1] if self.add_extra_convs == "on_input" else out_channels
            widths = [first] + [out_channels] * (self.num_coarser - 1)
            self.fpn_convs.extend(_conv3x3(width, out_channels, stride=2) for width in widths[: self.num_coarser])
        if pre_norm:
            self.batch_norm = nn.ModuleList(LayerNorm2d(width) for width in self.in_channels)
            # Distributed training waits for the gradient of every parameter that wants one.
            self.batch_norm[:start_level].requires_grad_(False)
        self.extra_trans_convs = nn.ModuleList(
            Conv(nn.ConvTranspose2d(out_channels, out_channels, 2, stride=2)) for _ in range(num_extra_trans_convs)
        )
        self.extra_fpn_convs = nn.ModuleList(_conv3x3(out_channels, out_channels) for _ in range(num_extra_trans_convs))

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return ``num_outs`` maps (b, out_channels, h_i, w_i), the finest first, of the backbone's (b, c_i, h_i, w_i).

        Raises:
            OpInputError: If there are more or fewer maps than ``in_channels``.
        """
        if len(inputs) != len(self.in_channels):
            raise OpInputError(
                f"EfficientViTFPN got {len(inputs)} maps, expected {len(self.in_channels)}, as many as in_channels "
                f"{self.in_channels}. Set out_indices of the backbone or in_channels of the neck."
            )
        maps = list(inputs)
        if hasattr(self, "batch_norm"):
            # Those that are not used are left alone, as their norms have no gradient.
            maps[self.start_level :] = [
                norm(x) for norm, x in zip(self.batch_norm[self.start_level :], maps[self.start_level :], strict=True)
            ]
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, maps[self.start_level :], strict=True)]
        for i in range(len(laterals) - 1, 0, -1):
            laterals[i - 1] = laterals[i - 1] + F.interpolate(laterals[i], size=laterals[i - 1].shape[2:])
        outs = [conv(x) for conv, x in zip(self.fpn_convs, laterals, strict=False)]
        outs += self._coarser(maps[-1], laterals[-1], outs[-1])
        finer: list[Tensor] = []
        lateral = laterals[0]
        for conv in self.extra_trans_convs:
            lateral = conv(lateral)
            finer.insert(0, lateral)
        return (*(conv(x) for conv, x in zip(self.extra_fpn_convs, finer, strict=True)), *outs)

    def _coarser(self, last_map: Tensor, last_lateral: Tensor, last_out: Tensor) -> list[Tensor]:
        """Return the outputs that are coarser than the backbone's last map, each (b, out_channels, h', w')."""
        if self.add_extra_convs is None:
            outs = [last_out]
            for _ in range(self.num_coarser):
                outs.append(outs[-1][:, :, ::2, ::2])
            return [out.contiguous() for out in outs[1:]]
        sources = {"on_input": last_map, "on_lateral": last_lateral, "on_output": last_out}
        x, outs = sources[self.add_extra_convs], []
        for conv in self.fpn_convs[len(self.lateral_convs) :]:
            x = conv(F.relu(x) if outs and self.relu_before_extra_convs else x)
            outs.append(x)
        return outs


def _conv3x3(in_channels: int, channels: int, stride: int = 1) -> Conv:
    return Conv(nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1))


def _check_numbers(
    in_channels: Sequence[int], out_channels: int, num_outs: int, start_level: int, num_extra_trans_convs: int
) -> None:
    widths = list(in_channels) if isinstance(in_channels, Sequence) else [0]
    if not widths or not all(isinstance(n, int) and n > 0 for n in (*widths, out_channels)):
        raise ConfigError(
            f"EfficientViTFPN: in_channels is {in_channels!r} and out_channels {out_channels!r}, expected a list of "
            "positive integers and a positive integer. Correct them."
        )
    if not isinstance(start_level, int) or not 0 <= start_level < len(widths):
        raise ConfigError(
            f"EfficientViTFPN: start_level is {start_level!r}, expected 0 to {len(widths) - 1} because in_channels has "
            f"{len(widths)} entries. Choose one of these."
        )
    if not isinstance(num_extra_trans_convs, int) or num_extra_trans_convs < 0:
        raise ConfigError(
            f"EfficientViTFPN: num_extra_trans_convs is {num_extra_trans_convs!r}, expected 0 or more. Correct it."
        )
    least = len(widths) - start_level + num_extra_trans_convs
    if not isinstance(num_outs, int) or num_outs < least:
        raise ConfigError(
            f"EfficientViTFPN: num_outs is {num_outs!r}, expected at least {least}: {len(widths) - start_level} of the "
            f"backbone's maps and {num_extra_trans_convs} of transposed convolutions. Raise it."
        )
