"""Zero padding of channels-last maps at the bottom and at the right, and its removal."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional as F


def pad_to_multiple(x: Tensor, unit: int) -> Tensor:
    """Zero-pad ``x`` (b, h, w, c) until both sides are multiples of ``unit``; the map itself where they are.

    Where an export leaves sizes open they must not be looked at, or the program would serve only those that need the
    same padding: it pads always, perhaps by nothing.
    """
    # Not -h % unit: an export knows of this sum that it is a multiple.
    below, right = ((side + unit - 1) // unit * unit - side for side in x.shape[1:3])
    if statically_known_true(below == 0) and statically_known_true(right == 0):
        return x
    return F.pad(x, (0, 0, 0, right, 0, below))


def without_padding(x: Tensor, h: int, w: int) -> Tensor:
    """Return the first ``h`` rows and ``w`` columns of ``x`` (b, h', w', c); the map itself where it has no more."""
    if statically_known_true(x.shape[1] == h) and statically_known_true(x.shape[2] == w):
        return x
    sides: tuple[int | torch.SymInt, ...] = (h, w)
    if any(isinstance(side, torch.SymInt) for side in sides):
        # Of a part of unknown size an export would ask whether it lies densely in memory, which depends on the size.
        rows, columns = (torch.arange(side, device=x.device) for side in (h, w))
        return x.index_select(1, rows).index_select(2, columns)
    return x[:, :h, :w]
