"""Networks of mmvmamba; importing this module needs PyTorch and MMEngine only and fills ``registry.MODELS``."""

from mmvmamba.models import backbones
from mmvmamba.models.adapters import ViTAdapter
from mmvmamba.models.backbones import *  # noqa: F403 (its list of families is the only one)
from mmvmamba.models.heads import build_mambaout_cls_head
from mmvmamba.models.necks import EfficientViTFPN, FourScalePyramid, SimpleFeaturePyramid
from mmvmamba.models.segmentors import build_windowed_encoder_decoder

__all__ = [
    "EfficientViTFPN",
    "FourScalePyramid",
    "SimpleFeaturePyramid",
    "ViTAdapter",
    "build_mambaout_cls_head",
    "build_windowed_encoder_decoder",
]
__all__ += backbones.__all__
