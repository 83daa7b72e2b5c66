"""The routes on which networks walk over their maps, captured while they run.

Nothing is drawn by hand: `mmvmamba.analysis.scan_capture` sees the operators' orders, `scan_places` where they lie, and
`route_figures` draws what is found here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmvmamba.analysis.scan_capture import ScanCall, watch_scans
from mmvmamba.analysis.scan_maps import scan_layers
from mmvmamba.analysis.scan_places import Places, placed_routes, places_of
from mmvmamba.analysis.scan_weights import UNORDERED
from mmvmamba.errors import ConfigError

Point = tuple[float, float]
"""Row and column, in cells; the middle of the first cell is (0.5, 0.5)."""

_PROBE, _SMALLEST = 256, 32
"""Sides of images: that shows how large the map of a layer is, and that every network takes."""


@dataclass(frozen=True)
class Walk:
    """A route over a map.

    Attributes:
        name: Of the route.
        points: Where every step reads; None for a token that is no cell of the map.
        ordered: Whether there is an order; without one every cell is read at once.
        start: How many steps of the same sequence were before.
    """

    name: str
    points: tuple[Point | None, ...]
    ordered: bool = True
    start: int = 0


@dataclass(frozen=True)
class LayerWalks:
    """The walks of a layer.

    Attributes:
        title: What the network is called.
        layer: Name of the layer.
        rows: Of its map.
        columns: Of its map.
        walks: Its walks; none for a network that does not scan.
    """

    title: str
    layer: str
    rows: int
    columns: int
    walks: tuple[Walk, ...]


def walks_of_layer(title: str, model: nn.Module, image: Tensor, layer: str | None = None) -> LayerWalks:
    """Return the walks of one layer.

    Args:
        title: What to call the network.
        model: A network that takes images, in evaluation form.
        image: One image (1, c, h, w); its values do not matter.
        layer: Its name; None for the first one that scans.

    Raises:
        ConfigError: If nothing scans, or the layer is unknown.
    """
    layers = scan_layers(model, image)
    names = [found.name for found in layers]
    chosen = names[0] if layer is None else layer
    if chosen not in names:
        raise ConfigError(f"layer is {layer!r}, expected one of {', '.join(map(repr, names))}. Correct it.")
    points: dict[str, list[Point | None]] = {}

    def see(call: ScanCall) -> None:
        if call.layer != chosen or call.operator == "ssd_state":
            return
        if call.operator == "ssd_read":
            places = places_of(call)
            points[UNORDERED] = _points(torch.arange(places.total), places)
            return
        for route, places in placed_routes(call):
            before = points.get(route.name)
            more = _points(route.reads, places)
            # Rows that are sequences of their own have one name.
            points[route.name] = more if before is None else [*before, None, *more]

    with torch.no_grad(), watch_scans(model, see):
        model(image)
    found = layers[names.index(chosen)]
    walks = [walk for name, steps in points.items() for walk in _passes(name, steps)]
    return LayerWalks(title, chosen, found.rows, found.columns, tuple(walks))


def _points(reads: Tensor, places: Places) -> list[Point | None]:
    """Return the middle of the cells that each position in ``reads`` stands for."""
    sums = torch.zeros(places.total, 3, dtype=torch.float64)
    rows, columns = places.cells // places.columns, places.cells % places.columns
    cells = torch.stack([rows + 0.5, columns + 0.5, torch.ones_like(rows)], 1).double()
    sums.index_add_(0, places.positions.cpu(), cells.cpu())
    middles = (sums[:, :2] / sums[:, 2:])[reads.cpu()].tolist()
    return [None if row != row else (row, column) for row, column in middles]  # NaN: stands for no cell


def _passes(name: str, points: list[Point | None]) -> Iterator[Walk]:
    """Yield a walk that goes over all its cells several times in a row as so many walks."""
    cells = len({point for point in points if point is not None})
    if name == UNORDERED:
        yield Walk(name, tuple(points), ordered=False)
        return
    parts = [points[start : start + cells] for start in range(0, len(points), cells)]
    if len(parts) == 1 or any(len(set(part) - {None}) != cells for part in parts):
        yield Walk(name, tuple(points))
        return
    for number, part in enumerate(parts):
        yield Walk(f"{name}: {number + 1} of {len(parts)}", tuple(part), start=number * cells)


def walks_at_size(title: str, model: nn.Module, cells: int, layer: str | None = None) -> LayerWalks:
    """Return the walks of one layer for a square image for which its map has about ``cells`` cells a side.

    Args:
        title: What to call the network.
        model: A network that takes images of 3 channels, in evaluation form.
        cells: At least 2.
        layer: Its name; None for the first one that scans.

    Raises:
        ConfigError: If ``cells`` is less than 2, nothing scans, or the layer is unknown.
    """
    if cells < 2:
        raise ConfigError(f"cells is {cells}, expected at least 2. Correct it.")
    parameter = next(model.parameters())

    def image(side: int) -> Tensor:
        return torch.zeros(1, 3, side, side, dtype=parameter.dtype, device=parameter.device)

    layers = {found.name: found for found in scan_layers(model, image(_PROBE))}
    name = next(iter(layers)) if layer is None else layer
    if name not in layers:
        raise ConfigError(f"layer is {layer!r}, expected one of {', '.join(map(repr, layers))}. Correct it.")
    return walks_of_layer(title, model, image(max(_SMALLEST, _PROBE * cells // layers[name].rows)), name)
