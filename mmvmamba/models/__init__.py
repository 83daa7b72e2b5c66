"""Networks of mmvmamba; importing this module needs PyTorch and MMEngine only and fills ``registry.MODELS``."""

from mmvmamba.models.backbones import VMamba

__all__ = ["VMamba"]
