"""Found objects painted into a picture, with lines and labels that can be read however small the picture is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from mmvmamba.optional import optional_package

Image = np.ndarray
Colour = tuple[int, int, int]

_LINE = 2
_COVER = 0.45  # share of a mask's colour
_LUMA = np.array([0.299, 0.587, 0.114])
_BRIGHT = 140  # brightness of a colour from which labels on it are black


def paint_objects(
    image: Image,
    instances: Any,
    classes: Sequence[str],
    palette: Sequence[Colour],
    *,
    score_threshold: float,
    factor: int = 1,
) -> Image:
    """Return a picture with boxes, masks (if there are any) and labels, the surest on top.

    Args:
        image: (h, w, 3) uint8 in the order BGR.
        instances: Of mmdet's answer, on the CPU: ``bboxes`` (n, 4), ``scores`` (n,), ``labels`` (n,) and perhaps
            ``masks`` (n, h, w).
        classes: Names of the classes.
        palette: A colour (RGB) for each of them.
        score_threshold: Objects below this score are left out.
        factor: How many times larger than the picture the drawing is.

    Returns:
        (factor h, factor w, 3) uint8 in the order RGB.
    """
    large = cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC)
    canvas = np.ascontiguousarray(large[..., ::-1])
    scores = instances.scores.numpy()
    order = [int(index) for index in np.argsort(scores, kind="stable") if scores[index] >= score_threshold]
    labels = instances.labels.tolist()
    boxes = np.round(instances.bboxes.numpy() * factor).astype(int).tolist()
    if "masks" in instances:
        for index in order:
            _paint_mask(canvas, instances.masks[index].numpy(), palette[labels[index]])
    for index in order:
        left, top, right, bottom = boxes[index]
        cv2.rectangle(canvas, (left, top), (right, bottom), palette[labels[index]], _LINE, cv2.LINE_AA)
    texts = [(f"{classes[labels[index]]} {scores[index]:.2f}", boxes[index], palette[labels[index]]) for index in order]
    return _with_labels(canvas, texts)


def _paint_mask(canvas: Image, mask: Image, colour: Colour) -> None:
    height, width = canvas.shape[:2]
    smooth = cv2.resize(mask.astype(np.uint8) * 255, (width, height), interpolation=cv2.INTER_LINEAR)
    covered = smooth > 127
    canvas[covered] = ((1 - _COVER) * canvas[covered] + _COVER * np.array(colour)).astype(np.uint8)
    outlines, _ = cv2.findContours(covered.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(canvas, outlines, -1, colour, _LINE, cv2.LINE_AA)


def _with_labels(canvas: Image, texts: Sequence[tuple[str, Sequence[int], Colour]]) -> Image:
    """Return a picture (h, w, 3) with a text above the left upper corner of each box, in it where there is no room."""
    from PIL import Image as PILImage
    from PIL import ImageDraw, ImageFont

    height, width = canvas.shape[:2]
    # matplotlib's font has far more letters than the built-in ones of OpenCV and PIL.
    folder = Path(optional_package("matplotlib", "analysis").get_data_path())
    font = ImageFont.truetype(str(folder / "fonts" / "ttf" / "DejaVuSans.ttf"), max(13, max(height, width) // 32))
    picture = PILImage.fromarray(canvas)
    pen = ImageDraw.Draw(picture)
    for text, (left, top, _, _), colour in texts:
        edges = font.getbbox(text)
        text_width, text_height = int(edges[2]) + 6, int(edges[3]) + 4
        x = min(max(left, 0), max(width - text_width, 0))
        y = top - text_height if top >= text_height else max(top, 0)
        pen.rectangle((x, y, x + text_width, y + text_height), fill=tuple(colour))
        pen.text((x + 3, y + 1), text, fill="black" if _LUMA @ colour >= _BRIGHT else "white", font=font)
    return np.asarray(picture)
