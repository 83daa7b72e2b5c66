"""Necks between backbones and heads that the mm* libraries lack."""

from mmvmamba.models.necks.efficientvit_fpn import EfficientViTFPN
from mmvmamba.models.necks.simple_feature_pyramid import FourScalePyramid, SimpleFeaturePyramid

__all__ = ["EfficientViTFPN", "FourScalePyramid", "SimpleFeaturePyramid"]
