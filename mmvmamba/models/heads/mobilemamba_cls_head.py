"""The classification head of MobileMamba: a batch norm of the pooled map, then a linear map.

Paper: https://arxiv.org/abs/2411.15941. Upstream: lewandofskee/MobileMamba, model/mobilemamba/mobilemamba.py
(``MobileMamba.head``). Difference: a model with a second head for distillation gives the mean of both in training as
well, where upstream gives both to its own loss.
"""

from __future__ import annotations

import functools
from typing import Any

from mmengine.model import BaseModule
from torch import Tensor, nn

from mmvmamba.errors import ConfigError
from mmvmamba.models.layers.conv_bn import fold_norm_before
from mmvmamba.registry import MODELS

_INIT_STD = 0.02


# A function, so that a config can name it where MMPretrain is not installed.
@MODELS.register_module(name="MobileMambaClsHead")
def build_mobilemamba_cls_head(
    num_classes: int, in_channels: int, distillation: bool = False, **settings: Any
) -> BaseModule:
    """Build a head of an ``ImageClassifier`` of MMPretrain whose neck pools the map.

    Args:
        num_classes: Number of classes.
        in_channels: Channels of the pooled map.
        distillation: Whether there is a second norm and linear map; the scores are the mean of both. No released
            model has one.
        settings: Arguments of ``ClsHead`` (``loss``, ``topk``, ``cal_acc``, ``init_cfg``), which refuses others.

    Raises:
        ConfigError: If a number is impossible.
        ImportError: If MMPretrain is not installed.
    """
    for name, value in (("num_classes", num_classes), ("in_channels", in_channels)):
        if not isinstance(value, int) or value < 1:
            raise ConfigError(
                f"MobileMambaClsHead: {name} is {value!r}, expected an integer of at least 1. Use a larger value."
            )
    return _head_class()(num_classes, in_channels, distillation, **settings)


class NormedLinear(nn.Module):
    """A batch norm of vectors, then a linear map.

    Args:
        channels: Length of the vectors.
        out_channels: Length of the result.
    """

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm: nn.Module = nn.BatchNorm1d(channels)
        self.fc = nn.Linear(channels, out_channels)
        nn.init.trunc_normal_(self.fc.weight, std=_INIT_STD)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (b, c) to (b, c')."""
        return self.fc(self.norm(x))

    def fold_batch_norms(self) -> None:
        """Make the norm a part of the linear map. For `mmvmamba.models.deploy` alone."""
        self.fc, self.norm = fold_norm_before(self.norm, self.fc), nn.Identity()


@functools.cache
def _head_class() -> type[BaseModule]:
    from mmpretrain.models.heads import ClsHead

    class MobileMambaClsHead(ClsHead):
        """See ``build_mobilemamba_cls_head``."""

        def __init__(self, num_classes: int, in_channels: int, distillation: bool, **settings: Any) -> None:
            super().__init__(**settings)
            self.num_classes, self.in_channels = num_classes, in_channels
            self.head = NormedLinear(in_channels, num_classes)
            self.head_dist = NormedLinear(in_channels, num_classes) if distillation else None

        def pre_logits(self, feats: tuple[Tensor, ...]) -> Tensor:
            """Return what the classifying layers get (b, c) for pooled maps, of which the last (b, c) is used."""
            return feats[-1]

        def forward(self, feats: tuple[Tensor, ...]) -> Tensor:
            """Return the scores (b, classes) for pooled maps, of which the last (b, c) is used."""
            x = self.pre_logits(feats)
            scores = self.head(x)
            return scores if self.head_dist is None else (scores + self.head_dist(x)) / 2

    return MobileMambaClsHead
