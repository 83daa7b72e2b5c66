"""Layers shared by two or more families. Every map inside the package is channels-last, (b, h, w, c)."""

from mmvmamba.models.layers.activation import ACTIVATIONS, build_activation
from mmvmamba.models.layers.checks import check_choice
from mmvmamba.models.layers.conv import ChannelsLastConv2d
from mmvmamba.models.layers.conv_bn import ConvBN, ConvMlp, ResidualDepthwise
from mmvmamba.models.layers.depthwise import convolve_depthwise
from mmvmamba.models.layers.drop_path import DropPath, drop_path_schedule
from mmvmamba.models.layers.linear import Linear, StepProjection
from mmvmamba.models.layers.mlp import GatedMlp, Mlp
from mmvmamba.models.layers.mobile import MobileMerging, MobileStem, ReluSqueezeExcite
from mmvmamba.models.layers.norm import NORMS, BatchNorm, LayerNorm, build_norm
from mmvmamba.models.layers.patch import DOWNSAMPLES, PATCH_EMBEDS, build_downsample, build_patch_embed
from mmvmamba.models.layers.pointwise import PointwiseConv2d
from mmvmamba.models.layers.squeeze_excite import SqueezeExcite
from mmvmamba.models.layers.ss2d import OUT_NORMS, SS2D

__all__ = [
    "ACTIVATIONS",
    "DOWNSAMPLES",
    "NORMS",
    "OUT_NORMS",
    "PATCH_EMBEDS",
    "SS2D",
    "BatchNorm",
    "ChannelsLastConv2d",
    "ConvBN",
    "ConvMlp",
    "DropPath",
    "GatedMlp",
    "LayerNorm",
    "Linear",
    "Mlp",
    "MobileMerging",
    "MobileStem",
    "PointwiseConv2d",
    "ReluSqueezeExcite",
    "ResidualDepthwise",
    "SqueezeExcite",
    "StepProjection",
    "build_activation",
    "build_downsample",
    "build_norm",
    "build_patch_embed",
    "check_choice",
    "convolve_depthwise",
    "drop_path_schedule",
]
