"""Vim, Vision Mamba: bidirectional state spaces over the patches of an image (https://arxiv.org/abs/2401.09417).

Upstream: hustvl/Vim, vim/models_mamba.py (``VisionMamba``), with the feature extractors of seg/ (``VisionMambaSeg``)
and det/ (``VisionMambaDet``). Differences: variants are named options, one class serves all three, the pyramids are
necks, every input size from 1x1 up works (upstream takes its one size, the feature extractors only squares), rotary
tables are computed for the grid at hand, and the class token of a classifier's checkpoint is dropped where it stands,
not in the first row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from mmvmamba.models.backbones.arch import resolve_arch
from mmvmamba.models.backbones.columnar import ClassToken, OutType
from mmvmamba.models.backbones.two_stream import Feature, LastFeature, Rope, TwoStreamArch, TwoStreamBackbone
from mmvmamba.registry import MODELS


@dataclasses.dataclass(frozen=True)
class VimArch(TwoStreamArch):
    """Everything that distinguishes one Vim from another; see ``TwoStreamArch``."""


ARCHS: dict[str, VimArch] = {
    "tiny": VimArch(192, 24, 0.0),
    # The classifiers with a plus are fine-tuned with overlapping patches.
    "tiny-plus": VimArch(192, 24, 0.0, stride=8),
    "small": VimArch(384, 24, 0.05),
    "small-plus": VimArch(384, 24, 0.05, stride=8),
    "base": VimArch(768, 24, 0.1),
    # For demos and tests on a CPU; not a model of the paper.
    "nano": VimArch(24, 4, 0.0, d_state=8),
}


@MODELS.register_module()
class Vim(TwoStreamBackbone):
    """Vim as a feature extractor: maps of one resolution, floor((h - 16) / 16) + 1 rows with patches of stride 16.

    Args:
        arch: Name of a variant (a key of ``ARCHS``) or a dict with the fields of ``VimArch``.
        in_channels: Channels of the image.
        img_size: Height and width (or one number for both) of the images for which the position embedding has a row
            per token. For others it is resized (bicubic), and so is that of a checkpoint of another size.
        out_indices: Layers whose output is returned, counted from 0, in rising order; None for the last of each quarter
            of the depth, or for the last alone if ``out_type`` is not ``"featmap"``.
        out_type: ``"featmap"`` for maps (b, d, h, w), ``"cls_token"`` for the class token (b, d), ``"avg_featmap"`` for
            the mean of the patches (b, d).
        cls_token: Where the class token stands: in the ``"middle"`` of the patches, ``"first"``, or ``"none"``.
            Feature extractors have none; a classifier's checkpoint loads into them without its token.
        feature: What the output of a layer but the last is: the mixer's ``"hidden"`` tokens or the ``"residual"``
            stream.
        last_feature: The same of the last layer, or the residual stream ``"normed"``.
        rope: Which streams are rotated by the positions before every layer: ``"none"``, the ``"hidden"`` tokens, or
            ``"both"`` them and the residual stream. Upstream's detector and its larger segmentor rotate both.
        final_norm: Whether there is that norm; a classifier's checkpoint has it. It is kept untrained where no output
            needs it. Without it, the entries of a checkpoint are left out.
        drop_path_rate: Stochastic depth of the last layer; None takes the variant's own.
        shuffle_rate: Stochastic layer-wise shuffle while training, see ``ColumnarBackbone``.
        frozen_stages: -1 trains everything, 0 freezes the stem, i freezes the stem and the first i layers.
        norm_eval, with_cp, init_cfg: See ``BaseBackbone``.

    Raises:
        ConfigError: If an option is unknown, misspelt or contradicts another.
    """

    stored_cls_token: ClassToken = "middle"  # noqa: S105 (no password)

    def __init__(
        self,
        arch: str | Mapping[str, Any] | VimArch = "tiny",
        *,
        in_channels: int = 3,
        img_size: int | Sequence[int] = 224,
        out_indices: Sequence[int] | None = None,
        out_type: OutType = "featmap",
        cls_token: ClassToken = "middle",  # noqa: S107 (no password)
        feature: Feature = "residual",
        last_feature: LastFeature = "normed",
        rope: Rope = "none",
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
        self.arch = resolve_arch(arch, ARCHS, VimArch)
        super().__init__(
            in_channels=in_channels,
            img_size=img_size,
            out_indices=out_indices,
            out_type=out_type,
            cls_token=cls_token,
            feature=feature,
            last_feature=last_feature,
            rope=rope,
            final_norm=final_norm,
            drop_path_rate=drop_path_rate,
            shuffle_rate=shuffle_rate,
            frozen_stages=frozen_stages,
            norm_eval=norm_eval,
            with_cp=with_cp,
            init_cfg=init_cfg,
        )
