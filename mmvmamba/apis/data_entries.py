"""The data set entries of a config, found within wrappers, with the types of what is read from them checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmvmamba.errors import ConfigError

_PATH = ("a path as text", (str, Path))
_OBJECT = ("entries with names", (Mapping,))
_ENDING = ("an ending as text", (str,))
#: Entry of a data set -> what is expected, in words and as types. None stands for an entry that is not there.
_EXPECTED: dict[str, tuple[str, tuple[type, ...]]] = {
    "data_root": _PATH,
    "ann_file": _PATH,
    "data_prefix": ("a path as text, or several with names", (str, Path, Mapping)),
    "metainfo": _OBJECT,
    "backend_args": _OBJECT,
    "img_suffix": _ENDING,
    "seg_map_suffix": _ENDING,
    "ignore_index": ("a whole number", (int,)),
}
_NEVER_NONE = ("img_suffix", "seg_map_suffix", "ignore_index")


def innermost_datasets(cfg: Mapping[str, Any], split: str) -> Iterator[Mapping[str, Any]]:
    """Yield the data set entries of a split inside wrappers and concatenations.

    Args:
        cfg: A config of MMDetection, MMSegmentation or MMPretrain.
        split: ``"train"``, ``"val"`` or ``"test"``.

    Raises:
        ConfigError: If an entry is of another type than its reader takes, as ``data_root={a,b}`` on a command line is,
            which is a list.
    """
    loader = cfg.get(f"{split}_dataloader")
    _check_type(f"{split}_dataloader", loader, "entries with names", (Mapping,), may_be_none=True)
    for dataset in _inside(loader.get("dataset") if loader else None):
        _check_entries(f"{split}_dataloader.dataset", dataset)
        yield dataset


def _inside(dataset: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(dataset, Sequence) and not isinstance(dataset, str):
        for part in dataset:
            yield from _inside(part)
    elif isinstance(dataset, Mapping):
        inner = dataset.get("dataset", dataset.get("datasets"))
        if inner is not None:
            yield from _inside(inner)
        else:
            yield dataset


def _check_entries(place: str, dataset: Mapping[str, Any]) -> None:
    for name, (text, types) in _EXPECTED.items():
        if name in dataset:
            _check_type(f"{place}.{name}", dataset[name], text, types, may_be_none=name not in _NEVER_NONE)
    prefixes = dataset.get("data_prefix")
    for name, prefix in prefixes.items() if isinstance(prefixes, Mapping) else ():
        _check_type(f"{place}.data_prefix.{name}", prefix, *_PATH, may_be_none=True)


def _check_type(place: str, value: Any, expected: str, types: tuple[type, ...], *, may_be_none: bool) -> None:
    if value is None and may_be_none:
        return
    if not isinstance(value, types) or isinstance(value, bool):
        raise ConfigError(f"{place} is {value!r}, expected {expected}. Correct the config or --cfg-options.")


def type_name(entry: Mapping[str, Any]) -> str:
    """Return the bare name of an entry's type, which is a name with or without a scope, or the class."""
    kind = entry.get("type", "")
    return kind.rpartition(".")[2] if isinstance(kind, str) else str(getattr(kind, "__name__", kind))


def is_local(dataset: Mapping[str, Any]) -> bool:
    """Whether a data set's files are on the disk, and not in some store."""
    return (dataset.get("backend_args") or {}).get("backend", "local") in ("local", "LocalBackend")
