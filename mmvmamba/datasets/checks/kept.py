"""The policy ``skip``: write a list of what is sound, to a new file, and count what is left out."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from mmvmamba.datasets.checks.coco import CocoFile
from mmvmamba.datasets.checks.folders import FolderCheck
from mmvmamba.datasets.checks.kinds import KINDS, Level, Part
from mmvmamba.datasets.checks.report import Report
from mmvmamba.errors import DataError

#: Share of the images or annotations that may be left out.
MAX_SKIPPED = 0.01


@dataclass(frozen=True)
class Kept:
    """What was written, and how much of what there was is left out."""

    path: Path
    images: int
    images_left_out: int
    annotations: int = 0
    annotations_left_out: int = 0

    def line(self) -> str:
        """Return it in words."""
        text = f"{self.path}: {self.images - self.images_left_out} of {self.images} images"
        if self.annotations:
            text += f", {self.annotations - self.annotations_left_out} of {self.annotations} annotations"
        return text


def refuse_what_cannot_be_left_out(report: Report) -> None:
    """Raise if the report holds an error that is not of single images or annotations.

    Raises:
        DataError: Naming the kinds.
    """
    whole = [kind for kind in report.kinds() if KINDS[kind].level is Level.ERROR and KINDS[kind].part is Part.NOTHING]
    if whole:
        raise DataError(
            f"--policy skip: found {', '.join(whole)}, expected errors of single images or annotations only; nothing "
            "was written. Repair these first."
        )


@dataclass(frozen=True)
class Plan:
    """What is going to be written, with nothing against it so far; nothing is written before ``write``."""

    kept: Kept
    content: Callable[[IO[str]], object]

    def write(self) -> Kept:
        """Write it.

        Raises:
            DataError: If the file exists or cannot be written.
        """
        _write_new(self.kept.path, self.content)
        return self.kept


def plan_coco(coco: CocoFile, target: Path, max_skipped: float = MAX_SKIPPED) -> Plan:
    """Plan a COCO file without the images and annotations that have an error.

    Annotations of an image that is left out are left out with it, and so are those of an image id that two images have:
    they could belong to either.

    Args:
        coco: What was read, with what is bad.
        target: The new file.
        max_skipped: Largest share of the images, and of the annotations, that may be left out.

    Raises:
        DataError: If more would be left out, or the file exists.
    """
    if coco.document is None:
        raise DataError(f"{coco.path} could not be read, expected a COCO file. Repair it first.")
    images, annotations = coco.document["images"], coco.document["annotations"]
    bad_ids = {
        image["id"] for image in (images[index] for index in coco.bad_images)
        if isinstance(image, dict) and isinstance(image.get("id"), int)
    }  # fmt: skip
    kept_images = [
        image for index, image in enumerate(images) if index not in coco.bad_images and image["id"] not in bad_ids
    ]
    kept_annotations = [
        annotation for index, annotation in enumerate(annotations)
        if index not in coco.bad_annotations and annotation["image_id"] not in bad_ids
    ]  # fmt: skip
    kept = Kept(
        target, len(images), len(images) - len(kept_images), len(annotations), len(annotations) - len(kept_annotations)
    )
    _refuse_too_many(kept.images_left_out, kept.images, "images", coco.path, max_skipped)
    _refuse_too_many(kept.annotations_left_out, kept.annotations, "annotations", coco.path, max_skipped)
    _refuse_existing(target)
    document: dict[str, Any] = {**coco.document, "images": kept_images, "annotations": kept_annotations}
    return Plan(kept, lambda file: json.dump(document, file))


def plan_names(checked: FolderCheck, target: Path, source: Path, max_skipped: float = MAX_SKIPPED) -> Plan:
    """Plan a list of the images that have no error, as ``ann_file`` of MMSegmentation or MMPretrain reads it.

    Args:
        checked: What was found in the folders.
        target: The new file.
        source: The folder, for messages.
        max_skipped: Largest share of the images that may be left out.

    Raises:
        DataError: If more would be left out, or the file exists.
    """
    names = [name for name in checked.names if name not in checked.bad]
    number = len(checked.names) + checked.unusable_lines
    kept = Kept(target, number, number - len(names))
    _refuse_too_many(kept.images_left_out, kept.images, "images", source, max_skipped)
    _refuse_existing(target)
    lines = [f"{name} {checked.numbers[name]}\n" if checked.numbers else f"{name}\n" for name in names]
    return Plan(kept, lambda file: file.writelines(lines))


def _refuse_too_many(left_out: int, total: int, what: str, source: Path, limit: float) -> None:
    if left_out > limit * total or (total and left_out == total):
        raise DataError(
            f"--policy skip: {left_out} of {total} {what} of {source} ({left_out / max(total, 1):.1%}) would be left "
            f"out, expected at most {limit:.1%}; nothing was written. Repair the data, or raise --max-skipped."
        )


def _refuse_existing(target: Path) -> None:
    if os.path.lexists(target):
        raise DataError(f"{str(target)!r} exists and is left alone, expected a new file. Name another --out.")


def _write_new(target: Path, write: Callable[[IO[str]], object]) -> None:
    """Write a file that does not exist, whole or not at all."""
    partial = target.with_name(f".{target.name}.{os.getpid()}.unfinished")
    _refuse_existing(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("x", encoding="utf-8") as file:
            write(file)
        partial.replace(target)
    except (OSError, UnicodeError) as error:
        raise DataError(f"{str(target)!r} cannot be written: {error}. Name another --out.") from error
    finally:
        with contextlib.suppress(OSError):  # where it could not even be made
            partial.unlink()
