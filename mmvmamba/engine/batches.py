"""What a message says about a batch: its images, their shape, where they are not finite.

A batch is whatever the data loader of an mm* library gives: images and samples nested in dicts, lists and tuples.
Nothing here is computed unless there is something to report.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

#: Entries of a sample that name it, the first that is there.
_NAMES = ("img_path", "video_path", "filename", "img_id", "sample_idx")


def image_names(batch: Any) -> list[str]:
    """Return the file of every sample of a batch; where it has none, its number in the data set."""
    return [name for leaf in _leaves(batch) if (name := _name(leaf)) is not None]


def image_shapes(batch: Any) -> list[tuple[int, ...]]:
    """Return the shape (channels, height, width) of every image of a batch."""
    return [tuple(image.shape) for image in _images(batch)]


def non_finite_images(batch: Any) -> list[str]:
    """Return a phrase for every image of a batch that holds NaN or infinite values."""
    names = image_names(batch)
    phrases = []
    for index, image in enumerate(_images(batch)):
        if image.is_floating_point() and (bad := int((~torch.isfinite(image)).sum())):
            name = names[index] if index < len(names) else f"image {index} of the batch"
            phrases.append(f"{name} ({bad} of {image.numel()} values)")
    return phrases


def _images(batch: Any) -> Iterator[Tensor]:
    inputs = batch.get("inputs") if isinstance(batch, Mapping) else batch
    for leaf in _leaves(inputs):
        if isinstance(leaf, Tensor) and leaf.ndim == 3:
            yield leaf
        elif isinstance(leaf, Tensor) and leaf.ndim == 4:
            yield from leaf


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for entry in value.values():
            yield from _leaves(entry)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _leaves(entry)
    else:
        yield value


def _name(sample: Any) -> str | None:
    metainfo = getattr(sample, "metainfo", None)
    if not isinstance(metainfo, Mapping):
        return None
    key = next((key for key in _NAMES if key in metainfo), None)
    if key is None:
        return None
    return str(metainfo[key]) if key in _NAMES[:3] else f"{key} {metainfo[key]}"
