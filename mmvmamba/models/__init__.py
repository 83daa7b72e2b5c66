"""Networks of mmvmamba; importing this module needs PyTorch and MMEngine only and fills ``registry.MODELS``."""

from mmvmamba.models import backbones
from mmvmamba.models.backbones import *  # noqa: F403 (its list of families is the only one)
from mmvmamba.models.deploy import fold_batch_norms
from mmvmamba.models.heads import (
    build_efficientvim_cls_head,
    build_mambaout_cls_head,
    build_mobilemamba_cls_head,
    build_ssd_head,
)
from mmvmamba.models.necks import EfficientViTFPN, FourScalePyramid, SimpleFeaturePyramid
from mmvmamba.models.segmentors import build_windowed_encoder_decoder

__all__ = [
    "EfficientViTFPN",
    "FourScalePyramid",
    "SimpleFeaturePyramid",
    "build_efficientvim_cls_head",
    "build_mambaout_cls_head",
    "build_mobilemamba_cls_head",
    "build_ssd_head",
    "build_windowed_encoder_decoder",
    "fold_batch_norms",
]
__all__ += backbones.__all__
