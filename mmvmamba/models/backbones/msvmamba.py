"""MSVMamba: VMamba with one scan of the map and three of a map of half its resolution.

Paper: "Multi-Scale VMamba: Hierarchy in Hierarchy Visual State Space Model" (https://arxiv.org/abs/2405.14174).
Upstream: YuHengsss/MSVMamba, classification/models/vmamba.py (``VSSM`` and ``Backbone_VSSM``) on two branches, here the
generations v1 (branch master, c394019) and v3 (branch v2, fca4a39); configs/README.md holds the recipes.

Kept from upstream, because released weights depend on it: the three scans of the half map are one sequence whose state
runs on from each to the next, with one set of scan parameters; the 7x7 convolution of stride 2 sees the projected map
before any other convolution; v1 norms every scanned token and resizes bilinearly, v3 norms the sum and repeats pixels;
v3 norms the result of the feed-forward part instead of its input; the two sets of parameters are in opposite order.

Differences: maps stay channels-last; the scans are two calls of one operator, so that nothing is reversed or
transposed in memory; A, D and the time-step bias are trained without weight decay, as ``SSMOptimWrapperConstructor``
asks (upstream decays A and the bias).
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
    SS2D,
    ChannelsLastConv2d,
    DropPath,
    Mlp,
    PointwiseConv2d,
    SqueezeExcite,
    build_downsample,
    build_norm,
    build_patch_embed,
    check_choice,
    convolve_depthwise,
    drop_path_schedule,
)
from mmvmamba.models.layers.activation import Activation
from mmvmamba.models.layers.checks import check_hidden
from mmvmamba.models.layers.depthwise import can_fuse_depthwise
from mmvmamba.models.layers.norm import Norm
from mmvmamba.models.layers.onednn import linear
from mmvmamba.models.layers.patch import Downsample, PatchEmbed
from mmvmamba.models.layers.ss2d import OutNorm
from mmvmamba.models.layers.ssm_init import SSMInit
from mmvmamba.ops import ScanOrder, depthwise_conv2d, scan2d
from mmvmamba.ops.scan2d.orders import order_to_permutation, remember_range
from mmvmamba.registry import MODELS

Generation = Literal["v1", "v3"]
Route = Literal["row", "column", "row_reversed", "column_reversed"]
FeedForward = Literal["conv", "mlp", "none"]
GENERATIONS: tuple[str, ...] = get_args(Generation)
ROUTES: tuple[str, ...] = get_args(Route)
FEED_FORWARDS: tuple[str, ...] = get_args(FeedForward)


@dataclasses.dataclass(frozen=True)
class MSVMambaArch:
    """Everything that distinguishes one MSVMamba from another; the defaults are those of the released v1 models.

    Attributes:
        dims: Channels of every stage.
        depths: Blocks of every stage.
        drop_path_rate: Stochastic depth of the released recipe.
        generation: How the two resolutions meet, see ``MultiScaleSS2D``.
        d_state, ssm_ratio, dt_rank, ssm_act, conv_kernel, conv_bias, ssm_dropout, ssm_init, gated, gate_act,
            out_norm, out_act: See ``SS2D``.
        squeeze_excite: Whether the channels of the merged map are scaled by a squeeze and excitation.
        full_route: The route over the map.
        half_routes: The routes over the half map, walked one after the other with one state.
        ffn: ``"conv"`` is ``ConvFFN``, ``"mlp"`` the perceptron of VMamba, ``"none"`` leaves the part out.
        ffn_ratio: Its inner channels as a multiple of the block's.
        ffn_act: Activation of ``"mlp"``; ``"conv"`` has a GELU.
        ffn_dropout: Dropout after either of its linear maps.
        ffn_post_norm: Whether its result is normed instead of its input.
        norm: Kind of every norm outside the scan.
        patch_embed, downsample: See ``layers/patch.py``.
    """

    dims: tuple[int, ...]
    depths: tuple[int, ...]
    drop_path_rate: float = 0.2
    generation: Generation = "v1"
    d_state: int = 1
    ssm_ratio: float = 2.0
    dt_rank: int | None = None
    ssm_act: Activation = "silu"
    conv_kernel: int = 3
    conv_bias: bool = True
    ssm_dropout: float = 0.0
    ssm_init: SSMInit = "mamba"
    gated: bool = True
    gate_act: bool = True
    out_norm: OutNorm = "layer_norm"
    out_act: bool = False
    squeeze_excite: bool = True
    full_route: Route = "row"
    half_routes: tuple[Route, ...] = ("row_reversed", "column", "column_reversed")
    ffn: FeedForward = "conv"
    ffn_ratio: float = 2.0
    ffn_act: Activation = "gelu"
    ffn_dropout: float = 0.0
    ffn_post_norm: bool = False
    norm: Norm = "layer_norm"
    patch_embed: PatchEmbed = "patchify"
    downsample: Downsample = "patch_merging"

    def __post_init__(self) -> None:
        """Check what no layer checks by itself."""
        check_stages(dims=self.dims, depths=self.depths)
        check_choice("generation", self.generation, GENERATIONS)
        check_choice("ffn", self.ffn, FEED_FORWARDS)
        for route in (self.full_route, *self.half_routes):
            check_choice("full_route or half_routes", route, ROUTES)
        if self.generation == "v1" and self.out_norm != "layer_norm":
            raise ConfigError(
                f"arch: out_norm is {self.out_norm!r} with generation='v1', expected 'layer_norm': it norms single "
                "tokens. Use 'layer_norm' or generation='v3'."
            )
        if not self.half_routes:
            raise ConfigError(
                "arch: half_routes is (), expected at least one route over the half map. For a network without it "
                "use VMamba."
            )


_V3: dict[str, Any] = dict(
    generation="v3",
    ssm_ratio=1.0,
    gated=False,
    ffn_ratio=4.0,
    ffn_post_norm=True,
    patch_embed="overlapping",
    downsample="conv3x3",
)

ARCHS: dict[str, MSVMambaArch] = {
    "v1-nano": MSVMambaArch((48, 96, 192, 384), (1, 2, 5, 2)),
    "v1-micro": MSVMambaArch((64, 128, 256, 512), (1, 2, 5, 2)),
    "v1-tiny": MSVMambaArch((96, 192, 384, 768), (1, 2, 9, 2)),
    "v3-tiny": MSVMambaArch((96, 192, 384, 768), (2, 2, 9, 2), 0.2, **_V3),
    "v3-small": MSVMambaArch((96, 192, 384, 768), (2, 3, 20, 2), 0.4, **_V3),
    "v3-base": MSVMambaArch((128, 256, 512, 1024), (2, 4, 18, 2), 0.5, **(_V3 | {"gated": True})),
    # For demos and tests on a CPU; neither is a model of the paper ("v1-nano" is its smallest).
    "nano": MSVMambaArch((16, 32, 64, 128), (1, 1, 2, 1), 0.0),
    "nano-v3": MSVMambaArch((16, 32, 64, 128), (1, 1, 2, 1), 0.0, **(_V3 | {"gated": True})),
}


class MultiScaleSS2D(SS2D):
    """Scan a map along one route and its half along three, and add the two.

    The half map is a depthwise 7x7 convolution of stride 2 of the same input as the full map's convolution has; its
    three routes are one sequence. Either resolution has one set of scan parameters. Generation ``"v1"`` norms every
    token of both sequences, adds up the routes of the half map, resizes it bilinearly and adds it to the full map, and
    keeps the half map's parameters first. ``"v3"`` adds up the routes, repeats the pixels of the half map, adds it to
    the full map and norms the sum, and keeps the full map's parameters first.

    Args:
        channels: Channels of input and output.
        arch: The options of all blocks.
    """

    def __init__(self, channels: int, arch: MSVMambaArch) -> None:
        route = ScanOrder[arch.full_route.upper()]
        super().__init__(
            channels,
            d_state=arch.d_state,
            ssm_ratio=arch.ssm_ratio,
            dt_rank=arch.dt_rank,
            gated=arch.gated,
            gate_act=arch.gate_act,
            conv_kernel=arch.conv_kernel,
            conv_bias=arch.conv_bias,
            act=arch.ssm_act,
            out_norm=arch.out_norm,
            out_act=arch.out_act,
            scan_orders=(route, route),  # for the number of parameter sets, one of which is the half map's
            ssm_init=arch.ssm_init,
            dropout=arch.ssm_dropout,
        )
        self.full_route = route
        self.half_routes = tuple(ScanOrder[name.upper()] for name in arch.half_routes)
        self.norms_tokens = arch.generation == "v1"
        self.full_set, self.half_set = (1, 0) if arch.generation == "v1" else (0, 1)
        self.se = SqueezeExcite(self.inner, reduction=8) if arch.squeeze_excite else None
        self.conv2d_b1 = ChannelsLastConv2d(
            self.inner, self.inner, 7, stride=2, padding=3, groups=self.inner, bias=arch.conv_bias
        )

    def convolve_and_scan(self, x: Tensor) -> Tensor:
        """Return the merged scans of both resolutions of ``x`` (b, h, w, d), which may be part of a wider map."""
        _, h, w, _ = x.shape
        full, half = self._convolve(x), convolve_depthwise(self.conv2d_b1, x, self.act)
        sets = list(zip(*(values.split(1) for values in self.scan_parameters(x.dtype)), strict=True))
        scanned = self._scan_set(full, self.full_set, sets[self.full_set], (self.full_route,))
        if self.norms_tokens:
            scanned = self.out_norm(scanned)
            return scanned + _resize(self._half_of_normed_tokens(half, sets[self.half_set]), h, w, "bilinear")
        route = half_route(half, self.half_routes)
        return scanned + _resize(self._scan_set(half, self.half_set, sets[self.half_set], route), h, w, "nearest")

    def project(self, y: Tensor, z: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Scale and gate the merged map ``y`` (b, h, w, d) and project it back in ``dtype``; (b, h, w, c)."""
        y = (y if self.norms_tokens else self.out_norm(y)).to(dtype)
        factor = None if self.se is None else self.se.scale(y)
        if type(self.out_act) is not nn.Identity:
            y, factor = self.out_act(y if factor is None else y * factor), None
        if z is not None:
            factor = z if factor is None else z * factor
        return self.dropout(self.out_proj(y if factor is None else y * factor))

    def _scan_set(
        self, x: Tensor, index: int, parameters: tuple[Tensor, ...], routes: Sequence[ScanOrder] | Tensor
    ) -> Tensor:
        """Scan ``x`` (b, h, w, d) along one route with one set of parameters; same shape."""
        return scan2d(x, self._projections(x, index), *parameters, orders=routes, out_dtype=parameters[1].dtype)

    def _projections(self, x: Tensor, index: int) -> Tensor:
        """Return step size, B and C of a set of parameters (b, h, w, 1, r + 2 n) for ``x`` (b, h, w, d)."""
        return linear(x, self.x_proj_weight[index]).unsqueeze(3)

    def _half_of_normed_tokens(self, x: Tensor, parameters: tuple[Tensor, ...]) -> Tensor:
        """Scan the half map ``x`` (b, h, w, d), norm every token and add up the routes; same shape.

        The norm wants the routes apart, so there are as many copies of the map, each walked along a route of its own.
        """
        b, h, w, d = x.shape
        copies = len(self.half_routes)
        projections = self._projections(x, self.half_set)
        scanned = scan2d(
            _repeat(x, copies),
            _repeat(projections, copies),
            *parameters,
            orders=half_route(x, self.half_routes, apart=True),
            out_dtype=parameters[1].dtype,
        )
        tokens: Tensor = self.out_norm(scanned)
        return tokens.view(b, copies, h, w, d).sum(1)


def half_route(x: Tensor, routes: Sequence[ScanOrder], apart: bool = False) -> Tensor:
    """Return one walk along all ``routes``, one after the other, as pixel indices (1, k h w).

    Args:
        x: The map (b, h, w, d).
        routes: k of them.
        apart: Whether each has a map of its own, below the one before it, instead of all the same.
    """
    _, h, w, _ = x.shape
    walks = [order_to_permutation(route, h, w, x.device) for route in routes]
    if apart:
        walks = [walk + i * h * w for i, walk in enumerate(walks)]
    return remember_range(torch.cat(walks).unsqueeze(0), 0, h * w * (len(routes) if apart else 1) - 1)


def _repeat(x: Tensor, copies: int) -> Tensor:
    """Put ``copies`` of a map (b, h, w, ...) below one another; (b, copies * h, w, ...)."""
    return x.unsqueeze(1).expand(-1, copies, *x.shape[1:]).flatten(1, 2)


def _resize(x: Tensor, h: int, w: int, mode: str) -> Tensor:
    """Resize a map (b, h', w', d) to (b, h, w, d)."""
    return F.interpolate(x.permute(0, 3, 1, 2), size=(h, w), mode=mode).permute(0, 2, 3, 1)


class ConvFFN(nn.Module):
    """Linear map, depthwise 3x3 convolution added to its input, GELU, linear map.

    Args:
        channels: Channels of input and output.
        hidden: Channels between.
        dropout: Dropout probability after either linear map.

    Raises:
        ConfigError: If there are no hidden channels.
    """

    def __init__(self, channels: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        check_hidden("ConvFFN", hidden)
        self.linear1 = PointwiseConv2d(channels, hidden)
        self.linear2 = PointwiseConv2d(hidden, channels)
        self.dwc = ChannelsLastConv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.act = nn.GELU()
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (b, h, w, c) to (b, h, w, c)."""
        x = self.act(self._convolve_and_add(self.drop(self.linear1(x))))
        return self.drop(self.linear2(x))

    def _convolve_and_add(self, x: Tensor) -> Tensor:
        """Return ``x + dwc(x)`` of ``x`` (b, h, w, d)."""
        conv = self.dwc
        if can_fuse_depthwise(conv, x) and x.dtype == conv.weight.dtype in (torch.float32, torch.float64):
            # One more in the middle of the kernel is the sum; a narrower type would lose small weights beside the 1.
            middle = F.pad(conv.weight.new_ones(1, 1, 1, 1), (1, 1, 1, 1))
            return depthwise_conv2d(x, conv.weight + middle, conv.bias)
        return x + convolve_depthwise(conv, x)


class MSVMambaBlock(Block):
    """Residual multi-scale scan, then residual feed-forward part, each with its norm.

    Args:
        channels: Channels of input and output.
        arch: The options of all blocks.
        drop_path: Stochastic depth of this block.
    """

    def __init__(self, channels: int, arch: MSVMambaArch, drop_path: float) -> None:
        super().__init__()
        self.post_norm = arch.ffn_post_norm
        self.norm = build_norm(arch.norm, channels)
        self.op = MultiScaleSS2D(channels, arch)
        self.drop_path = DropPath(drop_path)
        self.convFFN: ConvFFN | None = None
        self.mlp: Mlp | None = None
        hidden = int(channels * arch.ffn_ratio)
        if arch.ffn == "conv":
            self.convFFN = ConvFFN(channels, hidden, arch.ffn_dropout)
        elif arch.ffn == "mlp":
            self.mlp = Mlp(channels, hidden, arch.ffn_act, arch.ffn_dropout)
        if arch.ffn != "none":
            self.norm2 = build_norm(arch.norm, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (b, h, w, c) to (b, h, w, c)."""
        x = x + self.drop_path(self.op(self.norm(x)))
        ffn = self.convFFN if self.mlp is None else self.mlp
        if ffn is not None:
            x = x + self.drop_path(self.norm2(ffn(x)) if self.post_norm else ffn(self.norm2(x)))
        return x


@MODELS.register_module()
class MSVMamba(BaseBackbone):
    """MSVMamba as a feature extractor.

    Stage i of a v3 has ceil(h / (4 * 2**i)) rows, and columns likewise. The stem of a v1 rounds down, to
    floor(h / 4), and zero-pads images below one patch; its downsamplings round up.

    Args:
        arch: Name of a variant (a key of ``ARCHS``) or a dict with the fields of ``MSVMambaArch``.
        in_channels: Channels of the image.
        out_indices: Stages whose output is returned, in rising order.
        drop_path_rate: Stochastic depth of the last block; None takes the variant's own.
        patch_size: Stride of the stem.
        patch_norm: Whether the stem has norms.
        frozen_stages, norm_eval, with_cp, init_cfg: See ``BaseBackbone``.

    Raises:
        ConfigError: If an option is unknown, misspelt or contradicts another.
    """

    def __init__(
        self,
        arch: str | Mapping[str, Any] | MSVMambaArch = "v1-tiny",
        *,
        in_channels: int = 3,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        drop_path_rate: float | None = None,
        patch_size: int = 4,
        patch_norm: bool = True,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        init_cfg: dict | list[dict] | None = None,
        **unknown: Any,
    ) -> None:
        self.reject_unknown(unknown)
        self.arch = resolve_arch(arch, ARCHS, MSVMambaArch)
        super().__init__(in_channels, self.arch.depths, out_indices, frozen_stages, norm_eval, with_cp, init_cfg)
        dims, rate = self.arch.dims, self.arch.drop_path_rate if drop_path_rate is None else drop_path_rate
        stem_norm = self.arch.norm if patch_norm else None
        self.patch_embed = build_patch_embed(self.arch.patch_embed, in_channels, dims[0], patch_size, stem_norm)

        rates = drop_path_schedule(rate, self.depths)
        self.layers = nn.ModuleList()
        for i, dim in enumerate(dims):
            blocks = [MSVMambaBlock(dim, self.arch, block_rate) for block_rate in rates[i]]
            last = i == len(dims) - 1
            downsample = (
                nn.Identity() if last else build_downsample(self.arch.downsample, dim, dims[i + 1], self.arch.norm)
            )
            self.layers.append(Stage(blocks, downsample))
        self.add_out_norms([build_norm(self.arch.norm, dims[i]) for i in self.out_indices])
        self.freeze()

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return one contiguous map (b, c_i, h_i, w_i) per entry of ``out_indices`` for an image (b, c, h, w).

        Raises:
            OpInputError: If the image has another number of channels, an integer dtype or an empty side.
        """
        self.check_input(image)
        return self.run_stages(self.patch_embed(image))
