"""Networks of mmvmamba; importing this module needs PyTorch and MMEngine only and fills ``registry.MODELS``."""

from mmvmamba.models import adapters, backbones, heads, necks, segmentors
from mmvmamba.models.adapters import *  # noqa: F403 (each part has the only list of what is in it)
from mmvmamba.models.backbones import *  # noqa: F403
from mmvmamba.models.deploy import fold_batch_norms
from mmvmamba.models.heads import *  # noqa: F403
from mmvmamba.models.necks import *  # noqa: F403
from mmvmamba.models.segmentors import *  # noqa: F403

__all__ = ["fold_batch_norms"]
__all__ += [*adapters.__all__, *backbones.__all__, *heads.__all__, *necks.__all__, *segmentors.__all__]
