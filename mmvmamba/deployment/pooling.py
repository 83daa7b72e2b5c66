"""Adaptive average pooling for maps of any size, while a network is recorded.

UperNet's pyramid pools a map to 1, 2, 3 and 6 bins a side, whatever its size. PyTorch's program keeps that as one
operator, but its translation to ONNX and AOTInductor's both take the bins of the recorded size for those of every size.
Written as two products with what every bin averages, the bins are computed from the size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class PoolsOfAnySize(TorchFunctionMode):
    """Records adaptive average pooling of open sizes as products while the ``with`` block lasts."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run a function of PyTorch, or what stands for it."""
        if func is F.adaptive_avg_pool2d or func is torch._C._nn.adaptive_avg_pool2d:
            x, bins = _pool_arguments(*args, **(kwargs or {}))
            if any(isinstance(side, torch.SymInt) for side in x.shape[-2:]):
                return average_bins(x, bins)
        return func(*args, **(kwargs or {}))


def _pool_arguments(input: Tensor, output_size: Any) -> tuple[Tensor, tuple[int, int]]:  # noqa: A002  (PyTorch's name)
    """Return the map and how many bins it gets; None is as many as pixels."""
    rows, columns = output_size if isinstance(output_size, (tuple, list)) else (output_size, output_size)
    h, w = input.shape[-2:]
    return input, (h if rows is None else rows, w if columns is None else columns)


def average_bins(x: Tensor, bins: tuple[int, int]) -> Tensor:
    """Average ``x`` (..., h, w) over the bins of `torch.nn.AdaptiveAvgPool2d`: (..., rows, columns).

    Args:
        x: Floating-point map.
        bins: Rows and columns of the result.
    """
    by_row, by_column = (_shares(side, count, x) for side, count in zip(x.shape[-2:], bins, strict=True))
    return F.linear(F.linear(x, by_column).transpose(-1, -2), by_row).transpose(-1, -2)


def _shares(side: int, bins: int, like: Tensor) -> Tensor:
    """Return how much of every bin each pixel is (bins, side); bins overlap where the side is no multiple of them."""
    numbers = torch.arange(bins, device=like.device)
    first, behind = numbers * side // bins, ((numbers + 1) * side + bins - 1) // bins
    pixels = torch.arange(side, device=like.device)
    inside = (pixels >= first[:, None]) & (pixels < behind[:, None])
    return inside.to(like.dtype) / (behind - first)[:, None].to(like.dtype)
