"""Pictures of scan routes: a strip, with time as colour, and an animation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from mmvmamba.analysis.routes import LayerWalks, Point, Walk
from mmvmamba.optional import optional_package

#: Pixels: side of a panel's map, space between panels, heights of texts; before halving.
_SIDE, _GAP, _TITLE, _NAME, _HEAD = 232, 36, 52, 34, 84
_SMOOTH = 2  # drawn so much larger, then averaged
_GREY, _INK, _FAINT = (205, 208, 214), (35, 38, 45), (238, 239, 242)
_BLOCKS = 2  # networks side by side
MILLISECONDS = 110
_LAST = 2500

_LEGEND = (
    "First step blue, with a dot; last step red. Gaps: tokens that are no cells of the map.\n"
    "Star: all cells write to one state and read it, in no order."
)
_TIME = [
    tuple(int(value) for value in rgb)
    for rgb in cv2.applyColorMap(np.arange(256, dtype=np.uint8)[:, None], cv2.COLORMAP_TURBO)[:, 0, ::-1]
]


def draw_strip(layers: Sequence[LayerWalks], path: Path) -> Path:
    """Draw all walks with time as colour, from blue to red; a dot is the start and an arrow the end.

    Args:
        layers: One for each network.
        path: The PNG.
    """
    _sheet(layers, None).save(path)
    return path


def draw_animation(layers: Sequence[LayerWalks], path: Path) -> Path:
    """Draw all walks step by step as a GIF that begins anew after a pause.

    Args:
        layers: One for each network.
        path: The GIF.
    """
    optional_package("PIL", "analysis")
    from PIL import Image

    steps = max((walk.start + len(walk.points) for layer in layers for walk in layer.walks if walk.ordered), default=1)
    sheets = [_sheet(layers, step) for step in range(steps)]
    palette = sheets[-1].quantize(96)
    frames = [sheet.quantize(palette=palette, dither=Image.Dither.NONE) for sheet in sheets]
    times = [MILLISECONDS] * (len(frames) - 1) + [_LAST]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=times, loop=0, optimize=True)
    return path


def _sheet(layers: Sequence[LayerWalks], step: int | None) -> Any:
    """Return all networks on one sheet, a picture of Pillow's, up to a step or, without one, whole."""
    optional_package("PIL", "analysis")
    from PIL import Image, ImageDraw, ImageFont

    widest = max(len(layer.walks) for layer in layers)
    block = (widest * (_SIDE + _GAP) + _GAP, _TITLE + _SIDE + _NAME + _GAP)
    columns = min(_BLOCKS, len(layers))
    rows = -(-len(layers) // columns)
    sheet = Image.new("RGB", (columns * block[0], _HEAD + rows * block[1] + _GAP // 2), "white")
    draw = ImageDraw.Draw(sheet)
    title, text = ImageFont.load_default(size=30), ImageFont.load_default(size=22)
    draw.text((_GAP, _GAP // 2), _LEGEND, fill=_INK, font=text)
    for number, layer in enumerate(layers):
        left, top = number % columns * block[0] + _GAP, _HEAD + number // columns * block[1] + _GAP // 2
        draw.text((left, top), layer.title, fill=_INK, font=title)
        for place, walk in enumerate(layer.walks):
            corner = (left + place * (_SIDE + _GAP), top + _TITLE)
            _panel(draw, corner, layer, walk, step)
            draw.text((corner[0], corner[1] + _SIDE + 4), walk.name, fill=_INK, font=text)
    return sheet.resize((sheet.width // _SMOOTH, sheet.height // _SMOOTH), Image.Resampling.BOX)


def _panel(draw: Any, corner: tuple[int, int], layer: LayerWalks, walk: Walk, step: int | None) -> None:
    """Draw a map and what of a walk is done at ``step``."""
    cell = _SIDE / max(layer.rows, layer.columns)

    def at(point: Point) -> tuple[float, float]:
        return corner[0] + point[1] * cell, corner[1] + point[0] * cell

    for row in range(layer.rows):
        for column in range(layer.columns):
            box = (*at((row, column)), *at((row + 1, column + 1)))
            draw.rectangle(box, outline=_GREY, fill=_FAINT, width=1)
    if not walk.ordered:
        middle = (layer.rows / 2, layer.columns / 2)
        for point in walk.points:
            if point is not None:
                draw.line((*at(middle), *at(point)), fill=_TIME[60], width=2)
                _dot(draw, at(point), 4, _TIME[60])
        _dot(draw, at(middle), 14, _TIME[230])
        return
    done = len(walk.points) if step is None else max(0, min(step + 1 - walk.start, len(walk.points)))
    pieces = list(zip(walk.points[: max(done - 1, 0)], walk.points[1:done], strict=True))
    for number, (start, end) in enumerate(pieces):
        if start is not None and end is not None:
            colour = _TIME[20 + 215 * number // max(len(walk.points) - 1, 1)]
            draw.line((*at(start), *at(end)), fill=colour, width=7)
            _dot(draw, at(end), 3, colour)  # rounds the corner
    first, last = walk.points[0], walk.points[done - 1] if done else None
    if done and first is not None:
        _dot(draw, at(first), 9, _TIME[20])
    if last is not None and step is not None:
        _dot(draw, at(last), 11, _INK)
    elif last is not None and pieces and pieces[-1][0] is not None:
        _arrow(draw, at(pieces[-1][0]), at(last), _TIME[235])


def _dot(draw: Any, at: tuple[float, float], radius: float, colour: tuple[int, ...]) -> None:
    draw.ellipse((at[0] - radius, at[1] - radius, at[0] + radius, at[1] + radius), fill=colour)


def _arrow(draw: Any, start: tuple[float, float], end: tuple[float, float], colour: tuple[int, ...]) -> None:
    """Draw the head of an arrow that ends in ``end``."""
    along = np.subtract(end, start)
    along = along / max(float(np.hypot(*along)), 1e-6)
    across = np.array([-along[1], along[0]])
    tip, base = np.add(end, 10 * along), np.add(end, -8 * along)
    draw.polygon([tuple(tip), tuple(base + 11 * across), tuple(base - 11 * across)], fill=colour)
