"""Convolutions of channels-last maps without layout copies."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def pad_to_kernel(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Zero-pad ``x`` (b, c, h, w) at the right and bottom where ``conv`` could not be applied even once."""
    if isinstance(conv.padding, str):  # "same" and "valid" are not used here; the former always fits
        return x
    below, right = (
        max(0, kernel - size - 2 * padding)
        for kernel, size, padding in zip(conv.kernel_size, x.shape[2:], conv.padding, strict=True)
    )
    return F.pad(x, (0, right, 0, below)) if below or right else x


class ChannelsLastConv2d(nn.Conv2d):
    """``nn.Conv2d`` that maps (b, h, w, c) to (b, h', w', c').

    The permuted view is a tensor of PyTorch's channels-last memory format, which its convolutions keep, so that
    neither permutation moves data. In a half-precision model a float32 map (that of the scan) stays
    float32. A map that is smaller than the kernel even with the convolution's own padding is
    padded with zeros at the right and bottom up to the kernel; every other size follows the usual formula.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``x`` (b, h, w, c)."""
        x = pad_to_kernel(self, x.permute(0, 3, 1, 2))
        if x.dtype == torch.float32 and self.weight.dtype in (torch.float16, torch.bfloat16):
            bias = None if self.bias is None else self.bias.float()
            return self._conv_forward(x, self.weight.float(), bias).permute(0, 2, 3, 1)
        return super().forward(x).permute(0, 2, 3, 1)
