"""Segmentors of MMSegmentation with one part changed; MMSegmentation is imported when one is built."""

from mmvmamba.models.segmentors.windowed_encoder_decoder import build_windowed_encoder_decoder

__all__ = ["build_windowed_encoder_decoder"]
