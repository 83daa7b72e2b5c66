"""The calls that a pickled checkpoint may make, each with the arguments that writers of checkpoints give it.

Nothing is called: ``pickled`` notes here what would be made. What PyTorch or ``stand_ins`` would copy is counted,
because a text that is written once can be asked for a million times.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

from mmvmamba.checkpoints import stand_ins

_MAX_PARTS = 64
_MAX_KEY_PARTS = 8
_MAX_INT = 1 << 63
_SMALL_INT = 1 << 31
_LOCATION = re.compile(r"(?!meta)[a-z]{2,16}(:\d{1,3})?")


class Malformed(Exception):
    """The pickle is no sound program of its kind; the message says where."""


class Unusual(Exception):
    """A name of the closed list is used as no writer of checkpoints uses it."""


@dataclasses.dataclass(frozen=True)
class Global:
    """The name of a class, function or constant."""

    name: str


@dataclasses.dataclass(frozen=True)
class Storage:
    """The bytes of one or more tensors, by their name in the file."""

    key: str
    item_size: int
    size: int


@dataclasses.dataclass(eq=False)
class Noted:
    """An object that would be made by calling ``name``, and what it would be made of."""

    name: str
    parts: list[Any] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor that lies within its storage, and how many bytes it shows of it."""

    storage: Storage
    size: int


def described_storage(reference: tuple[Any, ...], fields: int) -> Storage:
    """Return the storage that a reference describes, before its bytes are looked for in the file.

    Args:
        reference: ``("storage", class, key, location, number of elements, ...)``.
        fields: How many of these a reference has in this kind of file.
    """
    if len(reference) != fields:
        raise Malformed("a reference to a storage is damaged")
    _, kind, key, location, count = reference[:5]
    item_size = stand_ins.STORAGES.get(kind.name) if type(kind) is Global else None
    if item_size is None or type(key) is not str or type(location) is not str or not _is_count(count):
        raise Malformed("a reference to a storage is damaged")
    if not _LOCATION.fullmatch(location):
        raise Malformed(f"a storage was on a device called {location[:20]!r}")
    return Storage(key, item_size, count * item_size)


def unusual(name: str, what: str) -> Unusual:
    """Return the refusal of a name of the closed list that is used as no writer uses it."""
    return Unusual(f"{name} is {what} in a way that no writer of checkpoints does")


def checked_key(key: Any) -> Any:
    """Return a key of a dict or member of a set, or raise: text, numbers, None, and short tuples of these."""
    parts = key if type(key) is tuple and len(key) <= _MAX_KEY_PARTS else (key,)
    for part in parts:
        kind = type(part)
        sound = kind in (str, bool, type(None)) or (kind is int and -_MAX_INT < part < _MAX_INT)
        if not sound and not (kind is float and math.isfinite(part)):
            raise Unusual(f"a dict or set has a key of type {kind.__name__}, such as no writer of checkpoints uses")
    return key


def is_common_key(key: Any) -> bool:
    """Return whether a key is of a kind of which not many share a hash value; text has secret ones."""
    return type(key) is str or (type(key) is int and abs(key) < _SMALL_INT)


def copied(name: str, arguments: tuple[Any, ...]) -> tuple[int, int]:
    """Return how many items and how many characters or bytes a call makes a copy of."""
    items = characters = 0
    for argument in arguments:
        if type(argument) in (list, tuple) or isinstance(argument, dict):
            items += len(argument)
        elif type(argument) in (str, bytes):
            characters += len(argument)
    # These two keep what they are given as it is.
    return (0, 0) if name in ("builtins.getattr", "numpy.dtype") else (items, characters)


def _is_count(*values: Any) -> bool:
    return all(type(value) is int and 0 <= value < 1 << 48 for value in values)


def _ordered_dict(name: str, *arguments: Any) -> Any:
    if not arguments:
        return OrderedDict()
    raise unusual(name, "called")


def _counter(name: str, entries: Any) -> Any:
    if type(entries) is dict and all(type(count) is int for count in entries.values()):
        return Counter({checked_key(key): count for key, count in entries.items()})
    raise unusual(name, "called")


def _set(name: str, entries: Any) -> Any:
    if type(entries) is list:
        return (set if name == "builtins.set" else frozenset)(map(checked_key, entries))
    raise unusual(name, "called")


def _config_dict(name: str, entries: Any) -> Any:
    if type(entries) is dict:
        return OrderedDict(entries)
    raise unusual(name, "called")


def _default_dict(name: str, factory: Any = None) -> Any:
    if factory is None or (type(factory) is Global and factory.name in (*stand_ins.FACTORIES, "builtins.set")):
        return OrderedDict()
    raise unusual(name, "called")


def _complex(name: str, real: Any, imaginary: Any) -> Any:
    if type(real) is float and type(imaginary) is float:
        return complex(real, imaginary)
    raise unusual(name, "called")


def _no_bytes(name: str, *arguments: Any) -> Any:
    # Python 2's way of writing empty ones; with a number it would make as many zeros.
    if not arguments:
        return b""
    raise unusual(name, "called")


def _path(name: str, *parts: Any) -> Any:
    if len(parts) <= _MAX_PARTS and all(type(part) is str for part in parts):
        return Noted(name)
    raise unusual(name, "called")


def _bytes(name: str, text: Any, encoding: Any) -> Any:
    # Pickle writes bytes so. Other codecs would let a few instructions double the text again and again.
    if type(text) is str and encoding == "latin1":
        return text.encode("latin1")
    raise unusual(name, "called")


def _size(name: str, sizes: Any) -> Any:
    if type(sizes) is tuple and len(sizes) <= _MAX_PARTS and _is_count(*sizes):
        return sizes
    raise unusual(name, "called")


def _device(name: str, kind: Any, index: Any = 0) -> Any:
    if type(kind) is str and _LOCATION.fullmatch(kind) and _is_count(index):
        return Noted(name)
    raise unusual(name, "called")


def _note(name: str, *arguments: Any) -> Any:
    return Noted(name, list(arguments))


def _old_tensor(name: str, storage: Any, offset: Any, size: Any, stride: Any) -> Any:
    return _tensor(name, storage, offset, size, stride, False, OrderedDict())


def _typed_tensor(
    name: str, storage: Any, offset: Any, size: Any, stride: Any, gradient: Any, hooks: Any, dtype: Any, *rest: Any
) -> Any:
    item = stand_ins.DTYPES.get(dtype.name) if type(dtype) is Global else None
    if item is None or type(storage) is not Storage:
        raise unusual(name, "called")
    return _tensor(name, dataclasses.replace(storage, item_size=item), offset, size, stride, gradient, hooks, *rest)


def _tensor(
    name: str, storage: Any, offset: Any, size: Any, stride: Any, gradient: Any, hooks: Any, metadata: Any = None
) -> Any:
    """Return a tensor whose elements all lie within its storage."""
    sound = type(storage) is Storage and type(size) is tuple and type(stride) is tuple and len(size) == len(stride)
    if not sound or not _is_count(offset, *size, *stride) or len(size) > 64 or metadata:
        raise unusual(name, "called")
    if type(gradient) is not bool or type(hooks) is not OrderedDict or hooks or hooks.__dict__:
        raise unusual(name, "called")
    count, last = 1, offset
    for length, step in zip(size, stride, strict=True):
        count *= length
        last += (length - 1) * step
    available = storage.size // storage.item_size
    # One that shows the same values many times (``expand``) may have more than its storage: it counts with all of them.
    if (count and last >= available) or offset > available:
        raise Malformed(f"a tensor of shape {size} claims more than the {available} values of its storage")
    return Tensor(storage, count * storage.item_size)


def _parameter(name: str, tensor: Any, gradient: Any, hooks: Any) -> Any:
    if type(tensor) is Tensor and type(gradient) is bool and type(hooks) is OrderedDict and not hooks:
        return tensor
    raise unusual(name, "called")


CFG_NODE = "yacs.config.CfgNode"
_HISTORY = "mmengine.logging.history_buffer.HistoryBuffer"
_ADDICT = "addict.addict.Dict"
BARE = (CFG_NODE, _HISTORY, "argparse.Namespace")
#: Classes derived from dict that are made empty, or (addict) from pairs that follow once more as items.
EMPTY_DICTS = (CFG_NODE, _ADDICT)
#: Attributes that a state dict (its versions) and a CfgNode carry.
MARKS = frozenset(("_metadata", "__immutable__", "__deprecated_keys__", "__renamed_keys__", "__new_allowed__"))
CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered_dict,
    "collections.Counter": _counter,
    "collections.defaultdict": _default_dict,
    "builtins.set": _set,
    "builtins.frozenset": _set,
    "builtins.complex": _complex,
    "builtins.bytes": _no_bytes,
    "mmengine.config.config.ConfigDict": _config_dict,
    **dict.fromkeys(stand_ins.PATHS, _path),
    "_codecs.encode": _bytes,
    "torch.Size": _size,
    "torch.device": _device,
    "torch._utils._rebuild_tensor": _old_tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "builtins.getattr": _note,
    "numpy.dtype": _note,
    "numpy.core.multiarray.scalar": _note,
    "numpy._core.multiarray.scalar": _note,
    "numpy.core.multiarray._reconstruct": _note,
    "numpy._core.multiarray._reconstruct": _note,
}
#: Which of these take a state, and of what kind.
STATES: dict[str, type] = {
    _HISTORY: dict,
    "argparse.Namespace": dict,
    "numpy.dtype": tuple,
    "numpy.core.multiarray._reconstruct": tuple,
    "numpy._core.multiarray._reconstruct": tuple,
}
