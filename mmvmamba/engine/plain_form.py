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

from mmvmamba.errors import CorruptCheckpoint, SaveError

_HISTORY = {"log_history", "count_history", "max_length"}
_ARRAY, _NUMBER = "numpy_array", "numpy_number"
_NUMBERS = "biufc"  # kinds of NumPy types that tensors have
_TEXTS = "U"
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_CONFIG_KEYS = ("cfg", "config")


def make_plain(checkpoint: MutableMapping[str, Any]) -> None:
    """Bring a checkpoint into the plain form, in place; tensors are shared, everything changed is new.

    Raises:
        SaveError: If it holds an object that has no plain form.
    """
    _take_config_text(checkpoint)
    if "param_schedulers" in checkpoint:
        checkpoint["param_schedulers"] = _without_functions(checkpoint["param_schedulers"])
    for key, value in list(checkpoint.items()):
        checkpoint[key] = _to_plain(value, key)


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
                place.pop(key, None)
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


def _to_plain(value: Any, where: str) -> Any:
    if isinstance(value, Tensor) or type(value) in _PLAIN:
        return value
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
        return _map_items(value, lambda item, key: _to_plain(item, f"{where}.{key}"))
    if isinstance(value, (list, tuple, set, frozenset)):
        return _map_members(value, lambda item: _to_plain(item, where))
    if isinstance(value, PurePath):
        return str(value)
    for base in (str, int, float):
        if isinstance(value, base):  # such as the version numbers of PyTorch, which are texts
            return base(value)
    raise SaveError(
        f"checkpoint entry {where} is a {type(value).__module__}.{type(value).__qualname__}, expected tensors, "
        "numbers, texts, or lists and dicts of them: only such files can be read without running code. Let the hook or "
        "data set that puts it there store plain values."
    )


def _map_items(value: Mapping[Any, Any], change: Callable[[Any, Any], Any]) -> Any:
    """Return a mapping with changed items; the very same one if nothing changes, as modules hang notes on theirs."""
    changed = {_plain_key(key): change(item, key) for key, item in value.items()}
    if type(value) not in (dict, OrderedDict):
        return changed
    same_keys = all(new is old for new, old in zip(changed, value, strict=True))
    if same_keys and all(new is old for new, old in zip(changed.values(), value.values(), strict=True)):
        return value
    return changed if type(value) is dict else OrderedDict(changed)


def _plain_key(key: Any) -> Any:
    return key.item() if isinstance(key, np.generic) else key


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
        return _map_items(value, lambda item, key: _from_plain(item, f"{where}.{key}"))
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
