"""Columnar backbones of bidirectional Mamba layers with a residual stream beside the tokens: Vim and ShuffleMamba."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from mmvmamba.errors import ConfigError
from mmvmamba.models.backbones.columnar import (
    ColumnarBackbone,
    ColumnarBlock,
    PatchEmbed,
    check_positive,
    image_size,
)
from mmvmamba.models.layers import DropPath, LayerNorm, check_choice, drop_path_schedule
from mmvmamba.models.layers.bidirectional_mamba import BidirectionalMamba
from mmvmamba.models.layers.norm import RMSNorm
from mmvmamba.models.layers.rope import check_rotated, rotate, rotation
from mmvmamba.models.layers.tokens import TokenLayout, insert_tokens, only_extra, only_patches
from mmvmamba.ops.ssd.heads import accumulation

TokenNorm = Literal["rms_norm", "layer_norm"]
TOKEN_NORMS: tuple[str, ...] = get_args(TokenNorm)
Rope = Literal["none", "hidden", "both"]
ROPES: tuple[str, ...] = get_args(Rope)
Feature = Literal["hidden", "residual"]
FEATURES: tuple[str, ...] = get_args(Feature)
LastFeature = Literal["hidden", "residual", "normed"]
LAST_FEATURES: tuple[str, ...] = get_args(LastFeature)


@dataclasses.dataclass(frozen=True)
class TwoStreamArch:
    """Everything that distinguishes one such model from another; the defaults are those of the released models.

    Attributes:
        dim: Channels of the tokens.
        depth: Layers.
        drop_path_rate: Stochastic depth of the released recipe.
        patch_size: Side of a patch.
        stride: Pixels from one patch to the next.
        d_state, expansion, dt_rank, conv_kernel, halve, layer_scale: See ``BidirectionalMamba``.
        norm: Kind of every norm.
        norm_eps: What is added to the variance.
    """

    dim: int
    depth: int
    drop_path_rate: float = 0.0
    patch_size: int = 16
    stride: int = 16
    d_state: int = 16
    expansion: float = 2
    dt_rank: int | None = None
    conv_kernel: int = 4
    halve: bool = True
    layer_scale: float | None = None
    norm: TokenNorm = "rms_norm"
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        """Check what no layer checks by itself."""
        check_positive(dim=self.dim, depth=self.depth, patch_size=self.patch_size, stride=self.stride)
        check_choice("norm", self.norm, TOKEN_NORMS)


class TwoStreamBlock(ColumnarBlock):
    """Add the tokens to the residual, norm the sum, mix: the order "add, norm, mixer" of Mamba's own blocks.

    The residual is float32 in half-precision models too. Stochastic depth acts on the tokens that come in, which are
    the previous layer's.

    Args:
        arch: The options of all layers.
        drop_path: Stochastic depth of the tokens that enter.
    """

    def __init__(self, arch: TwoStreamArch, drop_path: float) -> None:
        super().__init__()
        self.mixer = BidirectionalMamba(
            arch.dim,
            d_state=arch.d_state,
            expansion=arch.expansion,
            dt_rank=arch.dt_rank,
            conv_kernel=arch.conv_kernel,
            halve=arch.halve,
            layer_scale=arch.layer_scale,
        )
        self.norm = build_token_norm(arch)
        self.drop_path = DropPath(drop_path)

    def enter(self, h: Tensor, r: Tensor | None) -> Tensor:
        """Return the residual (b, l, d) with the tokens ``h`` (b, l, d) added; without one, the tokens."""
        return h.to(accumulation(h.dtype)) if r is None else r + self.drop_path(h)

    def forward(self, x: Tensor, layout: TokenLayout) -> Tensor:  # noqa: ARG002 (a sequence is all the mixer sees)
        """Map the residual ``x`` (b, l, d) to tokens (b, l, d)."""
        out: Tensor = self.mixer(self.norm(x).to(self.norm.weight.dtype))
        return out


class TwoStreamBackbone(ColumnarBackbone):
    """A stack of `TwoStreamBlock`s; ``arch`` is a `TwoStreamArch`, set before this constructor is called.

    Args:
        in_channels: Channels of the image.
        img_size: Height and width (or one number for both) of the images for which the position embedding has a row
            per token. For others it is resized.
        drop_path_rate: Stochastic depth of the last layer; None takes the variant's own.
        feature: What the output of a layer is: the mixer's ``"hidden"`` tokens or the ``"residual"`` stream with them
            added (and rotated, if the next layer rotates it).
        last_feature: The same of the last layer, or the residual stream ``"normed"``.
        rope: Which streams are rotated by the positions before every layer: none, the ``"hidden"`` tokens, or
            ``"both"`` them and the residual. The rotations accumulate along the depth.
        final_norm: Whether there is that norm. It is kept untrained where no output needs it. Without it, the entries
            of a checkpoint are left out.
        out_indices, out_type, cls_token, shuffle_rate, frozen_stages, norm_eval, with_cp, init_cfg: See
            ``ColumnarBackbone``.

    Raises:
        ConfigError: If an option is impossible or contradicts another.
    """

    arch: TwoStreamArch
    norm_f: RMSNorm | LayerNorm | None

    def __init__(
        self,
        *,
        in_channels: int,
        img_size: int | Sequence[int],
        drop_path_rate: float | None,
        feature: str,
        last_feature: str,
        final_norm: bool,
        rope: str = "none",
        out_indices: Sequence[int] | None,
        out_type: str,
        cls_token: str,
        shuffle_rate: float,
        frozen_stages: int,
        norm_eval: bool,
        with_cp: bool,
        init_cfg: dict | list[dict] | None,
    ) -> None:
        arch = self.arch
        check_choice("feature", feature, FEATURES)
        check_choice("last_feature", last_feature, LAST_FEATURES)
        check_choice("rope", rope, ROPES)
        if rope != "none":
            check_rotated(arch.dim)
        super().__init__(
            in_channels=in_channels,
            stride=arch.stride,
            out_indices=out_indices,
            out_type=out_type,
            cls_token=cls_token,
            shuffle_rate=shuffle_rate,
            frozen_stages=frozen_stages,
            norm_eval=norm_eval,
            with_cp=with_cp,
            init_cfg=init_cfg,
        )
        self.features, self.last_feature, self.rotated = feature, last_feature, rope
        rate = arch.drop_path_rate if drop_path_rate is None else drop_path_rate
        self.patch_embed = PatchEmbed(in_channels, arch.dim, arch.patch_size, arch.stride)
        self.add_tokens(self.patch_embed.grid(image_size(img_size)))
        # The tokens that enter a layer are those of the one before: the rates are one layer late.
        rates = [0.0, *drop_path_schedule(rate, (arch.depth,))[0]]
        self.layers = nn.ModuleList(TwoStreamBlock(arch, rates[layer]) for layer in range(arch.depth))
        self.drop_path = DropPath(rate)
        if not final_norm and self._is_normed():
            raise ConfigError(
                "final_norm is False but the last layer's output is 'normed', expected a norm for it. Set "
                "last_feature='residual', or leave final_norm at True."
            )
        self.norm_f = build_token_norm(arch) if final_norm else None
        with torch.no_grad():
            for block in cast("Sequence[TwoStreamBlock]", self.layers):
                block.mixer.out_proj.weight /= math.sqrt(arch.depth)
        self.freeze()

    def _is_normed(self) -> bool:
        return self.last_feature == "normed" and self.out_indices[-1] == len(self.layers) - 1

    def parts_of_stage(self, stage: int) -> list[nn.Module]:
        """Return what ``frozen_stages > stage`` freezes besides the stem and earlier layers: with the last its norm."""
        last = stage == len(self.layers) - 1 and self.norm_f is not None
        return [*super().parts_of_stage(stage), *([cast("nn.Module", self.norm_f)] if last else [])]

    def unused_parts(self) -> list[nn.Module]:
        """Return what no output depends on: the layers after the last output, and the norm where none is normed."""
        unused = super().unused_parts()
        return unused if self.norm_f is None or self._is_normed() else [*unused, self.norm_f]

    def embed(self, image: Tensor) -> tuple[Tensor, TokenLayout]:
        """Return the tokens (b, l, d) and their layout, with the rotation of the patches, for an image (b, c, h, w)."""
        x, layout = super().embed(image)
        if self.rotated == "none":
            return x, layout
        by = rotation(layout.rows, layout.columns, self.arch.dim, x.device, accumulation(x.dtype))
        return x, layout._replace(rotation=by)

    def turn(self, h: Tensor, r: Tensor | None, layout: TokenLayout) -> tuple[Tensor, Tensor | None]:
        """Return both streams rotated by their positions, as ``rope`` says; class tokens are not."""
        if layout.rotation is None:
            return h, r
        turned = _rotate_patches(h, layout)
        return turned, r if r is None or self.rotated == "hidden" else _rotate_patches(r, layout)

    def feature(self, layer: int, h: Tensor, r: Tensor, following: Tensor | None) -> Tensor:  # noqa: ARG002
        """Return the tokens (b, l, d) that are the output of a layer, as ``feature`` and ``last_feature`` say."""
        kind = self.features if following is not None else self.last_feature
        if kind == "hidden":
            return h
        if kind == "residual":
            return (r + h if following is None else following).to(h.dtype)
        norm = cast("RMSNorm | LayerNorm", self.norm_f)
        normed: Tensor = norm(r + self.drop_path(h))
        return normed.to(norm.weight.dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Leave out the final norm of a checkpoint if this model has none, besides what all columnar backbones do."""
        for field in ("weight", "bias") if self.norm_f is None else ():
            state_dict.pop(f"{prefix}norm_f.{field}", None)
        super()._load_from_state_dict(state_dict, prefix, *args)


def build_token_norm(arch: TwoStreamArch) -> RMSNorm | LayerNorm:
    """Return a norm over the channels of the tokens (..., d)."""
    return (RMSNorm if arch.norm == "rms_norm" else LayerNorm)(arch.dim, eps=arch.norm_eps)


def _rotate_patches(x: Tensor, layout: TokenLayout) -> Tensor:
    by = layout.rotation
    if by is None or not layout.extra:
        return x if by is None else rotate(x, by)
    patches = rotate(only_patches(x, layout.extra), by)
    return insert_tokens(patches, only_extra(x, layout.extra), layout.extra)
