"""Scan maps for the demo page: panels over a picture, with captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmvmamba.analysis.images import enlarged, shrunk
from mmvmamba.analysis.predictions import Image
from mmvmamba.analysis.scan_maps import ScanLayer, default_layer, overlay, scan_layers, scan_map
from mmvmamba.apis.app import Answer, Models, enlargement
from mmvmamba.errors import ConfigError

#: Longest side of a panel, in pixels: the page receives up to five of them at once.
PANEL_SIDE = 640
#: Kind of map (see ``mmvmamba.analysis.scan_maps``) -> what the page calls it, in its order.
KIND_NAMES = {"weight": "whole weight", "decayed": "(Q⊙w)(K/w)ᵀ", "qk": "QKᵀ"}
#: What each kind is, for the page.
KIND_MEANINGS = {
    "weight": "what a cell's value is multiplied by in the query's output",
    "decayed": "products of the projections, and what the decays leave of them on the way",
    "qk": "products of the projections alone, as attention without a softmax",
}


@dataclass(frozen=True)
class ScanView:
    """Scan maps of one layer for one pixel, ready to be shown.

    Attributes:
        caption: What they are, in one sentence or two.
        merged: The sum over all directions over the picture, (h, w, 3) uint8 in the order RGB.
        directions: Name of a direction and its map over the picture, empty where there is but one.
    """

    caption: str
    merged: Image
    directions: tuple[tuple[str, Image], ...]


def answer_layers(models: Models, answer: Answer) -> tuple[list[ScanLayer], str]:
    """Return the layers that scan a picture, in the order they run, and the name of the one to show first.

    Raises:
        ConfigError: If the model's backbone has none. Errors of ``Models.get`` as well.
    """
    network = models.get(answer.request).network
    layers = scan_layers(network.backbone, _input(models, answer))
    return layers, default_layer(layers).name


def scan_view(models: Models, answer: Answer, pixel: tuple[int, int], layer: str, kind: str) -> ScanView:
    """Return the scan maps of a layer.

    Args:
        models: Where the model is from.
        answer: What was answered before: its model and picture are looked at.
        pixel: Row and column of the query in that picture.
        layer: Name of a layer that scans.
        kind: One of ``KIND_NAMES``.

    Raises:
        ConfigError: If the layer or the kind is unknown or the pixel outside the picture. Errors of ``Models.get`` as
            well.
    """
    if kind not in KIND_NAMES:
        raise ConfigError(f"kind is {kind!r}, expected one of {', '.join(map(repr, KIND_NAMES))}. Name one of them.")
    network = models.get(answer.request).network
    maps = scan_map(network.backbone, _input(models, answer), pixel, layer)
    factor = enlargement(answer.picture)
    shown = enlarged(answer.picture[..., ::-1], factor)
    spot = (pixel[0] * factor + factor // 2, pixel[1] * factor + factor // 2)
    values = maps.maps[kind]
    rows, columns = values.shape[1:]
    caption = (
        f"Shown: {KIND_NAMES[kind]} of {layer}, {columns} x {rows} cells, for the pixel at row {pixel[0]}, "
        f"column {pixel[1]} (cross): {KIND_MEANINGS[kind]}. Each map has its own scale, from 0 (dark) to its largest "
        "value, by square roots."
    )
    several: Sequence[str] = maps.directions if len(maps.directions) > 1 else ()

    def panel(map_: Tensor) -> Image:
        return shrunk(overlay(shown, map_, spot), PANEL_SIDE)

    return ScanView(
        caption=caption,
        merged=panel(values.sum(0)),
        directions=tuple((name, panel(one)) for name, one in zip(several, values, strict=False)),
    )


def _input(models: Models, answer: Answer) -> Tensor:
    """Return the picture as the backbone sees it, (1, 3, h, w), at its own size."""
    image = torch.from_numpy(answer.picture.copy()).permute(2, 0, 1)[None]
    return models.get(answer.request).network.normalised(image.to(models.device))
