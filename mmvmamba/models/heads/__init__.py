"""Heads of classifiers that MMPretrain lacks, and a mended one of MMDetection; either is imported when one is built."""

from mmvmamba.models.heads.efficientvim_cls_head import build_efficientvim_cls_head
from mmvmamba.models.heads.mambaout_cls_head import build_mambaout_cls_head
from mmvmamba.models.heads.mobilemamba_cls_head import build_mobilemamba_cls_head
from mmvmamba.models.heads.register_cls_head import build_register_cls_head
from mmvmamba.models.heads.ssd_head import build_ssd_head

__all__ = [
    "build_efficientvim_cls_head",
    "build_mambaout_cls_head",
    "build_mobilemamba_cls_head",
    "build_register_cls_head",
    "build_ssd_head",
]
