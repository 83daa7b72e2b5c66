"""Following a pickle without running it, to know before PyTorch reads it that it only builds tensors and plain values.

A pickle is a program for a small stack machine. This is that machine with nothing behind it: a name stays a name, a
call becomes a note of what would be called. Its instructions are those that ``torch.load(weights_only=True)`` has;
names are those of ``stand_ins``; every call is checked with its arguments, above all that no tensor reaches beyond its
storage and no storage beyond its bytes in the file.
"""

from __future__ import annotations

import _compat_pickle
import dataclasses
import pickletools
import re
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any, BinaryIO

from mmvmamba.checkpoints import stand_ins
from mmvmamba.errors import CorruptCheckpoint, UnsafeCheckpoint

_NAMES_SHOWN = 10
_MAX_DEPTH = 60
#: Values, each counted as often as it is reached: lists within lists of lists can hold 2**60 in a few bytes.
_MAX_VALUES = 20_000_000
#: Tied weights show the same bytes twice; more than this is a file that grows when it is read.
_MAX_SHARE = 4
_MAX_INSTRUCTIONS = 2_000_000
_CHUNK = 4096
_MAX_KEY = 1 << 31
_LOCATION = re.compile(r"(?!meta)[a-z]{2,16}(:\d{1,3})?")
_PUSHED = {
    "NONE": None,
    "NEWTRUE": True,
    "NEWFALSE": False,
}
_MADE: dict[str, Callable[[], Any]] = {"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}
_ARGUMENT = ("BININT", "BININT1", "BININT2", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING", "LONG1")
_INSTRUCTIONS = frozenset(
    (
        *(*_PUSHED, *_MADE, *_ARGUMENT, "MARK", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "PROTO", "STOP"),
        *("GLOBAL", "REDUCE", "NEWOBJ", "BUILD", "BINPERSID", "APPEND", "APPENDS", "SETITEM", "SETITEMS"),
        *("BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"),
    )
)


class Malformed(Exception):
    """The pickle is no sound program of its kind; the message says where."""


class _Bounded:
    """A file of which nobody asks for more bytes than it has; Python sets aside what is asked for before it reads."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size
        self.readline = file.readline

    def read(self, count: int) -> bytes:
        if count > _CHUNK:
            count = min(count, self.size - self.file.tell())
        return self.file.read(count)


class _Unusual(Exception):
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


def follow(file: BinaryIO, size: int, name: str, storage_of: Callable[[tuple[Any, ...]], Storage]) -> Any:
    """Return what the pickle at the position of a file would build, with notes in the place of objects.

    The file is left behind the pickle.

    Args:
        file: The open file.
        size: Bytes of the whole checkpoint, which bounds what its tensors may claim.
        name: What to call it in messages.
        storage_of: Turns the reference to a storage, as the kind of file writes it, into one that is checked.

    Raises:
        UnsafeCheckpoint: If it names a class or function outside the closed list, or calls one in an unusual way.
        CorruptCheckpoint: If it is no pickle.
    """
    machine = _Machine(storage_of, size)
    try:
        program = _instructions(_Bounded(file, size), name)
        result = machine.run(program)
        _check_nesting(result)
    except _Unusual as error:
        raise UnsafeCheckpoint(
            f"checkpoint {name} is refused ({error}), expected tensors and plain values. Nothing of it was run. Save "
            "its weights alone: torch.save(model.state_dict(), NEW_FILE)."
        ) from error
    except Malformed as error:
        raise CorruptCheckpoint(
            f"checkpoint {name} cannot be read ({error}), expected a complete file of torch.save. It is probably cut "
            "off or damaged: delete it and download or train it anew."
        ) from error
    except (IndexError, KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise CorruptCheckpoint(
            f"checkpoint {name} cannot be read (its list of contents is damaged: {type(error).__name__}), expected a "
            "complete file of torch.save. It is probably cut off or damaged: delete it and download or train it anew."
        ) from error
    return result


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


def _instructions(file: _Bounded, name: str) -> list[tuple[str, Any]]:
    """Return the instructions of a pickle; refuses unknown names and instructions, all of them in one message."""
    program: list[tuple[str, Any]] = []
    names: list[str] = []
    foreign: list[str] = []
    for code, argument, _ in pickletools.genops(file):  # type: ignore[arg-type]
        if len(program) == _MAX_INSTRUCTIONS:
            raise Malformed(f"its list of contents has more than {_MAX_INSTRUCTIONS} instructions")
        kind = code.name
        if kind == "GLOBAL":
            argument = _modern_name(str(argument))
            if argument not in stand_ins.ALLOWED:
                names.append(argument)
        elif kind not in _INSTRUCTIONS:
            foreign.append(kind)
        elif kind == "PROTO" and (argument != 2 or program):
            foreign.append(f"PROTO {argument}")
        program.append((kind, argument))
    if "STACK_GLOBAL" in foreign:  # names put together from text on the stack
        names += [str(text) for kind, text in program if kind in ("SHORT_BINUNICODE", "UNICODE")]
    if names:
        shown = ", ".join(dict.fromkeys(names[:_NAMES_SHOWN]))
        raise UnsafeCheckpoint(
            f"checkpoint {name} holds objects of {shown}, expected tensors and plain values; such a file can run code "
            "of its author when it is read. Nothing of it was run. If you trust it, save its weights alone where those "
            "packages are installed: torch.save(model.state_dict(), NEW_FILE)."
        )
    if foreign:
        raise UnsafeCheckpoint(
            f"checkpoint {name} is pickled with instructions that torch.save does not use by default "
            f"({', '.join(dict.fromkeys(foreign[:_NAMES_SHOWN]))}), expected pickle protocol 2. Save its weights "
            "again: torch.save(model.state_dict(), NEW_FILE)."
        )
    if not program or program[0] != ("PROTO", 2):
        raise UnsafeCheckpoint(
            f"checkpoint {name} is a pickle of protocol 0 or 1, expected protocol 2 as torch.save writes it. Save its "
            "weights again: torch.save(model.state_dict(), NEW_FILE)."
        )
    return program


def _modern_name(argument: str) -> str:
    """Return the name PyTorch would look up: files of Python 2 have other names for some modules."""
    module, _, attribute = argument.partition(" ")
    if (module, attribute) in _compat_pickle.NAME_MAPPING:
        module, attribute = _compat_pickle.NAME_MAPPING[module, attribute]
    elif module in _compat_pickle.IMPORT_MAPPING:
        module = _compat_pickle.IMPORT_MAPPING[module]
    return f"{module}.{attribute}"


class _Machine:
    def __init__(self, storage_of: Callable[[tuple[Any, ...]], Storage], size: int) -> None:
        self.storage_of = storage_of
        self.bytes_left = _MAX_SHARE * size
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self, program: list[tuple[str, Any]]) -> Any:
        """Follow the instructions to the end and return what is on top of the stack."""
        for kind, argument in program:
            if kind in _PUSHED:
                self.stack.append(_PUSHED[kind])
            elif kind in _ARGUMENT:
                self.stack.append(argument)
            elif kind in _MADE:
                self.stack.append(_MADE[kind]())
            elif kind in ("BINPUT", "LONG_BINPUT"):
                self.memo[argument] = self.stack[-1]
            elif kind in ("BINGET", "LONG_BINGET"):
                self.stack.append(self.memo[argument])
            elif kind == "GLOBAL":
                self.stack.append(Global(argument))
            elif kind not in ("PROTO", "STOP"):
                getattr(self, f"_{kind.lower()}")()
        return self.stack.pop()

    def _mark(self) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def _above_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def _tuple(self) -> None:
        items = self._above_mark()
        self.stack.append(tuple(items))

    def _tuple1(self) -> None:
        self._join(1)

    def _tuple2(self) -> None:
        self._join(2)

    def _tuple3(self) -> None:
        self._join(3)

    def _join(self, count: int) -> None:
        if len(self.stack) < count:
            raise Malformed("too few values")
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def _append(self) -> None:
        item = self.stack.pop()
        self._extend([item])

    def _appends(self) -> None:
        self._extend(self._above_mark())

    def _extend(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise Malformed("appends to what is no list")
        self.stack[-1].extend(items)

    def _setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._update([key, value])

    def _setitems(self) -> None:
        self._update(self._above_mark())

    def _update(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) not in (dict, OrderedDict, Counter) or len(items) % 2:
            raise Malformed("sets items of what is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_checked_key(key)] = value

    def _binpersid(self) -> None:
        reference = self.stack.pop()
        if type(reference) is not tuple or not reference or reference[0] != "storage":
            raise Malformed("refers to something outside that is no storage")
        self.stack.append(self.storage_of(reference))

    def _newobj(self) -> None:
        arguments, target = self.stack.pop(), self.stack.pop()
        name = target.name if type(target) is Global else ""
        if arguments != () or name not in _BARE:
            raise _unusual(name or "a value", "made without a call")
        self.stack.append(OrderedDict() if name == _CFG_NODE else Noted(name))

    def _reduce(self) -> None:
        arguments, target = self.stack.pop(), self.stack.pop()
        name = target.name if type(target) is Global else ""
        if type(arguments) is not tuple or name not in _CALLS:
            raise _unusual(name or "a value", "called")
        result = _CALLS[name](name, *arguments)
        if type(result) is Tensor:
            self.bytes_left -= result.size
            if self.bytes_left < 0:
                raise Malformed(f"its tensors claim more than {_MAX_SHARE} times the bytes of the file")
        self.stack.append(result)

    def _build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is OrderedDict and type(state) is dict and _MARKS.issuperset(state):
            target.__dict__.update(state)  # attributes, none of which is called
        elif type(target) is Noted and type(state) is _STATES.get(target.name):
            target.parts.append(state)
        else:
            raise _unusual(getattr(target, "name", type(target).__name__), "given a state")


def _unusual(name: str, what: str) -> _Unusual:
    return _Unusual(f"{name} is {what} in a way that no writer of checkpoints does")


def _checked_key(key: Any) -> Any:
    # Other keys may share one hash value by the thousand, and a dict of them takes hours to fill.
    if type(key) is str or (type(key) is int and abs(key) < _MAX_KEY):
        return key
    raise Malformed(f"a key is a {type(key).__name__}, expected text or a small number")


def _is_count(*values: Any) -> bool:
    return all(type(value) is int and 0 <= value < 1 << 48 for value in values)


def _ordered_dict(name: str, *arguments: Any) -> Any:
    if not arguments:
        return OrderedDict()
    raise _unusual(name, "called")


def _counter(name: str, entries: Any) -> Any:
    if type(entries) is dict and all(type(count) is int for count in entries.values()):
        return Counter({_checked_key(key): count for key, count in entries.items()})
    raise _unusual(name, "called")


def _set(name: str, entries: Any) -> Any:
    if type(entries) is list:
        return {_checked_key(entry) for entry in entries}
    raise _unusual(name, "called")


def _bytes(name: str, text: Any, encoding: Any) -> Any:
    # Pickle writes bytes so. Other codecs would let a few instructions double the text again and again.
    if type(text) is str and encoding == "latin1":
        return text.encode("latin1")
    raise _unusual(name, "called")


def _size(name: str, sizes: Any) -> Any:
    if type(sizes) is tuple and _is_count(*sizes):
        return sizes
    raise _unusual(name, "called")


def _device(name: str, kind: Any, index: Any = 0) -> Any:
    if type(kind) is str and _LOCATION.fullmatch(kind) and _is_count(index):
        return Noted(name)
    raise _unusual(name, "called")


def _note(name: str, *arguments: Any) -> Any:
    return Noted(name, list(arguments))


def _old_tensor(name: str, storage: Any, offset: Any, size: Any, stride: Any) -> Any:
    return _tensor(name, storage, offset, size, stride, False, OrderedDict())


def _typed_tensor(
    name: str, storage: Any, offset: Any, size: Any, stride: Any, gradient: Any, hooks: Any, dtype: Any, *rest: Any
) -> Any:
    item = stand_ins.DTYPES.get(dtype.name) if type(dtype) is Global else None
    if item is None or type(storage) is not Storage:
        raise _unusual(name, "called")
    return _tensor(name, dataclasses.replace(storage, item_size=item), offset, size, stride, gradient, hooks, *rest)


def _tensor(
    name: str, storage: Any, offset: Any, size: Any, stride: Any, gradient: Any, hooks: Any, metadata: Any = None
) -> Any:
    """Return a tensor whose elements all lie within its storage and are no more than it has."""
    sound = type(storage) is Storage and type(size) is tuple and type(stride) is tuple and len(size) == len(stride)
    if not sound or not _is_count(offset, *size, *stride) or len(size) > 64 or metadata:
        raise _unusual(name, "called")
    if type(gradient) is not bool or type(hooks) is not OrderedDict or hooks or hooks.__dict__:
        raise _unusual(name, "called")
    count, last = 1, offset
    for length, step in zip(size, stride, strict=True):
        count *= length
        last += (length - 1) * step
    available = storage.size // storage.item_size
    if (count and last >= available) or count > available or offset > available:
        raise Malformed(f"a tensor of shape {size} claims more than the {available} values of its storage")
    return Tensor(storage, count * storage.item_size)


def _parameter(name: str, tensor: Any, gradient: Any, hooks: Any) -> Any:
    if type(tensor) is Tensor and type(gradient) is bool and type(hooks) is OrderedDict and not hooks:
        return tensor
    raise _unusual(name, "called")


_CFG_NODE = "yacs.config.CfgNode"
_HISTORY = "mmengine.logging.history_buffer.HistoryBuffer"
_BARE = (_CFG_NODE, _HISTORY, "argparse.Namespace")
#: Attributes that a state dict (its versions) and a CfgNode carry.
_MARKS = frozenset(("_metadata", "__immutable__", "__deprecated_keys__", "__renamed_keys__", "__new_allowed__"))
_CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered_dict,
    "collections.Counter": _counter,
    "builtins.set": _set,
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
_STATES: dict[str, type] = {
    _HISTORY: dict,
    "argparse.Namespace": dict,
    "numpy.dtype": tuple,
    "numpy.core.multiarray._reconstruct": tuple,
    "numpy._core.multiarray._reconstruct": tuple,
}


def _check_nesting(root: Any) -> None:
    """Refuse what contains itself, is nested too deep, or multiplies to too many values where a part is used often."""
    counts: dict[int, tuple[Any, int, int]] = {}
    underway: set[int] = set()

    def visit(value: Any, depth: int) -> tuple[int, int]:
        children = _children(value)
        if children is None:
            return 1, 0
        if id(value) in counts:
            return counts[id(value)][1:]
        if depth > _MAX_DEPTH or id(value) in underway:
            raise Malformed("its contents are nested without end")
        underway.add(id(value))
        total, height = 1, 0
        for child in children:
            count, below = visit(child, depth + 1)
            total, height = total + count, max(height, below + 1)
        underway.discard(id(value))
        if total > _MAX_VALUES or depth + height > _MAX_DEPTH:
            raise Malformed("its contents are nested without end")
        counts[id(value)] = (value, total, height)
        return total, height

    visit(root, 0)


def _children(value: Any) -> list[Any] | None:
    if isinstance(value, dict):
        # The attributes of a state dict are as much of the file as its entries.
        return [*value.values(), *getattr(value, "__dict__", {}).values()]
    if type(value) is Noted:
        return value.parts
    return list(value) if type(value) in (list, tuple) else None
