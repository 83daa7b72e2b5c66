"""VMamba: Visual State Space Model (https://arxiv.org/abs/2401.10166).

Upstream: MzeroMiko/VMamba, classification/models/vmamba.py (``VSSM``, ``Backbone_VSSM``). Differences: variants are
named options, the map is channels-last throughout (checkpoints of channel-first models load unchanged), every
input size from 1x1 up works, and the downsampling after the last used stage is not evaluated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional as F

from mmvmamba.models.backbones.arch import check_stages, resolve_arch
from mmvmamba.models.backbones.base import BaseBackbone, Block, Stage
from mmvmamba.models.layers import (
    SS2D,
    DropPath,
    GatedMlp,
    LayerNorm,
    Mlp,
    build_downsample,
    build_norm,
    build_patch_embed,
    check_choice,
    drop_path_schedule,
)
from mmvmamba.models.layers.activation import Activation
from mmvmamba.models.layers.fused_block import fused_tail, fused_tail_dtype
from mmvmamba.models.layers.norm import Norm
from mmvmamba.models.layers.observers import is_unobserved
from mmvmamba.models.layers.patch import Downsample, PatchEmbed
from mmvmamba.models.layers.ss2d import OutNorm
from mmvmamba.models.layers.ssm_init import SSMInit
from mmvmamba.ops import BIDIRECTIONAL_SCAN, CROSS_SCAN, UNIDIRECTIONAL_SCAN, selective_scan
from mmvmamba.ops.scan2d.orders import remember_range
from mmvmamba.registry import MODELS

Scan = Literal["cross", "unidirectional", "bidirectional", "rotated", "cascade"]
SCANS: tuple[str, ...] = get_args(Scan)


@dataclasses.dataclass(frozen=True)
class VMambaArch:
    """Everything that distinguishes one VMamba from another; the defaults are those of the released v2 models.

    Attributes:
        dims: Channels of every stage.
        depths: Blocks of every stage.
        drop_path_rate: Stochastic depth of the released recipe.
        d_state, ssm_ratio, dt_rank, ssm_act, conv_kernel, conv_bias, ssm_dropout, ssm_init, gated, gate_act,
            out_norm, out_act: See ``SS2D``; ``ssm_ratio`` 0 leaves the whole branch out.
        scan: The route over the map.
        mlp_ratio, mlp_act, mlp_dropout, gated_mlp: The MLP; ``mlp_ratio`` 0 leaves it out.
        post_norm: Whether a block norms the result of a branch instead of its input.
        norm: Kind of every norm outside the scan.
        patch_embed, downsample: See ``layers/patch.py``.
    """

    dims: tuple[int, ...]
    depths: tuple[int, ...]
    drop_path_rate: float = 0.1
    d_state: int = 1
    ssm_ratio: float = 2.0
    dt_rank: int | None = None
    ssm_act: Activation = "silu"
    conv_kernel: int = 3
    conv_bias: bool = False
    ssm_dropout: float = 0.0
    ssm_init: SSMInit = "mamba"
    gated: bool = False
    gate_act: bool = True
    out_norm: OutNorm = "layer_norm"
    out_act: bool = False
    scan: Scan = "cross"
    mlp_ratio: float = 4.0
    mlp_act: Activation = "gelu"
    mlp_dropout: float = 0.0
    gated_mlp: bool = False
    post_norm: bool = False
    norm: Norm = "layer_norm"
    patch_embed: PatchEmbed = "overlapping"
    downsample: Downsample = "conv3x3"

    def __post_init__(self) -> None:
        """Check what no layer checks by itself."""
        check_stages(dims=self.dims, depths=self.depths)
        check_choice("scan", self.scan, SCANS)


_VANILLA: dict[str, Any] = dict(
    d_state=16,
    conv_bias=True,
    gated=True,
    mlp_ratio=0.0,
    patch_embed="patchify",
    downsample="patch_merging",
)
_DIMS_T, _DIMS_B = (96, 192, 384, 768), (128, 256, 512, 1024)

ARCHS: dict[str, VMambaArch] = {
    "tiny-s1l8": VMambaArch(_DIMS_T, (2, 2, 8, 2), 0.2, ssm_ratio=1.0),
    "tiny-s2l5": VMambaArch(_DIMS_T, (2, 2, 5, 2), 0.2),
    "small-s2l15": VMambaArch(_DIMS_T, (2, 2, 15, 2), 0.3),
    "small-s1l20": VMambaArch(_DIMS_T, (2, 2, 20, 2), 0.3, ssm_ratio=1.0),
    "base-s2l15": VMambaArch(_DIMS_B, (2, 2, 15, 2), 0.6),
    "base-s1l20": VMambaArch(_DIMS_B, (2, 2, 20, 2), 0.5, ssm_ratio=1.0),
    "vanilla-tiny": VMambaArch(_DIMS_T, (2, 2, 9, 2), 0.2, **_VANILLA),
    "vanilla-small": VMambaArch(_DIMS_T, (2, 2, 27, 2), 0.3, **_VANILLA),
    "vanilla-base": VMambaArch(_DIMS_B, (2, 2, 27, 2), 0.6, **_VANILLA),
    # For demos and tests on a CPU; not a model of the paper.
    "nano": VMambaArch((32, 64, 128, 256), (1, 1, 2, 1), 0.0, ssm_ratio=1.0),
}

_ORDERS = {
    "cross": CROSS_SCAN,
    "unidirectional": UNIDIRECTIONAL_SCAN,
    "bidirectional": BIDIRECTIONAL_SCAN,
    # Only the number of directions counts here; the classes below say where they go.
    "rotated": CROSS_SCAN,
    "cascade": CROSS_SCAN,
}


class RotatedSS2D(SS2D):
    """Scan the map row by row in each of its four rotations by a quarter turn."""

    def routes(self, x: Tensor) -> Tensor:
        """Return the pixel indices (4, l) of the rotated maps of ``x`` (b, h, w, d)."""
        _, h, w, _ = x.shape
        pixels = torch.arange(h * w, device=x.device).view(h, w)
        routes = torch.stack([pixels.rot90(turns).flatten() for turns in range(4)])
        return remember_range(routes, 0, h * w - 1)


class CascadeSS2D(SS2D):
    """Scan all rows as sequences of their own, both ways, then all columns of the result.

    Upstream quirk, kept because weights depend on it: the two directions of a pass are added without turning the
    second one back, so position i is summed with position length - 1 - i.
    """

    def scan(self, x: Tensor) -> Tensor:
        """Scan ``x`` (b, h, w, d) in two passes; (b, h, w, d) in the accumulation type."""
        y = F.layer_norm(x, x.shape[-1:])
        # The first pass returns float32 also in a half-precision model, whose weights the second must match.
        y = F.layer_norm(self._scan_rows(y, 0), x.shape[-1:]).to(self.x_proj_weight.dtype)
        return self._scan_rows(y.transpose(1, 2), 2).transpose(1, 2)

    def _scan_rows(self, x: Tensor, first: int) -> Tensor:
        """Scan every row of ``x`` (b, h, w, d) with directions ``first`` and ``first + 1``; same shape."""
        b, h, w, d = x.shape
        n, rank, pair = self.d_state, self.dt_rank, slice(first, first + 2)
        weight, bias, decay, skip = self.scan_parameters(x.dtype)
        rows = x.reshape(b * h, w, d)
        both = torch.stack([rows, rows.flip(1)], dim=1)  # (b*h, 2, w, d)
        projected = torch.einsum("skwd,kcd->skcw", both, self.x_proj_weight[pair])
        dt, b_in, c_out = projected.split([rank, n, n], dim=2)
        delta = torch.einsum("skrw,kdr->skdw", dt, weight[pair].to(dt.dtype))
        y = selective_scan(
            both.transpose(2, 3).reshape(b * h, 2 * d, w),
            delta.reshape(b * h, 2 * d, w),
            decay[pair].reshape(2 * d, n),
            b_in,
            c_out,
            skip[pair].reshape(2 * d),
            delta_bias=bias[pair].reshape(2 * d),
            delta_softplus=True,
            out_dtype=bias.dtype,
        )
        assert isinstance(y, Tensor)  # a tuple only with return_last_state
        return y.view(b, h, 2, d, w).sum(2).transpose(2, 3)


class VSSBlock(Block):
    """Residual 2-D selective scan, then residual MLP, each with its norm.

    Args:
        channels: Channels of input and output.
        arch: The options of all blocks.
        drop_path: Stochastic depth of this block.
    """

    def __init__(self, channels: int, arch: VMambaArch, drop_path: float) -> None:
        super().__init__()
        self.post_norm = arch.post_norm
        self.has_ssm, self.has_mlp = arch.ssm_ratio > 0, arch.mlp_ratio > 0
        if self.has_ssm:
            self.norm = build_norm(arch.norm, channels)
            self.op = _build_ss2d(channels, arch)
        self.drop_path = DropPath(drop_path)
        if self.has_mlp:
            self.norm2 = build_norm(arch.norm, channels)
            mlp = GatedMlp if arch.gated_mlp else Mlp
            self.mlp = mlp(channels, int(channels * arch.mlp_ratio), arch.mlp_act, arch.mlp_dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (b, h, w, c) to (b, h, w, c)."""
        if self.has_ssm and self.has_mlp and not self.post_norm and self._keeps_all():
            dtype = fused_tail_dtype(x, self.op, self.norm2, self.mlp)
            if dtype is not None:
                assert isinstance(self.norm2, LayerNorm) and isinstance(self.mlp, Mlp)  # for the type checker
                return fused_tail(x, *self.op.mix(self.norm(x))[:2], self.op, self.norm2, self.mlp, dtype)
        if self.has_ssm:
            x = x + self.drop_path(self._branch(self.op, self.norm, x))
        if self.has_mlp:
            x = x + self.drop_path(self._branch(self.mlp, self.norm2, x))
        return x

    def _keeps_all(self) -> bool:
        """Whether the stochastic depth passes everything on, without anybody watching it."""
        drop = self.drop_path
        return type(drop) is DropPath and (drop.rate == 0.0 or not drop.training) and is_unobserved(drop)

    def _branch(self, body: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
        return norm(body(x)) if self.post_norm else body(norm(x))


@MODELS.register_module()
class VMamba(BaseBackbone):
    """VMamba as a feature extractor.

    Stage i has ceil(h / (4 * 2**i)) rows with the released v2 stems and downsamplings, and columns likewise. The
    patchifying stem and the 2x2 convolution round down instead; below their kernel they zero-pad up to it.

    Args:
        arch: Name of a variant (a key of ``ARCHS``) or a dict with the fields of ``VMambaArch``.
        in_channels: Channels of the image.
        out_indices: Stages whose output is returned, in rising order.
        drop_path_rate: Stochastic depth of the last block; None takes the variant's own.
        patch_size: Stride of the stem.
        patch_norm: Whether the stem has norms.
        pos_embed_size: (rows, columns) of a learned position embedding, or None for none. It is resized
            (bicubic) to other map sizes and when loaded from a checkpoint of another size.
        use_pos_embed: False keeps the embedding in the state dict without adding it, which is what upstream's
            feature extractor does.
        frozen_stages, norm_eval, with_cp, init_cfg: See ``BaseBackbone``.

    Raises:
        ConfigError: If an option is unknown, misspelt or contradicts another.
    """

    stem_names = ("patch_embed", "pos_embed")

    def __init__(
        self,
        arch: str | Mapping[str, Any] | VMambaArch = "tiny-s1l8",
        *,
        in_channels: int = 3,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        drop_path_rate: float | None = None,
        patch_size: int = 4,
        patch_norm: bool = True,
        pos_embed_size: Sequence[int] | None = None,
        use_pos_embed: bool = True,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        init_cfg: dict | list[dict] | None = None,
        **unknown: Any,
    ) -> None:
        self.reject_unknown(unknown)
        self.arch = resolve_arch(arch, ARCHS, VMambaArch)
        super().__init__(in_channels, self.arch.depths, out_indices, frozen_stages, norm_eval, with_cp, init_cfg)
        dims, rate = self.arch.dims, self.arch.drop_path_rate if drop_path_rate is None else drop_path_rate
        stem_norm = self.arch.norm if patch_norm else None
        self.patch_embed = build_patch_embed(self.arch.patch_embed, in_channels, dims[0], patch_size, stem_norm)
        self.pos_embed: nn.Parameter | None = None
        if pos_embed_size is not None:
            self.pos_embed = nn.Parameter(torch.empty(1, dims[0], *pos_embed_size))
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.use_pos_embed = use_pos_embed

        rates = drop_path_schedule(rate, self.depths)
        self.layers = nn.ModuleList()
        for i, dim in enumerate(dims):
            blocks = [VSSBlock(dim, self.arch, block_rate) for block_rate in rates[i]]
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
        x = self.patch_embed(image)
        if self.pos_embed is not None and self.use_pos_embed:
            x = x + _resize(self.pos_embed, x.shape[1], x.shape[2]).permute(0, 2, 3, 1)
        return self.run_stages(x)

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters that are trained without weight decay, the position embedding included."""
        return super().no_weight_decay() | (set() if self.pos_embed is None else {"pos_embed"})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        key = prefix + "pos_embed"
        stored = state_dict.get(key)
        # Anything but another map size is not resized: it stays what it is and does not fit.
        if self.pos_embed is not None and stored is not None and _is_resizable(stored, self.pos_embed):
            state_dict[key] = _resize(stored, *self.pos_embed.shape[2:])
        super()._load_from_state_dict(state_dict, prefix, *args)


def _build_ss2d(channels: int, arch: VMambaArch) -> SS2D:
    return {"rotated": RotatedSS2D, "cascade": CascadeSS2D}.get(arch.scan, SS2D)(
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
        scan_orders=_ORDERS[arch.scan],
        ssm_init=arch.ssm_init,
        dropout=arch.ssm_dropout,
    )


def _is_resizable(stored: Tensor, own: Tensor) -> bool:
    return stored.is_floating_point() and stored.ndim == 4 and stored.shape[:2] == own.shape[:2] and stored.numel() > 0


def _resize(embedding: Tensor, rows: int, columns: int) -> Tensor:
    """Return a position embedding (1, d, h, w) resized to (1, d, rows, columns)."""
    # A grid that an export leaves open is not looked at: resizing to the same one changes nothing.
    if statically_known_true(embedding.shape[2] == rows) and statically_known_true(embedding.shape[3] == columns):
        return embedding
    resized = F.interpolate(embedding.float(), size=(rows, columns), mode="bicubic", align_corners=False)
    return resized.to(embedding.dtype)
