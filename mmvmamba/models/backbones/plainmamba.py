"""PlainMamba: Improving Non-Hierarchical Mamba in Visual Recognition (https://arxiv.org/abs/2403.17695).

Upstream: ChenhongyiYang/PlainMamba, mmcls/plain_mamba_dev (``PlainMamba``) and downstream/mmsegmentation
(``PlainMambaSeg``); its detectors are ``mmvmamba.ViTAdapter`` around this backbone. Differences: variants are named
options, the four scans of a layer are one operator call, images of any size work as in upstream, and the layer-wise
shuffle of ShuffleMamba is an option. Upstream's normalisation by RMS, which no model of it has, is not here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmvmamba.errors import ConfigError
from mmvmamba.models.backbones.arch import resolve_arch
from mmvmamba.models.backbones.columnar import ColumnarBackbone, ColumnarBlock, check_positive, image_size
from mmvmamba.models.layers import (
    BatchNorm,
    ChannelsLastConv2d,
    DropPath,
    LayerNorm,
    Linear,
    StepProjection,
    check_choice,
    convolve_depthwise,
    drop_path_schedule,
)
from mmvmamba.models.layers.observers import is_unobserved
from mmvmamba.models.layers.onednn import is_traced, linear
from mmvmamba.models.layers.padding import pad_to_multiple
from mmvmamba.models.layers.patch import image_to_channels_last
from mmvmamba.models.layers.snake import NUM_WALKS, STEPS, SnakeWalks, snake_walks
from mmvmamba.models.layers.ssm_init import init_ssm_
from mmvmamba.models.layers.tokens import TokenLayout
from mmvmamba.ops import scan2d
from mmvmamba.registry import MODELS

#: Of the norms behind the layers; those inside have PyTorch's own.
OUT_NORM_EPS = 1e-6
#: Channels of the convolutions of the stem.
_STEM_CHANNELS = 64
DtInit = Literal["zero", "mamba"]
DT_INITS: tuple[str, ...] = get_args(DtInit)


@dataclasses.dataclass(frozen=True)
class PlainMambaArch:
    """Everything that distinguishes one PlainMamba from another; the defaults are those of all released models.

    Attributes:
        dim: Channels of every layer.
        depth: Layers.
        drop_path_rate: Stochastic depth of the ImageNet recipe.
        num_convs: Convolutions of the stem between its first and its last.
        dwconv_layers: Layers that end with a depthwise convolution.
        patch_size: Pixels of the image per token, along a side; even.
        d_state: Size n of the state of one channel.
        expansion: Inner channels of the mixer as a multiple of ``dim``, rounded down.
        dt_rank: Features from which the time steps are made; None means ceil(dim / 16).
        conv_kernel: Side of the mixer's depthwise convolution, odd.
        conv_bias: Whether that convolution has a bias.
        bias: Whether the projections into and out of the mixer have biases.
        layer_scale: Initial factor of every channel of a mixer's result, or None for no such factors.
        use_pos_embed: Whether tokens get a learned position embedding.
        dt_init: How time steps start: ``"zero"`` with a bias of 0, a step of 0.7, which is what upstream's training
            starts from, or as in ``"mamba"``, log-uniform in [0.001, 0.1], which upstream's training overwrites.
    """

    dim: int
    depth: int
    drop_path_rate: float = 0.2
    num_convs: int = 2
    dwconv_layers: tuple[int, ...] = ()
    patch_size: int = 16
    d_state: int = 16
    expansion: float = 2
    dt_rank: int | None = None
    conv_kernel: int = 7
    conv_bias: bool = True
    bias: bool = True
    layer_scale: float | None = None
    use_pos_embed: bool = True
    dt_init: DtInit = "zero"

    def __post_init__(self) -> None:
        """Check what no layer checks by itself."""
        check_positive(dim=self.dim, depth=self.depth, patch_size=self.patch_size, d_state=self.d_state)
        check_choice("dt_init", self.dt_init, DT_INITS)
        if self.dt_rank is not None:
            check_positive(dt_rank=self.dt_rank)
        if self.patch_size % 2:
            raise ConfigError(
                f"arch: patch_size is {self.patch_size}, expected an even number: the stem halves the image first. "
                "Choose 16."
            )
        if not isinstance(self.num_convs, int) or self.num_convs < 0:
            raise ConfigError(f"arch: num_convs is {self.num_convs!r}, expected 0 or more. Correct it.")
        if not isinstance(self.conv_kernel, int) or self.conv_kernel < 1 or self.conv_kernel % 2 == 0:
            raise ConfigError(
                f"arch: conv_kernel is {self.conv_kernel!r}, expected a positive odd integer (an even one changes the "
                "size of the map). Choose 7."
            )
        if int(self.dim * self.expansion) < 1:
            raise ConfigError(
                f"arch: expansion is {self.expansion!r} with {self.dim} channels, expected at least one inner channel. "
                "Choose 2."
            )
        if not all(isinstance(layer, int) and 0 <= layer < self.depth for layer in self.dwconv_layers):
            raise ConfigError(
                f"arch: dwconv_layers is {self.dwconv_layers!r}, expected layers from 0 to {self.depth - 1}. "
                "Correct it."
            )


ARCHS: dict[str, PlainMambaArch] = {
    "l1": PlainMambaArch(192, 24, 0.2, num_convs=1, dwconv_layers=(0,)),
    "l2": PlainMambaArch(384, 24, 0.2),
    "l3": PlainMambaArch(448, 36, 0.4),
    # For demos and tests on a CPU; not a model of the paper.
    "nano": PlainMambaArch(32, 4, 0.0, num_convs=1, dwconv_layers=(0,), d_state=8),
}


class Stem(nn.Module):
    """A 7x7 convolution of stride 2, some 3x3 ones, and one from cells of half a patch's side to tokens.

    The output has ceil(ceil(n / 2) / (patch_size / 2)) tokens a side; the map is zero-padded at the right and bottom.

    Args:
        in_channels: Channels of the image.
        channels: Channels of the tokens.
        num_convs: 3x3 convolutions.
        patch_size: Pixels of the image per token, even.
    """

    def __init__(self, in_channels: int, channels: int, num_convs: int, patch_size: int) -> None:
        super().__init__()
        self.cell = patch_size // 2
        self.stem = nn.Sequential(
            ChannelsLastConv2d(in_channels, _STEM_CHANNELS, 7, stride=2, padding=3, bias=False),
            BatchNorm(_STEM_CHANNELS),
            nn.ReLU(),
        )
        convs: list[nn.Module] = []
        for _ in range(num_convs):
            conv = ChannelsLastConv2d(_STEM_CHANNELS, _STEM_CHANNELS, 3, padding=1, bias=False)
            convs += [conv, BatchNorm(_STEM_CHANNELS), nn.ReLU()]
        self.convs = nn.Sequential(*convs) if convs else None
        self.projection = ChannelsLastConv2d(_STEM_CHANNELS, channels, self.cell, stride=self.cell)

    def forward(self, image: Tensor) -> Tensor:
        """Map an image (b, c, h, w) to tokens (b, h', w', d)."""
        x: Tensor = self.stem(image_to_channels_last(image))
        if self.convs is not None:
            x = self.convs(x)
        out: Tensor = self.projection(pad_to_multiple(x, self.cell))
        return out


class SnakeMixer(nn.Module):
    """Mamba over four continuous walks through the map, which share all parameters; their results are added.

    Upstream quirks, kept because weights depend on them: only the inputs of a scan are in the order of its walk, while
    step t has the time step, B and C of token t in row order, whatever token it visits; the bias of the time step
    counts twice; the four scans are added without being divided, so the skip counts four times.

    Args:
        arch: The options of all layers.
    """

    def __init__(self, arch: PlainMambaArch) -> None:
        super().__init__()
        inner = int(arch.expansion * arch.dim)
        rank = math.ceil(arch.dim / 16) if arch.dt_rank is None else arch.dt_rank
        self.inner, self.dt_rank, self.d_state = inner, rank, arch.d_state
        self.gamma: nn.Parameter | None = None
        if arch.layer_scale is not None:
            self.gamma = nn.Parameter(torch.full((arch.dim,), float(arch.layer_scale)))
        self.A_log = nn.Parameter(torch.empty(inner, arch.d_state))
        self.D = nn.Parameter(torch.empty(inner))
        self.direction_Bs = nn.Parameter(torch.empty(len(STEPS), arch.d_state))
        self.in_proj = Linear(arch.dim, 2 * inner, bias=arch.bias)
        self.conv2d = ChannelsLastConv2d(
            inner, inner, arch.conv_kernel, padding=arch.conv_kernel // 2, groups=inner, bias=arch.conv_bias
        )
        self.act = nn.SiLU()
        self.x_proj = Linear(inner, rank + 2 * arch.d_state, bias=False)
        self.dt_proj = StepProjection(rank, inner)
        self.out_proj = Linear(inner, arch.dim, bias=arch.bias)
        nn.init.trunc_normal_(self.direction_Bs, std=0.02)
        steps = (self.dt_proj.weight, self.dt_proj.bias)
        # Linear starts as upstream's recipe has it: weights with standard deviation 0.02, biases 0.
        weight, bias = steps if arch.dt_init == "mamba" else (p.detach().clone() for p in steps)
        init_ssm_("mamba", weight, bias, self.A_log, self.D)

    def no_weight_decay(self) -> set[str]:
        """Return the parameters of its own that a recipe must not pull towards zero."""
        return {"A_log", "D", "direction_Bs", "dt_proj.bias"}

    def forward(self, x: Tensor, layout: TokenLayout) -> Tensor:
        """Map tokens ``x`` (b, l, d) to (b, l, d)."""
        x, z = self._project_in(x)
        u = convolve_depthwise(self.conv2d, x.unflatten(1, (layout.rows, layout.columns)), self.act)
        y = self.scan(u, walks_of(layout, u.device))
        out: Tensor = self.out_proj(y.flatten(1, 2) * self.act(z))
        return out if self.gamma is None else out * self.gamma

    def _project_in(self, x: Tensor) -> Sequence[Tensor]:
        """Return what is convolved and the gate, (b, l, e) each."""
        if torch.is_grad_enabled() and not is_traced() and type(self.in_proj) is Linear and is_unobserved(self.in_proj):
            # One product each: the backward pass of a split would copy the gradient of the wide map.
            weights, bias = self.in_proj.weight.chunk(2), self.in_proj.bias
            biases = (None, None) if bias is None else bias.chunk(2)
            return [linear(x, weight, b) for weight, b in zip(weights, biases, strict=True)]
        parts: tuple[Tensor, ...] = self.in_proj(x).chunk(2, dim=-1)
        return parts

    def scan(self, u: Tensor, walks: SnakeWalks) -> Tensor:
        """Return the sum of the four scans of ``u`` (b, h, w, e), same shape and type.

        To the operator step t belongs to the token that it visits. So what upstream takes in row order, the
        projections, is moved, once for all walks, and neither ``u`` nor a result is.
        """
        b, h, w, _ = u.shape
        accumulate = torch.float64 if u.dtype == torch.float64 else torch.float32
        projected = self.x_proj(u).flatten(1, 2)
        # Direction vectors belong to B alone, which stands between the time step and C.
        vectors = F.pad(self.direction_Bs.to(projected.dtype), (self.dt_rank, self.d_state))
        moved = projected.index_select(1, walks.times) + vectors.index_select(0, walks.steps)
        decay = -torch.exp(self.A_log.to(accumulate))
        bias, skip = 2 * self.dt_proj.bias.to(accumulate), self.D.to(accumulate)
        return scan2d(
            u,
            moved.view(b, h, w, NUM_WALKS, moved.shape[-1]),
            self.dt_proj.weight.expand(NUM_WALKS, -1, -1),
            bias.expand(NUM_WALKS, -1),
            decay.expand(NUM_WALKS, -1, -1),
            skip.expand(NUM_WALKS, -1),
            orders=walks.orders,
        )


class PlainMambaBlock(ColumnarBlock):
    """Residual mixer after its norm; in some layers then a depthwise convolution, norm and GELU without a residual.

    Args:
        arch: The options of all layers.
        with_dwconv: Whether the convolution is there.
        drop_path: Stochastic depth of this layer.
    """

    def __init__(self, arch: PlainMambaArch, with_dwconv: bool, drop_path: float) -> None:
        super().__init__()
        self.norm = LayerNorm(arch.dim)
        self.dw: nn.Sequential | None = None
        if with_dwconv:
            conv = ChannelsLastConv2d(arch.dim, arch.dim, 3, padding=1, groups=arch.dim, bias=False)
            self.dw = nn.Sequential(conv, BatchNorm(arch.dim), nn.GELU())
        self.mamba = SnakeMixer(arch)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, layout: TokenLayout) -> Tensor:
        """Map tokens ``x`` (b, l, d) to (b, l, d)."""
        x = x + self.drop_path(self.mamba(self.norm(x), layout))
        if self.dw is None:
            return x
        conv, norm, act = self.dw
        y: Tensor = act(norm(convolve_depthwise(conv, x.unflatten(1, (layout.rows, layout.columns)))))
        return y.flatten(1, 2)


@MODELS.register_module()
class PlainMamba(ColumnarBackbone):
    """PlainMamba as a feature extractor. All maps have ceil(ceil(h / 2) / 8) rows, and columns likewise.

    The output of the last layer goes through the norm ``ln1``, which a classifier has too; that of every other layer
    through a norm of its own, ``outnorm{i}``, which starts anew from a classifier's weights.

    Args:
        arch: Name of a variant (a key of ``ARCHS``) or a dict with the fields of ``PlainMambaArch``.
        img_size: Side of the images of training, or (height, width): it sets the rows of the position embedding, which
            is resized (bicubic) to other grids and when loaded from a checkpoint of another size.
        in_channels: Channels of the image.
        out_indices: Layers whose output is returned, counted from 0, in rising order; None for the last layer of each
            quarter, or for the last layer alone if ``out_type`` is not ``"featmap"``.
        out_type: ``"featmap"`` for maps, ``"avg_featmap"`` for the mean of all tokens (b, d), which a classifier takes.
        drop_path_rate: Stochastic depth of the last layer; None takes the variant's own.
        dropout: Dropout probability of tokens after the position embedding.
        out_norms: Whether outputs of layers before the last have norms.
        final_norm: Whether there is ``ln1``. Without it, the entries of a checkpoint are left out.
        shuffle_rate: See ``ColumnarBackbone``.
        frozen_stages, norm_eval, with_cp, init_cfg: See ``BaseBackbone``; ``frozen_stages`` counts layers.

    Raises:
        ConfigError: If an option is unknown, misspelt or contradicts another.
    """

    out_types = ("featmap", "avg_featmap")

    def __init__(
        self,
        arch: str | Mapping[str, Any] | PlainMambaArch = "l1",
        *,
        img_size: int | Sequence[int] = 224,
        in_channels: int = 3,
        out_indices: Sequence[int] | None = None,
        out_type: Literal["featmap", "avg_featmap"] = "featmap",
        drop_path_rate: float | None = None,
        dropout: float = 0.0,
        out_norms: bool = True,
        final_norm: bool = True,
        shuffle_rate: float = 0.0,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        init_cfg: dict | list[dict] | None = None,
        **unknown: Any,
    ) -> None:
        self.reject_unknown(unknown)
        self.arch = resolve_arch(arch, ARCHS, PlainMambaArch)
        options = self.arch
        super().__init__(
            in_channels=in_channels,
            stride=options.patch_size,
            out_indices=out_indices,
            out_type=out_type,
            cls_token="none",  # noqa: S106 (no password)
            shuffle_rate=shuffle_rate,
            frozen_stages=frozen_stages,
            norm_eval=norm_eval,
            with_cp=with_cp,
            init_cfg=init_cfg,
        )
        rate = options.drop_path_rate if drop_path_rate is None else drop_path_rate
        self.patch_embed = Stem(in_channels, options.dim, options.num_convs, options.patch_size)
        # Upstream rounds the half of an odd size down here, and only here.
        rows, columns = (max(-(-(side // 2) // (options.patch_size // 2)), 1) for side in image_size(img_size))
        self.add_tokens((rows, columns))
        if not options.use_pos_embed:
            self.pos_embed = None
        self.pos_drop = nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            PlainMambaBlock(options, i in options.dwconv_layers, layer_rate)
            for i, (layer_rate,) in enumerate(drop_path_schedule(rate, self.depths))
        )
        self.ln1 = LayerNorm(options.dim, eps=OUT_NORM_EPS) if final_norm else None
        for i in self.out_indices if out_norms else ():
            if i != options.depth - 1:
                self.add_module(f"outnorm{i}", LayerNorm(options.dim, eps=OUT_NORM_EPS))
        self.freeze()

    def positions(self, layout: TokenLayout) -> Tensor:
        """Return the position embedding (1, l, d) for a grid, or a zero where there is none."""
        return self.patch_embed.projection.weight.new_zeros(()) if self.pos_embed is None else super().positions(layout)

    def embed(self, image: Tensor) -> tuple[Tensor, TokenLayout]:
        """Return tokens (b, l, d) and their layout with the walks of all mixers, for an image (b, c, h, w)."""
        x, layout = super().embed(image)
        return x, layout._replace(walks=snake_walks(layout.rows, layout.columns, x.device))

    def finish_embedding(self, x: Tensor) -> Tensor:
        """Return what the first layer gets of the tokens with their positions (b, l, d)."""
        out: Tensor = self.pos_drop(x)
        return out

    def feature(self, layer: int, h: Tensor, r: Tensor, following: Tensor | None) -> Tensor:  # noqa: ARG002
        """Return the normed tokens (b, l, d) that are the output of a layer."""
        norm = self._norm_of(layer)
        return h if norm is None else norm(h)

    def _norm_of(self, layer: int) -> nn.Module | None:
        last = layer == len(self.layers) - 1
        return self.ln1 if last else cast("nn.Module | None", getattr(self, f"outnorm{layer}", None))

    def parts_of_stage(self, stage: int) -> list[nn.Module]:
        """Return what ``frozen_stages > stage`` freezes besides the stem and earlier layers."""
        norm = self._norm_of(stage)
        return [self.layers[stage], *([] if norm is None else [norm])]

    def unused_parts(self) -> list[nn.Module]:
        """Return what no output depends on: the layers after the last output, and their norm."""
        unused = super().unused_parts()
        return [*unused, self.ln1] if unused and self.ln1 is not None else unused

    def fit_tokens(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Resize the position embedding of a checkpoint to this model's; leave out the final norm if this has none."""
        if f"{prefix}cls_token" in state_dict:
            return  # no PlainMamba: it stays what it is, for whoever refuses it to tell
        super().fit_tokens(state_dict, prefix)
        if self.ln1 is None:
            for field in ("weight", "bias"):
                state_dict.pop(f"{prefix}ln1.{field}", None)


def walks_of(layout: TokenLayout, device: torch.device) -> SnakeWalks:
    """Return the walks of a layout, made now if whoever made the layout did not."""
    return snake_walks(layout.rows, layout.columns, device) if layout.walks is None else layout.walks
