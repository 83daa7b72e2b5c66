"""Checking the data sets of a config, or of folders, before a training: what ``tools/check_dataset.py`` does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmvmamba.apis.described_data import DescribedData, Layout, described_data
from mmvmamba.datasets.checks import (
    MAX_SKIPPED,
    CocoFile,
    CocoUse,
    FolderCheck,
    Kept,
    LabelRule,
    PictureOptions,
    Plan,
    Report,
    category_names,
    check_class_folders,
    check_class_list,
    check_coco,
    check_coco_pictures,
    check_heads,
    check_label_pictures,
    class_folders,
    compare_classes,
    plan_coco,
    plan_names,
    refuse_what_cannot_be_left_out,
)
from mmvmamba.files import is_folder

#: ADE20K's own folders: split -> folder of images and of annotations.
_ADE20K = {"train": "training", "val": "validation"}
_ADE20K_CLASSES = 150
_SHOWN = 10


@dataclass
class DataCheck:
    """A check of one or more data sets, and what was found.

    Attributes:
        report: The findings.
        options: How pictures are looked at; None: not at all.
    """

    report: Report = field(default_factory=Report)
    options: PictureOptions | None = field(default_factory=PictureOptions)
    _coco: list[tuple[str, CocoFile]] = field(default_factory=list)
    _folders: list[tuple[str, Path, FolderCheck]] = field(default_factory=list)

    def config(self, cfg: Mapping[str, Any], splits: Sequence[str]) -> None:
        """Check the data sets of a config.

        Args:
            cfg: From ``load_config``.
            splits: Which of ``"train"``, ``"val"`` and ``"test"``.

        Raises:
            ConfigError: If a data set cannot be checked.
        """
        sets = described_data(cfg, splits)
        same: dict[tuple[Path, Path | None], list[DescribedData]] = {}
        for data in sets:  # most configs test on what they validate on
            same.setdefault((data.images, data.listed), []).append(data)
        read: dict[Path, list[str]] = {}
        folders: dict[str, list[str]] = {}
        for uses in same.values():
            data = uses[0]
            if data.layout is Layout.COCO:
                coco = self._coco_of_config(data, uses)
                read[coco.path] = list(coco.names.values()) if coco.document is not None else []
            elif data.layout is Layout.LABEL_PICTURES:
                self._labels_of_config(data)
            else:
                folders[data.split] = self._classes_of_config(data)
        _check_classes(sets, read, folders, cfg.get("model") or {}, self.report)

    def _coco_of_config(self, data: DescribedData, uses: Sequence[DescribedData]) -> CocoFile:
        use = CocoUse(
            any(each.masks for each in uses),
            evaluation=any(each.split != "train" for each in uses),
            annotations=any(each.annotations for each in uses),
        )
        coco = self.coco(data.listed or Path(), data.images, data.split, use)
        if data.classes is not None and data.split == "train":
            without = {name for own, name in coco.names.items() if not coco.per_category[own]}
            self._report_unused([name for name in data.classes if name in without], coco.path, data)
        return coco

    def _labels_of_config(self, data: DescribedData) -> None:
        number = len(data.known_classes or data.classes or ())
        rule = LabelRule(number, data.zero_is_ignored, data.ignored) if number else None
        result = self.label_pictures(data, rule)
        if data.split == "train" and result.pixels and data.classes and number == len(data.classes):
            there = [index - data.zero_is_ignored for index in result.pixels]
            unused = [name for index, name in enumerate(data.classes) if index not in there]
            self._report_unused(unused, data.labels or data.images, data)

    def _classes_of_config(self, data: DescribedData) -> list[str]:
        return self.class_folders(data).classes

    def _report_unused(self, names: list[str], path: Path, data: DescribedData) -> None:
        for name in names:
            self.report.add("category-unused", path, data.entry(), f"{name!r} has no annotation")

    def coco(self, path: Path, images: Path | None, split: str, use: CocoUse | None = None) -> CocoFile:
        """Check a COCO file, and its pictures if a folder is given."""
        coco = check_coco(path, self.report, use)
        looked = 0
        if images is not None and self.options is not None:
            looked = check_coco_pictures(coco, images, self.report, self.options)
        self._coco.append((split, coco))
        document = coco.document or {}
        number = {name: len(document.get(name, ())) for name in ("images", "annotations", "categories")}
        self.report.checked.append({"split": split, "file": str(path), **number, "pictures looked at": looked})
        return coco

    def label_pictures(self, data: DescribedData, rule: LabelRule | None) -> FolderCheck:
        """Check a folder of pictures and one of label pictures."""
        result = FolderCheck()
        if self.options is not None:
            result = check_label_pictures(
                data.images, data.labels, self.report, self.options, rule=rule,
                image_suffix=data.image_suffix, label_suffix=data.label_suffix, listed=data.listed,
            )  # fmt: skip
        self._folders.append((data.split, data.images, result))
        self.report.checked.append(
            {"split": data.split, "folder": str(data.images), "pictures looked at": len(result.names)}
        )
        return result

    def ade20k(self, root: Path) -> None:
        """Check a folder in ADE20K's layout, as its archive unpacks."""
        for split, folder in _ADE20K.items():
            data = DescribedData(
                split, "ADE20KDataset", Layout.LABEL_PICTURES, root / "images" / folder, root / "annotations" / folder,
                listed=None, classes=None, own_classes=False, classes_text=None,
            )  # fmt: skip
            self.label_pictures(data, LabelRule(_ADE20K_CLASSES, zero_is_ignored=True))

    def class_folders(self, data: DescribedData) -> FolderCheck:
        """Check a folder with a folder per class, or a list of pictures with class numbers."""
        result = FolderCheck()
        if self.options is not None:
            result = check_class_folders(
                data.images, self.report, self.options,
                suffixes=data.suffixes, listed=data.listed, classes=len(data.classes) if data.classes else None,
            )  # fmt: skip
        elif data.listed is None and is_folder(data.images):
            result.classes = class_folders(data.images)
        self._folders.append((data.split, data.images, result))
        facts = {
            "split": data.split,
            "folder": str(data.images),
            "classes": len(result.classes),
            "pictures looked at": len(result.names),
        }
        self.report.checked.append(facts)
        return result

    def imagenet(self, root: Path) -> None:
        """Check a folder in ImageNet's layout: ``train`` and ``val`` with a folder per class."""
        lists = {}
        for split in ("train", "val"):
            data = DescribedData(
                split, "ImageNet", Layout.CLASS_FOLDERS, root / split,
                labels=None, listed=None, classes=None, own_classes=False, classes_text=None,
            )  # fmt: skip
            lists[split] = self.class_folders(data).classes
        _compare_lists(lists, self.report)

    def keep(self, out: Path, max_skipped: float = MAX_SKIPPED) -> list[Kept]:
        """Write lists of what has no error, for each data set that has one with an error.

        Args:
            out: The folder for them.
            max_skipped: Largest share of the images, and of the annotations, that may be left out.

        Raises:
            DataError: If there are errors that cannot be left out, too much would be, or a file exists already.
        """
        refuse_what_cannot_be_left_out(self.report)
        plans: list[Plan] = []
        stems: Counter[str] = Counter()

        def target(split: str, ending: str) -> Path:
            stems[split] += 1
            return out / f"{split}{stems[split] if stems[split] > 1 else ''}{ending}"

        for split, coco in self._coco:
            path = target(split, ".json")
            if coco.bad_images or coco.bad_annotations:
                plans.append(plan_coco(coco, path, max_skipped))
        for split, folder, checked in self._folders:
            path = target(split, ".txt")
            if checked.bad or checked.unusable_lines:
                plans.append(plan_names(checked, path, folder, max_skipped))
        return [plan.write() for plan in plans]  # only when none of them was refused


def check_classes(cfg: Mapping[str, Any], splits: Sequence[str]) -> list[str]:
    """Raise for classes of a config that its data or its model do not have; reads no more than it needs for that.

    Returns warnings, a line each, such as one of classes of the data that the config leaves out.

    Args:
        cfg: From ``load_config``.
        splits: Which of ``"train"``, ``"val"`` and ``"test"`` are going to be used.

    Raises:
        DataError: With both lists and the difference.
        ConfigError: If the type of a data set refuses its arguments.
    """
    report = Report()
    sets = described_data(cfg, splits, passing_over=True)
    folders = {
        data.split: class_folders(data.images)
        for data in sets
        if data.layout is Layout.CLASS_FOLDERS and data.listed is None and is_folder(data.images)
    }
    _check_classes(sets, {}, folders, cfg.get("model") or {}, report)
    report.raise_for_errors()
    return report.warning_lines()


def _check_classes(
    sets: Sequence[DescribedData],
    read: dict[Path, list[str]],
    folders: dict[str, list[str]],
    model: Mapping[str, Any],
    report: Report,
) -> None:
    """Compare the classes of each data set with its data, of the splits with each other, and with the heads.

    Args:
        sets: The data sets.
        read: COCO file -> its categories, where it was read; empty if that failed.
        folders: Split -> the folders of its classes.
        model: The model of the config.
        report: Where the findings go.
    """
    lists: dict[str, list[str]] = {}
    number = 0
    for data in sets:
        # Folders number the classes by their own names, whatever the config calls them; a list has numbers only.
        in_folders = data.layout is Layout.CLASS_FOLDERS
        names = (folders.get(data.split, []) if data.listed is None else []) if in_folders else data.classes
        problems = _own_problems(data)
        if not problems:
            lists.setdefault(data.split, list(names or ()))
            number = number or len(names or data.classes or ())
            problems = _problems_with_data(data, names or (), read, report)
        for kind, text in problems:
            report.add(kind, data.listed or data.images, data.entry(), text)
    _compare_lists(lists, report)
    if number:
        for kind, text in check_heads(model, number):
            report.add(kind, "config", "", text)


def _problems_with_data(
    data: DescribedData, names: Sequence[str], read: dict[Path, list[str]], report: Report
) -> list[tuple[str, str]]:
    """Return what of the classes of a data set is not as in its data; ``names`` are those that are used."""
    if data.classes is None:
        return []
    if data.layout is Layout.CLASS_FOLDERS:
        if not names or len(names) == len(data.classes):
            return []
        whose = "metainfo.classes" if data.own_classes else f"{data.name} by itself"
        return [("class-folders", f"there are {len(names)} folders, {whose} has {len(data.classes)} classes")]
    if data.layout is Layout.LABEL_PICTURES:
        return compare_classes(data.classes, data.known_classes, ordered=False) if data.known_classes else []
    if not data.annotations or data.listed is None:
        return []
    if data.listed not in read:
        read[data.listed] = category_names(data.listed, report)
    found = read[data.listed]
    return compare_classes(data.classes, found, by_default=not data.own_classes) if found else []


def _own_problems(data: DescribedData) -> list[tuple[str, str]]:
    """Return what is wrong with the list of classes in the config, whatever the data are."""
    if data.classes_text is not None:
        return check_class_list(data.classes_text)
    if data.classes is None and data.layout is Layout.LABEL_PICTURES:
        return [("classes-entry", "metainfo.classes is missing, expected a list of names")]
    return []


def _compare_lists(lists: dict[str, list[str]], report: Report) -> None:
    """Report splits that have not the classes of the first."""
    filled = {split: names for split, names in lists.items() if names}
    if not filled:
        return
    first = next(iter(filled))
    for split, names in filled.items():
        if names != filled[first]:
            missing = [name for name in filled[first] if name not in names]
            more = [name for name in names if name not in filled[first]]
            numbers = f"{first} has {len(filled[first])} classes, {split} has {len(names)}"
            difference = f"only in {first}: {missing[:_SHOWN]}, only in {split}: {more[:_SHOWN]}"
            text = f"{numbers}; {difference if missing or more else 'the order differs'}"
            report.add("classes-differ", "config", f"{first} and {split}", text)
