"""MMDetection's SSD head, whose present releases can train but not predict."""

from __future__ import annotations

import functools
from typing import Any

from mmengine.model import BaseModule

from mmvmamba.registry import MODELS


# A function, so that a config can name it where MMDetection is not installed.
@MODELS.register_module(name="SSDHead")
def build_ssd_head(**settings: Any) -> BaseModule:
    """Build MMDetection's ``SSDHead`` with the one attribute that its base class asks for when it predicts.

    The shared prediction of dense heads reads ``self.loss_cls``, which is no attribute of this head: it computes its
    loss by itself. Here it is None. Everything else, names of weights included, is MMDetection's.

    Args:
        settings: Arguments of ``SSDHead``, which refuses others.

    Raises:
        ImportError: If MMDetection is not installed.
    """
    return _head_class()(**settings)


@functools.cache
def _head_class() -> type[BaseModule]:
    from mmdet.models import SSDHead

    class PredictingSSDHead(SSDHead):
        """See ``build_ssd_head``."""

        loss_cls = None

    return PredictingSSDHead
