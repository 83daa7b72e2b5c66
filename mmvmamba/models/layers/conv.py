"""Convolutions of channels-last maps without layout copies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

from mmvmamba.models.layers.onednn import (
    is_traced,
    multiply,
    serves_float32,
    serves_gradient,
    weight_gradient,
    without_autocast,
)

# Multiplications of a window below which PyTorch's own backward pass is as fast (docs/cpu_speed.md).
_MIN_WINDOW = 9 * 96


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
        steps = self._window_steps(x)
        if steps is None:
            return super().forward(x).permute(0, 2, 3, 1)
        maps = x.permute(0, 2, 3, 1)
        if torch.is_grad_enabled():
            return _WindowConv.apply(maps, self.weight, self.bias, *steps)
        return _convolve(maps, self.weight, self.bias, *steps)

    def _window_steps(self, x: Tensor) -> tuple[tuple[int, int], tuple[int, int]] | None:
        """Return stride and padding if products of copied windows of ``x`` (b, c, h, w) beat PyTorch's convolution."""
        if (
            is_traced()
            or self.groups != 1
            or self.dilation != (1, 1)
            or self.padding_mode != "zeros"
            or isinstance(self.padding, str)
            or self.stride == (1, 1)  # the copied windows are as many times the map as they overlap
            or x.shape[1] != self.in_channels
            or not x.numel()
            or not serves_float32(x, self.weight, self.bias)
        ):
            return None
        stride, padding = (self.stride[0], self.stride[1]), (self.padding[0], self.padding[1])
        window = self.weight[0].numel()
        training = torch.is_grad_enabled() and window >= _MIN_WINDOW
        pixels = _pixels((x.shape[0], x.shape[2], x.shape[3]), self.weight, stride, padding)
        return (stride, padding) if training or _few_pixels(pixels, window) else None


def _few_pixels(pixels: int, window: int) -> bool:
    """Whether packing the weight, which only PyTorch's convolution does slowly, outweighs copying the windows."""
    return window >= _MIN_WINDOW and 2 * pixels <= window


def _sides(size: tuple[int, int], weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> tuple[int, int]:
    """Return the rows and columns that the convolution of a map of ``size`` (h, w) has."""
    rows, columns = (
        (side + 2 * pad - kernel) // step + 1
        for side, pad, kernel, step in zip(size, padding, weight.shape[2:], stride, strict=True)
    )
    return rows, columns


def _pixels(size: tuple[int, int, int], weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> int:
    """Return how many pixels the convolution of a map of ``size`` (b, h, w) has."""
    rows, columns = _sides(size[1:], weight, stride, padding)
    return size[0] * rows * columns


def _windows(x: Tensor, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
    """Copy all windows of the zero-padded map (b, h, w, c): (b * h' * w', kh * kw, c)."""
    if padding != (0, 0):  # F.pad would copy the map all the same
        x = F.pad(x, (0, 0, padding[1], padding[1], padding[0], padding[0]))
    # Both come out behind the channels: (b, h', w', c, kh, kw).
    windows = x.unfold(1, kernel[0], stride[0]).unfold(2, kernel[1], stride[1])
    return windows.permute(0, 1, 2, 4, 5, 3).reshape(-1, kernel[0] * kernel[1], x.shape[3])


def _swapped(matrices: Tensor) -> Tensor:
    """Copy (m, i, j) as (m, j * i): from the order of a window in the map to that in the weight, or back."""
    return matrices.transpose(1, 2).reshape(matrices.shape[0], -1)


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int], padding: tuple[int, int]
) -> Tensor:
    """Convolve ``x`` (b, h, w, c) by one product of all windows with the weight; (b, h', w', c').

    The windows are copied twice, the second time in the order of the weight, of which no copy is made: copying them
    in that order at once reads the map one number at a time.
    """
    rows, columns = _sides((x.shape[1], x.shape[2]), weight, stride, padding)
    windows = _swapped(_windows(x, (weight.shape[2], weight.shape[3]), stride, padding))
    return multiply(windows, weight.flatten(1), bias).resize_(x.shape[0], rows, columns, weight.shape[0])


class _WindowConv(torch.autograd.Function):
    """Strided convolution of a map (b, h, w, c) whose gradients are products of windows, twice differentiable.

    The backward pass copies the windows again: kept, they would be more than twice the map. The result gets its shape
    in place: a view would refuse the in-place operations of later layers.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int], padding: tuple[int, int]
    ) -> Tensor:
        of_x, of_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)
        ctx.sizes, ctx.stride, ctx.padding = (x.shape, weight.shape), stride, padding
        if _few_pixels(_pixels((x.shape[0], x.shape[1], x.shape[2]), weight, stride, padding), weight[0].numel()):
            return _convolve(x, weight, bias, stride, padding)
        return F.conv2d(x.permute(0, 3, 1, 2), weight, bias, stride, padding).transpose_(1, 2).transpose_(2, 3)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad[:3]
        if not serves_gradient(grad):
            return *_plain_gradients(ctx, grad, x, weight), None, None
        size, shape = ctx.sizes
        rows = grad.reshape(-1, shape[0])
        grad_x = grad_weight = None
        if of_weight:
            grad_weight = _weight_gradient(rows, _windows(x, shape[2:], ctx.stride, ctx.padding), shape)
        if of_x:
            of_windows = _windows_gradient(rows, weight).view(*grad.shape[:3], *shape[2:], -1)
            grad_x = _input_gradient(of_windows, size, ctx.stride, ctx.padding)
        return grad_x, grad_weight, rows.sum(0) if of_bias else None, None, None


def _weight_gradient(rows: Tensor, windows: Tensor, shape: torch.Size) -> Tensor:
    """Return the gradient of ``shape`` (c', c, kh, kw), contiguous, from that of the output and the windows.

    Args:
        rows: (m, c').
        windows: (m, kh * kw, c).
        shape: That of the weight.
    """
    if len(rows) <= shape[0]:
        return weight_gradient(rows, _swapped(windows)).view(shape)
    # More windows than the weight has: what is put in the order of the weight is the result.
    return _swapped(weight_gradient(rows, windows.flatten(1)).view(-1, *windows.shape[1:])).view(shape)


def _windows_gradient(rows: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient of all windows, in any order in memory, from that of the output (m, c'); (m, kh * kw, c)."""
    m, (c_out, c) = len(rows), weight.shape[:2]
    if m <= c_out:
        # Copied so that what belongs together in the map, the channels, is together here.
        return multiply(rows, weight.flatten(1).t()).view(m, c, -1).permute(2, 0, 1).contiguous().permute(1, 0, 2)
    return multiply(rows, _swapped(weight.flatten(2)).t()).view(m, -1, c)


def _input_gradient(of_windows: Tensor, size: torch.Size, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
    """Add the gradients of all windows (b, h', w', kh, kw, c) at the pixels of a map of ``size`` (b, h, w, c)."""
    (b, h, w, c), (_, rows, columns, kh, kw, _) = size, of_windows.shape
    out = of_windows.new_zeros(b, h + 2 * padding[0], w + 2 * padding[1], c)
    for i in range(kh):
        for j in range(kw):
            at = out[:, i : i + rows * stride[0] : stride[0], j : j + columns * stride[1] : stride[1]]
            at.add_(of_windows[:, :, :, i, j])
    return out[:, padding[0] : padding[0] + h, padding[1] : padding[1] + w]


def _plain_gradients(
    ctx: Any, grad: Tensor, x: Tensor | None, weight: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The same three gradients by PyTorch's operators, which can be differentiated again."""
    of_bias = ctx.needs_input_grad[2]
    (b, h, w, c), shape = ctx.sizes
    of_out, how = grad.permute(0, 3, 1, 2), (ctx.stride, ctx.padding)
    grad_x = grad_weight = None
    if weight is not None:
        grad_x = conv2d_input((b, c, h, w), weight, of_out, *how).permute(0, 2, 3, 1)
    if x is not None:
        grad_weight = conv2d_weight(x.permute(0, 3, 1, 2), shape, of_out, *how)
    return grad_x, grad_weight, grad.sum((0, 1, 2)) if of_bias else None
