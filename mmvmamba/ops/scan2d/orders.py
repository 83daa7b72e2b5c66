"""Scan orders of a 2D map, as data."""

from __future__ import annotations

import enum

import torch
from torch import Tensor


class ScanOrder(enum.IntEnum):
    """One way to walk over a map of h rows and w columns; position t of the walk is a pixel.

    The numbers are those of the C++ side (``csrc/cpu/kernels.h``) and of upstream VMamba's direction index k.
    """

    ROW = 0
    """Left to right, row after row: pixel t."""
    COLUMN = 1
    """Top to bottom, column after column."""
    ROW_REVERSED = 2
    """ROW backwards."""
    COLUMN_REVERSED = 3
    """COLUMN backwards."""


CROSS_SCAN = (ScanOrder.ROW, ScanOrder.COLUMN, ScanOrder.ROW_REVERSED, ScanOrder.COLUMN_REVERSED)
"""VMamba's four-way cross-scan."""
UNIDIRECTIONAL_SCAN = (ScanOrder.ROW,) * 4
"""The one-way ablation of the VMamba paper: four parameter sets, one route."""
BIDIRECTIONAL_SCAN = (ScanOrder.ROW, ScanOrder.ROW, ScanOrder.ROW_REVERSED, ScanOrder.ROW_REVERSED)
"""The two-way ablation of the VMamba paper."""


def order_to_permutation(order: ScanOrder, h: int, w: int, device: torch.device | None = None) -> Tensor:
    """Return the pixel indices (l,), int64, that ``order`` visits on an (h, w) map, in visiting order."""
    pixels = torch.arange(h * w, device=device)
    if order in (ScanOrder.COLUMN, ScanOrder.COLUMN_REVERSED):
        pixels = pixels.view(h, w).t().reshape(-1)
    if order in (ScanOrder.ROW_REVERSED, ScanOrder.COLUMN_REVERSED):
        pixels = pixels.flip(0)
    return pixels
