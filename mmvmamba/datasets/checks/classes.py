"""Do the classes of a config, the categories of the data and the heads of the model fit together?

MMDetection numbers labels by the categories of the annotation file, in the file's order, leaving out those that the
config does not name; it names them by the config. So a misspelt class shifts every later label by one, and another
order swaps names, both without a word (mmdetection issue 9611).
"""

from __future__ import annotations

import difflib
import json
import mmap
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmvmamba.datasets.checks.coco import read_categories, read_json
from mmvmamba.datasets.checks.report import Report, short
from mmvmamba.datasets.checks.shapes import Problem

#: Names of each list that a message writes out.
_LONG = 100
#: Where a detector, segmentor or classifier has the heads whose number of classes is the data set's.
_HEADS = (
    ("bbox_head",),
    ("mask_head",),
    ("roi_head", "bbox_head"),
    ("roi_head", "mask_head"),
    ("decode_head",),
    ("auxiliary_head",),
    ("head",),
)
#: Where models that only wrap another have it: test-time augmentation, semi-supervised training.
_WRAPPERS = ("module", "detector")


def check_class_list(classes: Any) -> list[Problem]:
    """Return (kind, text) of what is wrong with ``metainfo.classes`` by itself.

    Args:
        classes: As it stands in the config.
    """
    if isinstance(classes, str):
        return [("classes-not-a-list", f"classes is the text {short(classes)}, expected a list of names")]
    if not isinstance(classes, Sequence) or not classes:
        return [("classes-entry", f"classes is {short(classes)}, expected a list of names")]
    odd = [name for name in classes if not isinstance(name, str) or not name.strip()]
    if odd:
        return [("classes-entry", f"classes holds {short(odd[0])}, expected names as texts in quotation marks")]
    repeated = sorted({name for name in classes if list(classes).count(name) > 1})
    if repeated:
        return [("classes-entry", f"classes holds {_list(repeated)} more than once")]
    return []


def compare_classes(
    classes: Sequence[str], names: Sequence[str], *, by_default: bool = False, ordered: bool = True
) -> list[Problem]:
    """Return (kind, text) of how the classes of a config differ from the categories of the data.

    Args:
        classes: Classes of the config, known to be a list of different names.
        names: Categories of the data, in their order.
        by_default: Whether the config has none, and these are the ones of the type of the data set.
        ordered: Whether the order counts.
    """
    source = "the config sets no metainfo.classes, so these are the type's own: " if by_default else ""
    lists = f"{source}classes {_list(classes)}; categories of the data {_list(names)}"
    absent = [name for name in classes if name not in names]
    unused = [name for name in names if name not in classes]
    if absent:
        guesses = [f"{name!r}{_guess(name, names, unused)}" for name in absent[:_LONG]]
        text = (
            f"{lists}; only in classes: {', '.join(guesses)}; only in the data: {_list(unused) if unused else 'none'}"
        )
        return [("classes-not-in-file", text)]
    problems: list[Problem] = []
    kept = [name for name in names if name in classes]
    if ordered and kept != list(classes):
        place = next(index for index, (a, b) in enumerate(zip(classes, kept, strict=True)) if a != b)
        difference = f"label {place}: {classes[place]!r} in classes, {kept[place]!r} in the data"
        problems.append(("classes-order", f"{lists}; the first difference is {difference}"))
    if ordered and unused:
        problems.append(("classes-left-out", f"{_list(unused)} of the data is not in classes {_list(classes)}"))
    return problems


def _list(names: Sequence[str]) -> str:
    more = f", ... ({len(names)} in all)" if len(names) > _LONG else ""
    return "[" + ", ".join(repr(name) for name in names[:_LONG]) + more + "]"


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", "", unicodedata.normalize("NFKC", name)).casefold()


def _guess(name: str, names: Sequence[str], unused: Sequence[str]) -> str:
    """Return in brackets what a class that the data does not have is likely to be."""
    same = [other for other in names if _plain(other) == _plain(name)]
    if same:
        return f" (the data has {same[0]!r}: case, spaces and signs count)"
    if any(name.startswith(first) and name[len(first) :] in names for first in names):
        return " (two names of the data in one: a comma is missing)"
    close = difflib.get_close_matches(name, unused or names, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def check_heads(model: Mapping[str, Any], number: int) -> list[Problem]:
    """Return (kind, text) for each head of a model whose ``num_classes`` is not that of the data set.

    Args:
        model: The model entry of a config.
        number: Classes of the data set.
    """
    for wrapper in _WRAPPERS:
        while isinstance(model.get(wrapper), Mapping):
            model = model[wrapper]
    problems = []
    for path in _HEADS:
        found: Any = model
        for name in path:
            found = found.get(name) if isinstance(found, Mapping) else None
        for index, head in enumerate(found if isinstance(found, Sequence) else [found]):
            if not isinstance(head, Mapping) or head.get("class_agnostic"):
                continue  # a mask head with one mask for all classes
            size = head.get("num_classes")
            if size is not None and size != number:
                name = ".".join(path) + (f"[{index}]" if isinstance(found, Sequence) else "")
                text = f"model.{name}.num_classes is {short(size)}, expected {number}, the number of classes"
                problems.append(("num-classes", text))
    return problems


def category_names(path: Path, report: Report) -> list[str]:
    """Return the names of the categories of a COCO file, in their order, without reading all of a large file.

    If the word "categories" stands in the file exactly once, what follows it is read; else all of the file is.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            categories = _only_categories(content)
    except (OSError, ValueError):  # not readable, or without any byte
        categories = None
    if categories is None:
        document = read_json(path, report)
        if document is None:
            return []
        categories = document.get("categories") if isinstance(document, dict) else None
    return list(read_categories(categories, path, report).values())


def _only_categories(content: mmap.mmap) -> Any:
    word = b'"categories"'
    place = content.find(word)
    if place < 0 or content.find(word, place + 1) >= 0:
        return None
    # A list of 80 categories has some 5 kB; one that is longer than this is read with the rest of the file.
    text = content[place + len(word) : place + len(word) + (1 << 20)].decode("utf-8", errors="replace").lstrip()
    if not text.startswith(":"):
        return None
    try:
        return json.JSONDecoder().raw_decode(text[1:].lstrip())[0]
    except (ValueError, RecursionError):
        return None
