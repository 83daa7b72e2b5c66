"""Wrappers that make a pyramid of maps around a columnar backbone."""

from mmvmamba.models.adapters.vit_adapter import ViTAdapter

__all__ = ["ViTAdapter"]
