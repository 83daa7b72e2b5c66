"""The plain form of a training checkpoint, which any PyTorch reads with ``weights_only=True``, and the way back.

MMEngine stores objects: histories of the log (``HistoryBuffer``), NumPy numbers and arrays, and the config as Python
text that it runs when it resumes. In the plain form everything is a tensor, a number, a text, None, or a list, tuple,
set or dict of them:

- ``message_hub["log_scalars"][name]``: ``{"log_history": Tensor, "count_history": Tensor, "max_length": int}``;
- a NumPy array or number elsewhere: ``{"numpy_array": "<f4", "value": Tensor or list of texts}`` or
  ``numpy_number`` likewise, the text being NumPy's name of the type;
- the text of the config: ``config_text``, taken out of ``meta`` and ``message_hub``;
- functions in the state of a parameter scheduler: left out, its constructor sets them again.

What comes back has the same types and bits.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, MutableMapping
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from torch import Tensor

from mmvmamba.checkpoints.calls import Unusual, checked_key
from mmvmamba.checkpoints.config_text import problem_with
from mmvmamba.checkpoints.stand_ins import DTYPES
from mmvmamba.errors import CorruptCheckpoint, SaveError

_HISTORY = {"log_history", "count_history", "max_length"}
_ARRAY, _NUMBER = "numpy_array", "numpy_number"
_NUMBERS = "biufc"  # kinds of NumPy types that tensors have
_TEXTS = "U"
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_CONFIG_KEYS = ("cfg", "config")
#: The reader takes 60, of which some go to the form of arrays and numbers.
_MAX_DEPTH = 50
_MAX_INT = 1 << 2000
_WEIGHTS = ("state_dict", "ema_state_dict")


def make_plain(checkpoint: MutableMapping[str, Any]) -> None:
    """Bring a checkpoint into the plain form, in place; tensors are shared, everything changed is new.

    What comes out of it is what ``read_checkpoint`` takes: no checkpoint is written that cannot be gone on from.

    Raises:
        SaveError: If it holds an object that has no plain form, or weights that are NaN.
    """
    _take_config_text(checkpoint)
    if "param_schedulers" in checkpoint:
        checkpoint["param_schedulers"] = _without_functions(checkpoint["param_schedulers"])
    for key, value in list(checkpoint.items()):
        checkpoint[key] = _to_plain(value, key)
    for key in _WEIGHTS:
        _check_no_nan(checkpoint.get(key), key)


def restore(checkpoint: MutableMapping[str, Any]) -> None:
    """Turn the plain form back into what MMEngine expects, in place; what is not in the plain form stays as it is.

    Raises:
        CorruptCheckpoint: If something looks like the plain form and is not.
    """
    for key, value in list(checkpoint.items()):
        checkpoint[key] = _from_plain(value, key)


def _take_config_text(checkpoint: MutableMapping[str, Any]) -> None:
    hub = checkpoint.get("message_hub")
    places = [checkpoint.get("meta"), hub.get("runtime_info") if isinstance(hub, Mapping) else None]
    for place in places:
        for key in _CONFIG_KEYS:
            if isinstance(place, MutableMapping) and isinstance(place.get(key), str):
                checkpoint.setdefault("config_text", place.pop(key))
            elif isinstance(place, MutableMapping) and place.get(key) is not None:
                raise SaveError(
                    f"checkpoint entry {key} of meta or message_hub is a {type(place[key]).__name__}, expected the "
                    "text of the config, which stands there. Store it under another name."
                )
    text = checkpoint.get("config_text", "")
    problem = problem_with(text) if isinstance(text, str) else f"is a {type(text).__name__}"
    if problem:
        checkpoint["config_text"] = f"# The config was left out: its text {problem}.\n"
    if isinstance(hub, MutableMapping) and isinstance(hub.get("resumed_keys"), Mapping):
        # A copy: MMEngine hands out the dict it works with.
        known = {*hub["log_scalars"], *hub["runtime_info"]}
        hub["resumed_keys"] = {key: value for key, value in hub["resumed_keys"].items() if key in known}


def _without_functions(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_functions(item) for key, item in value.items() if not callable(item)}
    if isinstance(value, (list, tuple)):
        return type(value)(_without_functions(item) for item in value)
    return value


def _to_plain(value: Any, where: str, depth: int = 1) -> Any:
    if depth > _MAX_DEPTH:
        raise SaveError(f"checkpoint entry {where[:200]} is nested {depth} deep, expected at most {_MAX_DEPTH}.")
    if isinstance(value, Tensor):
        return _plain_tensor(value, where)
    if type(value) in _PLAIN:
        return _plain_value(value, where)
    if isinstance(value, HistoryBuffer):
        log, count = value.data
        return {
            "log_history": torch.from_numpy(log.copy()),
            "count_history": torch.from_numpy(count.copy()),
            "max_length": value.max_length,
        }
    if isinstance(value, (np.ndarray, np.generic)):
        return _numpy_to_plain(value, where)
    if isinstance(value, Mapping):
        return _map_items(value, lambda item, key: _to_plain(item, f"{where}.{key}", depth + 1), where)
    if isinstance(value, (set, frozenset)):
        return _map_members(value, lambda item: _plain_key(item, where))
    if isinstance(value, (list, tuple)):
        return _map_members(value, lambda item: _to_plain(item, where, depth + 1))
    if isinstance(value, PurePath):
        return str(value)
    for base in (str, int, float):
        if isinstance(value, base):  # such as the version numbers of PyTorch, which are texts
            return base(value)
    raise _not_plain(where, f"a {type(value).__module__}.{type(value).__qualname__}")


def _not_plain(where: str, found: str) -> SaveError:
    return SaveError(
        f"checkpoint entry {where} is {found}, expected tensors, numbers, texts, or lists and dicts of them: only such "
        "files can be read without running code. Let the hook or data set that puts it there store plain values."
    )


def _plain_value(value: Any, where: str) -> Any:
    if type(value) is int and not -_MAX_INT < value < _MAX_INT:
        raise _not_plain(where, f"a number of {value.bit_length()} bits")
    if type(value) is bytes and not value:
        raise _not_plain(where, "bytes of length 0, which are pickled as a call,")
    if type(value) is torch.dtype and str(value) not in DTYPES:
        raise _not_plain(where, f"the type {value}")
    if type(value) is torch.device and value.type == "meta":
        raise _not_plain(where, "the device meta")
    return value


def _plain_tensor(value: Tensor, where: str) -> Tensor:
    """Return a tensor of ordinary bytes, the very same if it is one."""
    kind = f"a tensor of {value.dtype}, {str(value.layout).removeprefix('torch.')}, on {value.device.type}"
    ordinary = value.layout is torch.strided and not value.is_quantized and not value.is_nested
    if not ordinary or value.device.type == "meta" or str(value.dtype) not in DTYPES:
        raise _not_plain(where, kind)
    if type(value) not in (Tensor, torch.nn.Parameter):
        raise _not_plain(where, f"a {type(value).__module__}.{type(value).__qualname__}")
    if value.is_conj() or value.is_neg():
        value = value.resolve_conj().resolve_neg()
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return value.detach().clone(memory_format=torch.contiguous_format)  # of ``expand``: it shows values many times
    if value.__dict__ or value._backward_hooks:
        return value.detach()  # without notes and hooks, with which PyTorch writes a call
    return value


def _check_no_nan(state: Any, where: str) -> None:
    for name, value in state.items() if isinstance(state, Mapping) else ():
        if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
            continue
        if (value if value.element_size() > 1 else value.float()).isnan().any():
            raise SaveError(
                f"checkpoint entry {where}.{name} holds NaN, expected numbers: no training goes on from it. What was "
                "saved before is kept: resume from there with a lower learning rate."
            )


def _map_items(value: Mapping[Any, Any], change: Callable[[Any, Any], Any], where: str) -> Any:
    """Return a mapping with changed items; the very same one if nothing changes, as modules hang notes on theirs."""
    changed = {_plain_key(key, where): change(item, key) for key, item in value.items()}
    if type(value) not in (dict, OrderedDict):
        return changed
    notes = getattr(value, "__dict__", {})
    same_keys = all(new is old for new, old in zip(changed, value, strict=True))
    same_values = all(new is old for new, old in zip(changed.values(), value.values(), strict=True))
    metadata = change(notes["_metadata"], "_metadata") if "_metadata" in notes else None
    if same_keys and same_values and not set(notes) - {"_metadata"} and metadata is notes.get("_metadata"):
        return value
    if type(value) is dict:
        return changed
    ordered = OrderedDict(changed)
    if metadata is not None:
        ordered._metadata = metadata  # type: ignore[attr-defined]
    return ordered


def _plain_key(key: Any, where: str) -> Any:
    if isinstance(key, tuple):
        key = tuple(part.item() if isinstance(part, np.generic) else part for part in key)
    elif isinstance(key, np.generic):
        key = key.item()
    for base in (str, int, float):
        if isinstance(key, base) and type(key) not in (base, bool):
            key = base(key)
    try:
        return checked_key(key)
    except Unusual as error:
        raise _not_plain(where, f"something of which {error},") from error


def _map_members(value: Any, change: Callable[[Any], Any]) -> Any:
    changed = [change(item) for item in value]
    kind = next(kind for kind in (list, tuple, set, frozenset) if isinstance(value, kind))
    kind = set if kind is frozenset else kind
    if type(value) is kind and all(new is old for new, old in zip(changed, value, strict=True)):
        return value
    return kind(changed)


def _numpy_to_plain(value: np.ndarray | np.generic, where: str) -> dict[str, Any]:
    array = np.asarray(value)
    if array.dtype.kind in _NUMBERS and array.dtype.itemsize <= (16 if array.dtype.kind == "c" else 8):
        native = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="))).reshape(array.shape)
        stored: Any = torch.from_numpy(native.copy())
    elif array.dtype.kind in _TEXTS:
        stored = array.tolist()
    else:
        raise SaveError(
            f"checkpoint entry {where} is a NumPy array of {array.dtype}, expected numbers or texts. Let the hook or "
            "data set that puts it there store plain values."
        )
    dtype = array.dtype.newbyteorder("=").str
    return {_ARRAY if isinstance(value, np.ndarray) else _NUMBER: dtype, "value": stored}


def _from_plain(value: Any, where: str) -> Any:
    if isinstance(value, Mapping):
        if set(value) == _HISTORY:
            return _history(value, where)
        if set(value) == {_ARRAY, "value"}:
            return _numpy(value[_ARRAY], value["value"], where)
        if set(value) == {_NUMBER, "value"}:
            return _numpy(value[_NUMBER], value["value"], where)[()]
        return _map_items(value, lambda item, key: _from_plain(item, f"{where}.{key}"), where)
    if isinstance(value, (list, tuple, set)):
        return _map_members(value, lambda item: _from_plain(item, where))
    return value


def _history(value: Mapping[str, Any], where: str) -> HistoryBuffer:
    columns = []
    for name in ("log_history", "count_history"):
        column = value[name]
        array = column.cpu().numpy() if isinstance(column, Tensor) else np.array(column)
        if array.ndim != 1 or array.dtype.kind not in _NUMBERS:
            raise _broken(f"{where}.{name}", f"shape {array.shape} of {array.dtype}", "a row of numbers")
        columns.append(array)
    length = value["max_length"]
    if type(length) is not int or len(columns[0]) != len(columns[1]) or len(columns[0]) > length:
        raise _broken(where, f"{len(columns[0])} values, {len(columns[1])} counts, room for {length!r}", "equally many")
    return HistoryBuffer(columns[0], columns[1], max_length=length)


def _numpy(name: Any, stored: Any, where: str) -> Any:
    try:
        dtype = np.dtype(name)
    except TypeError as error:
        raise _broken(where, f"the type {name!r}", "one of NumPy") from error
    if isinstance(stored, Tensor) and dtype.kind in _NUMBERS:
        array = stored.cpu().numpy()
    elif not isinstance(stored, Tensor) and dtype.kind in _TEXTS:
        array = np.array(stored, dtype=dtype)
    else:
        raise _broken(where, f"{type(stored).__name__} for {dtype}", "a tensor for numbers, a list for texts")
    if array.dtype != dtype:
        raise _broken(where, str(array.dtype), str(dtype))
    return array


def _broken(where: str, found: str, expected: str) -> CorruptCheckpoint:
    return CorruptCheckpoint(
        f"checkpoint entry {where} has {found}, expected {expected}. The file was changed after it was saved: take "
        "another one."
    )
