"""Small sets cut out of large ones, for runs that only show whether everything works.

The same arguments give the same files. Each result is a valid data set of the same layout, so that a config is pointed
to it by its ``data_root`` alone. What is read is never changed, and a folder or file that exists is never replaced.
"""

from __future__ import annotations

import json
import random
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from mmvmamba.errors import DataError, nearest_spelling
from mmvmamba.files import exists, is_file, is_folder

_IMAGE_ENDINGS = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Choice:
    """What is taken.

    Attributes:
        count: How many images; of a data set with a folder per class, how many of each class.
        seed: Which ones.
        link: Whether to make symbolic links to the images, in place of copies.
    """

    count: int
    seed: int = 0
    link: bool = False

    def __post_init__(self) -> None:
        for name, value, least in (("count", self.count, 1), ("seed", self.seed, 0)):
            if not isinstance(value, int) or value < least:
                raise DataError(f"subset: {name} is {value!r}, expected a whole number from {least}. Correct it.")

    def of(self, candidates: Sequence[Any], what: str) -> list[Any]:
        """Return ``count`` of the candidates, in their order.

        Raises:
            DataError: If there are fewer.
        """
        if len(candidates) < self.count:
            raise DataError(
                f"subset: there are {len(candidates)} {what}, expected at least {self.count}. Ask for fewer."
            )
        chosen = sorted(random.Random(self.seed).sample(range(len(candidates)), self.count))  # noqa: S311 - no secret
        return [candidates[index] for index in chosen]

    def place(self, source: Path, target: Path) -> None:
        """Copy a file, or link to it."""
        target.parent.mkdir(parents=True, exist_ok=True)
        if self.link:
            target.symlink_to(source.resolve())
        else:
            shutil.copyfile(source, target)


def subset_coco(
    root: Path,
    out: Path,
    *,
    annotations: str,
    images: str,
    choice: Choice,
    classes: Sequence[str] | None = None,
    keep_empty: bool = False,
) -> tuple[int, int]:
    """Cut some images with their annotations out of a data set in COCO's format.

    Args:
        root: The data set.
        out: The small one; further splits can be added to it by further calls.
        annotations: The annotation file below ``root``, such as ``"annotations/instances_train2017.json"``.
        images: The folder of the images below ``root``, such as ``"train2017"``.
        choice: How many, and which.
        classes: Categories to keep, by name; annotations of others are left out. Their ids stay. By default all.
        keep_empty: Whether images without an object (crowds are none) may be chosen.

    Returns:
        The numbers of images and of annotations.

    Raises:
        DataError: If files are missing or malformed, a category is unknown, there are too few images, or ``out`` has
            this split already.
    """
    document = _read_coco(root / annotations)
    wanted = _categories(document["categories"], classes, root / annotations)
    kept = [entry for entry in document["annotations"] if entry["category_id"] in wanted]
    with_objects = {entry["image_id"] for entry in kept if not entry.get("iscrowd")}
    candidates = [entry for entry in document["images"] if keep_empty or entry["id"] in with_objects]
    chosen = choice.of(candidates, "images" if keep_empty else "images with objects of these classes")
    ids = {entry["id"] for entry in chosen}
    result = {
        **document,
        "images": chosen,
        "annotations": [entry for entry in kept if entry["image_id"] in ids],
        "categories": [entry for entry in document["categories"] if entry["id"] in wanted],
    }
    with _parts(out, [images, annotations]) as partial:
        for entry in chosen:
            source = _inside(root / images, entry["file_name"])
            choice.place(source, partial / images / entry["file_name"])
        (partial / annotations).parent.mkdir(parents=True, exist_ok=True)
        (partial / annotations).write_text(json.dumps(result) + "\n")
    return len(chosen), len(result["annotations"])


def subset_ade20k(
    root: Path, out: Path, *, images: str, labels: str, choice: Choice, containing: Sequence[int] | None = None
) -> int:
    """Cut some images with their label pictures out of a data set in ADE20K's layout.

    Args:
        root: The data set.
        out: The small one; further splits can be added to it by further calls.
        images: The folder of the images below ``root``, such as ``"images/training"``.
        labels: That of the label pictures, ``.png`` files of the same names, such as ``"annotations/training"``.
        choice: How many, and which.
        containing: Values of labels, as they stand in the files; only images that have one of them are chosen.

    Returns:
        The number of images.

    Raises:
        DataError: As for ``subset_coco``.
    """
    pairs = [(image, root / labels / f"{image.stem}.png") for image in _images(root / images)]
    missing = [str(label) for _, label in pairs if not is_file(label)]
    if missing:
        raise DataError(
            f"subset: {len(missing)} of {len(pairs)} images in {str(root / images)!r} have no label picture, such as "
            f"{missing[0]!r}, expected one for each. Correct the folders."
        )
    if containing is not None:
        pairs = _first(pairs, choice, lambda pair: _has_label(pair[1], containing))
    chosen = choice.of(pairs, "images" if containing is None else f"images with one of the labels {list(containing)}")
    with _parts(out, [images, labels]) as partial:
        for image, label in chosen:
            choice.place(image, partial / images / image.name)
            choice.place(label, partial / labels / label.name)
    return len(chosen)


def subset_imagenet(
    root: Path, out: Path, *, folder: str, choice: Choice, classes: Sequence[str] | None = None
) -> tuple[int, int]:
    """Cut some images of each class out of a data set with a folder per class.

    Args:
        root: The data set.
        out: The small one; further splits can be added to it by further calls.
        folder: The split below ``root``, such as ``"train"``.
        choice: How many of each class, and which.
        classes: Folders to take images from, by default all. The others are made and stay empty: a class's number is
            the place of its folder among all, and a model of 1000 classes wants 1000 folders.

    Returns:
        The numbers of classes with images and of images.

    Raises:
        DataError: As for ``subset_coco``.
    """
    source = root / folder
    folders = sorted(path.name for path in _listed(source) if path.is_dir())
    if not folders:
        raise DataError(f"subset: {str(source)!r} has no folders, expected one for each class. Correct the path.")
    wanted = _known(classes, folders, f"the folders of {str(source)!r}")
    taken = 0
    with _parts(out, [folder]) as partial:
        for name in folders:
            (partial / folder / name).mkdir(parents=True)
            if name in wanted:
                chosen = choice.of(_images(source / name), f"images in {str(source / name)!r}")
                taken += len(chosen)
                for image in chosen:
                    choice.place(image, partial / folder / name / image.name)
    return len(wanted), taken


def _read_coco(path: Path) -> dict[str, Any]:
    """Return a document of which only what is used here has been checked."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"subset: {str(path)!r} cannot be read ({error.strerror}). Correct the path.") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"subset: {str(path)!r} is no JSON ({error}). Download or write it anew.") from error
    needed = {
        "images": ("id", "file_name"),
        "annotations": ("image_id", "category_id"),
        "categories": ("id", "name"),
    }
    for section, keys in needed.items():
        entries = document.get(section) if isinstance(document, dict) else None
        if not isinstance(entries, list):
            raise DataError(
                f"subset: {str(path)!r} has no list {section!r}, expected a file in COCO's format. Check it: python "
                f"tools/check_dataset.py --coco {path}"
            )
        for index, entry in enumerate(entries):
            missing = [key for key in keys if not isinstance(entry, dict) or not isinstance(entry.get(key), (int, str))]
            if missing:
                raise DataError(
                    f"subset: {str(path)!r}: entry {index} of {section!r} lacks {', '.join(missing)}, expected numbers "
                    f"or texts there. Check it: python tools/check_dataset.py --coco {path}"
                )
    result: dict[str, Any] = document
    return result


def _categories(categories: Iterable[Mapping[str, Any]], classes: Sequence[str] | None, path: Path) -> set[Any]:
    by_name = {entry["name"]: entry["id"] for entry in categories}
    return {by_name[name] for name in _known(classes, by_name, f"the categories of {str(path)!r}")}


def _known(names: Sequence[str] | None, known: Iterable[str], what: str) -> list[str]:
    """Return ``names``, or all that are known for None.

    Raises:
        DataError: If one is unknown.
    """
    known = list(known)
    if names is None:
        return known
    for name in names:
        if name not in known:
            raise DataError(
                f"subset: class {name!r} is not among {what}, expected one of {len(known)}, such as {known[:3]}."
                f"{nearest_spelling(name, map(str, known))} Correct it."
            )
    return list(names)


def _inside(folder: Path, name: Any) -> Path:
    """Return a file of ``folder``, which an annotation file names.

    Raises:
        DataError: If the name leads out of the folder, or there is no such file.
    """
    if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
        raise DataError(f"subset: file_name {name!r} leads out of {str(folder)!r}, expected a name in it. Correct it.")
    if not is_file(folder / name):
        raise DataError(f"subset: {str(folder / name)!r} does not exist, expected an image. Correct the folder.")
    return folder / name


def _listed(folder: Path) -> list[Path]:
    if not is_folder(folder):
        raise DataError(f"subset: {str(folder)!r} is no folder in {str(Path.cwd())!r}. Correct the path.")
    return sorted(folder.iterdir())


def _images(folder: Path) -> list[Path]:
    return [path for path in _listed(folder) if path.suffix.lower() in _IMAGE_ENDINGS and path.is_file()]


def _first(pairs: list[Any], choice: Choice, is_wanted: Callable[[Any], bool]) -> list[Any]:
    """Return as many as are needed of those that are wanted, looking in an order that the seed decides."""
    order = list(range(len(pairs)))
    random.Random(choice.seed).shuffle(order)  # noqa: S311 - no secret
    found: list[int] = []
    for index in order:
        if len(found) == choice.count:
            break
        if is_wanted(pairs[index]):
            found.append(index)
    return [pairs[index] for index in sorted(found)]


def _has_label(path: Path, values: Sequence[int]) -> bool:
    labels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if labels is None or labels.ndim != 2:
        raise DataError(f"subset: {str(path)!r} is no picture of one channel, expected labels. Repair or remove it.")
    return bool(np.isin(labels, list(values)).any())


@contextmanager
def _parts(out: Path, names: Sequence[str]) -> Iterator[Path]:
    """Give a folder to write the named files and folders to, and move them to ``out`` when all are there.

    Raises:
        DataError: If ``out`` has one of them or cannot be written, or a name leads out of it.
    """
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts or not Path(name).parts:
            raise DataError(f"subset: {name!r} is no path below the data set. Name it relative to its root.")
        if exists(out / name):
            raise DataError(f"subset: {str(out / name)!r} exists and is left alone. Remove it or name another folder.")
    partial: Path | None = None
    try:
        out.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=out))
        yield partial
        for name in names:
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).replace(out / name)
    except OSError as error:
        raise DataError(
            f"subset: {str(out)!r} cannot be written ({error}), expected a folder with room and the right to. Name "
            "another one."
        ) from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
