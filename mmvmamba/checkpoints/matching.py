"""Comparing a checkpoint with a model before anything is loaded: every road that weights take goes through here.

A refusal names what is wrong and leaves the model as it was, bit for bit. What may be absent is named by the caller;
nothing is skipped because it happens not to fit.
"""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from mmvmamba.checkpoints.official import recognise
from mmvmamba.errors import CheckpointMismatch, ConfigError, nearest_spelling

_NAMES_SHOWN = 10
#: The part that ``torch.compile`` puts into the names of what is inside a compiled module.
_COMPILED = "_orig_mod"
_TWIN = "_mmvmamba_twin"
_ADVICE = "Use the checkpoint of this model, or build the model of this checkpoint."
#: dtypes whose values every later one of the same row holds exactly (bfloat16 and float16 do not hold each other's).
_EXACT = (
    (torch.float16, torch.float32, torch.float64),
    (torch.bfloat16, torch.float32, torch.float64),
    (torch.int8, torch.int16, torch.int32, torch.int64),
    (torch.uint8, torch.int16, torch.int32, torch.int64),
)


@dataclasses.dataclass(frozen=True)
class Match:
    """A checkpoint that fits a model.

    Attributes:
        what: The model, for people.
        source: The checkpoint, for people.
        taken: Names of the model -> the checkpoint's tensors, in the shapes of the model.
        total: Number of tensors of the model.
        skipped: Names of the model that keep their values, as the caller allowed by name.
        unused: Names of the checkpoint that the model does not take, as the caller allowed by name.
    """

    what: str
    source: str
    taken: Mapping[str, Tensor]
    total: int
    skipped: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()

    def line(self) -> str:
        """Return the report: what share of the model comes from the checkpoint, and what does not, by name."""
        skipped = f"; {len(self.skipped)} keep their values: {_some(self.skipped)}" if self.skipped else ""
        unused = f"; {len(self.unused)} of the checkpoint left out: {_some(self.unused)}" if self.unused else ""
        return f"{self.what}: {len(self.taken)}/{self.total} tensors from {self.source}{skipped}{unused}"


def compare(
    own: Mapping[str, Tensor],
    stored: Mapping[str, Tensor],
    *,
    allow_missing: Sequence[str] = (),
    what: str,
    source: str,
    advice: str = _ADVICE,
    values: bool = True,
) -> Match:
    """Return what a checkpoint gives to a model, or raise unless it is all of it.

    Args:
        own: The model's tensors by name; only shapes and dtypes are looked at.
        stored: The checkpoint's, under the names of the model.
        allow_missing: Names, or beginnings of names in whole dotted parts (``"head"`` is the beginning of
            ``"head.fc.weight"``, ``"outnorm*"`` of ``"outnorm0.weight"``), that need not fit: absent on either side, or
            of another shape or dtype. What one entry covers is taken whole or skipped whole, because half a head is
            worse than none.
        what: The model, for messages.
        source: The checkpoint, for messages.
        advice: One thing to do, for messages.
        values: Whether dtypes and values count as well, not names and shapes alone.

    Raises:
        ConfigError: If an entry of ``allow_missing`` is the beginning of no name.
        CheckpointMismatch: If a tensor is missing, unexpected, of another shape, of a dtype whose values the model's
            does not hold exactly, or NaN.
    """
    names = dict.fromkeys((*own, *stored))
    skipped: set[str] = set()
    for entry in check_entries(allow_missing):
        covered = [name for name in names if covers(entry, name)]
        if not covered:
            raise ConfigError(
                f"allow_missing: {entry!r} is the beginning of no name in {what} or {source}.{_nearest(entry, names)} "
                "Correct or remove it."
            )
        if any(name in own and not _fits(own[name], stored.get(name)) for name in covered):
            skipped.update(covered)
        else:
            skipped.update(name for name in covered if name not in own)
    taken = {name: stored[name] for name in own if name in stored and name not in skipped}
    problems = {
        f"of {len(own)} entries missing": [name for name in own if name not in stored and name not in skipped],
        "unexpected": [name for name in stored if name not in own and name not in skipped],
        "of another shape": [
            f"{name} {tuple(value.shape)} instead of {tuple(own[name].shape)}"
            for name, value in taken.items()
            if value.shape != own[name].shape
        ],
        "of another dtype": [
            f"{name} {value.dtype} instead of {own[name].dtype}"
            for name, value in taken.items()
            if values and not _is_exact(value.dtype, own[name].dtype)
        ],
        "NaN": [name for name, value in taken.items() if values and bool(value.isnan().any())],
    }
    if any(problems.values()):
        raise CheckpointMismatch(
            f"checkpoint {source} does not fit {what}:{_kinds(own, stored)} "
            f"{', '.join(f'{len(found)} {kind} {found[:_NAMES_SHOWN]}' for kind, found in problems.items() if found)}. "
            f"{advice}"
        )
    if not taken:
        raise CheckpointMismatch(f"checkpoint {source}: nothing in it is for {what}, expected some weights. {advice}")
    return Match(
        what, source, taken, len(own),
        skipped=tuple(name for name in own if name in skipped),
        unused=tuple(name for name in stored if name in skipped and name not in own),
    )  # fmt: skip


def check_before_loading(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, *, allow_missing: Sequence[str] = ()
) -> None:
    """Raise unless a state dict that is being loaded has all of a module, by names and shapes.

    To be called in a module's ``_load_from_state_dict``, which every way of loading calls before that of its children.

    Args:
        module: The module.
        state_dict: The entries, of other modules too.
        prefix: What those of the module begin with.
        allow_missing: See ``compare``.

    Raises:
        CheckpointMismatch: If the state dict has an entry that begins with ``prefix`` and does not fit as a whole. Of a
            sharded module (FSDP) nothing is compared.
    """
    stored = {name[len(prefix) :]: value for name, value in state_dict.items() if name.startswith(prefix)}
    if stored and not is_twin(module) and not is_sharded(module):
        check(
            module,
            stored,
            allow_missing=allow_missing,
            what=type(module).__name__,
            source=f"(its entries {prefix + '*'!r})",
            advice="Load the checkpoint of this model; to load a part on purpose, call load_state_dict of "
            f"{prefix.rstrip('.')!r} itself.",
            values=False,
        )


def is_twin(module: nn.Module) -> bool:
    """Return whether a module is a copy that ``check`` made, to ask how the module would load."""
    return _TWIN in module.__dict__


def is_sharded(module: nn.Module) -> bool:
    """Return whether parts of a module are in FSDP's wrappers: its tensors are shares, which say nothing of shapes."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # whoever shards has imported it, which takes a while
    return fsdp is not None and any(isinstance(part, fsdp.FullyShardedDataParallel) for part in module.modules())


def check(
    module: nn.Module,
    stored: Mapping[str, Tensor],
    *,
    allow_missing: Sequence[str] = (),
    what: str | None = None,
    source: str,
    advice: str = _ADVICE,
    values: bool = True,
) -> Match:
    """Compare a checkpoint with a module as ``compare`` does, in the form in which the module would load it.

    Modules may convert what they are given (a 1x1 convolution for a linear map, a position embedding of another size,
    names of an earlier release, the counters that batch norms lacked before PyTorch 0.4.1) or do without it: they are
    asked, without touching their tensors.

    Args:
        module: The model; wrappers for distribution are looked through.
        stored: The checkpoint's tensors.
        allow_missing, source, advice, values: See ``compare``.
        what: The model, for messages; by default its class and what is known of its backbone.

    Raises:
        ConfigError: See ``compare``.
        CheckpointMismatch: See ``compare``; also if a module fails to convert what it is given.
    """
    own, converted = _as_loaded(module, plain_names(stored, module, source), source)
    if what is None:
        what = name_of(unwrapped(module), own)
    # Tables that a module computes itself and takes from no checkpoint, as Swin v2 does.
    kept = [name for name in own if name in stored and name not in converted]
    wanted = {name: value for name, value in own.items() if name not in kept}
    match = compare(
        wanted, converted, allow_missing=allow_missing, what=what, source=source, advice=advice, values=values
    )
    return dataclasses.replace(match, total=len(own), skipped=(*match.skipped, *kept))


def name_of(module: nn.Module, own: Mapping[str, Tensor]) -> str:
    """Return what messages call a model: ``"MaskRCNN (VMamba tiny-s1l8)"``, ``"VMamba tiny-s1l8"``, ``"ResNet"``."""
    name, known = type(module).__name__, recognise(own)
    if known is None:
        return name
    size = f"{known.title} {known.variant or known.sketch}"
    return size if name == known.title else f"{name} ({size})"


def load(module: nn.Module, match: Match) -> None:
    """Load what ``check`` found for this module; all other tensors keep their values.

    Args:
        module: The module that was checked.
        match: What ``check`` returned for it.
    """
    unwrapped(module).load_state_dict(filled(module, match), strict=True)


def filled(module: nn.Module, match: Match) -> dict[str, Any]:
    """Return the whole state dict that a module shall have: what ``check`` found, and its own values for the rest.

    It has the module's present versions (``_metadata``), because what was found is converted already: with those of the
    file, or none, a module might convert it a second time.
    """
    state: dict[str, Any] = unwrapped(module).state_dict()
    state.update(match.taken)
    return state


def renamed(state: Mapping[str, Tensor], rename: Callable[[str], str | None], source: str) -> dict[str, Tensor]:
    """Return the entries of a state dict under other names, with the versions of their modules (``_metadata``).

    Args:
        state: Names to tensors.
        rename: The new name of an entry or of a module, or None for what is left out.
        source: The checkpoint, for messages.

    Raises:
        CheckpointMismatch: If two entries would have the same name.
    """
    result: OrderedDict[str, Tensor] = OrderedDict()
    origin: dict[str, str] = {}
    for name, value in state.items():
        new = rename(name)
        if new is None:
            continue
        if new in result:
            raise CheckpointMismatch(
                f"checkpoint {source}: {origin[new]!r} and {name!r} are both {new!r}, expected each name once. Remove "
                "one of them."
            )
        result[new], origin[new] = value, name
    metadata = getattr(state, "_metadata", None)
    if metadata is not None:
        # A module's own name has no closing dot, the names that are cut off have one.
        versions = {rename(f"{name}." if name else ""): version for name, version in metadata.items()}
        result._metadata = OrderedDict(  # type: ignore[attr-defined]
            (name.rstrip("."), version) for name, version in versions.items() if name is not None
        )
    return result


def plain_names(stored: Mapping[str, Tensor], module: nn.Module, source: str) -> Mapping[str, Tensor]:
    """Return the entries without the parts ``_orig_mod`` of ``torch.compile``, unless the module has such names.

    Raises:
        CheckpointMismatch: If the checkpoint has an entry under both names.
    """
    if not any(_COMPILED in name.split(".") for name in stored):
        return stored
    if any(_COMPILED in name.split(".") for name, _ in unwrapped(module).named_modules()):
        return stored
    return renamed(stored, lambda name: ".".join(part for part in name.split(".") if part != _COMPILED), source)


def differing(module: nn.Module, match: Match) -> list[str]:
    """Return the names of the taken tensors whose values in the module are not the checkpoint's."""
    own, _ = _as_loaded(module, {}, match.source)
    return [name for name, value in match.taken.items() if not torch.equal(value.to(own[name]), own[name])]


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside PyTorch's wrappers for distribution."""
    while isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        module = module.module
    return module


def check_entries(allow_missing: Sequence[str]) -> tuple[str, ...]:
    """Return ``allow_missing`` as a tuple.

    Raises:
        ConfigError: If it is a string, whose letters would be taken for names, or holds something else than names.
    """
    if isinstance(allow_missing, str) or not all(isinstance(entry, str) and entry for entry in allow_missing):
        raise ConfigError(
            f"allow_missing is {allow_missing!r}, expected a sequence of names or beginnings of names, such as "
            "['head.fc']. Write a list."
        )
    return tuple(allow_missing)


def covers(entry: str, name: str) -> bool:
    """Return whether ``entry`` is ``name`` or its beginning, in whole dotted parts; ``*`` is any text of a part."""
    parts, wanted = name.split("."), entry.rstrip(".").split(".")
    return len(wanted) <= len(parts) and all(map(fnmatchcase, parts, wanted))


def _as_loaded(
    module: nn.Module, stored: Mapping[str, Tensor], source: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the tensors of ``module`` and those it would load, converted by its own code; nothing is copied.

    It does what ``nn.Module.load_state_dict`` does, with a twin of each module in turn.
    """
    own: dict[str, Tensor] = {}
    converted: dict[str, Tensor] = {}
    metadata = getattr(stored, "_metadata", None) or {}

    def walk(part: nn.Module, state: dict[str, Any], prefix: str) -> None:
        part = unwrapped(part)
        unexpected: list[str] = []
        twin = _twin(part, prefix, source)
        try:
            twin._load_from_state_dict(state, prefix, metadata.get(prefix[:-1], {}), True, [], unexpected, [])
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
            raise CheckpointMismatch(
                f"checkpoint {source}: {type(part).__name__} {prefix.rstrip('.')!r} cannot convert what it holds "
                f"({type(error).__name__}: {error}), expected tensors of this model. {_ADVICE}"
            ) from error
        buffers = {name: b for name, b in part._buffers.items() if name not in part._non_persistent_buffers_set}
        for name, value in (*part._parameters.items(), *buffers.items()):
            if value is not None:
                # Some take the shape of what they are given, as observers of quantisation do.
                after = getattr(twin, name, None)
                own[prefix + name] = after if isinstance(after, Tensor) and after.shape != value.shape else value
                if prefix + name in state:
                    converted[prefix + name] = state[prefix + name]
        converted.update((name, state[name]) for name in unexpected if name in state)
        for name, child in part._modules.items():
            if child is not None:
                start = f"{prefix}{name}."
                walk(child, {key: value for key, value in state.items() if key.startswith(start)}, start)

    with warnings.catch_warnings():
        # A model that was built without memory may be compared as well.
        warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter")
        walk(module, dict(stored), "")
    return own, converted


def _twin(module: nn.Module, prefix: str, source: str) -> nn.Module:
    """Return a module that shares everything with ``module`` but its own tensors, which are copies."""
    if any(is_lazy(value) for value in (*module._parameters.values(), *module._buffers.values()) if value is not None):
        raise CheckpointMismatch(
            f"checkpoint {source}: {type(module).__name__} {prefix.rstrip('.')!r} has tensors without shapes yet, "
            "expected a model whose shapes are known. Run it once on an input of your data before it is loaded."
        )
    twin: nn.Module = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    twin.__dict__[_TWIN] = True
    twin.__dict__["_parameters"] = {
        name: None if value is None else nn.Parameter(value.detach().clone(), requires_grad=False)
        for name, value in module._parameters.items()
    }
    twin.__dict__["_buffers"] = {
        name: None if value is None else value.detach().clone() for name, value in module._buffers.items()
    }
    return twin


def _fits(own: Tensor, stored: Tensor | None) -> bool:
    return stored is not None and stored.shape == own.shape and _is_exact(stored.dtype, own.dtype)


def _is_exact(stored: torch.dtype, own: torch.dtype) -> bool:
    """Return whether every value of ``stored`` is one of ``own``."""
    return stored == own or any(stored in row and own in row and row.index(stored) < row.index(own) for row in _EXACT)


def _kinds(own: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> str:
    """Return a sentence that says what both are, if that is known and not the same."""
    found, wanted = recognise(stored), recognise(own)
    if found is None or wanted is None or str(found) == str(wanted):
        return ""
    return f" the checkpoint is {found}, the model is {wanted};"


def _nearest(entry: str, names: Iterable[str]) -> str:
    depth = entry.count(".") + 1
    return nearest_spelling(entry, {".".join(name.split(".")[:depth]) for name in names})


def _some(names: Collection[str]) -> str:
    shown = ", ".join(list(names)[:_NAMES_SHOWN])
    return shown if len(names) <= _NAMES_SHOWN else f"{shown} and {len(names) - _NAMES_SHOWN} more"
