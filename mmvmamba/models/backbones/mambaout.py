"""MambaOut: Do We Really Need Mamba for Vision? (https://arxiv.org/abs/2405.07992).

A gated convolutional network without any state space: what is left of a Mamba block when its scan is taken out.

Upstream: yuweihao/MambaOut, models/mambaout.py (``MambaOut``), a classifier. Differences: variants are named options,
the depthwise convolution is our operator on a CPU, and the backbone is a feature extractor, which upstream has not
published; the classifier's norm and perceptron are ``mmvmamba.MambaOutClsHead``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmvmamba.errors import ConfigError
from mmvmamba.models.backbones.arch import check_stages, resolve_arch
from mmvmamba.models.backbones.base import BaseBackbone, Block, Stage
from mmvmamba.models.layers import (
    ChannelsLastConv2d,
    DropPath,
    LayerNorm,
    Linear,
    convolve_depthwise,
    drop_path_schedule,
)
from mmvmamba.models.layers.mlp import chunk_rows
from mmvmamba.models.layers.observers import is_unobserved
from mmvmamba.models.layers.onednn import inference_dtype, is_traced, linear, multiply
from mmvmamba.models.layers.patch import image_to_channels_last
from mmvmamba.registry import MODELS

#: Of every layer norm; PyTorch's own default is ten times larger.
NORM_EPS = 1e-6
#: Hidden channels of a block as a multiple of its channels, rounded down.
_EXPANSION = 8 / 3
#: Multiplications of the first linear map of a block below which nothing is fused, as in ``layers/mlp.py``.
_MIN_WORK = 2**20


@dataclasses.dataclass(frozen=True)
class MambaOutArch:
    """Everything that distinguishes one MambaOut from another; the defaults are those of all released models.

    Attributes:
        dims: Channels of every stage.
        depths: Blocks of every stage.
        drop_path_rate: Stochastic depth of the ImageNet recipe; upstream's constructor has 0 unless told.
        kernel_size: Side of the depthwise convolutions, odd.
        conv_ratio: Hidden channels that are convolved, as a multiple of a block's channels, rounded down.
    """

    dims: tuple[int, ...]
    depths: tuple[int, ...]
    drop_path_rate: float = 0.0
    kernel_size: int = 7
    conv_ratio: float = 1.0

    def __post_init__(self) -> None:
        """Check what no layer checks by itself."""
        check_stages(dims=self.dims, depths=self.depths)
        if self.dims[0] < 2:
            raise ConfigError(
                f"arch: dims is {self.dims}, expected at least 2 channels in the first stage, of which the stem has "
                "half after its first convolution. Use more."
            )
        if not isinstance(self.kernel_size, int) or self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ConfigError(
                f"arch: kernel_size is {self.kernel_size!r}, expected a positive odd integer (an even one changes the "
                "size of the map). Choose 7."
            )
        for dim in self.dims:
            if not 1 <= int(self.conv_ratio * dim) <= int(_EXPANSION * dim):
                raise ConfigError(
                    f"arch: conv_ratio is {self.conv_ratio!r}, which has {int(self.conv_ratio * dim)} of a stage's "
                    f"{int(_EXPANSION * dim)} hidden channels convolved, expected at least one and at most all. "
                    "Choose 1.0."
                )


_DIMS_F, _DIMS_T, _DIMS_B = (48, 96, 192, 288), (96, 192, 384, 576), (128, 256, 512, 768)

ARCHS: dict[str, MambaOutArch] = {
    "femto": MambaOutArch(_DIMS_F, (3, 3, 9, 3), 0.025),
    "kobe": MambaOutArch(_DIMS_F, (3, 3, 15, 3), 0.025),
    "tiny": MambaOutArch(_DIMS_T, (3, 3, 9, 3), 0.2),
    "small": MambaOutArch(_DIMS_T, (3, 4, 27, 3), 0.4),
    "base": MambaOutArch(_DIMS_B, (3, 4, 27, 3), 0.6),
    # For demos and tests on a CPU; not a model of the paper.
    "nano": MambaOutArch((16, 32, 64, 128), (1, 1, 2, 1), 0.0),
}


class Stem(nn.Module):
    """Two convolutions of stride 2, each with its norm, and a GELU between; ceil(n / 4) tokens a side.

    Args:
        in_channels: Channels of the image.
        channels: Channels of the tokens; half of it between the convolutions.
    """

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = ChannelsLastConv2d(in_channels, half, 3, stride=2, padding=1)
        self.norm1 = LayerNorm(half, eps=NORM_EPS)
        self.act = nn.GELU()
        self.conv2 = ChannelsLastConv2d(half, channels, 3, stride=2, padding=1)
        self.norm2 = LayerNorm(channels, eps=NORM_EPS)

    def forward(self, image: Tensor) -> Tensor:
        """Map an image (b, c, h, w) to tokens (b, h', w', d)."""
        x = self.act(self.norm1(self.conv1(image_to_channels_last(image))))
        return self.norm2(self.conv2(x))


class Downsample(nn.Module):
    """A 3x3 convolution of stride 2, then norm; ceil(n / 2) tokens a side."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = ChannelsLastConv2d(channels, out_channels, 3, stride=2, padding=1)
        self.norm = LayerNorm(out_channels, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (b, h, w, c) to (b, h', w', c')."""
        return self.norm(self.conv(x))


class GatedCNNBlock(Block):
    """Residual gated convolution: a wide projection of which one part is the gate and one is convolved depthwise.

    The first linear map gives the gate, channels that pass as they are, and channels to convolve, in this order; the
    two latter, as wide together as the gate, are multiplied by its GELU and mapped back.

    Args:
        channels: Channels of input and output.
        arch: The options of all blocks.
        drop_path: Stochastic depth of this block.
    """

    def __init__(self, channels: int, arch: MambaOutArch, drop_path: float) -> None:
        super().__init__()
        hidden, convolved = int(_EXPANSION * channels), int(arch.conv_ratio * channels)
        self.parts = (hidden, hidden - convolved, convolved)
        self.norm = LayerNorm(channels, eps=NORM_EPS)
        self.fc1 = Linear(channels, 2 * hidden)
        self.act = nn.GELU()
        self.conv = ChannelsLastConv2d(
            convolved, convolved, arch.kernel_size, padding=arch.kernel_size // 2, groups=convolved
        )
        self.fc2 = Linear(hidden, channels)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (b, h, w, c) to (b, h, w, c)."""
        normed = self.norm(x)
        dtype = self._chunked_dtype(x)
        if dtype is not None:
            return self._in_chunks(x, normed, dtype)
        gate, passed, convolved = self.fc1(normed).split(self.parts, dim=-1)
        mixed = torch.cat((passed, convolve_depthwise(self.conv, convolved)), dim=-1)
        return x + self.drop_path(self.fc2(self.act(gate) * mixed))

    def _chunked_dtype(self, x: Tensor) -> torch.dtype | None:
        """Return the type in which `_in_chunks` computes for ``x`` (b, h, w, c), None if it must not run.

        It leaves out the modules' ``forward``, so they must be the plain ones, without hooks, and all paths kept.
        """
        if torch.is_grad_enabled() or is_traced() or x.numel() * self.fc1.out_features < _MIN_WORK:
            return None
        fits = (
            type(self.fc1) is type(self.fc2) is Linear
            and type(self.act) is nn.GELU
            and self.act.approximate == "none"
            and type(self.drop_path) is DropPath
            and (self.drop_path.rate == 0.0 or not self.drop_path.training)
            and is_unobserved(self.fc1, self.act, self.fc2, self.drop_path)
        )
        return inference_dtype(x, *self.fc1.parameters(), *self.fc2.parameters()) if fits else None

    def _in_chunks(self, x: Tensor, normed: Tensor, dtype: torch.dtype) -> Tensor:
        """Return what ``forward`` does, of ``x`` and its norm (b, h, w, c), without a map wider than those.

        Only what is convolved is needed beyond a pixel. All else is done for some pixels at a time, whose wide vectors
        stay in the cache.
        """
        gates, passed, _ = self.parts
        w1, b1 = self.fc1.weight.to(dtype), self.fc1.bias.to(dtype)
        w2, b2 = self.fc2.weight.to(dtype), self.fc2.bias.to(dtype)
        start = gates + passed
        convolved = convolve_depthwise(self.conv, linear(normed.to(dtype), w1[start:], b1[start:]))
        out = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, dtype))
        size = chunk_rows(2 * gates)
        pixels = [t.reshape(-1, t.shape[-1]).split(size) for t in (x, normed, convolved, out)]
        for rows, inputs, neighbours, into in zip(*pixels, strict=True):
            inputs = inputs.to(dtype)
            hidden = multiply(inputs, w1[:gates], b1[:gates], gelu=True)
            if passed:
                hidden[:, :passed] *= multiply(inputs, w1[gates:start], b1[gates:start])
            hidden[:, passed:] *= neighbours
            torch.add(rows, multiply(hidden, w2, b2), out=into)
        return out


@MODELS.register_module()
class MambaOut(BaseBackbone):
    """MambaOut as a feature extractor. Stage i has ceil(h / (4 * 2**i)) rows, and columns likewise.

    Args:
        arch: Name of a variant (a key of ``ARCHS``) or a dict with the fields of ``MambaOutArch``.
        in_channels: Channels of the image.
        out_indices: Stages whose output is returned, in rising order.
        drop_path_rate: Stochastic depth of the last block; None takes the variant's own.
        out_norms: Whether every output has a layer norm, as detectors and segmentors want it. False gives what a stage
            computes, which is what the classifier pools.
        frozen_stages, norm_eval, with_cp, init_cfg: See ``BaseBackbone``.

    Raises:
        ConfigError: If an option is unknown, misspelt or impossible.
    """

    def __init__(
        self,
        arch: str | Mapping[str, Any] | MambaOutArch = "tiny",
        *,
        in_channels: int = 3,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        drop_path_rate: float | None = None,
        out_norms: bool = True,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        init_cfg: dict | list[dict] | None = None,
        **unknown: Any,
    ) -> None:
        self.reject_unknown(unknown)
        self.arch = resolve_arch(arch, ARCHS, MambaOutArch)
        super().__init__(in_channels, self.arch.depths, out_indices, frozen_stages, norm_eval, with_cp, init_cfg)
        dims, rate = self.arch.dims, self.arch.drop_path_rate if drop_path_rate is None else drop_path_rate
        self.patch_embed = Stem(in_channels, dims[0])
        rates = drop_path_schedule(rate, self.depths)
        self.layers = nn.ModuleList()
        for i, dim in enumerate(dims):
            blocks = [GatedCNNBlock(dim, self.arch, block_rate) for block_rate in rates[i]]
            last = i == len(dims) - 1
            self.layers.append(Stage(blocks, nn.Identity() if last else Downsample(dim, dims[i + 1])))
        if out_norms:
            self.add_out_norms([LayerNorm(dims[i], eps=NORM_EPS) for i in self.out_indices])
        for module in self.modules():
            if isinstance(module, ChannelsLastConv2d):
                init_like_upstream_(module)
        self.freeze()

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return one contiguous map (b, c_i, h_i, w_i) per entry of ``out_indices`` for an image (b, c, h, w).

        Raises:
            OpInputError: If the image has another number of channels, an integer dtype or an empty side.
        """
        self.check_input(image)
        return self.run_stages(self.patch_embed(image))

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters that are trained without weight decay: all with one dimension."""
        return super().no_weight_decay() | {name for name, p in self.named_parameters() if p.ndim <= 1}


def init_like_upstream_(layer: nn.Conv2d | nn.Linear) -> None:
    """Fill the weight of a layer with a truncated normal of standard deviation 0.02 and its bias with 0."""
    nn.init.trunc_normal_(layer.weight, std=0.02)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
