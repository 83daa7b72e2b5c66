"""MobileMamba: lightweight multi-receptive visual Mamba network (https://arxiv.org/abs/2411.15941).

Upstream: lewandofskee/MobileMamba, model/mobilemamba/mobilemamba.py and its copies in downstream/ (``MobileMamba``).
Differences: variants are named options, maps are channels-last throughout, the wavelet transform is a sum of four maps
instead of a grouped convolution, and both directions of a scan are one operator call. A, D, the time-step bias, all
norms and biases are trained without weight decay, as ``SSMOptimWrapperConstructor`` asks; upstream decays A and the
time-step bias in ImageNet training and, in its detectors, the batch norms. Upstream's fallback for machines without
Triton mixes the samples of a batch; that is not reproduced, no released model was trained with it.
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
    SS2D,
    ChannelsLastConv2d,
    ConvBN,
    ConvMlp,
    DropPath,
    MobileMerging,
    MobileStem,
    ResidualDepthwise,
    convolve_depthwise,
    drop_path_schedule,
)
from mmvmamba.models.layers.conv_bn import with_parameters
from mmvmamba.models.layers.depthwise import convolve_depthwise_by
from mmvmamba.models.layers.padding import without_padding
from mmvmamba.models.layers.wavelet import SQUARE, analyse, by_band, by_pixel, haar_filters, pad_to_even, synthesise
from mmvmamba.ops import ScanOrder
from mmvmamba.registry import MODELS

#: Hidden channels of a block's perceptrons and of a merging, as multiples of the channels they start from.
_MLP_RATIO, _MERGING_RATIO = 2, 4
#: Channels that are scanned are a multiple of this.
_SCAN_STEP = 16
#: Initial scale of the wavelet branch.
_WAVELET_SCALE = 0.1

_SCAN_ORDERS = (ScanOrder.ROW, ScanOrder.ROW_REVERSED)


@dataclasses.dataclass(frozen=True)
class MobileMambaArch:
    """Everything that distinguishes one MobileMamba from another; the defaults are those of the released models.

    Attributes:
        dims: Channels of every stage.
        depths: Blocks of every stage.
        drop_path_rate: Stochastic depth of the released recipe.
        global_ratio: Per stage, the part of the channels that is scanned; `split_channels` rounds it, perhaps to none.
        local_ratio: Per stage, the part of the channels that is convolved alone, rounded down; all others pass.
        kernels: Per stage, the side of the convolutions of local channels and of wavelet bands, odd.
        ssm_ratio: Inner channels of the scan as a multiple of the scanned channels.
    """

    dims: tuple[int, ...]
    depths: tuple[int, ...]
    drop_path_rate: float = 0.0
    global_ratio: tuple[float, ...] = (0.8, 0.7, 0.6)
    local_ratio: tuple[float, ...] = (0.2, 0.2, 0.3)
    kernels: tuple[int, ...] = (7, 5, 3)
    ssm_ratio: float = 2.0

    def __post_init__(self) -> None:
        """Check what no layer checks by itself."""
        check_stages(dims=self.dims, depths=self.depths, kernels=self.kernels)
        for name in ("global_ratio", "local_ratio"):
            ratios = getattr(self, name)
            if not isinstance(ratios, Sequence) or len(ratios) != len(self.dims):
                raise ConfigError(
                    f"arch: {name} is {ratios!r}, expected one number per stage, as dims {self.dims} has them. "
                    "Correct it."
                )
        if any(kernel % 2 == 0 for kernel in self.kernels):
            raise ConfigError(
                f"arch: kernels is {self.kernels}, expected odd integers (an even one changes the size of the map). "
                "Choose (7, 5, 3)."
            )
        for dim, scanned, convolved in zip(self.dims, self.global_ratio, self.local_ratio, strict=True):
            split_channels(dim, scanned, convolved)


def split_channels(channels: int, global_ratio: float, local_ratio: float) -> tuple[int, int, int]:
    """Return how many of a stage's channels are scanned, convolved alone and passed as they are.

    Scanned is the multiple of 16 that is nearest to ``global_ratio * channels``, rounded down before; ties go up. What
    is convolved is rounded down and takes at most what is left.

    Raises:
        ConfigError: If more channels than there are would be scanned, or a ratio is negative.
    """
    scanned = (int(global_ratio * channels) + _SCAN_STEP // 2) // _SCAN_STEP * _SCAN_STEP
    if not 0 <= scanned <= channels or global_ratio < 0 or local_ratio < 0:
        raise ConfigError(
            f"arch: global_ratio {global_ratio!r} and local_ratio {local_ratio!r} of {channels} channels have "
            f"{scanned} scanned, expected 0 to {channels} in steps of {_SCAN_STEP} and no negative ratio. "
            "Change a ratio or the stage's dims."
        )
    convolved = min(int(local_ratio * channels), channels - scanned)
    return scanned, convolved, channels - scanned - convolved


_DIMS_B = (200, 376, 448)

ARCHS: dict[str, MobileMambaArch] = {
    "t2": MobileMambaArch((144, 272, 368), (1, 2, 2)),
    "t4": MobileMambaArch((176, 368, 448), (1, 2, 2)),
    "s6": MobileMambaArch((192, 384, 448), (1, 2, 2)),
    # One network; what differs is the size of the images, 256, 384 and 512, and with it the weights.
    "b1": MobileMambaArch(_DIMS_B, (2, 3, 2), 0.03),
    "b2": MobileMambaArch(_DIMS_B, (2, 3, 2), 0.03),
    "b4": MobileMambaArch(_DIMS_B, (2, 3, 2), 0.03),
    # For demos and tests on a CPU; not a model of the paper. Scanned, convolved, passed: (16, 4, 0), (16, 4, 4),
    # (32, 8, 0), the first two as in stages 1 and 2 of most models, the last a tie rounded up.
    "nano": MobileMambaArch((20, 24, 40), (1, 1, 2)),
}


class ResidualMlp(ConvMlp):
    """`ConvMlp`, added to what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (b, h, w, c) to (b, h, w, c)."""
        directly = self.run_directly(x, residual=True)
        return x + super().forward(x) if directly is None else directly


class BidirectionalSS2D(SS2D):
    """The scan of a map row by row and the same backwards, gated, between convolutions with batch norms.

    Args:
        channels: Channels of input and output.
        ssm_ratio: Inner channels as a multiple of ``channels``.
    """

    # The base class calls them; what looks into them asks for their class first.
    in_proj: ConvBN  # type: ignore[assignment]
    out_proj: ConvBN  # type: ignore[assignment]

    def __init__(self, channels: int, ssm_ratio: float) -> None:
        super().__init__(channels, d_state=1, ssm_ratio=ssm_ratio, scan_orders=_SCAN_ORDERS, ssm_init="zero")
        self.in_proj = ConvBN(channels, 2 * self.inner)
        self.out_proj = ConvBN(self.inner, channels)


class WaveletScan(nn.Module):
    """A scan beside a convolution of wavelet bands, which sees twice as far at a quarter of the cost.

    Args:
        channels: Channels of input and output.
        kernel_size: Side of the convolution, odd.
        ssm_ratio: See `BidirectionalSS2D`.
    """

    def __init__(self, channels: int, kernel_size: int, ssm_ratio: float) -> None:
        super().__init__()
        bands = SQUARE * channels
        #: Whether scales are parts of weights and all of these in the order of maps: the deployment form.
        self.folded = False
        # Official files hold filters, and no optimizer is to change them.
        self.wt_filter = nn.Parameter(haar_filters(channels), requires_grad=False)
        self.iwt_filter = nn.Parameter(haar_filters(channels), requires_grad=False)
        self.scan = BidirectionalSS2D(channels, ssm_ratio)
        self.base_scale = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.conv = ChannelsLastConv2d(bands, bands, kernel_size, padding=kernel_size // 2, groups=bands, bias=False)
        self.scale = nn.Parameter(torch.full((1, bands, 1, 1), _WAVELET_SCALE))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (b, h, w, c) to (b, h, w, c)."""
        _, h, w, c = x.shape
        if self.folded:
            bands = convolve_depthwise(self.conv, analyse(pad_to_even(x), self.wt_filter).flatten(3))
            details = synthesise(bands.unflatten(3, (SQUARE, c)), self.iwt_filter)
            return self.scan(x) + without_padding(details, h, w)
        bands = analyse(pad_to_even(x), by_pixel(self.wt_filter)).flatten(3)
        # The scale of a band is that of its kernel, which has fewer numbers than the map.
        bands = convolve_depthwise_by(by_band(self.conv.weight * self.scale.view(-1, 1, 1, 1)), bands)
        details = synthesise(bands.unflatten(3, (SQUARE, c)), by_pixel(self.iwt_filter))
        return self.scan(x) * self.base_scale.flatten() + without_padding(details, h, w)

    @torch.no_grad()
    def fold_batch_norms(self) -> None:
        """Make both scales parts of weights, in the order of maps. For `mmvmamba.models.deploy` alone."""
        self.conv.weight = nn.Parameter(by_band(self.conv.weight * self.scale.view(-1, 1, 1, 1)), requires_grad=False)
        self.wt_filter = nn.Parameter(by_pixel(self.wt_filter), requires_grad=False)
        self.iwt_filter = nn.Parameter(by_pixel(self.iwt_filter), requires_grad=False)
        out, scale = self.scan.out_proj.conv, self.base_scale.flatten()
        bias = torch.zeros_like(scale) if out.bias is None else out.bias * scale
        with_parameters(out, out.weight * scale.view(-1, 1, 1, 1), bias)
        del self.scale, self.base_scale
        self.folded = True


class MultiReceptiveMixer(nn.Module):
    """Some channels scanned, some convolved, some as they are; then all mixed and added to the input.

    Args:
        split: How many channels are scanned, convolved and passed, in this order.
        kernel_size: Side of the convolutions, odd.
        ssm_ratio: See `BidirectionalSS2D`.
    """

    def __init__(self, split: tuple[int, int, int], kernel_size: int, ssm_ratio: float) -> None:
        super().__init__()
        self.split = split
        scanned, convolved, _ = split
        self.local_op: nn.Module = nn.Identity()
        if convolved:
            self.local_op = nn.Sequential(
                ConvBN(convolved, convolved, kernel_size, groups=convolved, relu=True),
                ConvBN(convolved, convolved, groups=convolved),
            )
        self.global_op: nn.Module = WaveletScan(scanned, kernel_size, ssm_ratio) if scanned else nn.Identity()
        self.act = nn.ReLU()
        self.proj = ConvBN(sum(split), sum(split), norm_weight=0.0)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (b, h, w, c) to (b, h, w, c)."""
        scanned, convolved, passed = x.split(self.split, dim=-1)
        parts = [self.global_op(scanned), self.local_op(convolved), passed]
        return x + self.proj(self.act(torch.cat(parts, dim=-1)))


class MobileMambaBlock(Block):
    """Convolution and perceptron, the mixer, convolution and perceptron, each with its residual, and one around all.

    Upstream quirk, kept because weights depend on it: the last of these adds an input that the others hold already.

    Args:
        split: See `MultiReceptiveMixer`.
        kernel_size: See `MultiReceptiveMixer`.
        ssm_ratio: See `BidirectionalSS2D`.
        drop_path: Stochastic depth of this block.
    """

    def __init__(self, split: tuple[int, int, int], kernel_size: int, ssm_ratio: float, drop_path: float) -> None:
        super().__init__()
        channels = sum(split)
        self.dw0 = ResidualDepthwise(channels, norm_weight=0.0)
        self.ffn0 = ResidualMlp(channels, _MLP_RATIO * channels, norm_weight=0.0)
        self.mixer = MultiReceptiveMixer(split, kernel_size, ssm_ratio)
        self.dw1 = ResidualDepthwise(channels, norm_weight=0.0)
        self.ffn1 = ResidualMlp(channels, _MLP_RATIO * channels, norm_weight=0.0)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (b, h, w, c) to (b, h, w, c)."""
        y = self.mixer(self.ffn0(self.dw0(x)))
        return x + self.drop_path(self.ffn1(self.dw1(y)))


class Transition(nn.Module):
    """From one stage to the next: convolution and perceptron at both widths, a merging between; ceil(n / 2) a side.

    Args:
        channels: Channels of the input.
        out_channels: Channels of the output.
    """

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        # The norm of these convolutions starts with weight 1, that of these perceptrons, as of all, with 0.
        self.before = nn.Sequential(
            ResidualDepthwise(channels), ResidualMlp(channels, _MLP_RATIO * channels, norm_weight=0.0)
        )
        self.merge = MobileMerging(channels, out_channels, _MERGING_RATIO * channels)
        self.after = nn.Sequential(
            ResidualDepthwise(out_channels), ResidualMlp(out_channels, _MLP_RATIO * out_channels, norm_weight=0.0)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (b, h, w, c) to (b, h', w', c')."""
        return self.after(self.merge(self.before(x)))


@MODELS.register_module()
class MobileMamba(BaseBackbone):
    """MobileMamba as a feature extractor, without norms on its outputs.

    Stage 0 is the stem, of stride 16 and without blocks, as upstream counts; stage i from 1 on has stride 8 * 2**i, and
    ceil(h / stride) rows. ``drop_path_rate`` rises from the first block to the last.

    Args:
        arch: Name of a variant (a key of ``ARCHS``) or a dict with the fields of ``MobileMambaArch``, which counts
            the stages with blocks only.
        in_channels: Channels of the image.
        out_indices: Stages whose output is returned, in rising order.
        drop_path_rate: Stochastic depth of the last block; None takes the variant's own.
        frozen_stages: -1 trains everything, 0 and 1 freeze the stem, i freezes the stem and the first i - 1 stages with
            blocks, each with the downsampling behind it.
        norm_eval, with_cp, init_cfg: See ``BaseBackbone``.

    Raises:
        ConfigError: If an option is unknown, misspelt or impossible.
    """

    stem_stride = 16

    def __init__(
        self,
        arch: str | Mapping[str, Any] | MobileMambaArch = "b1",
        *,
        in_channels: int = 3,
        out_indices: Sequence[int] = (1, 2, 3),
        drop_path_rate: float | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        init_cfg: dict | list[dict] | None = None,
        **unknown: Any,
    ) -> None:
        self.reject_unknown(unknown)
        self.arch = resolve_arch(arch, ARCHS, MobileMambaArch)
        depths = (0, *self.arch.depths)
        super().__init__(in_channels, depths, out_indices, frozen_stages, norm_eval, with_cp, init_cfg)
        dims, rate = self.arch.dims, self.arch.drop_path_rate if drop_path_rate is None else drop_path_rate
        self.patch_embed = MobileStem(in_channels, dims[0])
        self.layers = nn.ModuleList([Stage((), nn.Identity())])
        for i, rates in enumerate(drop_path_schedule(rate, self.arch.depths)):
            split = split_channels(dims[i], self.arch.global_ratio[i], self.arch.local_ratio[i])
            blocks = [
                MobileMambaBlock(split, self.arch.kernels[i], self.arch.ssm_ratio, block_rate) for block_rate in rates
            ]
            last = i == len(dims) - 1
            self.layers.append(Stage(blocks, nn.Identity() if last else Transition(dims[i], dims[i + 1])))
        self.freeze()

    @property
    def stage_channels(self) -> tuple[int, ...]:
        """Channels of every stage's map; the stem is stage 0."""
        return (self.arch.dims[0], *self.arch.dims)

    @property
    def stage_strides(self) -> tuple[int, ...]:
        """Pixels of the image per cell of every stage's map, along a side."""
        return (self.stem_stride, *(self.stem_stride * 2**i for i in range(len(self.arch.dims))))

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return one contiguous map (b, c_i, h_i, w_i) per entry of ``out_indices`` for an image (b, c, h, w).

        Raises:
            OpInputError: If the image has another number of channels, an integer dtype or an empty side.
        """
        self.check_input(image)
        return self.run_stages(self.patch_embed(image))

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters that are trained without weight decay: norms, biases, A and D."""
        return super().no_weight_decay() | {name for name, _ in self.named_parameters() if name.endswith("bias")}
