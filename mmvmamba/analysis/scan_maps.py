"""Scan maps: from which cells of its map a layer of state spaces takes what it writes to one cell.

The figure of the VMamba paper (arXiv 2401.10166), for any network whose layers call ``scan2d``, ``selective_scan`` or
one of the ``ssd`` operators of `mmvmamba.ops`. Three kinds of maps (`mmvmamba.analysis.scan_weights` has the formulas),
each for every direction and merged, which is their sum:

- ``"qk"``: QK^T, the products of projections alone, of the steps up to the query's;
- ``"decayed"``: (Q * w)(K / w)^T, with what the decays leave on the way;
- ``"weight"``: with the step size as well, which is exactly what x_s is multiplied by in y_t.

A value is the mean over channels (of heads, where a head has one weight) of the magnitude; with ``signed=True`` the
mean of the weight itself. The skip D x_t is no part of a map. Weights before a layer works on its states are shown for
EfficientViM; on MSVMamba's half map a cell's weight is shared out evenly among the cells of the whole map.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from mmvmamba.analysis.scan_capture import ScanCall, watch_scans
from mmvmamba.analysis.scan_places import Places, placed_routes, places_of
from mmvmamba.analysis.scan_weights import KINDS, UNORDERED, Route, routes_of_states
from mmvmamba.errors import ConfigError, nearest_spelling

Pixel = tuple[int, int]
"""Row and column."""


@dataclass(frozen=True)
class ScanLayer:
    """A layer that scans.

    Attributes:
        name: Of its module in the network.
        rows: Rows of its map, for the image that was shown.
        columns: Columns of its map.
        directions: Names of its routes.
    """

    name: str
    rows: int
    columns: int
    directions: tuple[str, ...]


@dataclass(frozen=True)
class ScanMaps:
    """What one cell of a layer's map takes from the others.

    Attributes:
        layer: Name of the layer.
        pixel: Row and column of the query in the image.
        cell: Row and column of the query on the layer's map.
        directions: Names of the routes.
        maps: Kind (one of ``KINDS``) -> a map for every direction (k, rows, columns), float32 on the CPU.
        elsewhere: Kind -> what comes from tokens that are no cells of the map, such as a class token (k,).
    """

    layer: str
    pixel: Pixel
    cell: Pixel
    directions: tuple[str, ...]
    maps: Mapping[str, Tensor]
    elsewhere: Mapping[str, Tensor]

    def merged(self, kind: str = "weight") -> Tensor:
        """Return the sum over all directions (rows, columns)."""
        return self.maps[kind].sum(0)


def scan_layers(model: nn.Module, image: Tensor) -> list[ScanLayer]:
    """Return the layers that scan, in the order they run.

    Args:
        model: A network that takes images, such as `mmvmamba.apis.networks.Network.backbone`.
        image: Images (b, c, h, w) as it was trained to see them.

    Raises:
        ConfigError: If there is none, or it cannot be told where on its map a layer scans.
    """
    found: dict[str, ScanLayer] = {}

    def see(call: ScanCall) -> None:
        if call.operator == "ssd_state":
            return  # the layer is known by the reading that follows
        if call.operator == "ssd_read":
            places, names = places_of(call), [UNORDERED]
        else:
            placed = placed_routes(call)
            places, names = placed[0][1], [route.name for route, _ in placed]
        before = found[call.layer].directions if call.layer in found else ()
        directions = tuple(dict.fromkeys((*before, *names)))
        found[call.layer] = ScanLayer(call.layer, places.rows, places.columns, directions)

    _run(model, image, see)
    return list(found.values())


def default_layer(layers: Sequence[ScanLayer]) -> ScanLayer:
    """Return the layer that is shown if nobody names one: the last of the last map with at least 12 x 12 cells.

    Where all maps are smaller it is the last layer of the largest.
    """
    large = [layer for layer in layers if min(layer.rows, layer.columns) >= 12]
    return large[-1] if large else max(reversed(layers), key=lambda layer: layer.rows * layer.columns)


def scan_map(
    model: nn.Module, image: Tensor, pixel: Pixel, layer: str | None = None, *, signed: bool = False
) -> ScanMaps:
    """Return the scan maps of one layer.

    Args:
        model: A network that takes images, such as `mmvmamba.apis.networks.Network.backbone`, in evaluation form.
        image: One image (1, c, h, w) as it was trained to see them.
        pixel: Row and column of the query in that image.
        layer: A name out of ``scan_layers``; None for ``default_layer``.
        signed: Whether maps are means of weights, not of their magnitudes.

    Raises:
        ConfigError: If the layer is unknown, the pixel outside the image, or nothing scans.
    """
    if layer is None:
        layer = default_layer(scan_layers(model, image)).name
    (maps,) = scan_maps(model, image, pixel, [layer], signed=signed)
    return maps


def scan_maps(
    model: nn.Module, image: Tensor, pixel: Pixel, layers: Sequence[str], *, signed: bool = False
) -> list[ScanMaps]:
    """Return the scan maps of some layers from one run of the network; arguments and errors as of ``scan_map``."""
    height, width = image.shape[2:]
    if image.shape[0] != 1 or not (0 <= pixel[0] < height and 0 <= pixel[1] < width):
        raise ConfigError(
            f"pixel is {tuple(pixel)} and image has shape {tuple(image.shape)}, expected a row and a column inside one "
            "image (1, c, h, w), counted from 0. Correct it."
        )
    wanted = {name: _Sum(name, pixel, (height, width), signed) for name in layers}
    seen: dict[str, None] = {}

    def see(call: ScanCall) -> None:
        seen[call.layer] = None
        if call.layer in wanted:
            wanted[call.layer].add(call)

    _run(model, image, see)
    for name in layers:
        if name not in seen:
            raise ConfigError(
                f"layer is {name!r}, expected one that scans.{nearest_spelling(name, seen)} Choose one of "
                f"{', '.join(map(repr, seen))}."
            )
    return [wanted[name].result() for name in layers]


def _run(model: nn.Module, image: Tensor, see: Callable[[ScanCall], None]) -> None:
    calls = 0

    def count(call: ScanCall) -> None:
        nonlocal calls
        calls += 1
        see(call)

    with torch.no_grad(), watch_scans(model, count):
        model(image)
    if calls == 0:
        raise ConfigError(
            f"{type(model).__name__} ran no scan operator of mmvmamba.ops, expected a network of state spaces (and not "
            "backend 'reference', which is none). Name another model, or unset MMVMAMBA_BACKEND."
        )


@dataclass
class _Sum:
    """The maps of a layer while its calls come in."""

    layer: str
    pixel: Pixel
    size: Pixel
    signed: bool
    cell: Pixel = (0, 0)
    shape: Pixel = (0, 0)
    maps: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    elsewhere: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    state: ScanCall | None = None

    def add(self, call: ScanCall) -> None:
        """Take in a call: its tensors are read now, for the network may overwrite them."""
        if call.operator == "ssd_state":
            x, weight, b_in, blocked = call.arguments
            kept = (x[:1], None if weight is None else weight[:1].clone(), b_in[:1].clone(), blocked)
            self.state = ScanCall(call.layer, call.module, call.number, call.operator, kept, call.layout)
            return
        if call.operator == "ssd_read" and self.state is not None:
            places = places_of(call)
            placed = [(route, places) for route in routes_of_states(self.state, call)]
        else:
            placed = placed_routes(call)
        for route, places in placed:
            self.shape = (places.rows, places.columns)
            self.cell = (self.pixel[0] * places.rows // self.size[0], self.pixel[1] * places.columns // self.size[1])
            on_map = self.maps.setdefault(route.name, {kind: torch.zeros(self.shape) for kind in KINDS})
            off_map = self.elsewhere.setdefault(route.name, {kind: torch.zeros(()) for kind in KINDS})
            for kind, values in self._sums(route, places).items():
                on_map[kind] += places.on_map(values).float().cpu()
                lost = values.clone()
                lost[places.positions] = 0
                off_map[kind] += lost.sum().float().cpu()

    def _sums(self, route: Route, places: Places) -> dict[str, Tensor]:
        """Return what the query takes from every position of the operator (total,), by kind."""
        queries = torch.isin(route.writes, places.of_cell(*self.cell)).nonzero().flatten().tolist()
        sums: dict[str, Tensor] = {}
        for step in queries:
            for kind, values in zip(KINDS, route.weights(step), strict=True):
                value = (values if self.signed else values.abs()).mean(1)
                total = sums.setdefault(kind, value.new_zeros(places.total))
                total.index_add_(0, route.reads[: value.shape[0]], value)
        return sums

    def result(self) -> ScanMaps:
        """Return the maps."""
        directions = tuple(self.maps)
        return ScanMaps(
            self.layer,
            self.pixel,
            self.cell,
            directions,
            {kind: torch.stack([self.maps[name][kind] for name in directions]) for kind in KINDS},
            {kind: torch.stack([self.elsewhere[name][kind] for name in directions]) for kind in KINDS},
        )


def heat_map(values: Tensor, height: int, width: int, *, gamma: float = 0.5) -> np.ndarray:
    """Return values (rows, columns) as a picture (height, width, 3) of uint8, RGB, 0 black and the largest bright.

    Args:
        values: At least 0.
        height: Rows of the picture; cells become rectangles, nothing is smoothed.
        width: Columns of the picture.
        gamma: Power that the share of the largest value is raised to: below 1, small values are seen too.
    """
    shares = values.clamp(min=0) / values.max().clamp(min=torch.finfo(torch.float32).tiny)
    grey = (shares.pow(gamma) * 255).round().to(torch.uint8).numpy()
    large = cv2.resize(grey, (width, height), interpolation=cv2.INTER_NEAREST)
    return cv2.cvtColor(cv2.applyColorMap(large, cv2.COLORMAP_INFERNO), cv2.COLOR_BGR2RGB)


def overlay(
    image: np.ndarray, values: Tensor, pixel: Pixel | None = None, *, alpha: float = 0.65, gamma: float = 0.5
) -> np.ndarray:
    """Return an image with a map over it and a cross at the query, (h, w, 3) uint8 in the order RGB.

    Args:
        image: (h, w, 3) uint8 in the order RGB.
        values: The map (rows, columns), at least 0.
        pixel: Row and column of the query; None for no cross.
        alpha: Share of the map's colours.
        gamma: See ``heat_map``.
    """
    height, width = image.shape[:2]
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    mixed = cv2.addWeighted(heat_map(values, height, width, gamma=gamma), alpha, grey, 1 - alpha, 0)
    if pixel is not None:
        arm = max(4, min(height, width) // 24)
        for thick, colour in ((5, (0, 0, 0)), (2, (0, 255, 255))):
            cv2.drawMarker(mixed, (pixel[1], pixel[0]), colour, cv2.MARKER_CROSS, 2 * arm, thick)
    return np.asarray(mixed)
