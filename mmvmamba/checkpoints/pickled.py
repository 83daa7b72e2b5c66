"""Following a pickle without running it, to know before PyTorch reads it that it only builds tensors and plain values.

A pickle is a program for a small stack machine. This is that machine with nothing behind it: a name stays a name, a
call becomes a note of what would be called. Its instructions are those that ``torch.load(weights_only=True)`` has;
names are those of ``stand_ins``; every call is checked with its arguments, above all that no tensor reaches beyond its
storage and no storage beyond its bytes in the file.
"""

from __future__ import annotations

import _compat_pickle
import pickletools
import re
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any, BinaryIO

from mmvmamba.checkpoints import stand_ins
from mmvmamba.checkpoints.calls import (
    BARE,
    CALLS,
    EMPTY_DICTS,
    MARKS,
    STATES,
    Global,
    Malformed,
    Noted,
    Storage,
    Tensor,
    Unusual,
    checked_key,
    copied,
    is_common_key,
    unusual,
)
from mmvmamba.errors import CorruptCheckpoint, UnsafeCheckpoint

_NAMES_SHOWN = 10
_MAX_DEPTH = 60
#: Values, each counted as often as it is reached: lists within lists of lists can hold 2**60 in a few bytes.
_MAX_VALUES = 20_000_000
#: Tied weights show the same bytes twice; more than this is a file that grows when it is read.
_MAX_SHARE = 4
_MAX_INSTRUCTIONS = 2_000_000
#: Keys of kinds of which many may share one hash value; a dict of 60,000 such takes minutes to fill.
_MAX_UNCOMMON_KEYS = 10_000
_CHUNK = 4096
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


class _Bounded:
    """A file of which nobody asks for more bytes than it has; Python sets aside what is asked for before it reads."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size
        self.readline = file.readline

    def read(self, count: int) -> bytes:
        if count > _CHUNK:
            count = min(count, self.size - self.file.tell())
        return self.file.read(count)


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
    except Unusual as error:
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
        texts = [str(text) for kind, text in program if kind in ("SHORT_BINUNICODE", "UNICODE")]
        names += [text for text in texts if re.fullmatch(r"[A-Za-z_][\w.]{0,80}", text, re.ASCII)]
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
        self.keys_left = _MAX_UNCOMMON_KEYS
        # What a file holds once may be copied once: each item takes an instruction, each character a byte.
        self.items_left = _MAX_INSTRUCTIONS
        self.characters_left = size
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
            target[self._counted(key)] = value

    def _counted(self, key: Any) -> Any:
        if not is_common_key(key):
            self.keys_left -= 1
            if self.keys_left < 0:
                raise Unusual(f"it has more than {_MAX_UNCOMMON_KEYS} keys that are neither text nor small numbers")
        return checked_key(key)

    def _count_copies(self, items: int, characters: int) -> None:
        self.items_left -= items
        self.characters_left -= characters
        if self.items_left < 0 or self.characters_left < 0:
            raise unusual("one value", "copied again and again")

    def _binpersid(self) -> None:
        reference = self.stack.pop()
        if type(reference) is not tuple or not reference or reference[0] != "storage":
            raise Malformed("refers to something outside that is no storage")
        self.stack.append(self.storage_of(reference))

    def _newobj(self) -> None:
        arguments, target = self.stack.pop(), self.stack.pop()
        name = target.name if type(target) is Global else ""
        if type(arguments) is not tuple or name not in (*BARE, *EMPTY_DICTS) or (arguments and name in BARE):
            raise unusual(name or "a value", "made without a call")
        self.stack.append(OrderedDict() if name in EMPTY_DICTS else Noted(name))

    def _reduce(self) -> None:
        arguments, target = self.stack.pop(), self.stack.pop()
        name = target.name if type(target) is Global else ""
        if type(arguments) is not tuple or name not in CALLS:
            raise unusual(name or "a value", "called")
        self._count_copies(*copied(name, arguments))
        if name in ("builtins.set", "builtins.frozenset") and type(arguments[0]) is list:
            for member in arguments[0]:
                self._counted(member)
        result = CALLS[name](name, *arguments)
        if type(result) is Tensor:
            self.bytes_left -= result.size
            if self.bytes_left < 0:
                raise Unusual(f"its tensors show more than {_MAX_SHARE} times the bytes of the file")
        self.stack.append(result)

    def _build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is OrderedDict and type(state) is dict and MARKS.issuperset(state):
            target.__dict__.update(state)  # attributes, none of which is called
        elif type(target) is OrderedDict and state is target:
            pass  # addict's way; PyTorch makes its items attributes, which nothing looks at
        elif type(target) is Noted and type(state) is STATES.get(target.name):
            if type(state) is tuple:  # of NumPy, whose arrays are copied
                self._count_copies(0, sum(len(part) for part in state if type(part) is bytes))
            target.parts.append(state)
        else:
            raise unusual(getattr(target, "name", type(target).__name__), "given a state")


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
