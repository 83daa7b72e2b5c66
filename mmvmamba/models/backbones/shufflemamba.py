"""ShuffleMamba: Vim trained with its tokens shuffled layer by layer (https://arxiv.org/abs/2408.17081).

Upstream: huangzizheng01/ShuffleMamba, models_shuffle.py, models_reg.py (``VisionMamba``; registers as in Mamba-Reg,
https://arxiv.org/abs/2405.14858) and models_openmm.py (``Backbone_VideoMamba``). It has no licence and has released no
weights; this is written from a description of what it computes. Differences: one class serves all three, variants are
named options, every input size from 1x1 up works with registers too, and a feature extractor may have the norms of the
classifier it starts from (upstream's configs of the base and the large one have layer norms where the classifier has
RMS norms). A, D and the biases of the time step have no weight decay here; upstream spares D and the biases alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from mmvmamba.errors import ConfigError
from mmvmamba.models.backbones.arch import resolve_arch
from mmvmamba.models.backbones.columnar import OutType
from mmvmamba.models.backbones.two_stream import (
    Feature,
    LastFeature,
    TwoStreamArch,
    TwoStreamBackbone,
    TwoStreamBlock,
)
from mmvmamba.models.layers import check_choice
from mmvmamba.models.layers.tokens import (
    TokenLayout,
    insert_tokens,
    only_extra,
    resize_position_embedding,
    square_grid,
)
from mmvmamba.registry import MODELS

Tokens = Literal["first", "middle", "spread", "none"]
TOKENS: tuple[str, ...] = get_args(Tokens)


@dataclasses.dataclass(frozen=True)
class ShuffleMambaArch(TwoStreamArch):
    """Everything that distinguishes one ShuffleMamba from another; see ``TwoStreamArch``.

    Attributes:
        num_registers: Tokens spread evenly among the patches, whose outputs are classified together; 0 for one class
            token.
    """

    num_registers: int = 0

    def __post_init__(self) -> None:
        """Check what no layer checks by itself."""
        super().__post_init__()
        if not isinstance(self.num_registers, int) or self.num_registers < 0:
            raise ConfigError(
                f"arch: num_registers is {self.num_registers!r}, expected an integer of at least 0. Correct it."
            )


# Upstream tells the stochastic depth of its two base models alone; of the others it is our choice.
ARCHS: dict[str, ShuffleMambaArch] = {
    "tiny": ShuffleMambaArch(192, 24, 0.1),
    "small": ShuffleMambaArch(384, 24, 0.2),
    "middle": ShuffleMambaArch(576, 32, 0.5, norm="layer_norm"),
    "base": ShuffleMambaArch(768, 24, 0.5),
    "large40": ShuffleMambaArch(1024, 40, 0.5),
    "large48": ShuffleMambaArch(1024, 48, 0.5),
    "reg-tiny": ShuffleMambaArch(192, 24, 0.1, num_registers=12),
    "reg-small": ShuffleMambaArch(384, 24, 0.2, num_registers=12),
    "reg-base": ShuffleMambaArch(768, 24, 0.4, num_registers=12),
    "reg-large": ShuffleMambaArch(1024, 48, 0.4, num_registers=16),
    # For demos and tests on a CPU; not a model of the paper.
    "nano": ShuffleMambaArch(24, 4, 0.0, d_state=8, num_registers=3),
}


@MODELS.register_module()
class ShuffleMamba(TwoStreamBackbone):
    """ShuffleMamba as a feature extractor: maps of one resolution, floor((h - 16) / 16) + 1 rows.

    Args:
        arch: Name of a variant (a key of ``ARCHS``) or a dict with the fields of ``ShuffleMambaArch``.
        in_channels: Channels of the image.
        img_size: Height and width (or one number for both) of the images for which the position embedding has a row
            per token. For others it is resized (bicubic), and so is that of a checkpoint of another size.
        out_indices: Layers whose output is returned, counted from 0, in rising order; None for the last of each quarter
            of the depth, or for the last alone if ``out_type`` is not ``"featmap"``.
        out_type: ``"featmap"`` for maps (b, d, h, w), ``"cls_token"`` for the class token (b, d), or all registers side
            by side (b, num_registers * d), ``"avg_featmap"`` for the mean of the patches (b, d).
        cls_token: Where the class token stands: ``"first"``, in the ``"middle"`` of the patches, or nowhere
            (``"none"``); registers are ``"spread"``. None takes what the variant has. Upstream's feature extractors
            have none; a classifier's checkpoint loads into them without its tokens.
        feature: What the output of a layer but the last is: the mixer's ``"hidden"`` tokens or the ``"residual"``
            stream.
        last_feature: The same of the last layer, or the residual stream ``"normed"``.
        final_norm: Whether there is that norm; a classifier's checkpoint has it. It is kept untrained where no output
            needs it. Without it, the entries of a checkpoint are left out.
        drop_path_rate: Stochastic depth of the last layer; None takes the variant's own.
        shuffle_rate: Probability with which the last layer of a training step sees its tokens shuffled, see
            ``layers/shuffle.py``. Upstream trains its classifier with 0.5, with registers 0.1, and detectors and
            segmentors with 0.
        frozen_stages: -1 trains everything, 0 freezes the stem, i freezes the stem and the first i layers.
        norm_eval, with_cp, init_cfg: See ``BaseBackbone``.

    Raises:
        ConfigError: If an option is unknown, misspelt or contradicts another.
    """

    stem_names = (*TwoStreamBackbone.stem_names, "pos_embed_cls")

    arch: ShuffleMambaArch

    def __init__(
        self,
        arch: str | Mapping[str, Any] | ShuffleMambaArch = "base",
        *,
        in_channels: int = 3,
        img_size: int | Sequence[int] = 224,
        out_indices: Sequence[int] | None = None,
        out_type: OutType = "featmap",
        cls_token: Tokens | None = None,
        feature: Feature = "hidden",
        last_feature: LastFeature = "normed",
        final_norm: bool = True,
        drop_path_rate: float | None = None,
        shuffle_rate: float = 0.0,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        init_cfg: dict | list[dict] | None = None,
        **unknown: Any,
    ) -> None:
        self.reject_unknown(unknown)
        self.arch = resolve_arch(arch, ARCHS, ShuffleMambaArch)
        super().__init__(
            in_channels=in_channels,
            img_size=img_size,
            out_indices=out_indices,
            out_type=out_type,
            cls_token=_checked_tokens(cls_token, self.arch.num_registers),
            feature=feature,
            last_feature=last_feature,
            final_norm=final_norm,
            drop_path_rate=drop_path_rate,
            shuffle_rate=shuffle_rate,
            frozen_stages=frozen_stages,
            norm_eval=norm_eval,
            with_cp=with_cp,
            init_cfg=init_cfg,
        )
        if not self.arch.num_registers:
            self._init_like_upstream()

    @torch.no_grad()
    def _init_like_upstream(self) -> None:
        """Draw the weights of the linear maps as upstream's plain model does, whose class token begins at zero.

        Its rule for linear maps is applied after the mixer's own, to the time step as well, and spares the projection
        back alone. The model with registers keeps the mixer's own.
        """
        if self.cls_token is not None:
            nn.init.zeros_(self.cls_token)
        for block in cast("Sequence[TwoStreamBlock]", self.layers):
            for name, layer in block.mixer.named_children():
                if isinstance(layer, nn.Linear) and name != "out_proj":
                    nn.init.trunc_normal_(layer.weight, std=0.02)
                    if layer.bias is not None:
                        nn.init.zeros_(layer.bias)

    @property
    def _has_registers(self) -> bool:
        return self.arch.num_registers > 0 and self.cls_token_place != "none"  # noqa: S105 (no password)

    def add_tokens(self, grid: tuple[int, int]) -> None:
        """Register class token or registers, and the position embedding for a ``grid`` (rows, columns).

        Registers have positions of their own: the embedding has rows for patches only.
        """
        if not self._has_registers:
            super().add_tokens(grid)
            return
        self.pos_grid = grid
        k, d = self.arch.num_registers, self.arch.dim
        self.cls_token = nn.Parameter(torch.empty(1, k, d))
        self.pos_embed_cls = nn.Parameter(torch.empty(1, k, d))
        self.pos_embed = nn.Parameter(torch.empty(1, math.prod(grid), d))
        for parameter in (self.cls_token, self.pos_embed_cls, self.pos_embed):
            nn.init.trunc_normal_(parameter, std=0.02)

    def token_positions(self, grid: tuple[int, int]) -> tuple[int, ...]:
        """Return the rising positions, in the sequence of a ``grid`` (rows, columns), of tokens that are no patches.

        Each of the k registers follows one of k groups of patches, of l // (k + 1) patches each; the rest comes last.
        """
        if not self._has_registers:
            return super().token_positions(grid)
        size = math.prod(grid) // (self.arch.num_registers + 1)
        return tuple(size + i * (size + 1) for i in range(self.arch.num_registers))

    def positions(self, layout: TokenLayout) -> Tensor:
        """Return the position embedding (1, l, d) of a sequence, resized if its grid is not that of the parameter."""
        if not self._has_registers:
            return super().positions(layout)
        grid = (layout.rows, layout.columns)
        rows = resize_position_embedding(cast("Tensor", self.pos_embed), self.pos_grid, grid)
        return insert_tokens(rows, self.pos_embed_cls, layout.extra)

    def output(self, x: Tensor, layout: TokenLayout) -> Tensor:
        """Return tokens ``x`` (b, l, d) as ``out_type`` says; all registers side by side (b, k * d)."""
        if self.out_type == "cls_token" and self._has_registers:
            return only_extra(x, layout.extra).flatten(1)
        return super().output(x, layout)

    def fit_tokens(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Change the entries of tokens in ``state_dict`` in place, where that makes them fit.

        Registers that this model does not have are left out; the rows of the position embedding are resized from
        another square grid, and lose that of a class token that this model does not have.
        """
        token, key = state_dict.get(prefix + "cls_token"), prefix + "pos_embed"
        stored, own = state_dict.get(key), cast("Tensor", self.pos_embed)
        if prefix + "pos_embed_cls" not in state_dict or token is None:
            if not self._has_registers:
                super().fit_tokens(state_dict, prefix)
            return
        if self.cls_token is None and token.ndim == own.ndim and token.shape[2] == own.shape[2]:
            del state_dict[prefix + "cls_token"], state_dict[prefix + "pos_embed_cls"]
        elif not self._has_registers:
            return
        if stored is None or not stored.is_floating_point() or stored.ndim != 3 or stored.shape[::2] != own.shape[::2]:
            return
        grid = square_grid(stored.shape[1])
        if stored.shape != own.shape and grid is not None:
            wide = stored.to(torch.promote_types(stored.dtype, own.dtype))
            state_dict[key] = resize_position_embedding(wide, grid, self.pos_grid)


def _checked_tokens(tokens: str | None, registers: int) -> str:
    """Return where the class token stands in words of the base class, to which registers are class tokens.

    Raises:
        ConfigError: If there is no such place, or the variant does not have what should stand there.
    """
    own = "spread" if registers else "first"
    chosen = own if tokens is None else tokens
    check_choice("cls_token", chosen, TOKENS)
    if chosen != "none" and (chosen == "spread") != (registers > 0):
        raise ConfigError(
            f"cls_token is {chosen!r} with num_registers={registers} in arch, expected {own!r} or 'none'. Leave it "
            "out, or choose another arch."
        )
    return "first" if chosen == "spread" else chosen
