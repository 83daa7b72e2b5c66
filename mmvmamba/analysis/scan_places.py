"""Where the positions of a scan lie on the map of its layer.

Most scans walk over the layer's own map. Some walk over a sequence with tokens that are no cells, over one of four
interleaved grids, over a map of half the size (in copies below each other) or over single rows and columns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmvmamba.analysis.scan_capture import MapLayout, ScanCall
from mmvmamba.analysis.scan_weights import Route, routes_of, selective_routes
from mmvmamba.errors import ConfigError
from mmvmamba.models.backbones.efficientvmamba import ES2D, split_grids
from mmvmamba.models.backbones.msvmamba import MultiScaleSS2D
from mmvmamba.models.backbones.vmamba import CascadeSS2D


@dataclass(frozen=True)
class Places:
    """Which positions of an operator are which cells of a map of ``rows`` x ``columns``; a coarse one is several.

    Attributes:
        rows: Of the layer's map.
        columns: Of the layer's map.
        positions: Positions of the operator (m,).
        cells: The cell ``row * columns + column`` of each of them (m,).
        total: How many positions the operator has.
    """

    rows: int
    columns: int
    positions: Tensor
    cells: Tensor
    total: int

    def of_cell(self, row: int, column: int) -> Tensor:
        """Return the positions that are a cell."""
        return self.positions[self.cells == row * self.columns + column]

    def on_map(self, values: Tensor) -> Tensor:
        """Put values of the positions (total,) on the map (rows, columns); a coarse one is shared out evenly."""
        share = torch.bincount(self.positions, minlength=self.total).to(values.dtype)
        cells = values.new_zeros(self.rows * self.columns)
        cells.index_add_(0, self.cells, (values / share.clamp(min=1))[self.positions])
        return cells.view(self.rows, self.columns)


def places_of(call: ScanCall) -> Places:
    """Return where the positions of a call lie on its layer's map.

    Raises:
        ConfigError: If that cannot be told.
    """
    h, w, layout = _size(call)
    device = call.arguments[0].device
    if layout is None:
        return _all(h, w, torch.arange(h * w, device=device), h * w)
    rows, columns, extra = layout
    if isinstance(call.module, ES2D):
        return _grid(call.number % 4, rows, columns, device)
    if (h, w) == (rows, columns):
        return _all(rows, columns, torch.arange(h * w, device=device), h * w)
    if h * w == rows * columns + len(extra):
        is_cell = torch.ones(h * w, dtype=torch.bool, device=device)
        is_cell[list(extra)] = False
        return _all(rows, columns, is_cell.nonzero().squeeze(1), h * w)
    if isinstance(call.module, MultiScaleSS2D):
        return _coarse(h, w, rows, columns, device)
    raise ConfigError(
        f"the layer {call.layer!r} scans a map of {h} x {w} but was given one of {rows} x {columns}, expected the same "
        "cells. Name another layer."
    )


def _size(call: ScanCall) -> tuple[int, int, MapLayout | None]:
    """Return rows and columns of the operator's map, and the layer's map; a sequence takes the layer's, if it fits."""
    layout = call.layout
    if call.operator == "scan2d":
        return call.arguments[0].shape[1], call.arguments[0].shape[2], layout
    if call.operator == "ssd_read":
        length = call.arguments[1].shape[1]
    else:
        length = call.arguments[0].shape[2 if call.operator == "selective_scan" else 1]
    return 1, length, layout


def _all(rows: int, columns: int, positions: Tensor, total: int) -> Places:
    return Places(rows, columns, positions, torch.arange(rows * columns, device=positions.device), total)


def _grid(number: int, rows: int, columns: int, device: torch.device) -> Places:
    """Return the places of one of the four grids of an atrous scan; the rows and columns of padding are no cells."""
    even = (rows + rows % 2, columns + columns % 2)
    cells = torch.full(even, -1, dtype=torch.int64, device=device)
    cells[:rows, :columns] = torch.arange(rows * columns, device=device).view(rows, columns)
    grid = split_grids(cells[None, :, :, None])[number].flatten()
    inside = grid >= 0
    return Places(rows, columns, inside.nonzero().squeeze(1), grid[inside], grid.numel())


def _coarse(h: int, w: int, rows: int, columns: int, device: torch.device) -> Places:
    """Return the places of a map of half the size, in copies below each other, as nearest-neighbour resizing has it."""
    half_rows = -(-rows // 2)
    copies = h // half_rows
    row = torch.arange(rows, device=device) * half_rows // rows
    column = torch.arange(columns, device=device) * w // columns
    nearest = (row[:, None] * w + column).flatten()
    positions = torch.cat([nearest + copy * half_rows * w for copy in range(copies)])
    cells = torch.arange(rows * columns, device=device).repeat(copies)
    return Places(rows, columns, positions, cells, h * w)


def placed_routes(call: ScanCall) -> list[tuple[Route, Places]]:
    """Return the routes of a call, each with where it is.

    Raises:
        ConfigError: If it cannot be told where a route is.
    """
    if isinstance(call.module, CascadeSS2D) and call.operator == "selective_scan" and call.layout is not None:
        return _cascade(call, call.layout)
    places = places_of(call)
    routes = routes_of(call)
    if isinstance(call.module, ES2D):
        routes = [replace(route, name=f"grid {call.number % 4 + 1}, {route.name}") for route in routes]
    elif isinstance(call.module, MultiScaleSS2D) and places.total != places.rows * places.columns:
        routes = [replace(route, name="half map") for route in routes]
    elif isinstance(call.module, MultiScaleSS2D):
        routes = [replace(route, name=f"whole map, {route.name}") for route in routes]
    return [(route, places) for route in routes]


def _cascade(call: ScanCall, layout: MapLayout) -> list[tuple[Route, Places]]:
    """Return the routes of a cascade: every row by itself both ways, in a second call every column.

    The second direction's sequence is the row backwards and its result is not turned back, see ``CascadeSS2D``: step t
    reads the cell t from the end and writes the cell t from the start.
    """
    rows, columns, _ = layout
    sequences, length = call.arguments[0].shape[0], call.arguments[0].shape[2]
    cells = torch.arange(rows * columns, device=call.arguments[0].device).view(rows, columns)
    lines = cells if call.number % 2 == 0 else cells.t()
    if lines.shape[1] != length or sequences % lines.shape[0]:
        raise ConfigError(
            f"the layer {call.layer!r} scans {sequences} sequences of {length}, expected those of a map of {rows} x "
            f"{columns}. Name another layer."
        )
    name = "rows" if call.number % 2 == 0 else "columns"
    places = _all(rows, columns, torch.arange(rows * columns, device=cells.device), rows * columns)
    found = []
    for i, line in enumerate(lines.unbind(0)):
        forward, backward = selective_routes(call, i)
        found.append((replace(forward, name=f"{name}, forwards", reads=line, writes=line), places))
        found.append((replace(backward, name=f"{name}, backwards", reads=line.flip(0), writes=line), places))
    return found
