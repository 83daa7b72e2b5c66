"""Tokens among patches, and position embeddings of both on grids of any size.

Upstream code of the columnar models resizes embeddings of square grids only, and knows one place for a class token.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional as F

from mmvmamba.models.layers.rope import Rotation
from mmvmamba.models.layers.snake import SnakeWalks


class TokenLayout(NamedTuple):
    """Where the tokens of a sequence come from.

    Attributes:
        rows: Rows of patches.
        columns: Columns of patches.
        extra: Rising positions in the sequence of the tokens that are no patches; all others are patches, row by row.
        rotation: Cosines and sines of every patch, see ``rope.py``, or None.
        walks: Walks over the grid, see ``snake.py``, or None.
    """

    rows: int
    columns: int
    extra: tuple[int, ...] = ()
    rotation: Rotation | None = None
    walks: SnakeWalks | None = None


def insert_tokens(patches: Tensor, extra: Tensor, at: tuple[int, ...]) -> Tensor:
    """Return the sequence (b, l + k, d) of patches (b, l, d) with extra tokens (b, k, d) at the positions ``at``."""
    pieces, start = [], 0
    for i, position in enumerate(at):
        stop = position - i
        pieces += [patches[:, start:stop], extra[:, i : i + 1]]
        start = stop
    return torch.cat([*pieces, patches[:, start:]], dim=1)


def only_patches(x: Tensor, at: tuple[int, ...]) -> Tensor:
    """Return the patches (b, l, d) of a sequence (b, l + k, d) with other tokens at the k rising positions ``at``."""
    starts, stops = (0, *(position + 1 for position in at)), (*at, x.shape[1])
    pieces = [x[:, start:stop] for start, stop in zip(starts, stops, strict=True) if start < stop]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def only_extra(x: Tensor, at: tuple[int, ...]) -> Tensor:
    """Return the tokens (b, k, d) at the positions ``at`` of a sequence (b, l, d)."""
    return torch.cat([x[:, position : position + 1] for position in at], dim=1)


def resize_position_embedding(embedding: Tensor, grid: tuple[int, int], wanted: tuple[int, int]) -> Tensor:
    """Return a position embedding of patches (1, l, d) for another grid: bicubic, without aligned corners.

    Args:
        embedding: One row per patch of ``grid``.
        grid: Its rows and columns.
        wanted: Those of the result (1, l', d).
    """
    # A grid that an export leaves open is not looked at: resizing to the same one changes nothing.
    if all(statically_known_true(own == new) for own, new in zip(grid, wanted, strict=True)):
        return embedding
    maps = embedding.unflatten(1, grid).permute(0, 3, 1, 2)
    # Half-precision bicubic is neither exact nor there on every device.
    wide = maps if maps.dtype == torch.float64 else maps.float()
    resized = F.interpolate(wide, size=wanted, mode="bicubic", align_corners=False)
    return resized.flatten(2).transpose(1, 2).to(embedding.dtype)


def square_grid(patches: int) -> tuple[int, int] | None:
    """Return the square grid of so many patches, None where there is none."""
    side = math.isqrt(patches)
    return (side, side) if side * side == patches and side > 0 else None
