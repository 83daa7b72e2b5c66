"""What the mobile families share besides ``conv_bn.py``: a stem of stride 16 and the merging of patches."""

from __future__ import annotations

import itertools

from torch import Tensor, nn
from torch.nn import functional as F

from mmvmamba.errors import ConfigError
from mmvmamba.models.layers.conv_bn import ConvBN
from mmvmamba.models.layers.patch import image_to_channels_last
from mmvmamba.models.layers.pointwise import PointwiseConv2d

#: Convolutions of the stem, each of which halves the sides; the widths double up to that of the first stage.
STEM_CONVS = 4
#: Narrowest layer of a squeeze and excitation, of which all widths are multiples.
_SE_STEP = 8
_SE_PART = 4


class MobileStem(nn.Module):
    """Four 3x3 convolutions of stride 2 with their norms, ReLUs between; a side n becomes ceil(n / 16).

    Args:
        in_channels: Channels of the image.
        channels: Channels of the tokens; an eighth, a quarter and a half of it (rounded down) before.

    Raises:
        ConfigError: If there is no channel behind the first convolution.
    """

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        widths = [channels // 2**i for i in range(STEM_CONVS - 1, -1, -1)]
        if widths[0] < 1:
            raise ConfigError(
                f"arch: dims begins with {channels}, expected at least {2 ** (STEM_CONVS - 1)} channels, an eighth of "
                "which the stem has behind its first convolution. Use more."
            )
        self.convs = nn.Sequential(
            *(
                ConvBN(before, after, 3, stride=2, relu=i < STEM_CONVS - 1)
                for i, (before, after) in enumerate(itertools.pairwise([in_channels, *widths]))
            )
        )

    def forward(self, image: Tensor) -> Tensor:
        """Map an image (b, c, h, w) to tokens (b, h', w', d)."""
        return self.convs(image_to_channels_last(image))


class ReluSqueezeExcite(nn.Module):
    """Squeeze and excitation (https://arxiv.org/abs/1709.01507) with biases, as timm has it.

    Mean over the pixels, linear, ReLU, linear, sigmoid; the map is multiplied by the result. The layer between has a
    quarter of the channels, to the nearest multiple of 8 (ties go up), and at least 8.

    Args:
        channels: Channels of the map.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(_SE_STEP, (channels // _SE_PART + _SE_STEP // 2) // _SE_STEP * _SE_STEP)
        self.fc1 = PointwiseConv2d(channels, hidden)
        self.fc2 = PointwiseConv2d(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Scale the channels of ``x`` (b, h, w, c); same shape."""
        mean = x.mean((1, 2), keepdim=True)
        return x * self.fc2(F.relu(self.fc1(mean))).sigmoid()


class MobileMerging(nn.Module):
    """Half the resolution: widen, convolve depthwise with stride 2, squeeze and excite, narrow; ceil(n / 2) a side.

    Args:
        channels: Channels of the input.
        out_channels: Channels of the output.
        hidden: Channels between.
    """

    def __init__(self, channels: int, out_channels: int, hidden: int) -> None:
        super().__init__()
        self.conv1 = ConvBN(channels, hidden, relu=True)
        self.conv2 = ConvBN(hidden, hidden, 3, stride=2, groups=hidden, relu=True)
        self.se = ReluSqueezeExcite(hidden)
        self.conv3 = ConvBN(hidden, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (b, h, w, c) to (b, h', w', c')."""
        return self.conv3(self.se(self.conv2(self.conv1(x))))
