"""A few pictures to try a model on: scenes and crops of digits that no training of the demo saw, and photographs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from mmvmamba.datasets.digit_scenes import (
    Array,
    DigitSource,
    Scene,
    crop_digit,
    draw_scene,
    load_digit_sources,
    mask_box,
)
from mmvmamba.datasets.digits import CROP_SIZE, DigitsSettings
from mmvmamba.errors import OutputError

_STREAM = 3  # digits.py draws its scenes from stream 1 and its crops from stream 2 of the same seed
_SCENES, _CROPS = 4, 2
_LARGE = 36  # least width and height, in pixels, of a digit that is cut out
_PHOTOS = {"temple": "china.jpg", "flower": "flower.jpg"}


@dataclass(frozen=True)
class Sample:
    """A picture to try: what to call it, and its file."""

    name: str
    path: Path


def write_samples(folder: Path) -> list[Sample]:
    """Write the sample pictures as PNG files, always the same, and return them.

    The scenes hold several digits each and are drawn from the scans of the split ``val``, which the digits data set
    keeps from training. The photographs are the two that scikit-learn brings.

    Args:
        folder: One that exists.

    Raises:
        DataError: If scikit-learn is not installed.
        OutputError: If a file cannot be written.
    """
    samples = []
    for name, image in _images():
        path = folder / f"{name.replace(' ', '-')}.png"
        if not cv2.imwrite(str(path), image):
            raise OutputError(f"could not write {str(path)!r}, expected room and the right to. Choose another folder.")
        samples.append(Sample(name, path))
    return samples


def _images() -> Iterator[tuple[str, Array]]:
    """Yield names and pictures (h, w, 3) of uint8 in the order BGR."""
    source = load_digit_sources(DigitsSettings().seed)["val"]
    scenes = _scenes(source)
    for number in range(1, _SCENES + 1):
        yield f"digits {number}", next(scenes).image
    rng = np.random.default_rng([DigitsSettings().seed, _STREAM])
    large = (scene for scene in scenes if min(mask_box(scene.instances[-1].mask)[2:]) >= _LARGE)
    for number, scene in zip(range(1, _CROPS + 1), large, strict=False):
        yield f"one digit {number}", crop_digit(rng, scene, scene.instances[-1], CROP_SIZE)
    from sklearn.datasets import load_sample_image  # is there: the scans are from it too

    for name, file in _PHOTOS.items():
        yield name, np.ascontiguousarray(load_sample_image(file)[..., ::-1])


def _scenes(source: DigitSource) -> Iterator[Scene]:
    """Yield scenes of at least three digits, and without the crowds that detectors are not asked to find."""
    index = 0
    while True:
        scene = draw_scene(np.random.default_rng([DigitsSettings().seed, _STREAM, index]), source)
        if len(scene.instances) >= 3 and not any(instance.crowd for instance in scene.instances):
            yield scene
        index += 1
