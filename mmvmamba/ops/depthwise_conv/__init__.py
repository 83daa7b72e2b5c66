"""The depthwise convolution of channels-last maps with its activation fused."""

from mmvmamba.ops.depthwise_conv.interface import Activation, depthwise_conv2d

__all__ = ["Activation", "depthwise_conv2d"]
