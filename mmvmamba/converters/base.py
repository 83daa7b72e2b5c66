"""The three functions every family answers to, and the strict renaming they share."""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from mmvmamba.errors import CheckpointMismatch, ConfigError, nearest_spelling
from mmvmamba.models.backbones import FAMILIES

_NAMES_SHOWN = 10
StateDict = dict[str, Tensor]

#: Family -> module holding its ``CONVERTER``, imported when asked for.
CONVERTERS: dict[str, str] = {family: f"mmvmamba.converters.{family}" for family in FAMILIES}


@dataclasses.dataclass(frozen=True)
class Rule:
    """One renaming: an upstream name matching ``pattern`` in full becomes ``target``.

    Attributes:
        pattern: Regular expression over a whole upstream name.
        target: Replacement, with backreferences.
    """

    pattern: str
    target: str


@dataclasses.dataclass(frozen=True)
class Converter:
    """One family.

    Attributes:
        forms: The upstream modules it knows.
        build: (form, upstream constructor arguments) -> our module.
        read: (form, upstream state dict, stages whose missing out norms are filled) -> our state dict.
        write: (form, our state dict) -> upstream state dict.
        title: The family's name for people.
        released: Released variant, under our name for it -> upstream constructor arguments for form ``"backbone"``.
        mark: Regular expression of an upstream (or our) name that a backbone of this family has and others hardly do.
        head: Regular expression of the names that upstream's classifier has and its feature extractor has not.
        knows: (form, name) -> whether ``read`` accepts an entry of this name.
        sketch: (our entries without out norms and head) -> the size of the network in words.
        sketches: Released variant -> its sketch, so that only variants of the right size are built for a comparison.
        optional: Regular expression of our names that some forms of a network have and some have not, besides out norms
            and head; which variant it is does not depend on them.
    """

    forms: tuple[str, ...]
    build: Callable[[str, Mapping[str, Any]], nn.Module]
    read: Callable[[str, Mapping[str, Tensor], Sequence[int]], StateDict]
    write: Callable[[str, Mapping[str, Tensor]], StateDict]
    title: str
    released: Mapping[str, Mapping[str, Any]]
    mark: str
    head: str
    knows: Callable[[str, str], bool]
    sketch: Callable[[Mapping[str, Tensor]], str]
    sketches: Mapping[str, str]
    optional: str = r"(?!)"


def load_converter(family: str) -> Converter:
    """Return the converter of a key of ``CONVERTERS``."""
    converter: Converter = importlib.import_module(CONVERTERS[family]).CONVERTER
    return converter


def from_upstream(family: str, form: str, kwargs: Mapping[str, Any]) -> nn.Module:
    """Build our module equal to the upstream module with these constructor arguments.

    Args:
        family: A key of ``CONVERTERS``.
        form: Which of upstream's modules, such as ``"classifier"`` or ``"backbone"``.
        kwargs: Upstream's constructor arguments, or ``{"function": name}`` for one of its released variants
            (then with the arguments given besides ``function`` on top).

    Returns:
        For form ``"classifier"`` an MMPretrain ``ImageClassifier`` whose plain call gives the logits (b, classes);
        for form ``"backbone"`` the feature extractor.

    Raises:
        ConfigError: If family, form, an argument or its value is unknown.
    """
    return _converter(family, form).build(form, kwargs)


def convert_state_dict(
    family: str,
    form: str,
    state_dict: Mapping[str, Tensor],
    *,
    fill_out_norms: Sequence[int] = (),
) -> StateDict:
    """Rename upstream's entries to ours; the result loads into ``from_upstream(...)`` with ``strict=True``.

    Args:
        family: A key of ``CONVERTERS``.
        form: The form of the module that the result is for.
        state_dict: Upstream's entries, names to tensors (``checkpoint["model"]`` of an ImageNet checkpoint).
        fill_out_norms: For form ``"backbone"``: the ``out_indices`` of a feature extractor that shall start from a
            classifier's weights. Out norms of these stages get weight 1 and bias 0 where the state dict has none, and
            the entries of the classification head are left out. (MambaOut's has no out norms, and gets none.)

    Raises:
        ConfigError: If family or form is unknown.
        CheckpointMismatch: If an entry is no known entry of that form; the message names it.
    """
    converter = _converter(family, form)
    wrong = [key for key, value in state_dict.items() if not isinstance(value, Tensor)]
    if wrong:
        raise CheckpointMismatch(
            f"state_dict holds {wrong[:_NAMES_SHOWN]}, which are no tensors, expected names of parameters. Pass the "
            "inner dict, such as checkpoint['model'] or checkpoint['state_dict']."
        )
    return converter.read(form, state_dict, fill_out_norms)


def to_upstream_state_dict(family: str, form: str, state_dict: Mapping[str, Tensor]) -> StateDict:
    """Rename our entries back to upstream's; the inverse of ``convert_state_dict``, bit for bit.

    The entries come in upstream's order.

    Raises:
        ConfigError: If family or form is unknown.
        CheckpointMismatch: If an entry is no known entry of that form.
    """
    return _converter(family, form).write(form, state_dict)


def rename(
    state_dict: Mapping[str, Tensor],
    rules: Sequence[Rule],
    what: str,
    drop: Sequence[str] = (),
) -> StateDict:
    """Rename every entry by the one rule it matches.

    Args:
        state_dict: Names to tensors.
        rules: Tried in order.
        what: What the entries should belong to, for messages.
        drop: Regular expressions of entries to leave out.

    Raises:
        CheckpointMismatch: If entries match no rule, or two of them get the same name.
    """
    renamed: StateDict = {}
    unknown = []
    for name, value in state_dict.items():
        if any(re.fullmatch(pattern, name) for pattern in drop):
            continue
        match = next((m for rule in rules if (m := _apply(rule, name)) is not None), None)
        if match is None:
            unknown.append(name)
        elif match in renamed:
            raise CheckpointMismatch(
                f"two entries of {what} become {match!r}, the second is {name!r}; expected each name once. "
                "The state dict mixes old and new names: remove one of them."
            )
        else:
            renamed[match] = value
    if unknown:
        raise CheckpointMismatch(
            f"{len(unknown)} of {len(state_dict)} entries are no entries of {what}: {unknown[:_NAMES_SHOWN]}. "
            "Check family and form, or strip the prefix of an enclosing model."
        )
    return renamed


def known_to(rules: Sequence[Rule], name: str) -> bool:
    """Return whether ``rename`` with these rules would accept an entry of this name."""
    return any(re.fullmatch(rule.pattern, name) for rule in rules)


def reject_unknown_arguments(kwargs: Mapping[str, Any], known: Sequence[str], what: str) -> None:
    """Raise ``ConfigError`` for upstream arguments nobody knows, with the nearest spelling of each."""
    unknown = [name for name in kwargs if name not in known]
    if unknown:
        hints = "".join(nearest_spelling(name, known) for name in unknown)
        raise ConfigError(
            f"{what}: unknown argument {', '.join(map(repr, unknown))}, expected arguments among "
            f"{', '.join(known)}.{hints} Remove or rename it."
        )


def _apply(rule: Rule, name: str) -> str | None:
    match = re.fullmatch(rule.pattern, name)
    return None if match is None else match.expand(rule.target)


def _converter(family: str, form: str) -> Converter:
    if family not in CONVERTERS:
        raise ConfigError(
            f"family is {family!r}, expected one of {', '.join(CONVERTERS)}.{nearest_spelling(family, CONVERTERS)} "
            "Write one of these names."
        )
    converter = load_converter(family)
    if form not in converter.forms:
        raise ConfigError(
            f"form is {form!r}, expected one of {', '.join(converter.forms)} for family {family!r}."
            f"{nearest_spelling(form, converter.forms)} Write one of these names."
        )
    return converter
