"""The causal depthwise convolution of channels-last sequences, in several directions at once."""

from mmvmamba.ops.causal_conv.interface import causal_conv1d

__all__ = ["causal_conv1d"]
