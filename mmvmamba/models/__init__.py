"""Networks of mmvmamba; importing this module needs PyTorch and MMEngine only and fills ``registry.MODELS``."""

from mmvmamba.models.backbones import VMamba
from mmvmamba.models.segmentors import build_windowed_encoder_decoder

__all__ = ["VMamba", "build_windowed_encoder_decoder"]
