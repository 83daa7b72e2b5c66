"""What a config says about its data sets, as plain values; the data set classes are asked, no data are read."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from mmvmamba.apis.data_entries import innermost_datasets, is_local, type_name
from mmvmamba.datasets.checks.folders import CLASS_SUFFIXES
from mmvmamba.errors import ConfigError
from mmvmamba.files import is_file, is_folder

#: What the constructors of mm* raise about their arguments.
_REFUSALS = (TypeError, ValueError, AssertionError, KeyError, AttributeError, OSError)


class Layout(str, Enum):
    """How a data set lies on disk."""

    COCO = "coco"
    LABEL_PICTURES = "label pictures"
    CLASS_FOLDERS = "class folders"


@dataclass(frozen=True)
class DescribedData:
    """A data set of a config.

    Attributes:
        split: ``"train"``, ``"val"`` or ``"test"``.
        name: Its type, for messages.
        layout: How it lies on disk.
        images: Folder of the pictures.
        labels: Folder of the label pictures.
        listed: Annotation file, or list of the pictures.
        classes: Its classes, as they are used; None where folders give them, or the config's text is no list.
        own_classes: Whether the config sets them.
        classes_text: ``metainfo.classes`` as it stands in the config, or in the file that it names.
        known_classes: Classes of the type, of which the config may take some (MMSegmentation).
        zero_is_ignored: ``reduce_zero_label``.
        ignored: The label of pixels that do not count.
        image_suffix: How names of pictures end.
        label_suffix: How names of label pictures end.
        suffixes: How names of pictures in folders of classes end, in small letters.
        masks: Whether masks of objects are read.
        annotations: Whether it must have annotations.
    """

    split: str
    name: str
    layout: Layout
    images: Path
    labels: Path | None
    listed: Path | None
    classes: tuple[str, ...] | None
    own_classes: bool
    classes_text: Any
    known_classes: tuple[str, ...] | None = None
    zero_is_ignored: bool = False
    ignored: int = 255
    image_suffix: str = ".jpg"
    label_suffix: str = ".png"
    suffixes: tuple[str, ...] = CLASS_SUFFIXES
    masks: bool = False
    annotations: bool = True

    def entry(self) -> str:
        """Return the entry of the config, for messages."""
        return f"{self.split}_dataloader.dataset ({self.name})"


def described_data(cfg: Mapping[str, Any], splits: Sequence[str], *, passing_over: bool = False) -> list[DescribedData]:
    """Return the data sets of a config.

    Args:
        cfg: A config of MMDetection, MMSegmentation or MMPretrain.
        splits: Which of ``"train"``, ``"val"`` and ``"test"``.
        passing_over: Whether data sets of a layout that cannot be checked are passed over.

    Raises:
        ConfigError: If a data set has another layout, an entry of the wrong type, or its type refuses its arguments.
    """
    found = []
    for split in splits:
        for dataset in innermost_datasets(cfg, split):
            described = _describe(cfg, split, dataset)
            if described is not None:
                found.append(described)
            elif not passing_over:
                raise ConfigError(
                    f"{split}_dataloader.dataset: type is {type_name(dataset)!r}, which has none of the layouts that "
                    "can be checked: expected a CocoDataset of mmdet, a BaseSegDataset of mmseg or a labelled "
                    "CustomDataset of mmpretrain, or a subclass that reads files as it does. Check this data set by "
                    "other means."
                )
    return found


def _dataset_class(cfg: Mapping[str, Any], split: str, dataset: Mapping[str, Any]) -> type:
    kind = dataset.get("type")
    if isinstance(kind, type):
        return kind
    scope = str(cfg.get("default_scope"))
    found = importlib.import_module(f"{scope}.registry").DATASETS.get(kind) if kind and isinstance(kind, str) else None
    if not isinstance(found, type):
        raise ConfigError(
            f"{split}_dataloader.dataset: type is {kind!r}, which is no data set of {scope}. Correct the name."
        )
    return found


def _layout(kind: type, scope: str) -> Layout | None:
    """Return the layout of a data set class, or None if it does not read files as the classes do that are known."""
    own: tuple[str, ...]
    if scope == "mmdet":
        from mmdet.datasets import CocoDataset

        own = ("load_data_list", "parse_data_info")
        base, layout = CocoDataset, Layout.COCO
    elif scope == "mmseg":
        from mmseg.datasets import BaseSegDataset

        own = ("load_data_list",)
        base, layout = BaseSegDataset, Layout.LABEL_PICTURES
    else:
        from mmpretrain.datasets import CustomDataset

        own = ("load_data_list", "_find_samples")
        base, layout = CustomDataset, Layout.CLASS_FOLDERS
    if issubclass(kind, base) and all(getattr(kind, name) is getattr(base, name) for name in own):
        return layout
    return None


def _describe(cfg: Mapping[str, Any], split: str, dataset: Mapping[str, Any]) -> DescribedData | None:
    kind = _dataset_class(cfg, split, dataset)
    layout = _layout(kind, str(cfg.get("default_scope")))
    if layout is None or not is_local(dataset):
        return None
    text = _names_in_file((dataset.get("metainfo") or {}).get("classes", dataset.get("classes")))
    unclear = text is not None and not _is_list_of_names(text)
    known = tuple(getattr(kind, "METAINFO", {}).get("classes") or ()) or None
    foreign = layout is Layout.LABEL_PICTURES and known and not unclear and not set(text or ()) <= set(known)
    # MMEngine notes in an inherited dict from which library it came ("_scope_"), and takes the note out when it builds.
    entries = {name: value for name, value in dataset.items() if name not in ("type", "pipeline", "_scope_")}
    if unclear or foreign:  # the constructor would not have them
        entries = {name: value for name, value in entries.items() if name not in ("metainfo", "classes")}
    built = _built(kind, split, entries)
    if not getattr(built, "with_label", True):
        return None  # pictures without classes, in no folders of classes
    classes = None if unclear else tuple(text or ()) if foreign else tuple(built.metainfo.get("classes") or ()) or None
    return DescribedData(
        split=split,
        name=kind.__name__,
        layout=layout,
        images=Path(_prefix(built, "img", "img_path")),
        labels=_labels(built) if layout is Layout.LABEL_PICTURES else None,
        listed=Path(built.ann_file) if built.ann_file and not is_folder(built.ann_file) else None,
        classes=classes,
        own_classes=text is not None,
        classes_text=text,
        known_classes=known,
        zero_is_ignored=bool(getattr(built, "reduce_zero_label", False)),
        ignored=getattr(built, "ignore_index", 255),
        image_suffix=getattr(built, "img_suffix", ".jpg"),
        label_suffix=getattr(built, "seg_map_suffix", ".png"),
        suffixes=tuple(getattr(built, "extensions", CLASS_SUFFIXES)),
        masks=_reads_masks(dataset.get("pipeline")) or "segm" in _metrics(cfg.get(f"{split}_evaluator")),
        annotations=not _only_formats(cfg.get(f"{split}_evaluator")),
    )


def _names_in_file(classes: Any) -> Any:
    """Return what ``classes`` is, or the lines of the file that it names, as MMEngine reads it."""
    if not isinstance(classes, str) or not is_file(classes):
        return classes
    try:
        return Path(classes).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"metainfo.classes: {classes!r} cannot be read ({error}), expected a name per line. Correct it."
        ) from error


def _is_list_of_names(classes: Any) -> bool:
    is_list = isinstance(classes, Sequence) and not isinstance(classes, str)
    return is_list and bool(classes) and all(isinstance(name, str) for name in classes)


def _built(kind: type, split: str, entries: dict[str, Any]) -> Any:
    try:
        return kind(**{**entries, "pipeline": [], "lazy_init": True})
    except _REFUSALS as error:
        raise ConfigError(
            f"{split}_dataloader.dataset: {kind.__name__} refuses its arguments ({error}). Correct the config."
        ) from error


def _prefix(built: Any, *names: str) -> str:
    prefixes = built.data_prefix
    return next((prefixes[name] for name in names if prefixes.get(name)), built.data_root or "")


def _labels(built: Any) -> Path | None:
    folder = built.data_prefix.get("seg_map_path")
    return Path(folder) if folder else None


def _reads_masks(pipeline: Any) -> bool:
    """Whether a step of a pipeline, or one within a step, loads masks of objects."""
    if isinstance(pipeline, Mapping):
        return bool(pipeline.get("with_mask")) or any(map(_reads_masks, pipeline.values()))
    return isinstance(pipeline, (list, tuple)) and any(map(_reads_masks, pipeline))


def _evaluators(evaluator: Any) -> list[Mapping[str, Any]]:
    several = evaluator if isinstance(evaluator, (list, tuple)) else [evaluator]
    return [each for each in several if isinstance(each, Mapping)]


def _metrics(evaluator: Any) -> list[str]:
    named: list[str] = []
    for each in _evaluators(evaluator):
        metric = each.get("metric", [])
        named += [metric] if isinstance(metric, str) else list(metric or [])
    return named


def _only_formats(evaluator: Any) -> bool:
    """Whether predictions are only written, as for test sets whose annotations are not public."""
    return any(each.get("format_only") for each in _evaluators(evaluator))
