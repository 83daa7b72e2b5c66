"""Pictures on disk: are they there, whole, of the stated size, and what will OpenCV make of them?

Pillow reads the header first, so that a picture of too many pixels is known before it is decoded. A JPEG is decoded at
an eighth of its size, which reads all of its data in less time.
"""

from __future__ import annotations

import contextlib
import os
import struct
import threading
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from mmvmamba.datasets.checks.shapes import Problem

#: 10,000 by 10,000 pixels.
MAX_PIXELS = 100_000_000
#: What Pillow's many readers raise for files that are damaged; DecompressionBombError is of no other class.
_READ_ERRORS = (
    OSError, ValueError, SyntaxError, EOFError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError,
    MemoryError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
#: Formats that OpenCV reads as Pillow does; MPO is what phones make of JPEG. For others OpenCV is asked.
_COMMON = ("JPEG", "MPO", "PNG", "BMP")
#: The EXIF entry and those of its values that turn or mirror; OpenCV passes over all others.
_ORIENTATION, _TURNS = 0x0112, range(2, 9)
_LARGE_PIXELS = 25_000_000
#: Pixels that are counted at a time, and different labels in a picture after which no more are counted.
_PIECE, _MANY_LABELS = 1 << 22, 1 << 16
#: Large pictures are decoded one at a time, whatever the number of threads.
_ONE_LARGE = threading.Lock()


@dataclass
class Seen:
    """What was found out about a picture.

    Attributes:
        size: (width, height) as OpenCV gives it, turned as the EXIF data say; None if it cannot be decoded.
        problems: (kind, text) of what is wrong.
    """

    size: tuple[int, int] | None = None
    problems: list[Problem] = field(default_factory=list)


@contextlib.contextmanager
def own_pixel_limit() -> Iterator[None]:
    """Switch off Pillow's limit, which counts for the whole process; ours is looked at before anything is decoded."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _missing(path: Path, missing: str, empty: str) -> Problem | None:
    try:
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "does not exist"
            backslash = "; Windows' backslashes are to be slashes" if "\\" in path.name else ""
            return missing, f"the file {what}{backslash}"
        if path.stat().st_size == 0:
            return empty, "the file has 0 bytes"
        if not os.access(path, os.R_OK):
            return missing, "the file may not be read"
    except (OSError, ValueError) as error:  # names too long, or with characters that no file name can have
        return missing, f"the file cannot be found: {error}"
    return None


def look_at_picture(path: Path, max_pixels: int = MAX_PIXELS) -> Seen:
    """Check one image file.

    Args:
        path: The file.
        max_pixels: More pixels than this are not decoded.
    """
    seen = Seen()
    problem = _missing(path, "image-missing", "image-empty")
    if problem is not None:
        seen.problems.append(problem)
        return seen
    try:
        with Image.open(path) as picture:
            _look_inside(picture, path, seen, max_pixels)
    except UnidentifiedImageError:
        seen.problems.append(("image-unreadable", "it is no picture of a known format"))
    except _READ_ERRORS as error:
        seen.problems.append(_why_unreadable(error))
    if any(kind in ("image-cut", "image-unreadable") for kind, _ in seen.problems):
        seen.size = None
    return seen


def _look_inside(picture: Image.Image, path: Path, seen: Seen, max_pixels: int) -> None:
    width, height = picture.size
    if width * height > max_pixels:
        text = f"it is {width} x {height} = {width * height} pixels, expected at most {max_pixels}"
        seen.problems.append(("image-too-large", text))
        return
    kind, mode, frames = picture.format, picture.mode, getattr(picture, "n_frames", 1)
    deep = mode.startswith(("I", "F")) or (kind == "PNG" and _png_depth(path) > 8)
    if kind == "JPEG":
        picture.draft(None, (max(width // 8, 1), max(height // 8, 1)))
    with _ONE_LARGE if width * height > _LARGE_PIXELS else contextlib.nullcontext():
        picture.load()
    seen.size = (width, height)
    turn = picture.getexif().get(_ORIENTATION, 1)
    if turn in _TURNS or kind not in _COMMON:
        seen.size = _size_in_opencv(path)
        if seen.size is None:
            seen.problems.append(("image-unreadable", f"OpenCV does not decode it (format {kind})"))
            return
    if turn in _TURNS:
        stored, got = f"{width} x {height}", f"{seen.size[0]} x {seen.size[1]}"
        seen.problems.append(("image-turned", f"EXIF orientation {turn}: stored as {stored}, decoded as {got}"))
    if mode == "CMYK":
        seen.problems.append(("image-cmyk", "its mode is CMYK, expected RGB or grey"))
    if deep:
        seen.problems.append(("image-16-bit", "it has more than 8 bits per channel"))
    if frames > 1 and kind != "MPO":
        seen.problems.append(("image-animated", f"it has {frames} frames, expected 1"))


def _size_in_opencv(path: Path) -> tuple[int, int] | None:
    try:
        decoded = cv2.imdecode(np.fromfile(path, dtype=np.uint8), cv2.IMREAD_COLOR)
    except cv2.error:
        return None
    return None if decoded is None else (decoded.shape[1], decoded.shape[0])


def _png_depth(path: Path) -> int:
    """Return the bits per channel of a PNG, which Pillow does not tell for pictures with colours."""
    with path.open("rb") as file:
        return file.read(25)[-1]


def _why_unreadable(error: BaseException) -> Problem:
    text = str(error) or type(error).__name__
    if isinstance(error, Image.DecompressionBombError):  # of Pillow's own limit, where the caller has left it on
        return "image-too-large", text
    # Pillow has no class of its own for it: "image file is truncated (n bytes not processed)", "broken data stream",
    # and for PNG "Truncated File Read" and "unrecognized data stream contents".
    cut = any(word in text.lower() for word in ("truncated", "broken data stream", "unexpected end"))
    return ("image-cut" if cut else "image-unreadable"), f"it cannot be decoded: {text}"


@dataclass(frozen=True)
class LabelRule:
    """Which numbers a label picture may hold.

    Attributes:
        classes: Number of classes.
        zero_is_ignored: Whether 0 means "not labelled" and classes start at 1 (``reduce_zero_label``).
        ignored: The number of pixels that do not count.
    """

    classes: int
    zero_is_ignored: bool = False
    ignored: int = 255

    def allowed(self) -> set[int]:
        """Return the numbers."""
        return {*range(self.classes + self.zero_is_ignored), self.ignored}

    def text(self) -> str:
        """Return the numbers in words."""
        return f"0 to {self.classes - 1 + self.zero_is_ignored} or {self.ignored}"


@dataclass
class Labels:
    """What was found out about a label picture: (width, height), pixels of each number, and problems."""

    size: tuple[int, int] | None = None
    pixels: dict[int, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def look_at_labels(
    path: Path, rule: LabelRule | None, image_size: tuple[int, int] | None, max_pixels: int = MAX_PIXELS
) -> Labels:
    """Check one label picture.

    Args:
        path: The file.
        rule: The numbers it may hold, or None if these are not known.
        image_size: (width, height) of its image, or None if that is not known.
        max_pixels: More pixels than this are not decoded.
    """
    seen = Labels()
    problem = _missing(path, "label-missing", "label-unreadable")
    if problem is not None:
        seen.problems.append(problem)
        return seen
    try:
        with Image.open(path) as picture:
            if picture.width * picture.height > max_pixels:
                text = f"it is {picture.width} x {picture.height} pixels, expected at most {max_pixels}"
                seen.problems.append(("image-too-large", text))
                return seen
            with _ONE_LARGE if picture.width * picture.height > _LARGE_PIXELS else contextlib.nullcontext():
                _read_labels(picture, seen, rule)
    except _READ_ERRORS as error:
        seen.problems.append(("label-unreadable", f"it cannot be decoded: {str(error) or type(error).__name__}"))
        return seen
    if image_size is not None and seen.size != image_size:
        text = f"it is {picture.width} x {picture.height}, its image is {image_size[0]} x {image_size[1]}"
        seen.problems.append(("label-size", text))
    return seen


def _read_labels(picture: Image.Image, seen: Labels, rule: LabelRule | None) -> None:
    seen.size = picture.size
    picture.load()
    if len(picture.getbands()) > 1:
        text = f"its mode is {picture.mode} with {len(picture.getbands())} channels, expected one number per pixel"
        seen.problems.append(("label-colours", text))
        return
    if picture.mode == "P":
        seen.problems.append(("label-palette", "its mode is P, expected L"))
    seen.pixels = _histogram(np.asarray(picture))
    allowed = rule.allowed() if rule else set(range(256))
    odd = {value: count for value, count in seen.pixels.items() if value not in allowed}
    if odd:
        some = ", ".join(f"{value:g} ({count} pixels)" for value, count in list(odd.items())[:5])
        expected = rule.text() if rule else "0 to 255"
        more = f" and {len(odd) - 5} more" if len(odd) > 5 else ""
        seen.problems.append(("label-range", f"it holds {some}{more}, expected {expected}"))


def _histogram(numbers: np.ndarray) -> dict[int, int]:
    """Return number -> count, in pieces: counting needs eight bytes for each pixel that it looks at."""
    total: Counter[int] = Counter()
    flat = numbers.reshape(-1)
    for start in range(0, flat.size, _PIECE):
        values, counts = np.unique(flat[start : start + _PIECE], return_counts=True)
        total.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
        if len(total) > _MANY_LABELS:
            break
    return dict(sorted(total.items()))
