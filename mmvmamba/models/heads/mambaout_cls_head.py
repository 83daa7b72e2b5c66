"""The classification head of MambaOut: a norm, then a perceptron with a norm behind its activation.

Paper: https://arxiv.org/abs/2405.07992. Upstream: yuweihao/MambaOut, models/mambaout.py (``MambaOut.norm``,
``MlpHead``).
"""

from __future__ import annotations

import functools
from typing import Any

from mmengine.model import BaseModule
from torch import Tensor, nn

from mmvmamba.errors import ConfigError
from mmvmamba.models.backbones.mambaout import NORM_EPS, init_like_upstream_
from mmvmamba.models.layers import LayerNorm
from mmvmamba.registry import MODELS

#: Hidden values as a multiple of the channels.
_EXPANSION = 4


# A function, so that a config can name it where MMPretrain is not installed.
@MODELS.register_module(name="MambaOutClsHead")
def build_mambaout_cls_head(num_classes: int, in_channels: int, dropout: float = 0.0, **settings: Any) -> BaseModule:
    """Build a head of an ``ImageClassifier`` of MMPretrain whose neck pools the map, as upstream does before its norm.

    Args:
        num_classes: Number of classes.
        in_channels: Channels of the pooled map.
        dropout: Dropout probability before the last linear map; the released models have none.
        settings: Arguments of ``ClsHead`` (``loss``, ``topk``, ``cal_acc``, ``init_cfg``), which refuses others.

    Raises:
        ConfigError: If a number is impossible.
        ImportError: If MMPretrain is not installed.
    """
    for name, value in (("num_classes", num_classes), ("in_channels", in_channels)):
        if not isinstance(value, int) or value < 1:
            raise ConfigError(
                f"MambaOutClsHead: {name} is {value!r}, expected an integer of at least 1. Use a larger value."
            )
    return _head_class()(num_classes, in_channels, dropout, **settings)


@functools.cache
def _head_class() -> type[BaseModule]:
    from mmpretrain.models.heads import ClsHead

    class MambaOutClsHead(ClsHead):
        """See ``build_mambaout_cls_head``."""

        def __init__(self, num_classes: int, in_channels: int, dropout: float, **settings: Any) -> None:
            super().__init__(**settings)
            self.num_classes, self.in_channels = num_classes, in_channels
            hidden = _EXPANSION * in_channels
            self.pre_norm = LayerNorm(in_channels, eps=NORM_EPS)
            self.fc1 = nn.Linear(in_channels, hidden)
            self.act = nn.GELU()
            self.norm = LayerNorm(hidden, eps=NORM_EPS)
            self.dropout = nn.Dropout(dropout)
            self.fc2 = nn.Linear(hidden, num_classes)
            for layer in (self.fc1, self.fc2):
                init_like_upstream_(layer)

        def pre_logits(self, feats: tuple[Tensor, ...]) -> Tensor:
            """Return what the last linear map gets (b, 4 c) for pooled maps, of which the last (b, c) is used."""
            return self.dropout(self.norm(self.act(self.fc1(self.pre_norm(feats[-1])))))

        def forward(self, feats: tuple[Tensor, ...]) -> Tensor:
            """Return the scores (b, classes) for pooled maps, of which the last (b, c) is used."""
            return self.fc2(self.pre_logits(feats))

    return MambaOutClsHead
