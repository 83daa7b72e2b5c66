"""Polygons and run lengths of COCO files, in plain Python: no C code sees them before they are known to be sound.

pycocotools before 2.0.5 writes outside its memory for run lengths longer than the image and for polygons far outside of
it (cocoapi issues 362 and 380), and later ones still ask for memory by the length of a polygon's outline.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import isnan
from typing import Any

from mmvmamba.datasets.checks.report import short

#: Numbers beyond this are not places in a picture. Comparing with it is also true for no NaN, and never overflows.
LIMIT = 1e9
#: Pixels that an outline or a box may reach out of its image, as rounding does in COCO's own files.
ROUNDING = 2
NUMBERS = {int, float}

Problem = tuple[str, str]


def is_number(value: object) -> bool:
    """Whether a value of a JSON file is a number; true and false are none."""
    return type(value) in NUMBERS


def is_sensible(value: Any) -> bool:
    """Whether a number is neither NaN nor infinite nor senselessly large."""
    return -LIMIT < value < LIMIT


def check_segmentation(segmentation: Any, height: int | None, width: int | None) -> Iterator[Problem]:
    """Yield (kind, text) of what is wrong with the segmentation of an annotation, which is not empty.

    Args:
        segmentation: The value as it was read.
        height: Height of the image, or None if that is not known.
        width: Width of the image, or None.
    """
    if isinstance(segmentation, dict):
        yield from _check_run_lengths(segmentation, height, width)
    elif not isinstance(segmentation, list):
        yield "mask-type", f"segmentation is {short(segmentation)}, expected a list or a dict"
    else:
        for polygon in segmentation:
            problem = _check_polygon(polygon, height, width)
            if problem is not None:
                yield problem


def _check_polygon(polygon: Any, height: int | None, width: int | None) -> Problem | None:
    if type(polygon) is not list:
        return "polygon-type", f"a polygon is {short(polygon)}, expected a list of numbers within a list"
    if not set(map(type, polygon)) <= NUMBERS:
        odd = next(value for value in polygon if not is_number(value))
        return "polygon-type", f"a polygon holds {short(odd)}, expected numbers"
    if len(polygon) % 2:
        return "polygon-odd", f"a polygon has {len(polygon)} numbers, expected an even count"
    if len(polygon) < 6:
        return "polygon-short", f"a polygon has {len(polygon)} numbers, expected 6 or more"
    # min and max pass over a NaN that is not the first, the sum does not; it cannot overflow after the comparison.
    if not (min(polygon) > -LIMIT and max(polygon) < LIMIT) or isnan(sum(polygon)):
        odd = next(value for value in polygon if not is_sensible(value))
        return "polygon-not-finite", f"a polygon holds {short(odd)}, expected places within the image"
    if height is None or width is None:
        return None
    xs, ys = polygon[0::2], polygon[1::2]
    left, right, top, bottom = min(xs), max(xs), min(ys), max(ys)
    if left >= -ROUNDING and top >= -ROUNDING and right <= width + ROUNDING and bottom <= height + ROUNDING:
        return None
    text = f"a polygon reaches from ({left}, {top}) to ({right}, {bottom}), the image is {width} x {height}"
    far = left < -width or right > 2 * width or top < -height or bottom > 2 * height
    return ("polygon-far-outside" if far else "polygon-outside"), text


def _check_run_lengths(rle: dict[str, Any], height: int | None, width: int | None) -> Iterator[Problem]:
    size, counts = rle.get("size"), rle.get("counts")
    if not (isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)):
        yield "rle-size", f"size is {short(size)}, expected [height, width]"
        return
    if height is not None and width is not None and size != [height, width]:
        yield "rle-size", f"size is {short(size)}, expected [{height}, {width}]"
        return
    total = size[0] * size[1]
    if isinstance(counts, str):
        try:
            counts = decode_counts(counts, total)
        except ValueError as error:
            yield "rle-counts", f"counts cannot be decoded: {error}"
            return
    elif not isinstance(counts, list) or not set(map(type, counts)) <= {int}:
        yield "rle-counts", f"counts is {short(counts)}, expected a list of whole numbers or a text"
        return
    if counts and min(counts) < 0:
        yield "rle-counts", f"counts holds {short(min(counts))}, expected 0 or more"
    elif sum(counts) != total:
        yield "rle-sum", f"counts add up to {short(sum(counts))}, expected {size[0]} * {size[1]} = {total}"


def decode_counts(text: str, total: int) -> list[int]:
    """Return the run lengths of COCO's compressed text.

    Each number is a row of characters with five bits each, lowest first, from the character '0' on; the sixth bit says
    that more follow, and the highest of the last five is the sign. From the fourth number on, each is the difference to
    the one two places before (maskApi.c of cocoapi, rleToString).

    Args:
        text: The characters.
        total: Pixels of the image; a number cannot be larger, which bounds the characters of each.

    Raises:
        ValueError: If a character does not belong there, a number does not end, or one is longer than the image.
    """
    counts: list[int] = []
    value, shift = 0, 0
    longest = total.bit_length() + 6
    for place, character in enumerate(text):
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            raise ValueError(f"character {short(character)} at place {place}")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            if shift > longest:
                raise ValueError(f"the number at place {place} is larger than the image")
            continue
        if bits & 16:
            value -= 1 << shift
        if len(counts) > 2:
            value += counts[-2]
        counts.append(value)
        value, shift = 0, 0
    if shift:
        raise ValueError("it ends within a number")
    return counts
