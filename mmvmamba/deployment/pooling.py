"""Adaptive average pooling as two matrix products, for exporters that fix its windows to the size recorded."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


class MatrixPool(nn.Module):
    """``nn.AdaptiveAvgPool2d`` for maps of any size.

    Window i of s over n pixels begins at floor(i n / s) and ends before ceil((i + 1) n / s).

    Args:
        rows: Of the result.
        columns: Of the result.
    """

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.rows, self.columns = rows, columns

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (b, c, h, w) to (b, c, rows, columns)."""
        down = _windows(x.shape[2], self.rows, x)
        across = _windows(x.shape[3], self.columns, x)
        return torch.matmul(torch.matmul(down, x), across.transpose(0, 1))


def _windows(size: int, count: int, like: Tensor) -> Tensor:
    """Return the weights (count, size) of the pixels of a side in each of its windows."""
    first = torch.arange(count, device=like.device)[:, None] * size
    start = first // count
    stop = (first + size + count - 1) // count
    pixels = torch.arange(size, device=like.device)[None]
    inside = ((pixels >= start) & (pixels < stop)).to(like.dtype)
    return inside / (stop - start).to(like.dtype)


def with_matrix_pools(module: nn.Module) -> nn.Module:
    """Return a copy of a network in which every ``nn.AdaptiveAvgPool2d`` to more than one pixel is a `MatrixPool`."""
    copied = copy.deepcopy(module)
    for part in list(copied.modules()):
        for name, child in list(part.named_children()):
            if type(child) is nn.AdaptiveAvgPool2d:
                size: Any = child.output_size
                rows, columns = size if isinstance(size, tuple) else (size, size)
                if rows is not None and columns is not None and (rows, columns) != (1, 1):
                    setattr(part, name, MatrixPool(rows, columns).train(child.training))
    return copied
