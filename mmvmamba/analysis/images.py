"""Pictures as tensors for the analysis tools: from files and folders, by default of the bundled digits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from mmvmamba.analysis.predictions import pictures
from mmvmamba.errors import DataError, OutputError


def read_images(inputs: Sequence[str | Path], height: int, width: int, *, limit: int | None = None) -> Tensor:
    """Return pictures resized to one size: (b, 3, height, width) float32 of 0 to 255, channels in the order BGR.

    Args:
        inputs: Files and folders; in a folder, the images that lie in it, by name.
        height: Rows of every picture, whatever its own shape.
        width: Columns.
        limit: Take the first so many.

    Raises:
        DataError: If a file or folder does not exist, a folder has no image, or a picture cannot be decoded.
    """
    if min(height, width) < 1:
        raise DataError(f"the size is {height} x {width}, expected at least 1 x 1. Correct it.")
    found = pictures([str(entry) for entry in inputs])[:limit]
    return torch.stack([_resized(picture.read(), height, width) for picture in found])


def _resized(image: np.ndarray, height: int, width: int) -> Tensor:
    shrinks = image.shape[0] > height or image.shape[1] > width
    resized = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    return torch.from_numpy(resized).permute(2, 0, 1).float()


def shrunk(image: np.ndarray, max_side: int) -> np.ndarray:
    """Return a picture (h, w, c) of the same shape whose longer side is at most so many pixels; never enlarged.

    Args:
        image: As ``cv2.imread`` gives it.
        max_side: In pixels.
    """
    longest = max(image.shape[:2])
    if longest <= max_side:
        return image
    height, width = (max(round(side * max_side / longest), 1) for side in image.shape[:2])
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)


def enlarged(image: np.ndarray, factor: int) -> np.ndarray:
    """Return a picture (h, w, c) as (factor h, factor w, c), smoothly."""
    return cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC)


def encode_png(image: np.ndarray) -> bytes:
    """Return a picture (h, w, 3) of uint8 in the order RGB as the content of a PNG file."""
    done, content = cv2.imencode(".png", np.ascontiguousarray(image[..., ::-1]))
    if not done:
        raise OutputError(f"OpenCV cannot encode a picture of shape {image.shape}, expected (height, width, 3).")
    return bytes(content)
