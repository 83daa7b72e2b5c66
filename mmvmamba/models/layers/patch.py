"""From image to tokens, and from one stage's resolution to the next.

The child names ("0", "2", "5", ...) are those of the official checkpoints, whose permutations between
channel orders also took an index each.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from mmvmamba.errors import ConfigError
from mmvmamba.models.layers.checks import check_choice
from mmvmamba.models.layers.conv import ChannelsLastConv2d
from mmvmamba.models.layers.linear import Linear
from mmvmamba.models.layers.norm import Norm, build_norm
from mmvmamba.models.layers.padding import pad_to_multiple

PatchEmbed = Literal["patchify", "overlapping"]
Downsample = Literal["patch_merging", "conv2x2", "conv3x3", "none"]
PATCH_EMBEDS: tuple[str, ...] = get_args(PatchEmbed)
DOWNSAMPLES: tuple[str, ...] = get_args(Downsample)


def image_to_channels_last(image: Tensor) -> Tensor:
    """View an image (b, c, h, w) as (b, h, w, c), dense in that order (a copy of the few input channels)."""
    return image.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)


class PatchifyEmbed(nn.Module):
    """Non-overlapping patches: convolution with kernel = stride = patch size, then norm.

    The output has floor(n / patch_size) tokens a side; images smaller than one patch are zero-padded to one.

    Args:
        in_channels: Channels of the image.
        channels: Channels of the tokens.
        patch_size: Side of a patch.
        norm: Kind of norm, or None for none.
    """

    #: For ``mmvmamba.models.deploy``.
    runs_in_order = True

    def __init__(self, in_channels: int, channels: int, patch_size: int = 4, norm: Norm | None = "layer_norm") -> None:
        super().__init__()
        self.add_module("0", ChannelsLastConv2d(in_channels, channels, patch_size, stride=patch_size))
        self.add_module("2", _norm_or_identity(norm, channels))

    def forward(self, image: Tensor) -> Tensor:
        """Map an image (b, c, h, w) to tokens (b, h', w', d)."""
        return _run(self, image_to_channels_last(image))


class OverlappingEmbed(nn.Module):
    """Two overlapping convolutions with norms and a GELU between; ceil(n / 2) tokens a side after each.

    Args:
        in_channels: Channels of the image.
        channels: Channels of the tokens; half of it between the convolutions.
        patch_size: Total stride, even; each convolution has stride patch_size / 2.
        norm: Kind of norm, or None for none.
    """

    #: For ``mmvmamba.models.deploy``.
    runs_in_order = True

    def __init__(self, in_channels: int, channels: int, patch_size: int = 4, norm: Norm | None = "layer_norm") -> None:
        super().__init__()
        if patch_size < 2 or patch_size % 2:
            raise ConfigError(
                f"patch_size is {patch_size!r}, expected an even number of at least 2 for the overlapping patch "
                "embedding. Choose another size or patch_embed='patchify'."
            )
        stride, half = patch_size // 2, channels // 2
        self.add_module("0", ChannelsLastConv2d(in_channels, half, stride + 1, stride=stride, padding=1))
        self.add_module("2", _norm_or_identity(norm, half))
        self.add_module("4", nn.GELU())
        self.add_module("5", ChannelsLastConv2d(half, channels, stride + 1, stride=stride, padding=1))
        self.add_module("7", _norm_or_identity(norm, channels))

    def forward(self, image: Tensor) -> Tensor:
        """Map an image (b, c, h, w) to tokens (b, h', w', d)."""
        return _run(self, image_to_channels_last(image))


class PatchMerging(nn.Module):
    """2x2 neighbours concatenated, normed and mapped linearly; odd sides are zero-padded, ceil(n / 2) remain.

    The padding comes before the norm and the four neighbours are ordered (even row, even column),
    (odd, even), (even, odd), (odd, odd), as in upstream.
    """

    def __init__(self, channels: int, out_channels: int, norm: Norm = "layer_norm") -> None:
        super().__init__()
        self.norm = build_norm(norm, 4 * channels)
        self.reduction = Linear(4 * channels, out_channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (b, h, w, c) to (b, ceil(h / 2), ceil(w / 2), c')."""
        b, h, w, c = x.shape
        x = pad_to_multiple(x, 2)
        rows, columns = (h + 1) // 2, (w + 1) // 2
        x = x.reshape(b, rows, 2, columns, 2, c).permute(0, 1, 3, 4, 2, 5)
        return self.reduction(self.norm(x.reshape(b, rows, columns, 4 * c)))


class ConvDownsample(nn.Module):
    """Convolution with stride 2, then norm.

    Kernel 2 leaves floor(n / 2) tokens a side (a side of 1 is zero-padded to 2), kernel 3 with padding 1
    leaves ceil(n / 2).
    """

    #: For ``mmvmamba.models.deploy``.
    runs_in_order = True

    def __init__(self, channels: int, out_channels: int, kernel: Literal[2, 3], norm: Norm = "layer_norm") -> None:
        super().__init__()
        padding = 1 if kernel == 3 else 0
        self.add_module("1", ChannelsLastConv2d(channels, out_channels, kernel, stride=2, padding=padding))
        self.add_module("3", build_norm(norm, out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (b, h, w, c) to (b, h', w', c')."""
        return _run(self, x)


def build_patch_embed(
    kind: PatchEmbed, in_channels: int, channels: int, patch_size: int = 4, norm: Norm | None = "layer_norm"
) -> nn.Module:
    """Return the patch embedding called ``kind``; see the classes for what each does.

    Raises:
        ConfigError: If ``kind`` or ``patch_size`` is not supported.
    """
    check_choice("patch_embed", kind, PATCH_EMBEDS)
    embed = PatchifyEmbed if kind == "patchify" else OverlappingEmbed
    return embed(in_channels, channels, patch_size, norm)


def build_downsample(kind: Downsample, channels: int, out_channels: int, norm: Norm = "layer_norm") -> nn.Module:
    """Return the downsampling called ``kind``; ``"none"`` keeps the map and needs equal channels.

    Raises:
        ConfigError: If ``kind`` is unknown, or ``"none"`` with differing channels.
    """
    check_choice("downsample", kind, DOWNSAMPLES)
    if kind == "patch_merging":
        return PatchMerging(channels, out_channels, norm)
    if kind == "none":
        if channels != out_channels:
            raise ConfigError(
                f"downsample is 'none' between stages of {channels} and {out_channels} channels, expected equal "
                "channels. Choose another downsampling or equal dims."
            )
        return nn.Identity()
    return ConvDownsample(channels, out_channels, 2 if kind == "conv2x2" else 3, norm)


def _norm_or_identity(norm: Norm | None, channels: int) -> nn.Module:
    return nn.Identity() if norm is None else build_norm(norm, channels)


def _run(module: nn.Module, x: Tensor) -> Tensor:
    for child in module.children():
        x = child(x)
    return x
