"""Data sets that are folders: pictures with label pictures (ADE20K), and one folder per class (ImageNet)."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from mmvmamba.datasets.checks.coco import CocoFile, leaves_folder
from mmvmamba.datasets.checks.kinds import KINDS, Level
from mmvmamba.datasets.checks.pictures import (
    MAX_PIXELS,
    LabelRule,
    Labels,
    Seen,
    look_at_labels,
    look_at_picture,
    own_pixel_limit,
)
from mmvmamba.datasets.checks.report import Report, printable, short
from mmvmamba.files import is_folder

#: What MMPretrain takes out of folders of classes, and what else is meant to be a picture.
CLASS_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif")
PICTURE_SUFFIXES = (*CLASS_SUFFIXES, ".tiff", ".webp", ".gif")

Progress = Callable[[str, int, int], None]
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def no_progress(what: str, done: int, total: int) -> None:
    """Report nothing."""


@dataclass(frozen=True)
class PictureOptions:
    """How pictures are looked at.

    Attributes:
        max_pixels: More pixels than this are not decoded.
        workers: Threads.
        progress: Called as ``progress(what, done, total)``.
    """

    max_pixels: int = MAX_PIXELS
    workers: int = field(default_factory=lambda: min(4, os.cpu_count() or 1))
    progress: Progress = no_progress


def _over(
    function: Callable[[_Item], _Result], items: list[_Item], what: str, options: PictureOptions
) -> Iterator[tuple[_Item, _Result]]:
    """Yield each item with the function's result; decoding lets other threads run."""
    with own_pixel_limit(), ThreadPoolExecutor(options.workers) as pool:
        for done, (item, result) in enumerate(zip(items, pool.map(function, items), strict=True), start=1):
            options.progress(what, done, len(items))
            yield item, result


def check_coco_pictures(coco: CocoFile, folder: Path, report: Report, options: PictureOptions) -> int:
    """Check the pictures of a COCO file, and return how many were looked at.

    Args:
        coco: From ``check_coco``; entries with an error are passed over, those of bad pictures are added.
        folder: Where the pictures are.
        report: Where the findings go.
        options: How pictures are looked at.
    """

    def look(item: tuple[int, dict]) -> Seen:
        return look_at_picture(folder / item[1]["file_name"], options.max_pixels)

    items = list(coco.usable_images())
    for (index, image), seen in _over(look, items, f"pictures of {coco.path.name}", options):
        stated = (image["width"], image["height"])
        if seen.size is not None and seen.size != stated:
            text = f"it is {seen.size[0]} x {seen.size[1]} as decoded, its entry says {stated[0]} x {stated[1]}"
            seen.problems.append(("image-size", text))
        for kind, text in seen.problems:
            report.add(kind, folder / image["file_name"], f"image {image['id']} of {printable(coco.path.name)}", text)
            if KINDS[kind].level is Level.ERROR:
                coco.bad_images.add(index)
    return len(items)


@dataclass
class FolderCheck:
    """What was found in folders of pictures.

    Attributes:
        names: The samples, as they stand in a list of images: without suffix for label pictures, else the whole.
        bad: Those of them with an error.
        pixels: Label -> number of pixels, as in the files.
        classes: Names of class folders, in the order that numbers them; empty where a list of images does.
        numbers: Sample -> class number.
        unusable_lines: Lines of a list that name no sample.
    """

    names: list[str] = field(default_factory=list)
    bad: set[str] = field(default_factory=set)
    pixels: Counter[int] = field(default_factory=Counter)
    classes: list[str] = field(default_factory=list)
    numbers: dict[str, int] = field(default_factory=dict)
    unusable_lines: int = 0


def _files(folder: Path) -> list[str]:
    """Return the names of all files below a folder; hidden ones, as MMEngine, it leaves out."""
    found = []
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inner = Path(place).relative_to(folder)
        found += [str(inner / name) for name in files if not name.startswith(".")]
    return sorted(found)


def _read_list(path: Path, report: Report) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        report.add("file-missing", path, "", f"it cannot be read: {error}")
        return []


def check_label_pictures(
    images: Path, labels: Path | None, report: Report, options: PictureOptions, *,
    rule: LabelRule | None = None, image_suffix: str = ".jpg", label_suffix: str = ".png", listed: Path | None = None,
) -> FolderCheck:  # fmt: skip
    """Check a folder of pictures and one of label pictures, in the layout of ADE20K.

    Args:
        images: Folder of pictures.
        labels: Folder of label pictures, or None if there are none.
        report: Where the findings go.
        options: How pictures are looked at.
        rule: Which numbers label pictures may hold.
        image_suffix: How the name of a picture ends.
        label_suffix: How the name of a label picture ends.
        listed: A file with a name per line, without suffix; by default all pictures of the folder are taken.
    """
    result = FolderCheck()
    for folder in filter(None, (images, labels)):
        if not is_folder(folder):
            report.add("file-missing", folder, "", "there is no such folder")
            return result
    if listed is not None:
        _read_names(listed, result, report)
    else:
        result.names = _names_in_folder(images, image_suffix, report)

    def look(name: str) -> tuple[Seen, Labels | None]:
        seen = look_at_picture(images / (name + image_suffix), options.max_pixels)
        if labels is None:
            return seen, None
        return seen, look_at_labels(labels / (name + label_suffix), rule, seen.size, options.max_pixels)

    for name, (seen, label) in _over(look, result.names, f"pictures of {images.name}", options):
        found = [(images / (name + image_suffix), problem) for problem in seen.problems]
        if label is not None and labels is not None:
            found += [(labels / (name + label_suffix), problem) for problem in label.problems]
            result.pixels.update(label.pixels)
        for path, (kind, text) in found:
            report.add(kind, path, "", text)
            if KINDS[kind].level is Level.ERROR:
                result.bad.add(name)
    if labels is not None and listed is None:
        taken = {name + label_suffix for name in result.names}
        for name in _files(labels):
            if name.endswith(label_suffix) and name not in taken:
                report.add(
                    "label-unused", labels / name, "", f"there is no image of that name ending in {image_suffix}"
                )
    return result


def _read_names(listed: Path, result: FolderCheck, report: Report) -> None:
    for number, line in enumerate(_read_list(listed, report), start=1):
        name = line.strip()
        if name and not leaves_folder(name):
            result.names.append(name)
            continue
        result.unusable_lines += 1
        report.add("list-line", listed, f"line {number}", f"it is {short(line)}, expected a name without suffix")


def _names_in_folder(images: Path, suffix: str, report: Report) -> list[str]:
    files = _files(images)
    names = [name[: -len(suffix)] for name in files if name.endswith(suffix)]
    _report_others([name for name in files if not name.endswith(suffix)], images, suffix, report)
    if not names:
        report.add("folder-empty", images, "", f"no file ends in {suffix}")
    return names


def _report_others(files: Iterable[str], folder: Path, wanted: str, report: Report) -> None:
    for name in files:
        if name.lower().endswith(PICTURE_SUFFIXES):
            report.add("folder-other-files", folder / name, "", f"expected a name that ends in {wanted}")


def class_folders(folder: Path) -> list[str]:
    """Return the names of the folders in one, in the order that numbers the classes; hidden ones count, too."""
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())


def check_class_folders(
    folder: Path, report: Report, options: PictureOptions, *,
    suffixes: tuple[str, ...] = CLASS_SUFFIXES, listed: Path | None = None, classes: int | None = None,
) -> FolderCheck:  # fmt: skip
    """Check a data set for classification: a folder per class, or a list of files with class numbers.

    Args:
        folder: Where the class folders, or the files of the list, are.
        report: Where the findings go.
        options: How pictures are looked at.
        suffixes: How names of pictures end, in small letters.
        listed: A file with "name number" per line.
        classes: Number of classes, if it is known.
    """
    result = FolderCheck()
    if not is_folder(folder):
        report.add("file-missing", folder, "", "there is no such folder")
        return result
    if listed is not None:
        _read_numbered(listed, result, report, classes)
    else:
        result.classes = class_folders(folder)
        for number, name in enumerate(result.classes):
            files = _files(folder / name)
            _report_others(
                [each for each in files if not each.lower().endswith(suffixes)],
                folder / name,
                " or ".join(suffixes),
                report,
            )
            taken = [f"{name}/{each}" for each in files if each.lower().endswith(suffixes)]
            if not taken:
                report.add("class-folder-empty", folder / name, "", f"no file ends in one of {', '.join(suffixes)}")
            result.numbers.update(dict.fromkeys(taken, number))
    result.names = list(result.numbers)
    if not result.names:
        report.add("folder-empty", folder, "", "no picture in a folder of a class")
    for name, seen in _over(
        lambda each: look_at_picture(folder / each, options.max_pixels),
        result.names,
        f"pictures of {folder.name}",
        options,
    ):
        for kind, text in seen.problems:
            report.add(kind, folder / name, "", text)
            if KINDS[kind].level is Level.ERROR:
                result.bad.add(name)
    return result


def _read_numbered(listed: Path, result: FolderCheck, report: Report, classes: int | None) -> None:
    for line_number, line in enumerate(_read_list(listed, report), start=1):
        name, _, number = line.strip().rpartition(" ")
        good = name and not leaves_folder(name) and number.isascii() and number.isdigit()
        if good and (classes is None or int(number) < classes):
            result.numbers[name] = int(number)
            continue
        result.unusable_lines += 1
        expected = "'file number'" if classes is None else f"'file number' with a number of 0 to {classes - 1}"
        report.add("list-line", listed, f"line {line_number}", f"it is {short(line)}, expected {expected}")
