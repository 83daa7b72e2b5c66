"""Finding out before anything is built that a data set is not where, or not what, the config says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmvmamba.apis.data_entries import innermost_datasets, is_local, type_name
from mmvmamba.apis.dataset_checks import check_classes
from mmvmamba.apis.runner import SCOPES
from mmvmamba.errors import DataError
from mmvmamba.files import exists

#: Data set type -> how to get it.
_HOW_TO_GET: dict[str, str] = {
    "CocoDataset": (
        "Download train2017.zip, val2017.zip and annotations_trainval2017.zip from https://cocodataset.org/#download "
        "and unpack them into data/coco"
    ),
    "ADE20KDataset": (
        "Download http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip and unpack it into data/ade"
    ),
    "ImageNet": (
        "Download the ILSVRC2012 images from https://image-net.org/download-images (free account) and unpack them into "
        "data/imagenet/train and data/imagenet/val, one folder per class"
    ),
}
_DIGITS = "Run: python tools/dataset_converters/digits.py"
_OWN_DATA = "Check the paths of the config"
_OVERRIDE = "or point the config to your copy with --cfg-options {split}_dataloader.dataset.data_root=DIR."

#: These fetch their files themselves when they are missing.
_SELF_DOWNLOADING = ("MNIST", "FashionMNIST", "CIFAR10", "CIFAR100")


def check_data(cfg: Mapping[str, Any], splits: Sequence[str]) -> list[str]:
    """Raise ``DataError`` for what of the data sets does not exist, and for classes they do not have.

    Returns warnings, a line each, such as one of classes of the data that the config leaves out.

    What is cheap to find out is looked at; ``tools/check_dataset.py`` looks at everything.

    Args:
        cfg: A config of MMDetection, MMSegmentation or MMPretrain.
        splits: Which of ``"train"``, ``"val"`` and ``"test"`` are going to be used.

    Raises:
        DataError: Naming the path, the config entry and how to get the data; or both lists of classes and the
            difference.
        ConfigError: If an entry of a data set is of the wrong type, or the type of a data set refuses its arguments.
    """
    for split in splits:
        for dataset in innermost_datasets(cfg, split):
            for entry, path in _paths(dataset):
                if not exists(path):
                    raise DataError(_message(split, entry, path, type_name(dataset)))
    if cfg.get("default_scope") in SCOPES:
        return check_classes(cfg, splits)
    return []


def _message(split: str, entry: str, path: Path, kind: str) -> str:
    # Many data sets of other origin have COCO's format; only COCO's own has these names.
    foreign = kind == "CocoDataset" and not any("coco" in part.lower() or "2017" in part for part in path.parts)
    cure = _DIGITS if "digits" in path.parts else _OWN_DATA if foreign else _HOW_TO_GET.get(kind, _OWN_DATA)
    return (
        f"data set not found: {split}_dataloader.dataset ({kind or 'no type'}), {entry}: "
        f"{str(path.absolute())!r} does not exist. {cure}, {_OVERRIDE.format(split=split)}"
    )


def _paths(dataset: Mapping[str, Any]) -> Iterator[tuple[str, Path]]:
    """Yield (entry, path) of everything on disk that a data set config names."""
    if not is_local(dataset) or type_name(dataset) in _SELF_DOWNLOADING:
        return
    root = Path(dataset.get("data_root") or "")
    if dataset.get("data_root"):
        yield "data_root", root
    annotations = dataset.get("ann_file") or ""
    if annotations:
        yield "ann_file", root / annotations
    prefixes = dataset.get("data_prefix") or {}
    if not isinstance(prefixes, Mapping):
        prefixes = {"": prefixes}
    for name, prefix in prefixes.items():
        if prefix:
            yield f"data_prefix.{name}".rstrip("."), root / prefix
