"""A COCO annotation file as a whole: is it JSON, has it the parts, do ids and names fit together?"""

from __future__ import annotations

import json
import os
import posixpath
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmvmamba.datasets.checks.annotations import AnnotationCheck, CocoUse
from mmvmamba.datasets.checks.report import Report, printable, short

#: OpenCV decodes no wider and no higher picture.
LONGEST_SIDE = 1 << 20
_PARTS = ("images", "annotations", "categories")


@dataclass
class CocoFile:
    """What was read from a COCO file, and which of its entries have an error.

    Attributes:
        path: The file.
        document: The whole of it; None if it could not be used at all.
        bad_images: Places in ``document["images"]`` of entries with an error.
        bad_annotations: The same for annotations.
        names: Category id -> name, in the order of the file.
        per_category: Category id -> number of its annotations.
    """

    path: Path
    document: dict[str, Any] | None = None
    bad_images: set[int] = field(default_factory=set)
    bad_annotations: set[int] = field(default_factory=set)
    names: dict[int, str] = field(default_factory=dict)
    per_category: Counter[int] = field(default_factory=Counter)

    def usable_images(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (place, entry) of the images that have no error so far."""
        if self.document is not None:
            for index, image in enumerate(self.document["images"]):
                if index not in self.bad_images:
                    yield index, image


def read_json(path: Path, report: Report) -> Any:
    """Return the content of a JSON file, or None after a finding that says why it cannot be used."""
    repeated: Counter[str] = Counter()

    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) != len(pairs):
            repeated.update(name for name, number in Counter(name for name, _ in pairs).items() if number > 1)
        return entries

    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        report.add("file-missing", path, "", getattr(error, "strerror", None) or str(error))
        return None
    try:
        document = json.loads(content.decode("utf-8"), object_pairs_hook=collect)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        report.add("json-invalid", path, "", _why_no_json(path, error))
        return None
    if document is None:
        report.add("json-structure", path, "", "it is null, expected an object")
    for name, number in repeated.items():
        text = f"{short(name)} stands twice in {number} objects, expected once"
        report.add("json-repeated-key", path, "", text)
    return document


def _why_no_json(path: Path, error: Exception) -> str:
    size = path.stat().st_size
    if size == 0:
        return "it has no bytes, expected JSON"
    if isinstance(error, json.JSONDecodeError):
        whole = error.doc.rstrip().endswith(("}", "]"))
        rest = "" if whole else "; it does not end as JSON does, so it is probably cut off"
        return f"{error.msg} in line {error.lineno}, column {error.colno} of {size} bytes{rest}"
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} of {size} is no UTF-8 text; compressed files must be unpacked first"
    if isinstance(error, RecursionError):
        return "brackets within brackets, too deep to read"
    return printable(str(error))


def check_coco(path: str | os.PathLike[str], report: Report, use: CocoUse | None = None) -> CocoFile:
    """Check everything in a COCO file that needs no picture.

    Args:
        path: The annotation file, in COCO's format for instances.
        report: Where the findings go.
        use: What the file is for; by default training and evaluation.

    Returns:
        What was read. Nothing is written.
    """
    use = use or CocoUse()
    coco = CocoFile(Path(path))
    document = read_json(coco.path, report)
    if document is None or not _has_parts(document, coco.path, report, use):
        return coco
    coco.document = document
    document.setdefault("annotations", [])
    document.setdefault("categories", [])
    coco.names = read_categories(document["categories"], coco.path, report)
    images = _check_images(coco, report)
    check = AnnotationCheck(str(coco.path), images, set(coco.names), use, report)
    check.run(document["annotations"])
    coco.bad_annotations, coco.per_category = check.bad, check.per_category
    return coco


def _has_parts(document: Any, path: Path, report: Report, use: CocoUse) -> bool:
    if not isinstance(document, dict):
        report.add("json-structure", path, "", f"it is {short(document)}, expected an object with {', '.join(_PARTS)}")
        return False
    good = True
    for part in _PARTS if use.annotations else ("images",):
        if not isinstance(document.get(part), list):
            value = short(document[part]) if part in document else "missing"
            report.add("json-structure", path, part, f"it is {value}, expected a list")
            good = False
    for part in _PARTS:
        if part in document and not isinstance(document[part], list) and good:
            report.add("json-structure", path, part, f"it is {short(document[part])}, expected a list")
            good = False
    if good and not document["images"]:
        report.add("json-structure", path, "images", "it is empty, expected images")
    return good


def read_categories(categories: Any, path: Path, report: Report) -> dict[int, str]:
    """Return id -> name of the list of categories, in its order, and report what is wrong with it."""
    if not isinstance(categories, list):
        report.add("json-structure", path, "categories", f"it is {short(categories)}, expected a list")
        return {}
    names: dict[int, str] = {}
    for index, category in enumerate(categories):
        place = f"categories[{index}]"
        if not isinstance(category, dict):
            report.add("category-entry", path, place, f"it is {short(category)}, expected an object")
            continue
        own, name = category.get("id"), category.get("name")
        if type(own) is not int:
            report.add("category-entry", path, place, f"id is {short(own)}, expected a whole number")
            continue
        if not isinstance(name, str) or not name.strip():
            report.add("category-entry", path, place, f"name is {short(name)}, expected a text")
            name = ""
        elif name in names.values():
            report.add("category-repeated", path, place, f"name {short(name)} stands twice, expected once")
        if own in names:
            report.add("category-repeated", path, place, f"id {short(own)} stands twice, expected once")
        names.setdefault(own, name)
    return names


def _check_images(coco: CocoFile, report: Report) -> dict[int, tuple[str, int | None, int | None]]:
    """Return image id -> name, height and width of the entries, and report what is wrong with them."""
    images: dict[int, tuple[str, int | None, int | None]] = {}
    names: dict[str, int] = {}
    for index, image in enumerate(coco.document["images"] if coco.document else []):
        place = f"images[{index}]"
        if not isinstance(image, dict):
            report.add("image-entry", coco.path, place, f"it is {short(image)}, expected an object")
            coco.bad_images.add(index)
            continue
        own, name = image.get("id"), image.get("file_name")
        place += f" (id {short(own)})"
        before = report.errors
        height, width = (_side(image, side, coco.path, place, report) for side in ("height", "width"))
        if type(own) is not int:
            report.add("image-entry", coco.path, place, f"id is {short(own)}, expected a whole number")
        elif own in images:
            report.add("image-id-repeated", coco.path, place, "another image has the same id")
        else:
            images[own] = (str(name), height, width)
        _check_name(name, names, place, coco.path, report)
        if report.errors > before:
            coco.bad_images.add(index)
    return images


def _side(image: dict[str, Any], side: str, path: Path, place: str, report: Report) -> int | None:
    value = image.get(side)
    if type(value) is int and 0 < value <= LONGEST_SIDE:
        return value
    expected = f"a whole number of 1 to {LONGEST_SIDE}"
    report.add("image-entry", path, place, f"{side} is {short(value)}, expected {expected}")
    return None


def _check_name(name: Any, names: dict[str, int], place: str, path: Path, report: Report) -> None:
    if not isinstance(name, str) or not name:
        report.add("image-entry", path, place, f"file_name is {short(name)}, expected a text")
        return
    if leaves_folder(name):
        report.add(
            "image-path", path, place, f"file_name is {short(name)}, expected a file within the folder of images"
        )
    elif name in names:
        report.add("image-named-twice", path, place, f"file_name is {short(name)}, as in images[{names[name]}]")
    names.setdefault(name, int(place.split("]")[0].split("[")[1]))


def leaves_folder(name: str) -> bool:
    """Whether a file name of a data set leads out of its folder, or is no name that a file can have."""
    if "\0" in name or posixpath.isabs(name):
        return True
    return posixpath.normpath(name).split("/")[0] in ("..", ".")
