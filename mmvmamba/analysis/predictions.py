"""One picture and what a model says about it: as plain values for a JSON file, and drawn."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from mmvmamba.errors import DataError
from mmvmamba.files import is_file, is_folder

Image = np.ndarray

#: Endings of the files that are taken out of a folder.
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
#: How many classes of a classifier's answer are kept.
TOP = 5


_NOT_WRITTEN = "could not write {path!r}{why}, expected room and the right to. Choose another out_dir."


@dataclass(frozen=True)
class Picture:
    """An input.

    Attributes:
        source: The file, or ``"array 0"`` and so on, counted over the arrays of one call.
        name: A name for files about it, which no other picture of the call has.
        given: What goes to the toolbox: the path as text, or the array (h, w, 3) of uint8 in the order BGR.
    """

    source: str
    name: str
    given: str | Image

    def read(self) -> Image:
        """Return it as (h, w, 3) uint8 in the order BGR, turned as the EXIF entry of the file says.

        Raises:
            DataError: If the file is no image that OpenCV reads.
        """
        if isinstance(self.given, np.ndarray):
            return self.given
        try:
            image = cv2.imread(self.given, cv2.IMREAD_COLOR)
        except cv2.error as error:  # more pixels than OpenCV takes
            raise DataError(f"image {self.source!r} cannot be decoded ({error}). Use a smaller one.") from error
        if image is None:
            raise DataError(
                f"image {self.source!r} cannot be decoded, expected a whole JPEG, PNG or another kind that OpenCV "
                "reads. Remove or repair it."
            )
        return image


@dataclass(frozen=True)
class Prediction:
    """What a model says about one picture.

    Attributes:
        source: Where the picture is from, see ``Picture``.
        name: A name for files about it.
        record: Plain values only, ready for JSON. det: ``instances``, each with ``label``, ``class``, ``score``,
            ``bbox`` (left, top, right, bottom) and, of a model with masks, ``mask`` (COCO's compressed RLE), the
            surest first. seg: ``classes``, each with ``label``, ``class`` and ``pixels``, the largest first. cls:
            ``classes``, the five surest, each with ``label``, ``class`` and ``score``. All: ``source``, ``height``,
            ``width``.
        sample: The toolbox's own data sample, with all tensors, on the CPU.
        labels: Of a segmentor, the label of each pixel (h, w).
        drawing: The picture with the answer drawn in, (h, w, 3) uint8 in the order RGB, if it was asked for.
    """

    source: str
    name: str
    record: dict[str, Any]
    sample: Any
    labels: Image | None = None
    drawing: Image | None = None

    def save(self, folder: str | Path) -> list[Path]:
        """Write ``preds/<name>.json``, of a segmentor ``preds/<name>.png`` (labels), and ``vis/<name>.jpg`` if drawn.

        Args:
            folder: Made if it is absent; files of these names are replaced.

        Raises:
            DataError: If a file cannot be written.
        """
        target = Path(folder)
        files = [target / "preds" / f"{self.name}.json"]
        try:
            for part in ("preds", *(("vis",) if self.drawing is not None else ())):
                (target / part).mkdir(parents=True, exist_ok=True)
            files[0].write_text(json.dumps(self.record) + "\n")
        except OSError as error:
            raise DataError(_NOT_WRITTEN.format(path=str(files[0]), why=f" ({error})")) from error
        if self.labels is not None:
            kind = np.uint8 if self.labels.max(initial=0) <= np.iinfo(np.uint8).max else np.uint16
            files.append(_written(target / "preds" / f"{self.name}.png", self.labels.astype(kind)))
        if self.drawing is not None:
            files.append(_written(target / "vis" / f"{self.name}.jpg", self.drawing[..., ::-1]))
        return files


def _written(path: Path, image: Image) -> Path:
    if not cv2.imwrite(str(path), image):
        raise DataError(_NOT_WRITTEN.format(path=str(path), why=""))
    return path


def pictures(inputs: Any) -> list[Picture]:
    """Return the pictures that a caller means, in his order, files of a folder by name.

    Args:
        inputs: A file, a folder (the images in it, not those of its own folders), an array (h, w, 3) of uint8 in the
            order BGR as ``cv2.imread`` gives it, or a sequence of these.

    Raises:
        DataError: If a file or folder does not exist, a folder has no image, or an array is of another kind.
    """
    several = isinstance(inputs, Sequence) and not isinstance(inputs, (str, bytes))
    found = [given for entry in (inputs if several else [inputs]) for given in _expanded(entry)]
    if not found:
        raise DataError("inputs is empty, expected at least one file, folder or array. Name one.")
    taken: set[str] = set()
    result: list[Picture] = []
    arrays = 0
    for given in found:
        if isinstance(given, np.ndarray):
            source, stem = f"array {arrays}", f"array-{arrays}"
            arrays += 1
        else:
            source, stem = given, Path(given).stem
        name = _free(stem, taken)
        taken.add(name)
        result.append(Picture(source, name, given))
    return result


def _expanded(entry: Any) -> Iterator[str | Image]:
    if isinstance(entry, np.ndarray):
        if entry.ndim != 3 or entry.shape[2] != 3 or entry.dtype != np.uint8 or 0 in entry.shape:
            raise DataError(
                f"array of shape {entry.shape} and type {entry.dtype}, expected (height, width, 3) of uint8 in the "
                "order BGR. Convert it."
            )
        yield entry
    elif not isinstance(entry, (str, Path)):
        raise DataError(
            f"input is a {type(entry).__name__}, expected a file, a folder, an array or a sequence of these. "
            "Convert it."
        )
    elif is_folder(entry):
        inside = sorted(path for path in Path(entry).iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
        if not inside:
            raise DataError(
                f"folder {str(entry)!r} has no image right in it, expected files ending in {', '.join(SUFFIXES)}. "
                "Name a folder with images."
            )
        yield from map(str, inside)
    elif is_file(entry):
        yield str(entry)
    else:
        raise DataError(
            f"input {str(entry)!r} does not exist in {str(Path.cwd())!r}, expected an image or a folder of images. "
            "Correct the path; a URL must be downloaded first."
        )


def _free(stem: str, taken: set[str]) -> str:
    """Return a name that is free: ``a``, else ``a_2``, ``a_3``, for a.jpg beside a.png or in another folder."""
    number, name = 1, stem
    while name in taken:
        number += 1
        name = f"{stem}_{number}"
    return name


def detection_record(sample: Any, classes: Sequence[str]) -> dict[str, Any]:
    """Return the instances of an mmdet ``DetDataSample`` on the CPU as plain values, the surest first."""
    from mmdet.structures.mask import encode_mask_results

    found = sample.pred_instances
    order = found.scores.argsort(descending=True, stable=True).tolist()
    boxes, scores, labels = found.bboxes.tolist(), found.scores.tolist(), found.labels.tolist()
    masks = encode_mask_results(found.masks.numpy()) if "masks" in found else []
    instances = []
    for index in order:
        entry = {
            "label": labels[index],
            "class": classes[labels[index]],
            "score": scores[index],
            "bbox": boxes[index],
        }
        if masks:
            size, counts = masks[index]["size"], masks[index]["counts"]
            entry["mask"] = {
                "size": [int(side) for side in size],
                "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts,
            }
        instances.append(entry)
    return {"instances": instances}


def segmentation_record(labels: Image, classes: Sequence[str]) -> dict[str, Any]:
    """Return how many pixels each class that occurs in a label picture (h, w) has, the largest first."""
    values, counts = np.unique(labels, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return {
        "classes": [
            {"label": int(values[i]), "class": classes[int(values[i])], "pixels": int(counts[i])} for i in order
        ]
    }


def classification_record(sample: Any, classes: Sequence[str]) -> dict[str, Any]:
    """Return the surest classes of an mmpretrain ``DataSample`` on the CPU."""
    scores, labels = sample.pred_score.sort(descending=True, stable=True)
    return {
        "classes": [
            {"label": label, "class": classes[label], "score": score}
            for label, score in zip(labels[:TOP].tolist(), scores[:TOP].tolist(), strict=True)
        ]
    }
