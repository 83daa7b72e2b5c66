"""EfficientVMamba: atrous selective scan for light-weight visual Mamba (https://arxiv.org/abs/2403.09977).

Upstream: TerryPei/EfficientVMamba, classification/models/vmamba_efficient.py (``EfficientVSSM``,
``Backbone_EfficientVSSM``). Differences: the map is channels-last throughout, every input size from 1x1 up works, the
downsampling after the last used stage is not evaluated, the stages of inverted residuals have ``blocks`` and a
``downsample`` as all others have, and only the scan with a step of two exists (upstream's others leave pixels
without a value). Arguments that upstream takes and never uses are none here. A, D, the time-step bias and all norms
are trained without weight decay, as ``SSMOptimWrapperConstructor`` asks (upstream decays A and the bias and, in its
detectors, the batch norms).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmvmamba.errors import ConfigError
from mmvmamba.models.backbones.arch import check_stages, resolve_arch
from mmvmamba.models.backbones.base import BaseBackbone, Block, Stage
from mmvmamba.models.layers import (
    SS2D,
    BatchNorm,
    ChannelsLastConv2d,
    DropPath,
    LayerNorm,
    Linear,
    Mlp,
    PointwiseConv2d,
    build_downsample,
    build_patch_embed,
    check_choice,
    convolve_depthwise,
    drop_path_schedule,
)
from mmvmamba.models.layers.onednn import linear
from mmvmamba.models.layers.patch import DOWNSAMPLES, Downsample
from mmvmamba.ops import ScanOrder, scan2d
from mmvmamba.registry import MODELS

#: Stages from this one on consist of inverted residuals.
SCAN_STAGES = 2
#: Channels of the bottleneck of either squeeze-and-excitation as a part of the channels it weighs.
SE_RATIO = 0.125
_EXPANSION = 4
#: From this on upstream puts a pair of maps of lower rank around the scan, which no released model has.
_MAX_SSM_RATIO = 2.0


@dataclasses.dataclass(frozen=True)
class EfficientVMambaArch:
    """Everything that distinguishes one EfficientVMamba from another; the defaults are those of the released models.

    Attributes:
        dims: Channels of every stage.
        depths: Blocks of every stage; those of the first two scan, all others are inverted residuals.
        drop_path_rate: Stochastic depth of the released recipe.
        ssm_ratio: Inner channels of the scan as a multiple of the stage's, at most 2.
        mlp_ratio: Hidden channels of the perceptron of a scanning block; 0, as released, means none.
        downsample: See ``layers/patch.py``.
    """

    dims: tuple[int, ...]
    depths: tuple[int, ...]
    drop_path_rate: float = 0.1
    ssm_ratio: float = 2.0
    mlp_ratio: float = 0.0
    downsample: Downsample = "patch_merging"

    def __post_init__(self) -> None:
        """Check what no layer checks by itself."""
        check_stages(dims=self.dims, depths=self.depths)
        check_choice("downsample", self.downsample, DOWNSAMPLES)
        smallest = round(1 / SE_RATIO)
        if min(self.dims[:SCAN_STAGES]) < smallest:
            raise ConfigError(
                f"arch: dims is {self.dims}, expected at least {smallest} channels in the first {SCAN_STAGES} stages, "
                "an eighth of which is the bottleneck of their squeeze-and-excitation. Use more."
            )
        if not 0 < self.ssm_ratio <= _MAX_SSM_RATIO:
            raise ConfigError(
                f"arch: ssm_ratio is {self.ssm_ratio!r}, expected a number above 0 and at most {_MAX_SSM_RATIO:g}. "
                "Released are models with 2."
            )


ARCHS: dict[str, EfficientVMambaArch] = {
    "tiny": EfficientVMambaArch((48, 96, 192, 384), (2, 2, 4, 2)),
    # Upstream's released configs of S have 96 channels; its logs, its published size and its weights have 64.
    "small": EfficientVMambaArch((64, 128, 256, 512), (2, 2, 4, 2)),
    "base": EfficientVMambaArch((96, 192, 384, 768), (2, 2, 9, 2)),
    # For demos and tests on a CPU; not a model of the paper.
    "nano": EfficientVMambaArch((16, 32, 64, 128), (1, 1, 2, 1), 0.0),
}

#: Route over each of the four grids. Grid k holds rows of parity k % 2 and columns of parity k // 2.
GRID_ORDERS = (ScanOrder.ROW, ScanOrder.COLUMN, ScanOrder.ROW, ScanOrder.COLUMN)


def split_grids(x: Tensor) -> list[Tensor]:
    """Copy the pixels of every other row and column together: ``x`` (b, h, w, d), even sides, to four (b, h/2, w/2, d).

    Grid k holds the rows of parity k % 2 and the columns of parity k // 2.
    """
    b, h, w, d = x.shape
    pairs = x.reshape(b, h // 2, 2, w // 2, 2, d)
    return [grid.contiguous() for columns in pairs.unbind(4) for grid in columns.unbind(2)]


def merge_grids(grids: Sequence[Tensor]) -> Tensor:
    """Undo `split_grids`: four of (b, h, w, d) to (b, 2 h, 2 w, d)."""
    b, h, w, d = grids[0].shape
    even_rows, odd_rows = (torch.stack(tuple(grids[parity::2]), dim=3) for parity in (0, 1))
    return torch.stack((even_rows, odd_rows), dim=2).view(b, 2 * h, 2 * w, d)


class ES2D(SS2D):
    """The atrous scan: each of four grids of every other row and column is scanned by itself, with its own parameters.

    A pixel is visited once and there is no way back, so nothing is summed. Odd sides are zero-padded at the bottom and
    at the right; the zeros take part, for the state decays over them.
    """

    def gate(self, z: Tensor) -> Tensor:
        """Activate the gate ``z`` (b, h, w, d), half of a wider map."""
        # On a CPU, at the sizes of dense prediction, a copy and the activation of the copy take half the time.
        return super().gate(z.contiguous() if z.device.type == "cpu" else z)

    def scan(self, x: Tensor) -> Tensor:
        """Scan ``x`` (b, h, w, d) grid by grid; (b, h, w, d) in the accumulation type."""
        _, h, w, _ = x.shape
        if h % 2 or w % 2:
            x = F.pad(x, (0, 0, 0, w % 2, 0, h % 2))
        # One scan over all grids would need the projections of every pixel for all four, of which it uses one.
        own = zip(*(parameter.split(1) for parameter in self.scan_parameters(x.dtype)), strict=True)
        routes = zip(split_grids(x), self.x_proj_weight.unbind(), GRID_ORDERS, own, strict=True)
        scanned = [
            scan2d(
                grid,
                linear(grid, projection).unsqueeze(3),
                *parameters,
                orders=(order,),
                out_dtype=parameters[1].dtype,
            )
            for grid, projection, order, parameters in routes
        ]
        y = merge_grids(scanned)
        return y[:, :h, :w] if h % 2 or w % 2 else y


class BiAttention(nn.Module):
    """Squeeze-and-excitation: every channel is weighed by what the mean over the normed map says.

    Args:
        channels: Channels of input and output.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = int(channels * SE_RATIO)
        self.norm = LayerNorm(channels)
        self.global_reduce = Linear(channels, hidden)
        self.act_fn = nn.GELU()
        self.channel_select = Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (b, h, w, c) to (b, h, w, c); the norm is for the weights alone."""
        mean = self.norm(x).mean((1, 2), keepdim=True)
        return x * self.channel_select(self.act_fn(self.global_reduce(mean))).sigmoid()


class EVSSBlock(Block):
    """An atrous scan beside a convolution, weighed by one squeeze-and-excitation that both share; perhaps an MLP.

    Args:
        channels: Channels of input and output.
        arch: The options of all blocks.
        drop_path: Stochastic depth of this block.
    """

    def __init__(self, channels: int, arch: EfficientVMambaArch, drop_path: float) -> None:
        super().__init__()
        self.norm = LayerNorm(channels)
        self.op = ES2D(channels, ssm_ratio=arch.ssm_ratio)
        self.conv_branch = nn.Sequential(
            _depthwise(channels, bias=True), BatchNorm(channels), nn.GELU(), PointwiseConv2d(channels, channels)
        )
        self.se = BiAttention(channels)
        self.drop_path = DropPath(drop_path)
        self.has_mlp = arch.mlp_ratio > 0
        if self.has_mlp:
            self.norm2 = LayerNorm(channels)
            self.mlp = Mlp(channels, int(channels * arch.mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (b, h, w, c) to (b, h, w, c)."""
        normed = self.norm(x)
        convolved = _run_convolutions(self.conv_branch, normed)
        x = x + self.drop_path(self.se(self.op(normed)) + self.se(convolved))
        if self.has_mlp:
            x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x


class ConvSqueezeExcite(nn.Module):
    """Squeeze-and-excitation of the inverted residuals: of the plain mean, with a ReLU and biases.

    Args:
        channels: Channels of input and output.
        hidden: Channels between.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.conv_reduce = PointwiseConv2d(channels, hidden)
        self.conv_expand = PointwiseConv2d(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (b, h, w, c) to (b, h, w, c)."""
        mean = x.mean((1, 2), keepdim=True)
        return x * self.conv_expand(self.conv_reduce(mean).relu()).sigmoid()


class InvertedResidual(Block):
    """MobileNetV2's block with squeeze-and-excitation: widen, convolve depthwise, weigh, narrow, add.

    Args:
        channels: Channels of input and output.
        drop_path: Stochastic depth of this block.
    """

    def __init__(self, channels: int, drop_path: float) -> None:
        super().__init__()
        wide = _EXPANSION * channels
        self.conv_pw = nn.Sequential(PointwiseConv2d(channels, wide, bias=False), BatchNorm(wide), nn.ReLU())
        self.conv_dw = nn.Sequential(_depthwise(wide, bias=False), BatchNorm(wide), nn.ReLU())
        self.se = ConvSqueezeExcite(wide, max(1, int(SE_RATIO * wide)))
        self.conv_pw2 = nn.Sequential(PointwiseConv2d(wide, channels, bias=False), BatchNorm(channels))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (b, h, w, c) to (b, h, w, c)."""
        y = _run_convolutions(self.conv_dw, self.conv_pw(x))
        return x + self.drop_path(self.conv_pw2(self.se(y)))


@MODELS.register_module()
class EfficientVMamba(BaseBackbone):
    """EfficientVMamba as a feature extractor.

    Stage 0 has floor(h / patch_size) rows, at least one, and every later stage half of those before it, rounded up
    (``downsample="conv2x2"`` rounds down); columns likewise.

    Args:
        arch: Name of a variant (a key of ``ARCHS``) or a dict with the fields of ``EfficientVMambaArch``.
        in_channels: Channels of the image.
        out_indices: Stages whose output is returned, in rising order.
        drop_path_rate: Stochastic depth of the last block; None takes the variant's own.
        patch_size: Stride of the stem.
        patch_norm: Whether the stem has a norm.
        frozen_stages, norm_eval, with_cp, init_cfg: See ``BaseBackbone``.

    Raises:
        ConfigError: If an option is unknown, misspelt or contradicts another.
    """

    def __init__(
        self,
        arch: str | Mapping[str, Any] | EfficientVMambaArch = "tiny",
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
        self.arch = resolve_arch(arch, ARCHS, EfficientVMambaArch)
        super().__init__(in_channels, self.arch.depths, out_indices, frozen_stages, norm_eval, with_cp, init_cfg)
        dims, rate = self.arch.dims, self.arch.drop_path_rate if drop_path_rate is None else drop_path_rate
        self.patch_embed = build_patch_embed(
            "patchify", in_channels, dims[0], patch_size, "layer_norm" if patch_norm else None
        )
        self.layers = nn.ModuleList()
        for i, rates in enumerate(drop_path_schedule(rate, self.depths)):
            blocks: list[Block] = [
                EVSSBlock(dims[i], self.arch, block_rate) if i < SCAN_STAGES else InvertedResidual(dims[i], block_rate)
                for block_rate in rates
            ]
            last = i == len(dims) - 1
            self.layers.append(
                Stage(blocks, nn.Identity() if last else build_downsample(self.arch.downsample, dims[i], dims[i + 1]))
            )
        self.add_out_norms([LayerNorm(dims[i]) for i in self.out_indices])
        self.freeze()

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return one contiguous map (b, c_i, h_i, w_i) per entry of ``out_indices`` for an image (b, c, h, w).

        Raises:
            OpInputError: If the image has another number of channels, an integer dtype or an empty side.
        """
        self.check_input(image)
        return self.run_stages(self.patch_embed(image))


def _depthwise(channels: int, bias: bool) -> ChannelsLastConv2d:
    return ChannelsLastConv2d(channels, channels, 3, padding=1, groups=channels, bias=bias)


def _run_convolutions(body: nn.Sequential, x: Tensor) -> Tensor:
    """Apply ``body``, whose first module is a depthwise convolution, to ``x`` (b, h, w, c)."""
    conv, *rest = body
    x = convolve_depthwise(conv, x)
    for module in rest:
        x = module(x)
    return x
