"""Scan orders of a 2D map, as data."""

from __future__ import annotations

import enum

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


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


_ranges = WeakTensorKeyDictionary()
"""What is known of permutations on a GPU: (version of the tensor, (lowest, highest))."""


def pixel_range(permutation: Tensor) -> tuple[int, int] | None:
    """Return the lowest and the highest index of a permutation (k, l), or None where the values cannot be read.

    That is in a trace (whose tensors are of another class), for meta and empty tensors, and while a CUDA graph is
    captured; every kernel guards its memory by itself. Reading from a GPU means waiting for it, so there it happens
    once per tensor, and again after a change in place.
    """
    if (
        type(permutation) is not Tensor
        or torch.compiler.is_compiling()
        or permutation.device.type == "meta"
        or permutation.numel() == 0
    ):
        return None
    if permutation.device.type == "cpu":
        return _read_range(permutation)
    if permutation.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return None
    # Tensors of inference mode count no versions: what they held when first seen is what is known of them.
    version = -1 if permutation.is_inference() else permutation._version
    known: tuple[int, tuple[int, int]] | None = _ranges.get(permutation)
    if known is None or known[0] != version:
        known = version, _read_range(permutation)
        _ranges[permutation] = known
    return known[1]


def remember_range(permutation: Tensor, low: int, high: int) -> Tensor:
    """Note the range of a permutation (k, l) that was just made, so that nobody waits for a GPU to read it.

    Args:
        permutation: Pixel indices; returned as they are.
        low: Lowest index.
        high: Highest index.
    """
    if not torch.compiler.is_compiling() and type(permutation) is Tensor and permutation.device.type != "cpu":
        version = -1 if permutation.is_inference() else permutation._version
        _ranges[permutation] = version, (low, high)
    return permutation


def _read_range(permutation: Tensor) -> tuple[int, int]:
    """Read the lowest and the highest value in one transfer."""
    low, high = torch.stack(permutation.aminmax()).tolist()
    return int(low), int(high)
