"""Telling from names and shapes alone what a state dict is: family, variant, form.

Nothing here knows a family: what is special to one stands in its ``Converter``. ``mmvmamba.checkpoints.official``
documents the two functions that are called from elsewhere.
"""

from __future__ import annotations

import functools
import re
from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import Tensor

from mmvmamba.checkpoints.official import Recognition
from mmvmamba.converters.adapter import TRUNK, has_adapter, is_adapters
from mmvmamba.converters.base import CONVERTERS, Converter, StateDict, load_converter
from mmvmamba.errors import CheckpointMismatch

_OUT_NORM = re.compile(r"outnorm\d+\..*")
#: First parts of the names that OpenMMLab's models have beside their backbone -> what has them, tried in order.
_FORMS = (
    ("segmentor", {"decode_head"}),
    ("detector", {"rpn_head", "roi_head", "bbox_head", "mask_head", "panoptic_head"}),
    ("classifier", {"head"}),
)


def recognise(state_dict: Mapping[str, Tensor]) -> Recognition | None:
    """Return family, variant and form of the first backbone in a state dict, or None if there is none known here."""
    for prefix, family in _backbones(state_dict).items():
        converter, part = load_converter(family), _part(state_dict, prefix)
        others = {name.split(".")[0] for name in state_dict if not name.startswith(prefix)}
        own_form = _form(converter, part, prefix)
        if prefix:
            form = next((form for form, names in _FORMS if names & others), "model" if others else own_form)
        else:
            form = own_form
        trunk = _trunk(converter, part)
        return Recognition(
            family,
            converter.title,
            _variant(family, trunk),
            converter.sketch(trunk),
            form,
            prefix,
            upstream=adapt(dict(state_dict)).keys() != state_dict.keys(),
            adapter=own_form == "adapter",
        )
    return None


def adapt(state_dict: dict[str, Tensor], source: str = "") -> dict[str, Tensor]:
    """Return the entries of an official file under our names, and all others under their own."""
    try:
        return _adapt(state_dict)
    except CheckpointMismatch as error:
        raise CheckpointMismatch(f"checkpoint {source or 'given'}: {error}") from error


def _adapt(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    adapted: dict[str, Tensor] = OrderedDict(state_dict)
    if (metadata := getattr(state_dict, "_metadata", None)) is not None:
        # What is around the backbone keeps its names, and mmcv's layers tell old entries by it.
        adapted._metadata = metadata  # type: ignore[attr-defined]
    for prefix, family in _backbones(state_dict).items():
        converter, part = load_converter(family), _part(state_dict, prefix)
        form = _form(converter, part, prefix)
        # Names the family does not know stay, for whoever loads the result to refuse them, or to have them.
        known = {name: value for name, value in part.items() if converter.knows(form, name)}
        for name in known:
            del adapted[prefix + name]
        for name, value in converter.read(form, known, ()).items():
            if prefix + name in adapted:
                raise CheckpointMismatch(
                    f"two entries are called {prefix + name!r} today, expected each name once. It "
                    "mixes old and new names: remove one of them."
                )
            adapted[prefix + name] = value
    return state_dict if adapted.keys() == state_dict.keys() else adapted


def _backbones(state_dict: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the prefix of every backbone in a state dict and its family."""
    marked: dict[str, list[str]] = {}
    for family in CONVERTERS:
        mark = re.compile(rf"((?:.*?\.)?){load_converter(family).mark}")
        for prefix in dict.fromkeys(match[1] for name in state_dict if (match := mark.fullmatch(name))):
            marked.setdefault(_with_adapter(prefix, state_dict), []).append(family)
    chosen: dict[str, str] = {}
    for prefix, families in marked.items():
        part = _part(state_dict, prefix)
        # Families descend from one another and share names: the one that knows most of them is meant.
        chosen[prefix] = max(families, key=lambda family: _familiarity(family, part)) if families[1:] else families[0]
    return chosen


def _familiarity(family: str, part: Mapping[str, Tensor]) -> tuple[bool, int, bool]:
    """Return whether a backbone is a released variant of a family, how many names it knows, and whether its size is."""
    converter = load_converter(family)
    trunk, form = _trunk(converter, part), _form(converter, part, "")
    known = sum(converter.knows(form, name) for name in part)
    return _variant(family, trunk) is not None, known, converter.sketch(trunk) in converter.sketches.values()


def _part(state_dict: Mapping[str, Tensor], prefix: str) -> StateDict:
    return {name[len(prefix) :]: value for name, value in state_dict.items() if name.startswith(prefix)}


def _with_adapter(prefix: str, state_dict: Mapping[str, Tensor]) -> str:
    """Return the prefix of our adapter around the backbone with this prefix, or this one if there is none."""
    outer = prefix.removesuffix(TRUNK)
    inside = outer != prefix and has_adapter(_part(state_dict, outer))
    return outer if inside else prefix


def _form(converter: Converter, part: Mapping[str, Tensor], prefix: str) -> str:
    """Return as which form the entries of a backbone, which had this prefix, are read."""
    if "adapter" in converter.forms and has_adapter(part):
        return "adapter"
    return "backbone" if prefix else _upstream_form(converter, part)


def _upstream_form(converter: Converter, part: Mapping[str, Tensor]) -> str:
    return "classifier" if any(re.fullmatch(converter.head, name) for name in part) else "backbone"


def _trunk(converter: Converter, part: Mapping[str, Tensor]) -> StateDict:
    """Return what every form of the network has, under our names."""
    if "adapter" in converter.forms and has_adapter(part):
        part = {name.removeprefix(TRUNK): value for name, value in part.items() if not is_adapters(name)}
    known = {
        name: value
        for name, value in part.items()
        if converter.knows("backbone", name) and not re.fullmatch(converter.head, name)
    }
    return {
        name: value for name, value in converter.read("backbone", known, ()).items() if not _OUT_NORM.fullmatch(name)
    }


def _variant(family: str, trunk: Mapping[str, Tensor]) -> str | None:
    """Return the released variant that has exactly these names and shapes."""
    converter = load_converter(family)
    size = converter.sketch(trunk)
    for variant in converter.released:
        if converter.sketches[variant] != size:
            continue
        shapes = _released_shapes(family, variant)
        left_out = _left_out(converter)
        if shapes.keys() == {name for name in trunk if not left_out.fullmatch(name)} and all(
            _same(trunk[name].shape, shape) for name, shape in shapes.items()
        ):
            return variant
    return None


def _same(shape: torch.Size, released: torch.Size) -> bool:
    """Return whether two shapes are equal, also where a linear map is stored as a 1x1 convolution."""
    return shape == released or (len(released) == 2 and shape == (*released, 1, 1))


def _left_out(converter: Converter) -> re.Pattern[str]:
    """Return a pattern of the names that do not tell a variant: PyTorch adds counters where batch norms might be."""
    return re.compile(rf"{_OUT_NORM.pattern}|.*\.num_batches_tracked|{converter.optional}")


@functools.cache
def _released_shapes(family: str, variant: str) -> dict[str, torch.Size]:
    """Return the shapes of a released variant's trunk; it is built without memory for its weights."""
    converter = load_converter(family)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = converter.build("backbone", converter.released[variant])
    left_out = _left_out(converter)
    return {name: value.shape for name, value in model.state_dict().items() if not left_out.fullmatch(name)}
