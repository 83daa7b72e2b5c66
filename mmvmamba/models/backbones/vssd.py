"""VSSD: Vision Mamba with Non-Causal State Space Duality (https://arxiv.org/abs/2407.18559).

Upstream: YuHengsss/VSSD, classification/models/mamba2.py (``VMAMBA2``, ``Backbone_VMAMBA2``), as of August 2024; the
published checkpoints belong to it. The later version of the same title (ICCV 2025: asynchronous states, rotary
positions) is another network. Differences: the map is channels-last throughout, the classifier takes every image size
(upstream's wants multiples of 32), the sums of the mixer are kept in float32 up to its norm in half precision, and
the causal and bidirectional scans of upstream's ablations are not here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmvmamba.errors import ConfigError
from mmvmamba.models.backbones.arch import check_stages, resolve_arch
from mmvmamba.models.backbones.base import BaseBackbone, Block, Stage
from mmvmamba.models.layers import (
    BatchNorm,
    ChannelsLastConv2d,
    DropPath,
    LayerNorm,
    Linear,
    Mlp,
    check_choice,
    convolve_depthwise,
    drop_path_schedule,
)
from mmvmamba.models.layers.conv_bn import fold_norm
from mmvmamba.models.layers.observers import is_unobserved
from mmvmamba.models.layers.onednn import is_traced, linear
from mmvmamba.models.layers.patch import image_to_channels_last
from mmvmamba.models.layers.pointwise import PointwiseConv2d
from mmvmamba.models.layers.ssm_init import init_dt_bias_
from mmvmamba.ops import ssd_non_causal
from mmvmamba.ops.ssd.heads import accumulation
from mmvmamba.registry import MODELS

Mixer = Literal["ssd", "attention"]
MIXERS: tuple[str, ...] = get_args(Mixer)
A_MIN, A_MAX = 1.0, 16.0


@dataclasses.dataclass(frozen=True)
class VSSDArch:
    """Everything that distinguishes one VSSD from another.

    Attributes:
        dims: Channels of every stage.
        depths: Blocks of every stage.
        num_heads: Heads of every stage, in either mixer.
        drop_path_rate: Stochastic depth of the released recipe.
        d_state: Size n of the state of one channel.
        expansion: Inner channels of the mixer as a multiple of the stage's.
        num_groups: Groups of heads that share B and C; None gives every head its own.
        positive_weight: Whether tokens are summed with weight ``dt * exp(A_log)``, as in all released models, or with
            its negative (an ablation of the paper).
        mixers: What mixes the tokens of every stage.
        mlp_ratio: Hidden channels of the perceptron as a multiple of the stage's.
        dropout: Dropout probability of tokens after the stem, of perceptrons and of attention weights.
    """

    dims: tuple[int, ...]
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    drop_path_rate: float = 0.2
    d_state: int = 64
    expansion: float = 2
    num_groups: int | None = 1
    positive_weight: bool = True
    mixers: tuple[Mixer, ...] = ("ssd", "ssd", "ssd", "attention")
    mlp_ratio: float = 4.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        """Check what no layer checks by itself."""
        check_stages(dims=self.dims, depths=self.depths, num_heads=self.num_heads)
        if self.dims[0] < 2:
            raise ConfigError(f"arch: dims is {self.dims}, expected at least 2 in the first stage. Use a larger value.")
        if not isinstance(self.mixers, tuple) or len(self.mixers) != len(self.dims):
            raise ConfigError(
                f"arch: mixers is {self.mixers!r}, expected one of {', '.join(map(repr, MIXERS))} for each of the "
                f"{len(self.dims)} stages. Correct it."
            )
        for mixer in self.mixers:
            check_choice("mixers", mixer, MIXERS)


_HEADS = (2, 4, 8, 16)

ARCHS: dict[str, VSSDArch] = {
    "micro": VSSDArch((48, 96, 192, 384), (2, 2, 8, 4), _HEADS, 0.2, d_state=48),
    "tiny": VSSDArch((64, 128, 256, 512), (2, 4, 8, 4), _HEADS, 0.2),
    "small": VSSDArch((64, 128, 256, 512), (3, 4, 21, 5), _HEADS, 0.4),
    "base": VSSDArch((96, 192, 384, 768), (3, 4, 21, 5), (3, 6, 12, 24), 0.6),
    # For demos and tests on a CPU; not a model of the paper.
    "nano": VSSDArch((16, 32, 64, 128), (1, 1, 2, 1), _HEADS, 0.0, d_state=16),
}


class ConvNorm(nn.Module):
    """Convolution, batch norm and ReLU, of which the last two can be left out.

    Args:
        in_channels: Channels of the input.
        channels: Channels of the output.
        kernel: Side of the kernel, odd; half of it is padded with zeros.
        stride: Step of the convolution.
        groups: As for ``nn.Conv2d``.
        bias: Whether the convolution has a bias.
        norm: Whether a batch norm follows.
        act: Whether a ReLU follows.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        kernel: int,
        *,
        stride: int = 1,
        groups: int = 1,
        bias: bool = False,
        norm: bool = True,
        act: bool = True,
    ) -> None:
        super().__init__()
        self.conv: nn.Conv2d
        if kernel == stride == groups == 1:
            self.conv = PointwiseConv2d(in_channels, channels, bias=bias)
        else:
            self.conv = ChannelsLastConv2d(
                in_channels, channels, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=bias
            )
        self.norm: nn.Module = BatchNorm(channels) if norm else nn.Identity()
        self.act: nn.Module = nn.ReLU() if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (b, h, w, c) to (b, ceil(h / stride), ceil(w / stride), c')."""
        out: Tensor = self.norm(self.conv(x))
        inference = not torch.is_grad_enabled() and not is_traced()
        if inference and type(self.act) is nn.ReLU and is_unobserved(self.conv, self.norm, self.act):
            # The widest maps of the network are here. While training, in place would cost copies of the gradients.
            return out.relu_()
        out = self.act(out)
        return out

    def fold_batch_norms(self) -> None:
        """Make the norm, if there is one, a part of the convolution. For `mmvmamba.models.deploy` alone."""
        if not isinstance(self.norm, nn.Identity):
            self.conv, self.norm = fold_norm(self.conv, self.norm), nn.Identity()


class Stem(nn.Module):
    """Convolutions that halve the image twice, with a residual pair between; no activation at the end.

    Args:
        in_channels: Channels of the image.
        channels: Channels of the tokens.
    """

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = ConvNorm(in_channels, half, 3, stride=2)
        self.conv2 = nn.Sequential(ConvNorm(half, half, 3), ConvNorm(half, half, 3, act=False))
        self.conv3 = nn.Sequential(
            ConvNorm(half, 4 * channels, 3, stride=2), ConvNorm(4 * channels, channels, 1, act=False)
        )

    def forward(self, image: Tensor) -> Tensor:
        """Map an image (b, c, h, w) to tokens (b, ceil(h / 4), ceil(w / 4), d)."""
        x = self.conv1(image_to_channels_last(image))
        out: Tensor = self.conv3(self.conv2(x) + x)
        return out


class PatchMerging(nn.Module):
    """Widen, convolve depthwise with stride 2, narrow to the next stage's channels; ceil(n / 2) tokens a side remain.

    Only the last of the three convolutions has a norm, although all have a bias.
    """

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        hidden = 4 * out_channels
        self.conv = nn.Sequential(
            ConvNorm(channels, hidden, 1, bias=True, norm=False),
            ConvNorm(hidden, hidden, 3, stride=2, groups=hidden, bias=True, norm=False),
            ConvNorm(hidden, out_channels, 1, bias=True, act=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (b, h, w, c) to (b, ceil(h / 2), ceil(w / 2), c')."""
        out: Tensor = self.conv(x)
        return out


class NonCausalSSD(nn.Module):
    """State-space duality without an order of the tokens: every token reads one state that all have written to.

    The state of head j is the sum over all tokens of B (outer) (w x), with the weight ``w = dt * exp(A_log)`` of
    token and head; token l reads ``C_l`` times it and adds ``D x_l``. Nothing decays along a sequence and nothing is
    divided by its length: the norm that follows takes the magnitude out. Upstream quirk, kept because weights depend
    on it: the gate z is not activated, and the norm comes before it.

    Args:
        channels: Channels of input and output.
        num_heads: Heads k; inner channel i belongs to head i // p, with p channels each.
        d_state: Size n of the state of one channel.
        expansion: Inner channels e as a multiple of ``channels``.
        num_groups: Groups g of heads that share B and C, head j those of group j % g; None gives every head its own.
        positive_weight: Whether the weights are positive.

    Raises:
        ConfigError: If a size is impossible.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        d_state: int = 64,
        expansion: float = 2,
        num_groups: int | None = 1,
        positive_weight: bool = True,
    ) -> None:
        super().__init__()
        inner = int(expansion * channels)
        groups = num_heads if num_groups is None else num_groups
        _check_sizes(inner, num_heads, groups, d_state)
        self.inner, self.num_heads, self.num_groups, self.d_state = inner, num_heads, groups, d_state
        self.positive_weight = positive_weight
        mixed = inner + 2 * groups * d_state
        self.dt_bias = nn.Parameter(torch.empty(num_heads))
        self.A_log = nn.Parameter(torch.empty(num_heads))
        self.D = nn.Parameter(torch.ones(num_heads))
        self.in_proj = Linear(channels, inner + mixed + num_heads, bias=False)
        self.conv2d = ChannelsLastConv2d(mixed, mixed, 3, padding=1, groups=mixed)
        self.act = nn.SiLU()
        self.norm = LayerNorm(inner)
        self.out_proj = Linear(inner, channels, bias=False)
        init_dt_bias_(self.dt_bias)
        with torch.no_grad():
            self.A_log.uniform_(A_MIN, A_MAX).log_()

    def no_weight_decay(self) -> set[str]:
        """Return the parameters of its own that a recipe must not pull towards zero."""
        return {"dt_bias", "A_log", "D"}

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (b, h, w, c) to (b, h, w, c)."""
        z, y, dt = self._project_in(x)
        y = convolve_depthwise(self.conv2d, y, self.act)
        mixed = self.mix(y, dt).reshape(z.shape)
        # The sums stay float32 up to and including the norm: they grow with the number of tokens.
        out: Tensor = self.out_proj(self.norm(mixed).to(y.dtype) * z)
        return out

    def _project_in(self, x: Tensor) -> Sequence[Tensor]:
        """Return the gate (b, h, w, e), what is convolved (b, h, w, e + 2 g n) and the time steps (b, h, w, k)."""
        parts = [self.inner, self.conv2d.in_channels, self.num_heads]
        plain = type(self.in_proj) is Linear and is_unobserved(self.in_proj)
        if plain and not is_traced() and torch.is_grad_enabled():
            # One product each: the backward pass of a split would copy the gradient of the whole wide map.
            return [linear(x, weight) for weight in self.in_proj.weight.split(parts)]
        return self.in_proj(x).split(parts, dim=-1)

    def mix(self, y: Tensor, dt: Tensor) -> Tensor:
        """Sum the state over all tokens and read it; (b, l, k, p) in the accumulation type.

        Args:
            y: x, B and C of every pixel (b, h, w, e + 2 g n).
            dt: Time steps before bias and softplus (b, h, w, k).
        """
        states = self.num_groups * self.d_state
        x, b_in, c_out = y.flatten(1, 2).split([self.inner, states, states], dim=-1)
        return ssd_non_causal(
            x.unflatten(-1, (self.num_heads, -1)),
            self.weights(dt).flatten(1, 2),
            b_in.unflatten(-1, (self.num_groups, self.d_state)),
            c_out.unflatten(-1, (self.num_groups, self.d_state)),
            self.D.to(accumulation(y.dtype)),
            out_dtype=accumulation(y.dtype),
        )

    def weights(self, dt: Tensor) -> Tensor:
        """Return the weight of every token and head (..., k) in the accumulation type."""
        accumulate = accumulation(dt.dtype)
        rate = torch.exp(self.A_log.to(accumulate))
        step = F.softplus(dt.to(accumulate) + self.dt_bias.to(accumulate))
        return step * (rate if self.positive_weight else -rate)


class Attention(nn.Module):
    """Softmax attention of every token to all, without positions.

    Memory grows with the tokens, not their square, where PyTorch has a fused kernel: on a CPU not with dropout.

    Args:
        channels: Channels of input and output.
        num_heads: Heads.
        dropout: Dropout probability of the attention weights.

    Raises:
        ConfigError: If the heads do not divide the channels.
    """

    def __init__(self, channels: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if channels % num_heads:
            raise ConfigError(
                f"arch: num_heads is {num_heads} in a stage of {channels} channels with attention, expected a divisor. "
                "Correct dims or num_heads."
            )
        self.num_heads, self.dropout = num_heads, dropout
        self.to_qkv = Linear(channels, 3 * channels, bias=False)
        self.to_out = Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (b, h, w, c) to (b, h, w, c)."""
        heads = self.to_qkv(x).flatten(1, 2).unflatten(-1, (3, self.num_heads, -1))  # (b, l, 3, k, p)
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        out: Tensor = self.to_out(y.transpose(1, 2).reshape(x.shape))
        return out


class VSSDBlock(Block):
    """Residual mixer, then residual perceptron, each after its norm and a residual depthwise convolution.

    Args:
        channels: Channels of input and output.
        num_heads: Heads of the mixer.
        mixer: Which mixer.
        arch: The options of all blocks.
        drop_path: Stochastic depth of this block; the convolutions are never dropped.
    """

    def __init__(self, channels: int, num_heads: int, mixer: Mixer, arch: VSSDArch, drop_path: float) -> None:
        super().__init__()
        self.cpe1 = ChannelsLastConv2d(channels, channels, 3, padding=1, groups=channels)
        self.norm1 = LayerNorm(channels)
        self.attn: nn.Module
        if mixer == "attention":
            self.attn = Attention(channels, num_heads, arch.dropout)
        else:
            self.attn = NonCausalSSD(
                channels, num_heads, arch.d_state, arch.expansion, arch.num_groups, arch.positive_weight
            )
        self.cpe2 = ChannelsLastConv2d(channels, channels, 3, padding=1, groups=channels)
        self.norm2 = LayerNorm(channels)
        self.mlp = Mlp(channels, int(channels * arch.mlp_ratio), dropout=arch.dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (b, h, w, c) to (b, h, w, c)."""
        x = x + convolve_depthwise(self.cpe1, x)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = x + convolve_depthwise(self.cpe2, x)
        return x + self.drop_path(self.mlp(self.norm2(x)))


@MODELS.register_module()
class VSSD(BaseBackbone):
    """VSSD as a feature extractor.

    Stage i has ceil(h / (4 * 2**i)) rows, and columns likewise.

    Args:
        arch: Name of a variant (a key of ``ARCHS``) or a dict with the fields of ``VSSDArch``.
        in_channels: Channels of the image.
        out_indices: Stages whose output is returned, in rising order.
        drop_path_rate: Stochastic depth of the last block; None takes the variant's own.
        frozen_stages, norm_eval, with_cp, init_cfg: See ``BaseBackbone``.

    Raises:
        ConfigError: If an option is unknown, misspelt or contradicts another.
    """

    def __init__(
        self,
        arch: str | Mapping[str, Any] | VSSDArch = "tiny",
        *,
        in_channels: int = 3,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        drop_path_rate: float | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        init_cfg: dict | list[dict] | None = None,
        **unknown: Any,
    ) -> None:
        self.reject_unknown(unknown)
        self.arch = resolve_arch(arch, ARCHS, VSSDArch)
        super().__init__(in_channels, self.arch.depths, out_indices, frozen_stages, norm_eval, with_cp, init_cfg)
        dims, rate = self.arch.dims, self.arch.drop_path_rate if drop_path_rate is None else drop_path_rate
        self.patch_embed = Stem(in_channels, dims[0])
        self.pos_drop = nn.Dropout(self.arch.dropout)
        rates = drop_path_schedule(rate, self.depths)
        self.layers = nn.ModuleList()
        for i, (dim, heads, mixer) in enumerate(zip(dims, self.arch.num_heads, self.arch.mixers, strict=True)):
            blocks = [VSSDBlock(dim, heads, mixer, self.arch, block_rate) for block_rate in rates[i]]
            last = i == len(dims) - 1
            self.layers.append(Stage(blocks, nn.Identity() if last else PatchMerging(dim, dims[i + 1])))
        self.add_out_norms([LayerNorm(dims[i]) for i in self.out_indices])
        self.freeze()

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return one contiguous map (b, c_i, h_i, w_i) per entry of ``out_indices`` for an image (b, c, h, w).

        Raises:
            OpInputError: If the image has another number of channels, an integer dtype or an empty side.
        """
        self.check_input(image)
        return self.run_stages(self.pos_drop(self.patch_embed(image)))


def _check_sizes(inner: int, num_heads: int, groups: int, d_state: int) -> None:
    for name, value in (("d_state", d_state), ("num_groups", groups), ("num_heads", num_heads), ("expansion", inner)):
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"arch: {name} makes {value!r}, expected an integer of at least 1. Use a larger value.")
    if inner % num_heads or num_heads % groups:
        raise ConfigError(
            f"arch: {num_heads} heads in {groups} groups for {inner} inner channels, expected that num_heads divides "
            "dims times expansion and num_groups divides num_heads. Correct one of them."
        )
