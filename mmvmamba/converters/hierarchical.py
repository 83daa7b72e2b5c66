"""What converters of backbones with stages share.

Names here are ours: ``layers.<stage>.blocks.<block>.`` and ``outnorm<stage>.``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmvmamba.converters.base import Rule, StateDict
from mmvmamba.errors import CheckpointMismatch, ConfigError, nearest_spelling

#: What a norm has in a state dict, as a part of a pattern.
AFFINE = r"(?:weight|bias|running_mean|running_var|num_batches_tracked)"
#: Beginning of the names of a block.
BLOCK = r"layers\.\d+\.blocks\.\d+\."
OUT_NORM = Rule(rf"(outnorm\d+\.{AFFINE})", r"\1")


def translate(argument: str, value: object, table: Mapping[str, str]) -> str:
    """Return our word for a value of an upstream argument, whatever its case.

    Raises:
        ConfigError: If the table does not have it; the message names the argument.
    """
    key = str(value).lower()
    if key not in table:
        raise ConfigError(
            f"{argument} is {value!r}, expected one of {', '.join(map(repr, table))}.{nearest_spelling(value, table)} "
            "Write one of these."
        )
    return table[key]


def released_arguments(
    kwargs: Mapping[str, Any], functions: Mapping[str, Mapping[str, Any]]
) -> tuple[str | None, dict[str, Any]]:
    """Return the released variant that ``function`` names, if any, and its arguments with the others on top.

    Raises:
        ConfigError: If there is no such variant.
    """
    kwargs = dict(kwargs)
    function = kwargs.pop("function", None)
    if function is None:
        return None, kwargs
    if function not in functions:
        raise ConfigError(
            f"function is {function!r}, expected one of {', '.join(functions)}."
            f"{nearest_spelling(function, functions)} Write one of these names."
        )
    return function, {**functions[function], **kwargs}


def refuse_pretrained(pretrained: object) -> None:
    """Raise ``ConfigError`` if upstream's constructor is to load a file, where we only build."""
    if pretrained not in (None, "", False):
        raise ConfigError(
            f"pretrained is {pretrained!r}, expected None: this function only builds. Load the file and pass its "
            "entries through convert_state_dict."
        )


def refuse_out_norms(form: str, stages: Sequence[int]) -> None:
    """Raise ``ConfigError`` if a classifier is to be filled with out norms."""
    if stages:
        raise ConfigError(
            f"fill_out_norms is {tuple(stages)} for form {form!r}, expected () there: a classifier has no out norms. "
            "Use the form of a feature extractor."
        )


def widths(dims: int | Sequence[int], num_stages: int) -> tuple[int, ...]:
    """Return the channels of every stage; a number is that of the first, which doubles."""
    return tuple(dims * 2**i for i in range(num_stages)) if isinstance(dims, int) else tuple(dims)


def build_classifier(
    backbone: nn.Module, channels: int, num_classes: int, head: Callable[[], nn.Module] | None = None
) -> nn.Module:
    """Return MMPretrain's ``ImageClassifier`` that averages the last map and classifies it.

    Args:
        backbone: The feature extractor.
        channels: Channels of its last map.
        num_classes: Number of classes.
        head: Builds the head; None for one linear map.

    Raises:
        ConfigError: If there is no class.
    """
    if not isinstance(num_classes, int) or num_classes < 1:
        raise ConfigError(
            f"num_classes is {num_classes!r}, expected a positive integer: a classifier has classes. Use form "
            "'backbone' for features."
        )
    # Only this form needs MMPretrain.
    from mmengine.registry import DefaultScope
    from mmpretrain.models import GlobalAveragePooling, ImageClassifier, LinearClsHead

    # MMPretrain builds its loss and preprocessor by bare names, which a detector's scope would take for mmdet's.
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        return ImageClassifier(
            backbone=backbone,
            neck=GlobalAveragePooling(),
            head=LinearClsHead(num_classes, channels) if head is None else head(),
        )


def without(state_dict: Mapping[str, Tensor], pattern: str) -> StateDict:
    """Return the entries whose names do not match in full."""
    return {name: value for name, value in state_dict.items() if not re.fullmatch(pattern, name)}


def only(state_dict: Mapping[str, Tensor], pattern: str) -> StateDict:
    """Return the entries whose names match in full."""
    return {name: value for name, value in state_dict.items() if re.fullmatch(pattern, name)}


def in_order(state_dict: Mapping[str, Tensor], orders: Mapping[str, Sequence[str]]) -> StateDict:
    """Sort the entries inside some modules; the rest keeps its place.

    Args:
        state_dict: Names to tensors.
        orders: What a name has before the children of such a module, such as ``".op."`` -> their order. They stand
            where the first of them stood.
    """
    places: dict[str, int] = {}

    def place(item: tuple[int, str]) -> tuple[int, int]:
        index, name = item
        for infix, order in orders.items():
            head, found, tail = name.partition(infix)
            child = tail.split(".")[0]
            if found and child in order:
                return places.setdefault(head + infix, index), order.index(child)
        return index, 0

    return {name: state_dict[name] for _, name in sorted(enumerate(state_dict), key=place)}


def num_stages(trunk: Mapping[str, Tensor], title: str) -> int:
    """Return the number of stages of our entries of a trunk.

    Raises:
        CheckpointMismatch: If there is none.
    """
    stages = {int(match[1]) for name in trunk if (match := re.match(r"layers\.(\d+)\.", name))}
    if not stages:
        raise CheckpointMismatch(
            f"the state dict has no entry 'layers.*', expected those of a {title}. Check family, form and prefix."
        )
    return max(stages) + 1


def in_words(depths: Sequence[int], dims: Sequence[int]) -> str:
    """Return the size of a network for people."""
    return f"with depths {tuple(depths)} and dims {tuple(dims)}"


def sketch(trunk: Mapping[str, Tensor], width: str) -> str:
    """Return depths and dims in words, as far as our entries tell.

    Args:
        trunk: Names to tensors.
        width: Pattern of what follows ``layers.<stage>.blocks.<block>.`` in the names of the vectors that have as many
            entries as the stage has channels.
    """
    blocks: dict[int, set[int]] = {}
    for name in trunk:
        match = re.match(r"layers\.(\d+)\.blocks\.(\d+)\.", name)
        if match:
            blocks.setdefault(int(match[1]), set()).add(int(match[2]))
    dims = {stage: like.numel() for stage, like in _vectors(trunk, width).items()}
    return in_words([len(blocks[stage]) for stage in sorted(blocks)], [dims[stage] for stage in sorted(dims)])


def fill_out_norms(
    ours: StateDict, stages: Sequence[int], width: str, fields: Sequence[str] = ("bias", "weight")
) -> StateDict:
    """Add out norms at their initial values for ``stages`` that have none.

    Args:
        ours: Our entries; added to.
        stages: The ``out_indices`` to be.
        width: As for `sketch`.
        fields: What the norm has, such as running statistics.

    Raises:
        CheckpointMismatch: If there is no such stage.
    """
    vectors = _vectors(ours, width)
    for stage in stages:
        if f"outnorm{stage}.weight" in ours:
            continue
        if stage not in vectors:
            raise CheckpointMismatch(
                f"fill_out_norms names stage {stage}, but the state dict has {len(vectors)} stages. Name only "
                "stages from 0 to that number less one."
            )
        for field in fields:
            fill = 1.0 if field in ("weight", "running_var") else 0.0
            value = torch.tensor(0) if field == "num_batches_tracked" else torch.full_like(vectors[stage], fill)
            ours[f"outnorm{stage}.{field}"] = value
    return ours


def _vectors(trunk: Mapping[str, Tensor], width: str) -> dict[int, Tensor]:
    found: dict[int, Tensor] = {}
    for name, value in trunk.items():
        match = re.fullmatch(rf"layers\.(\d+)\.blocks\.\d+\.{width}", name)
        if match:
            found.setdefault(int(match[1]), value)
    return found
