"""Rotary position embedding of tokens on a grid (https://arxiv.org/abs/2104.09864, in the 2-D form of EVA-02).

Upstream: hustvl/Vim, vim/rope.py, which holds the tables of one square grid as buffers. Differences: tables are
computed for the grid at hand, of any size, and tokens that are no patches stay as they are wherever they stand.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmvmamba.errors import ConfigError

#: The positions of a row or column of the grid are spread over this length, whatever their number.
PRETRAINED_SIDE = 14
_BASE = 10000.0
Rotation = tuple[Tensor, Tensor]


def check_rotated(dim: int) -> None:
    """Raise ``ConfigError`` unless ``dim`` channels can be rotated."""
    if dim % 4:
        raise ConfigError(
            f"arch: dim is {dim} with rope, expected a multiple of 4: one half of the channels turns with the row, one "
            "with the column, in pairs. Change dim, or leave rope at 'none'."
        )


def rotation(rows: int, columns: int, dim: int, device: torch.device, dtype: torch.dtype) -> Rotation:
    """Return the cosines and sines (rows * columns, dim / 2) of the angles by which pairs of channels are turned.

    Token (i, j) turns its first ``dim / 4`` pairs by ``14 i / rows`` times falling frequencies, and the other half by
    ``14 j / columns`` times the same.
    """
    pairs = torch.arange(dim // 4, device=device, dtype=dtype)
    frequencies = _BASE ** (-pairs * 4 / dim)
    by_row, by_column = (
        torch.outer(torch.arange(side, device=device, dtype=dtype) / side * PRETRAINED_SIDE, frequencies)
        for side in (rows, columns)
    )
    angles = torch.cat((by_row[:, None].expand(-1, columns, -1), by_column[None].expand(rows, -1, -1)), dim=-1).flatten(
        0, 1
    )
    return angles.cos(), angles.sin()


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """Turn neighbouring channels (a, b) of the tokens ``x`` (b, l, d) to (a cos - b sin, b cos + a sin).

    Args:
        x: Tokens in the order of the rotation.
        by: Cosines and sines (l, d / 2) from `rotation`.

    Returns:
        (b, l, d) in the wider of the two types.
    """
    cos, sin = by
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
