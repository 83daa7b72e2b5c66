"""HRVMamba: high-resolution visual state space model for dense prediction (https://arxiv.org/abs/2410.03174).

An HRNet whose branches, one per stride and all kept to the end, consist of VMamba's blocks with a deformable
aggregation before the scan and depthwise convolutions of four sizes before that.

Upstream: zhanghao5201/HRVMamba, classification/models/hrvmamba.py and hrvmamba_se_lpu.py (``HRVmamba``,
``HRVmamba_se_lpu``), semantic_segmentation/tools/hrvmamba.py (``Backbone_HRVMamba``) and
pose_estimation/mmpose/models/backbones/hrvmamba.py (``HRVmamba``). Differences: variants are named options, maps are
channels-last throughout, every size from 1x1 up works in all forms (upstream's pose form takes multiples of 32), what
no output needs is not evaluated, and all three residual branches of a block have stochastic depth (in upstream's pose
form the first has none). The deformable aggregation runs on a CPU as on a GPU. Weights start as upstream's classifier
does; its feature extractors start with offsets and masks of zero and PyTorch's linear maps, on which nothing depends
that begins with a classifier's weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from mmvmamba.errors import ConfigError
from mmvmamba.models.backbones.arch import check_stages, resolve_arch
from mmvmamba.models.backbones.base import BaseBackbone, Block
from mmvmamba.models.layers import (
    SS2D,
    ChannelsLastConv2d,
    ConvBN,
    DropPath,
    LayerNorm,
    Mlp,
    SqueezeExcite,
    check_choice,
    convolve_depthwise,
    drop_path_schedule,
)
from mmvmamba.models.layers.activation import Activation
from mmvmamba.models.layers.deformable_aggregation import DeformableAggregation
from mmvmamba.models.layers.fused_block import fused_tail, fused_tail_dtype
from mmvmamba.models.layers.high_resolution import EXPANSION, Bottleneck, HighResolutionModule, ScaleFusion
from mmvmamba.models.layers.mixed_depthwise import MixedDepthwise
from mmvmamba.models.layers.observers import is_unobserved
from mmvmamba.models.layers.patch import image_to_channels_last
from mmvmamba.models.layers.ssm_init import SSMInit
from mmvmamba.registry import MODELS

OutType = Literal["fused", "branches"]
OUT_TYPES: tuple[str, ...] = get_args(OutType)

#: Sides of the depthwise convolutions of a block, each for a quarter of its channels.
KERNELS = (3, 5, 7, 9)
#: Widths that are a multiple of this have a depthwise convolution before the offsets; a rule of upstream's code.
_CONVOLVED_OFFSETS = 80
#: How much narrower the middle of a squeeze-and-excitation is.
_REDUCTION = 8


@dataclasses.dataclass(frozen=True)
class HRVMambaArch:
    """Everything that distinguishes one HRVMamba from another; the defaults are those of the released models.

    Attributes:
        dims: Channels of every branch; stage i of the network has the first i + 1 branches.
        depths: Blocks in a row of every stage, the same in all of its branches; those of stage 0 are bottlenecks.
        modules: Into how many modules, each of which ends with an exchange between branches, a stage's blocks are
            divided; stage 0 has one.
        drop_path_rate: Stochastic depth of the ImageNet recipe.
        stem_dim: Channels of the stem.
        bottleneck_dim: Channels in the middle of the bottlenecks of stage 0, which put out four times as many.
        neck_dims: Channels that the branches are widened to before they are fused, multiples of 4.
        neck_out_dim: Channels of the last fused map.
        se_lpu: Whether blocks have two more depthwise convolutions, one before the convolutions of four sizes and one
            before the perceptron, and a squeeze-and-excitation after the scan.
        d_state, ssm_ratio, dt_rank, ssm_act, ssm_dropout, ssm_init: See ``SS2D``. The deformable aggregation has
            as many groups as ``dt_rank`` says.
        mlp_ratio, mlp_act, mlp_dropout: The perceptron.
    """

    dims: tuple[int, ...]
    depths: tuple[int, ...] = (2, 2, 8, 4)
    modules: tuple[int, ...] = (1, 1, 4, 2)
    drop_path_rate: float = 0.2
    stem_dim: int = 64
    bottleneck_dim: int = 64
    neck_dims: tuple[int, ...] = (128, 256, 512, 1024)
    neck_out_dim: int = 2048
    se_lpu: bool = False
    d_state: int = 1
    ssm_ratio: float = 2.0
    dt_rank: int | None = None
    ssm_act: Activation = "silu"
    ssm_dropout: float = 0.0
    ssm_init: SSMInit = "mamba"
    mlp_ratio: float = 2.0
    mlp_act: Activation = "gelu"
    mlp_dropout: float = 0.0

    def __post_init__(self) -> None:
        """Check what no layer checks by itself."""
        check_stages(dims=self.dims, depths=self.depths, modules=self.modules, neck_dims=self.neck_dims)
        if len(self.dims) < 2:
            raise ConfigError(f"arch: dims is {self.dims}, expected at least two branches. Add one.")
        if any(dim % len(KERNELS) for dim in self.dims):
            raise ConfigError(
                f"arch: dims is {self.dims}, expected multiples of {len(KERNELS)}, for a quarter of the channels each "
                "is convolved with another kernel. Round them."
            )
        if self.modules[0] != 1 or any(d % m for d, m in zip(self.depths, self.modules, strict=True)):
            raise ConfigError(
                f"arch: modules is {self.modules} for depths {self.depths}, expected 1 for the first stage and for "
                "every other a divisor of its depth. Correct one of them."
            )
        for name in ("stem_dim", "bottleneck_dim", "neck_out_dim"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"arch: {name} is {value!r}, expected a positive integer. Correct it.")


_DIMS = {"nano": (8, 16, 32, 64), "tiny": (16, 32, 64, 128), "small": (32, 64, 128, 256), "base": (80, 160, 320, 640)}

ARCHS: dict[str, HRVMambaArch] = {
    # Upstream's build file has the first form of the two smallest, its pose configs the second.
    "nano-se-lpu": HRVMambaArch(_DIMS["nano"], drop_path_rate=0.1, bottleneck_dim=16, se_lpu=True),
    "nano-plain": HRVMambaArch(_DIMS["nano"], drop_path_rate=0.1, bottleneck_dim=16),
    "tiny-se-lpu": HRVMambaArch(_DIMS["tiny"], drop_path_rate=0.1, bottleneck_dim=32, se_lpu=True),
    "tiny-plain": HRVMambaArch(_DIMS["tiny"], drop_path_rate=0.1, bottleneck_dim=32),
    "small": HRVMambaArch(_DIMS["small"]),
    "base": HRVMambaArch(_DIMS["base"]),
    # For demos and tests on a CPU; not a model of the paper (its smallest is "nano-se-lpu").
    "nano": HRVMambaArch(
        (8, 80, 16, 32),
        (1, 1, 1, 1),
        (1, 1, 1, 1),
        0.0,
        stem_dim=16,
        bottleneck_dim=8,
        neck_dims=(16, 32, 48, 64),
        neck_out_dim=96,
        se_lpu=True,
    ),
}


class DeformableSS2D(SS2D):
    """VMamba's scan over four routes with a deformable aggregation in place of the depthwise convolution.

    Args:
        channels: Channels of input and output.
        arch: The options of all blocks.
    """

    def __init__(self, channels: int, arch: HRVMambaArch) -> None:
        super().__init__(
            channels,
            d_state=arch.d_state,
            ssm_ratio=arch.ssm_ratio,
            dt_rank=arch.dt_rank,
            gated=False,
            conv_kernel=1,
            act=arch.ssm_act,
            ssm_init=arch.ssm_init,
            dropout=arch.ssm_dropout,
        )
        self.conv2d = DeformableAggregation(self.inner, self.dt_rank, channels % _CONVOLVED_OFFSETS == 0)


class SqueezedSS2D(DeformableSS2D):
    """The same with a squeeze-and-excitation between norm and projection."""

    def __init__(self, channels: int, arch: HRVMambaArch) -> None:
        super().__init__(channels, arch)
        self.se = SqueezeExcite(self.inner, _REDUCTION)

    def project(self, y: Tensor, z: Tensor | None, dtype: torch.dtype) -> Tensor:  # noqa: ARG002 (there is no gate)
        """Norm the merged map ``y`` (b, h, w, d), weigh its channels and project it back; (b, h, w, c)."""
        return self.dropout(self.out_proj(self.se(self.out_norm(y).to(dtype))))


class HRVSSBlock(Block):
    """Residual depthwise convolutions of four sizes, residual scan, residual perceptron, each with its norm.

    Args:
        channels: Channels of input and output.
        arch: The options of all blocks.
        drop_path: Stochastic depth of this block.
    """

    def __init__(self, channels: int, arch: HRVMambaArch, drop_path: float) -> None:
        super().__init__()
        self.cpe1 = _depthwise(channels) if arch.se_lpu else None
        self.conv2d = MixedDepthwise(channels, KERNELS)
        self.norm0 = LayerNorm(channels)
        self.conv_act = nn.GELU()
        self.norm = LayerNorm(channels)
        self.op = (SqueezedSS2D if arch.se_lpu else DeformableSS2D)(channels, arch)
        self.cpe2 = _depthwise(channels) if arch.se_lpu else None
        self.norm2 = LayerNorm(channels)
        self.mlp = Mlp(channels, int(channels * arch.mlp_ratio), arch.mlp_act, arch.mlp_dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (b, h, w, c) to (b, h, w, c)."""
        x = x + self.drop_path(self._convolve(x))
        if self.cpe2 is None and self._keeps_all():
            dtype = fused_tail_dtype(x, self.op, self.norm2, self.mlp)
            if dtype is not None:
                return fused_tail(x, *self.op.mix(self.norm(x))[:2], self.op, self.norm2, self.mlp, dtype)
        x = x + self.drop_path(self.op(self.norm(x)))
        if self.cpe2 is not None:
            x = x + convolve_depthwise(self.cpe2, x)
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def _convolve(self, x: Tensor) -> Tensor:
        """Convolve a quarter of the channels each of ``x`` (b, h, w, c) with another kernel and mix their order."""
        normed = self.norm0(x if self.cpe1 is None else x + convolve_depthwise(self.cpe1, x))
        return cast("Tensor", self.conv_act(self.conv2d(normed)))

    def _keeps_all(self) -> bool:
        """Whether the stochastic depth passes everything on, without anybody watching it."""
        drop = self.drop_path
        return type(drop) is DropPath and (drop.rate == 0.0 or not drop.training) and is_unobserved(drop)


class BottleneckBlock(Bottleneck, Block):
    """A bottleneck that is a block of a stage."""


class BottleneckStage(nn.Module):
    """Stage 0: bottlenecks in a row.

    Args:
        arch: The options of the network.
    """

    def __init__(self, arch: HRVMambaArch) -> None:
        super().__init__()
        widths = [arch.stem_dim, *[EXPANSION * arch.bottleneck_dim] * (arch.depths[0] - 1)]
        self.blocks = nn.ModuleList(BottleneckBlock(width, arch.bottleneck_dim) for width in widths)


class HighResolutionStage(nn.Module):
    """The start of a new branch, then modules of blocks in all branches.

    Args:
        in_dims: Channels of the maps that come in, one per earlier branch.
        arch: The options of all blocks.
        stage: Number of the stage, which has one branch more than that.
        rates: Stochastic depth of every block in a row.
        outputs: Branches that receive something in the last exchange.
    """

    def __init__(
        self, in_dims: Sequence[int], arch: HRVMambaArch, stage: int, rates: Sequence[float], outputs: Collection[int]
    ) -> None:
        super().__init__()
        dims = arch.dims[: stage + 1]
        self.transition = nn.ModuleList(
            nn.Identity() if dim == wanted else ConvBN(dim, wanted, 3, relu=True)
            for dim, wanted in zip(in_dims, dims[:-1], strict=True)
        )
        self.transition.append(ConvBN(in_dims[-1], dims[-1], 3, stride=2, relu=True))
        count = arch.modules[stage]
        size = len(rates) // count
        self.units = nn.ModuleList()
        for unit in range(count):
            of_unit = rates[unit * size : (unit + 1) * size]
            branches = [[HRVSSBlock(dim, arch, rate) for rate in of_unit] for dim in dims]
            self.units.append(HighResolutionModule(branches, dims, outputs if unit == count - 1 else range(len(dims))))


@MODELS.register_module()
class HRVMamba(BaseBackbone):
    """HRVMamba as a feature extractor. Output i has ceil(h / (4 * 2**i)) rows, and columns likewise.

    A stage is what the network calls so: stage 0 the bottlenecks, stage i those modules that have i + 1 branches.
    Outputs are the branches of the last stage, fused or as they are; there are as many. So ``frozen_stages`` counts
    from the image on, whereas ``out_indices`` names strides.

    Args:
        arch: Name of a variant (a key of ``ARCHS``) or a dict with the fields of ``HRVMambaArch``.
        in_channels: Channels of the image.
        out_indices: Outputs that are returned, in rising order; output i has stride 4 * 2**i.
        out_type: ``"fused"`` gives the maps of HRNet's neck, which adds to every branch all finer ones, as the
            classifier and the segmentors have it; ``"branches"`` the branches themselves, as for pose estimation. With
            the latter there is no neck, and what the last module would send to other outputs is not built.
        drop_path_rate: Stochastic depth of the last block; None takes the variant's own.
        out_norms: Whether every output has a layer norm; None means yes for ``"fused"`` and no for ``"branches"``, as
            segmentors and pose estimators have it. False gives what the classifier pools.
        frozen_stages, norm_eval, with_cp, init_cfg: See ``BaseBackbone``.

    Raises:
        ConfigError: If an option is unknown, misspelt or impossible.
    """

    def __init__(
        self,
        arch: str | Mapping[str, Any] | HRVMambaArch = "tiny-plain",
        *,
        in_channels: int = 3,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        out_type: OutType = "fused",
        drop_path_rate: float | None = None,
        out_norms: bool | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        init_cfg: dict | list[dict] | None = None,
        **unknown: Any,
    ) -> None:
        self.reject_unknown(unknown)
        self.arch = resolve_arch(arch, ARCHS, HRVMambaArch)
        super().__init__(in_channels, self.arch.depths, out_indices, frozen_stages, norm_eval, with_cp, init_cfg)
        check_choice("out_type", out_type, OUT_TYPES)
        self.out_type = out_type
        dims, rate = self.arch.dims, self.arch.drop_path_rate if drop_path_rate is None else drop_path_rate
        stem = self.arch.stem_dim
        self.patch_embed = nn.Sequential(
            ConvBN(in_channels, stem, 3, stride=2, relu=True), ConvBN(stem, stem, 3, stride=2, relu=True)
        )
        self.layers = nn.ModuleList([BottleneckStage(self.arch)])
        rates = drop_path_schedule(rate, self.depths[1:])
        widths: tuple[int, ...] = (EXPANSION * self.arch.bottleneck_dim,)
        every = range(len(dims))
        for stage in every[1:]:
            last = stage == every[-1] and out_type == "branches"
            outputs = self.out_indices if last else every[: stage + 1]
            self.layers.append(HighResolutionStage(widths, self.arch, stage, rates[stage - 1], outputs))
            widths = dims[: stage + 1]
        self.neck = ScaleFusion(dims, self.arch.neck_dims, self.arch.neck_out_dim) if out_type == "fused" else None
        if out_type == "fused" if out_norms is None else out_norms:
            self.add_out_norms([LayerNorm(self.stage_channels[i]) for i in self.out_indices])
        self.freeze()

    @property
    def stage_channels(self) -> tuple[int, ...]:
        """Channels of every output."""
        if self.out_type == "branches":
            return self.arch.dims
        return (*self.arch.neck_dims[:-1], self.arch.neck_out_dim)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return one contiguous map (b, c_i, h_i, w_i) per entry of ``out_indices`` for an image (b, c, h, w).

        Raises:
            OpInputError: If the image has another number of channels, an integer dtype or an empty side.
        """
        self.check_input(image)
        x = self.patch_embed(image_to_channels_last(image))
        for block in cast("BottleneckStage", self.layers[0]).blocks:
            x = self.run_block(block, x)
        maps = [x]
        for stage in cast("list[HighResolutionStage]", self.layers[1:]):
            maps = self._run_stage(stage, maps)
        if self.neck is not None:
            maps = self.neck(maps)
            return tuple(self.collect(i, maps[i]) for i in self.out_indices)
        return tuple(self.collect(i, x) for i, x in zip(self.out_indices, maps, strict=True))

    def _run_stage(self, stage: HighResolutionStage, maps: list[Tensor]) -> list[Tensor]:
        """Return the maps (b, h_i, w_i, c_i) of those branches that something outside of the stage needs."""
        last = stage is self.layers[-1]
        # The new branch starts from the coarsest one there is.
        maps = [layer(x) for layer, x in zip(stage.transition, [*maps, maps[-1]], strict=True)]
        for unit in cast("list[HighResolutionModule]", stage.units):
            for i, branch in enumerate(unit.branches):
                for block in cast("nn.ModuleList", branch):
                    maps[i] = self.run_block(block, maps[i])
            outputs: Sequence[int] = range(len(maps))
            if last and unit is stage.units[-1]:
                outputs = self.out_indices if self.neck is None else range(self.out_indices[-1] + 1)
            fused = unit.exchange(maps, outputs)
            maps = [fused[i] for i in outputs]
        return maps

    def parts_of_stage(self, stage: int) -> list[nn.Module]:
        """Return what ``frozen_stages > stage`` freezes besides the stem and earlier stages.

        With the last stage go the neck and the out norms, for all outputs come after it.
        """
        if stage < len(self.depths) - 1:
            return [self.layers[stage]]
        names = (name for name, _ in self.named_children())
        behind = [getattr(self, name) for name in names if name == "neck" or name.startswith("outnorm")]
        return [self.layers[stage], *behind]

    def unused_parts(self) -> list[nn.Module]:
        """Return what no output depends on: what is for coarser outputs than the last one wanted."""
        if self.neck is None:
            return []
        last = self.out_indices[-1]
        fuse = cast("HighResolutionModule", cast("HighResolutionStage", self.layers[-1]).units[-1]).fuse
        return [*self.neck.unused(last), *(row for i, row in fuse.items() if int(i) > last)]

    def get_layer_depth(self, param_name: str, prefix: str = "") -> tuple[int, int]:
        """Return the depth of a parameter and the number of depths, for layer-wise learning rate decay.

        The stem has depth 0. Blocks in a row count from 1, in all branches alike; an exchange has the depth of the
        blocks before it, the start of a new branch that of the last stage before it. The neck and everything else
        has the last depth.

        Args:
            param_name: Name of the parameter in the whole model.
            prefix: Name of the backbone in the whole model, such as ``"backbone."``.
        """
        parts = param_name.removeprefix(prefix).split(".")
        if not param_name.startswith(prefix) or parts[0] != "layers" or parts[1] == "0":
            return super().get_layer_depth(param_name, prefix)
        num_depths, stage = sum(self.depths) + 2, int(parts[1])
        before, per_unit = sum(self.depths[:stage]), self.depths[stage] // self.arch.modules[stage]
        if parts[2] == "transition":
            return before, num_depths
        before += int(parts[3]) * per_unit
        return before + (int(parts[6]) + 1 if parts[4] == "branches" else per_unit), num_depths

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters that are trained without weight decay: all with one dimension, too."""
        return super().no_weight_decay() | {name for name, p in self.named_parameters() if p.ndim <= 1}

    def _out_norms(self, names: Collection[str], prefix: str = "") -> tuple[set[str], set[str]]:
        """Add what other forms have behind the blocks to the names that nothing is taken from."""
        own_norms, drop = super()._out_norms(names, prefix)
        if self.neck is None:
            fuse = f"{prefix}layers.{len(self.depths) - 1}.units.{self.arch.modules[-1] - 1}.fuse."
            rows = {f"{fuse}{i}." for i in range(len(self.depths)) if i not in self.out_indices}
            drop = drop | {name for name in names if name.startswith((f"{prefix}neck.", *rows))}
        return own_norms, drop


def _depthwise(channels: int) -> ChannelsLastConv2d:
    return ChannelsLastConv2d(channels, channels, 3, padding=1, groups=channels)
