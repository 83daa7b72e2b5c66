"""Necks between backbones and heads that the mm* libraries lack."""

from mmvmamba.models.necks.efficientvit_fpn import EfficientViTFPN

__all__ = ["EfficientViTFPN"]
