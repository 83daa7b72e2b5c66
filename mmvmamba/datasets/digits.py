"""The digits data set on disk: detection, segmentation and classification of the same scenes.

Layout of the folder that ``write_digits`` makes::

    images/{train,val}/000000.jpg                 scenes
    annotations/instances_{train,val}.json        COCO instances: ten categories named 0 to 9
    labels/{train,val}/000000.png                 ADE20K-style label pictures
    crops/{train,val}/<digit>/000000.jpg          one digit each, a folder per class (ImageFolder layout)
    manifest.json                                 the settings it was made with; written last

Label pictures follow ADE20K: 0 is "not labelled" and classes start at 1, to be read with ``reduce_zero_label=True``.
Class 1 is the background, class 2 + k the digit k. Crowds are not labelled (0), because their small digits have no
individual boundary.

In the COCO file a mask without holes is a polygon and one with holes a compressed RLE (a COCO polygon cannot have
holes); crowds have ``iscrowd=1`` and an RLE. ``area`` counts the pixels of the visible mask. The extra field
``digit_sources`` names the scans of ``sklearn.datasets.load_digits`` an object is made of.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from mmvmamba.datasets.digit_scenes import (
    DigitSource,
    Instance,
    Scene,
    crop_digit,
    draw_scene,
    load_digit_sources,
    mask_box,
)
from mmvmamba.errors import DataError

CLASSES = tuple(str(digit) for digit in range(10))
SEG_CLASSES = ("background", *CLASSES)
MANIFEST = "manifest.json"
FORMAT_VERSION = 1  # raise it whenever the same settings give other files
CROP_SIZE = 64
JPEG_QUALITY = 92

_SPLITS = ("train", "val")
_SCENE_STREAM, _CROP_STREAM = 1, 2
_TRACE_SCALE = 4  # outlines are traced on a mask enlarged this much, so that they follow pixel edges, not centres

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class DigitsSettings:
    """What determines every byte of the data set: scenes per split, digit crops per split, and the seed."""

    train: int = 1000
    val: int = 200
    seed: int = 0
    train_crops: int = 8000
    val_crops: int = 1000

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not isinstance(value, int) or value < (0 if name == "seed" else 1):
                raise DataError(f"digits: {name} is {value!r}, expected a positive whole number; pass another {name}")


def write_digits(out: str | os.PathLike[str], settings: DigitsSettings, progress: Progress | None = None) -> bool:
    """Make the data set in folder ``out``, whole or not at all.

    Args:
        out: The folder to make. Nothing is done when it already holds the data set of the same settings.
        settings: Sizes and seed.
        progress: Called as ``progress(what, done, total)`` while files are written.

    Returns:
        Whether anything was written.

    Raises:
        DataError: ``out`` holds other files, or a data set made with other settings.
    """
    target = Path(out)
    if _is_complete(target, settings):
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-partial-", dir=target.parent))
    try:
        counts: dict[str, Any] = {}
        for split, source in load_digit_sources(settings.seed).items():
            counts[split] = _write_split(partial, split, source, settings, progress or _silent)
        manifest = {"format_version": FORMAT_VERSION, "settings": asdict(settings), "counts": counts}
        _dump(manifest, partial / MANIFEST, indent=2)
        partial.chmod(0o755)  # mkdtemp makes folders private
        if target.exists():
            target.rmdir()  # known to be empty
        partial.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return True


def _is_complete(target: Path, settings: DigitsSettings) -> bool:
    """Whether ``target`` is this very data set; raises if it is anything else but absent or empty."""
    if not target.exists():
        return False
    if not target.is_dir():
        raise DataError(f"digits: {target} is a file, expected a folder or nothing; pass another --out")
    if not any(target.iterdir()):
        return False
    path = target / MANIFEST
    if not path.is_file():
        raise DataError(f"digits: {target} holds other files (no {MANIFEST}) and is left alone; pass another --out")
    try:
        found = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise DataError(f"digits: {path} is not valid JSON ({error}); delete {target} or pass another --out") from error
    wanted = {"format_version": FORMAT_VERSION, "settings": asdict(settings)}
    differing = [key for key in wanted if not isinstance(found, dict) or found.get(key) != wanted[key]]
    if differing:
        have = {key: found.get(key) for key in differing} if isinstance(found, dict) else found
        raise DataError(
            f"digits: {target} was made with {have}, expected { ({key: wanted[key] for key in differing}) }; "
            f"delete {target} or pass another --out"
        )
    for split, scenes, crops in (
        ("train", settings.train, settings.train_crops),
        ("val", settings.val, settings.val_crops),
    ):
        expected = (("images", "*.jpg", scenes), ("labels", "*.png", scenes), ("crops", "*/*.jpg", crops))
        for kind, pattern, count in expected:
            present = sum(1 for _ in (target / kind / split).glob(pattern))
            if present != count:
                raise DataError(
                    f"digits: {target / kind / split} holds {present} files, expected {count}; "
                    f"delete {target} to remake it"
                )
    return True


def _write_split(
    root: Path, split: str, source: DigitSource, settings: DigitsSettings, progress: Progress
) -> dict[str, int]:
    """Write scenes, annotations, labels and crops of one split and return how many of each there are."""
    images, labels = root / "images" / split, root / "labels" / split
    for folder in (images, labels, *(root / "crops" / split / name for name in CLASSES)):
        folder.mkdir(parents=True)
    total = getattr(settings, split)
    coco = _CocoWriter()
    for index in range(total):
        scene = draw_scene(_generator(settings, split, _SCENE_STREAM, index), source)
        stem = f"{index:06d}"
        _write_image(images / f"{stem}.jpg", scene.image)
        _write_image(labels / f"{stem}.png", label_picture(scene))
        coco.add(f"{stem}.jpg", scene)
        progress(f"{split} scenes", index + 1, total)
    (root / "annotations").mkdir(exist_ok=True)
    _dump(coco.document(), root / "annotations" / f"instances_{split}.json")
    crops = _write_crops(root / "crops" / split, split, source, settings, progress)
    crowds = sum(annotation["iscrowd"] for annotation in coco.annotations)
    return {"scenes": total, "objects": len(coco.annotations) - crowds, "crowds": crowds, "crops": crops}


def _write_crops(folder: Path, split: str, source: DigitSource, settings: DigitsSettings, progress: Progress) -> int:
    """Cut crops out of scenes drawn for this alone, so that they share background, clutter and occlusion."""
    total: int = getattr(settings, f"{split}_crops")
    done, index = 0, 0
    while done < total:
        rng = _generator(settings, split, _CROP_STREAM, index)
        index += 1
        scene = draw_scene(rng, source)
        for instance in scene.instances:
            if instance.crowd or done == total:
                continue
            crop = crop_digit(rng, scene, instance, CROP_SIZE)
            _write_image(folder / CLASSES[instance.label] / f"{done:06d}.jpg", crop)
            done += 1
        progress(f"{split} crops", done, total)
    return done


def label_picture(scene: Scene) -> np.ndarray:
    """ADE20K-style labels (h, w): 0 crowd (not labelled), 1 background, 2 + k the digit k."""
    labels = np.ones(scene.image.shape[:2], dtype=np.uint8)
    for instance in scene.instances:
        labels[instance.mask] = 0 if instance.crowd else 2 + instance.label
    return labels


class _CocoWriter:
    """Collects scenes into one COCO instances document; ids start at 1."""

    def __init__(self) -> None:
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []

    def add(self, file_name: str, scene: Scene) -> None:
        height, width = scene.image.shape[:2]
        image_id = len(self.images) + 1
        self.images.append({"id": image_id, "file_name": file_name, "height": height, "width": width})
        for instance in scene.instances:
            self.annotations.append(
                {
                    "id": len(self.annotations) + 1,
                    "image_id": image_id,
                    "category_id": instance.label + 1,
                    "bbox": list(mask_box(instance.mask)),
                    "area": int(instance.mask.sum()),
                    "iscrowd": int(instance.crowd),
                    "segmentation": encode_mask(instance),
                    "digit_sources": instance.sources,
                }
            )

    def document(self) -> dict[str, Any]:
        categories = [{"id": k + 1, "name": name, "supercategory": "digit"} for k, name in enumerate(CLASSES)]
        info = {"description": "handwritten digits on cluttered backgrounds", "version": str(FORMAT_VERSION)}
        return {"info": info, "images": self.images, "annotations": self.annotations, "categories": categories}


def encode_mask(instance: Instance) -> list[list[float]] | dict[str, Any]:
    """COCO segmentation of a visible mask: polygons where they can tell it exactly enough, else a compressed RLE."""
    if not instance.crowd:
        polygons = _trace(instance.mask)
        if polygons is not None:
            return polygons
    from pycocotools import mask as mask_api

    rle = mask_api.encode(np.asfortranarray(instance.mask.astype(np.uint8)))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def _trace(mask: np.ndarray) -> list[list[float]] | None:
    """Outlines of a mask without holes as flat x, y lists; None if it has a hole or a speck too small to outline."""
    big = cv2.resize(mask.astype(np.uint8), None, fx=_TRACE_SCALE, fy=_TRACE_SCALE, interpolation=cv2.INTER_NEAREST)
    contours, hierarchy = cv2.findContours(big, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_TC89_L1)
    if (hierarchy[0, :, 3] >= 0).any() or any(len(contour) < 4 for contour in contours):
        return None
    return [((contour.reshape(-1) + 0.5) / _TRACE_SCALE).round(2).tolist() for contour in contours]


def _generator(settings: DigitsSettings, split: str, stream: int, index: int) -> np.random.Generator:
    return np.random.default_rng([settings.seed, 1 + _SPLITS.index(split), stream, index])


def _write_image(path: Path, image: np.ndarray) -> None:
    parameters = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY] if path.suffix == ".jpg" else []
    if not cv2.imwrite(str(path), image, parameters):
        raise DataError(f"digits: could not write {path}; is the disk full or the folder read-only?")


def _dump(document: Any, path: Path, indent: int | None = None) -> None:
    path.write_text(json.dumps(document, indent=indent) + "\n")


def _silent(what: str, done: int, total: int) -> None:
    """Report nothing."""
