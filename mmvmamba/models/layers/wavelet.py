"""One level of a two-dimensional wavelet transform of channels-last maps, and its way back, with any 2x2 filters.

The filters have the shape (4, 4, c): of band n, at the pixel 2 * row + column of a square of 2x2, for every channel.
In checkpoints and parameters the four bands of a channel lie together, (4 c, 1, 2, 2); in the maps here the channels of
a band do, as this is what vectorises.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmvmamba.models.layers.padding import pad_to_multiple

#: Pixels of a square, and bands: low-low, rows, columns, both.
SQUARE = 4


def haar_filters(channels: int) -> Tensor:
    """Return the orthonormal Haar filters as a parameter (4 c, 1, 2, 2), the same for every channel."""
    signs = torch.tensor([[1.0, 1, 1, 1], [1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]])
    return (0.5 * signs).view(SQUARE, 1, 2, 2).repeat(channels, 1, 1, 1)


def by_band(weight: Tensor) -> Tensor:
    """Return weights (4 c, ...), of which the four of a channel lie together, in the order of maps: band by band."""
    return weight.unflatten(0, (-1, SQUARE)).transpose(0, 1).flatten(0, 1)


def by_pixel(filters: Tensor) -> Tensor:
    """Return filters (4 c, 1, 2, 2) of a parameter as `analyse` and `synthesise` want them (4, 4, c)."""
    return filters.reshape(-1, SQUARE, SQUARE).permute(1, 2, 0).contiguous()


def pad_to_even(x: Tensor) -> Tensor:
    """Zero-pad ``x`` (b, h, w, c) by a row at the bottom and a column at the right where the sides are odd."""
    return pad_to_multiple(x, 2)


def analyse(x: Tensor, filters: Tensor) -> Tensor:
    """Return the bands (b, h / 2, w / 2, 4, c) of a map ``x`` (b, h, w, c) with even sides."""
    b, h, w, c = x.shape
    squares = x.reshape(b, h // 2, 2, w // 2, 2, c)
    pixels = [squares[:, :, i, :, j].unsqueeze(3) for i in (0, 1) for j in (0, 1)]
    # A sum of four maps: a grouped convolution of these few channels each is three times as slow.
    bands = pixels[0] * filters[:, 0]
    for i in range(1, SQUARE):
        bands = torch.addcmul(bands, pixels[i], filters[:, i])
    return bands


def synthesise(bands: Tensor, filters: Tensor) -> Tensor:
    """Return the map (b, 2 h, 2 w, c) of ``bands`` (b, h, w, 4, c), by the transpose of `analyse`."""
    b, h, w, _, c = bands.shape
    squares = bands[:, :, :, :1] * filters[0]
    for n in range(1, SQUARE):
        squares = torch.addcmul(squares, bands[:, :, :, n : n + 1], filters[n])
    return squares.view(b, h, w, 2, 2, c).transpose(2, 3).reshape(b, 2 * h, 2 * w, c)
