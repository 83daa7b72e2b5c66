"""A convolution, its batch norm and perhaps a ReLU, of channels-last maps: the unit of the mobile families.

For deployment the norm becomes a part of the convolution, see ``mmvmamba.models.deploy``.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from mmvmamba.errors import ConfigError
from mmvmamba.models.layers import deployed
from mmvmamba.models.layers.conv import ChannelsLastConv2d
from mmvmamba.models.layers.depthwise import convolve_depthwise
from mmvmamba.models.layers.norm import BatchNorm
from mmvmamba.models.layers.pointwise import PointwiseConv2d

Layer = TypeVar("Layer", bound=nn.Conv2d | nn.Linear)


class ConvBN(nn.Module):
    """Convolution without bias, batch norm, and a ReLU if asked for, of a map (b, h, w, c).

    The padding is half the kernel, so a side n becomes ceil(n / stride). Weights start as PyTorch's convolutions do.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Side of the kernel, odd; with 1, stride 1 and one group it is a linear map of every pixel.
        stride: Step of the kernel.
        groups: Groups of channels; as many as channels make it depthwise.
        relu: Whether a ReLU follows.
        norm_weight: Initial weight of the norm; 0 lets a residual branch start as nothing.

    Raises:
        ConfigError: If the kernel has an even side.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        *,
        stride: int = 1,
        groups: int = 1,
        relu: bool = False,
        norm_weight: float = 1.0,
    ) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ConfigError(
                f"ConvBN: kernel_size is {kernel_size!r}, expected a positive odd integer (an even one changes the "
                "size of the map). Choose 3."
            )
        self.conv: nn.Conv2d
        if kernel_size == stride == groups == 1:
            self.conv = PointwiseConv2d(in_channels, out_channels, bias=False)
        else:
            self.conv = ChannelsLastConv2d(
                in_channels,
                out_channels,
                kernel_size,
                stride=stride,
                padding=kernel_size // 2,
                groups=groups,
                bias=False,
            )
        self.norm: nn.Module = BatchNorm(out_channels)
        self.act: nn.Module = nn.ReLU() if relu else nn.Identity()
        self.relu = relu
        #: Whether the norm is a part of the convolution: the deployment form.
        self.folded = False
        nn.init.constant_(self.norm.weight, norm_weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (b, h, w, c) to (b, h', w', c')."""
        if self.folded and deployed.runs_directly(x, self.conv, self.norm, self.act):
            return deployed.convolve(x, self.conv, relu=self.relu)
        return self.act(self.norm(convolve_depthwise(self.conv, x)))

    def fold_batch_norms(self) -> None:
        """Make the norm a part of the convolution, which gets a bias. For `mmvmamba.models.deploy` alone."""
        self.conv, self.norm = fold_norm(self.conv, self.norm), nn.Identity()
        deployed.in_operator_order(self.conv)
        self.folded = True


class ResidualDepthwise(ConvBN):
    """A depthwise convolution and its norm, added to what they are given.

    Args:
        channels: Channels of input and output.
        kernel_size: Side of the kernel, odd.
        norm_weight: Initial weight of the norm.
    """

    def __init__(self, channels: int, kernel_size: int = 3, *, norm_weight: float = 1.0) -> None:
        super().__init__(channels, channels, kernel_size, groups=channels, norm_weight=norm_weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (b, h, w, c) to (b, h, w, c)."""
        y = super().forward(x)
        # The folded kernel holds the identity.
        return y if self.folded else x + y

    def fold_batch_norms(self) -> None:
        """Make norm and identity parts of the convolution. For `mmvmamba.models.deploy` alone."""
        super().fold_batch_norms()
        add_identity_(self.conv)


class ConvMlp(nn.Module):
    """Two linear maps of every pixel, each with its batch norm, and a ReLU between.

    Args:
        channels: Channels of input and output.
        hidden: Channels between.
        norm_weight: Initial weight of the second norm.
    """

    def __init__(self, channels: int, hidden: int, *, norm_weight: float = 1.0) -> None:
        super().__init__()
        self.fc1 = ConvBN(channels, hidden, relu=True)
        self.fc2 = ConvBN(hidden, channels, norm_weight=norm_weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (b, h, w, c) to (b, h, w, c)."""
        if (rows := self.run_directly(x)) is not None:
            return rows
        return self.fc2(self.fc1(x))

    def run_directly(self, x: Tensor, residual: bool = False) -> Tensor | None:
        """Return what is made of ``x`` (b, h, w, c), plus ``x`` itself if asked for, or None but in deployment form."""
        first, second = self.fc1, self.fc2
        inside = (first.conv, first.norm, first.act, second.conv, second.norm, second.act)
        if not (first.folded and second.folded and deployed.runs_directly(x, first, second, *inside)):
            return None
        rows = x.reshape(-1, x.shape[-1])
        hidden = deployed.multiply_rows(rows, first.conv, relu=True)
        return deployed.multiply_rows(hidden, second.conv, residual=rows if residual else None).view(x.shape)


@torch.no_grad()
def norm_as_affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return by what an evaluating batch norm multiplies each channel, and what it adds (c,), in float64.

    Raises:
        ConfigError: If it is none with running statistics.
    """
    if (
        not isinstance(norm, nn.modules.batchnorm._BatchNorm)
        or norm.running_mean is None
        or norm.running_var is None
        or norm.weight is None
        or norm.bias is None
    ):
        raise ConfigError(
            f"the norm to fold is {norm}, expected a batch norm with weight, bias and running statistics. Fold only "
            "models whose norms are those they were built with, and fold them once."
        )
    scale = norm.weight.double() * torch.rsqrt(norm.running_var.double() + norm.eps)
    return scale, norm.bias.double() - norm.running_mean.double() * scale


@torch.no_grad()
def fold_norm(conv: Layer, norm: nn.Module) -> Layer:
    """Return a convolution or linear map, changed to do what ``norm(conv(x))`` does in evaluation mode.

    Raises:
        ConfigError: If one of them is something else.
    """
    if not isinstance(conv, nn.Conv2d | nn.Linear):
        raise ConfigError(
            f"the layer before a batch norm is {type(conv).__name__}, expected a convolution or a linear map. Fold "
            "the batch norms of other layers where they are defined."
        )
    scale, shift = norm_as_affine(norm)
    weight = conv.weight.double() * scale.view(-1, *[1] * (conv.weight.ndim - 1))
    bias = shift if conv.bias is None else conv.bias.double() * scale + shift
    return with_parameters(conv, weight, bias)


@torch.no_grad()
def fold_norm_before(norm: nn.Module, fc: nn.Linear) -> nn.Linear:
    """Return a linear map, changed to do what ``fc(norm(x))`` does in evaluation mode.

    Raises:
        ConfigError: If there is no such norm.
    """
    scale, shift = norm_as_affine(norm)
    weight = fc.weight.double()
    bias = weight @ shift
    return with_parameters(fc, weight * scale, bias if fc.bias is None else bias + fc.bias.double())


def with_parameters(layer: Layer, weight: Tensor, bias: Tensor) -> Layer:
    """Give ``layer`` other parameters, in the dtype of its own, that want no gradient, and return it."""
    dtype = layer.weight.dtype
    layer.weight = nn.Parameter(weight.to(dtype).contiguous(), requires_grad=False)
    layer.bias = nn.Parameter(bias.to(dtype).contiguous(), requires_grad=False)
    return layer


@torch.no_grad()
def add_identity_(conv: nn.Conv2d) -> None:
    """Make a depthwise convolution of stride 1 with half its kernel as padding add what it is given."""
    rows, columns = conv.weight.shape[2:]
    conv.weight[:, 0, rows // 2, columns // 2] += 1
