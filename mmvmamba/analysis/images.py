"""Pictures as tensors for the analysis tools: from files and folders, by default of the bundled digits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from mmvmamba.analysis.predictions import pictures
from mmvmamba.errors import DataError


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
