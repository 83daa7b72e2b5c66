"""The closed list of names that a pickled checkpoint may use, and the harmless objects that stand for foreign ones.

A checkpoint names classes and functions, and reading it calls them. PyTorch's own ``weights_only`` list is long (it
allows ``torch.Tensor(2**40)`` and ``bytearray(2**40)``, which allocate) and other code of the process may add to it;
ours is what files of mmengine, MMPretrain, VMamba and timm-style trainings hold, and nothing else.
"""

from __future__ import annotations

import re
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import torch

from mmvmamba.errors import CorruptCheckpoint, UnsafeCheckpoint

#: Storage classes -> bytes of an element; quantized ones are left out on purpose.
STORAGES = {
    "torch.DoubleStorage": 8,
    "torch.FloatStorage": 4,
    "torch.HalfStorage": 2,
    "torch.BFloat16Storage": 2,
    "torch.LongStorage": 8,
    "torch.IntStorage": 4,
    "torch.ShortStorage": 2,
    "torch.CharStorage": 1,
    "torch.ByteStorage": 1,
    "torch.BoolStorage": 1,
    "torch.ComplexFloatStorage": 8,
    "torch.ComplexDoubleStorage": 16,
    "torch.storage.UntypedStorage": 1,
}
#: Element types that have no storage class of their own, and those that a checkpoint may hold as a plain value.
DTYPES = {
    f"torch.{name}": getattr(torch, name).itemsize
    for name in (
        *("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"),
        *("complex64", "complex128", "uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2"),
    )
}
TENSORS = (
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
    "torch._utils._rebuild_parameter",
)
#: What PyTorch allows and we do too, with arguments that ``pickled`` checks.
PLAIN_CALLS = (
    "collections.OrderedDict",
    "collections.Counter",
    "builtins.set",
    "builtins.complex",
    "_codecs.encode",
    "torch.Size",
    "torch.device",
)

_NUMPY_CODE = re.compile(r"[biufc]\d{1,2}|[SU]\d{1,4}")


class HistoryRecord:
    """What a ``HistoryBuffer`` of mmengine holds, without mmengine.

    Attributes:
        max_length: How many values it keeps.
        log_history: The values, a NumPy array.
        count_history: How many samples each stands for, a NumPy array.
    """

    def __init__(self, max_length: int, log_history: Any, count_history: Any) -> None:
        self.max_length = max_length
        self.log_history = log_history
        self.count_history = count_history


class _DictStub:
    """Stands for a class derived from dict: unpickles to an ordered dict, the only kind PyTorch fills."""

    def __new__(cls, *_: object) -> Any:
        return OrderedDict()


class _CopiedDict:
    """Stands for a class derived from dict that is made of a plain one."""

    def __new__(cls, entries: Any = (), *_: object) -> Any:
        return OrderedDict(entries)


class _NoBytes:
    """Stands for ``bytes``, of which a file may have the empty ones by a call."""

    def __new__(cls, *_: object) -> Any:
        return b""


class _StandIn:
    """Stands for a class or function: keeps the arguments and the state it was given, does nothing."""

    def __init__(self, *args: object) -> None:
        self.args = args
        self.state: Any = None

    def __new__(cls, *_: object) -> Any:
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        self.state = state


class _Array(_StandIn):
    pass


class _ArrayClass(_StandIn):
    pass


class _Scalar(_StandIn):
    pass


class _Dtype(_StandIn):
    pass


class _History(_StandIn):
    pass


class _Method(_StandIn):
    pass


class _Namespace(_StandIn):
    pass


class _Path(_StandIn):
    pass


class _Factory(_StandIn):
    pass


class _Scheduler(_StandIn):
    pass


#: What makes the absent entries of a ``defaultdict``, which is read as a dict without.
FACTORIES = tuple(f"builtins.{name}" for name in ("list", "dict", "int", "float", "set", "str", "tuple"))
PATHS = tuple(f"pathlib.{name}" for name in ("PosixPath", "PurePosixPath", "_local.PosixPath", "_local.PurePosixPath"))


#: Name in the file -> what is put in its place. None of these is ever called under its own name.
STAND_INS: dict[str, type] = {
    # The training configuration in the official ImageNet checkpoints.
    "yacs.config.CfgNode": _DictStub,
    # The command line of trainings in the manner of DeiT.
    "argparse.Namespace": _Namespace,
    # Settings of data sets in meta.dataset_meta, and what they are derived from.
    "mmengine.config.config.ConfigDict": _CopiedDict,
    "addict.addict.Dict": _DictStub,
    "collections.defaultdict": _DictStub,
    **dict.fromkeys(FACTORIES, _Factory),
    "builtins.frozenset": frozenset,
    "builtins.bytes": _NoBytes,
    # Where a training of DeiT's kind wrote to.
    **dict.fromkeys(PATHS, _Path),
    # The method by which OneCycleLR goes down is written as one of this class.
    "mmengine.optim.scheduler.param_scheduler.OneCycleParamScheduler": _Scheduler,
    # The curves of the training in mmengine's checkpoints, and the methods that each of them lists by name.
    "mmengine.logging.history_buffer.HistoryBuffer": _History,
    "builtins.getattr": _Method,
    # Figures and colours in meta and message_hub.
    "numpy.dtype": _Dtype,
    "numpy.ndarray": _ArrayClass,
    "numpy.core.multiarray.scalar": _Scalar,
    "numpy._core.multiarray.scalar": _Scalar,
    "numpy.core.multiarray._reconstruct": _Array,
    "numpy._core.multiarray._reconstruct": _Array,
}
ALLOWED = frozenset((*STORAGES, *DTYPES, *TENSORS, *PLAIN_CALLS, *STAND_INS))


def torch_list() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """Return the stand-ins as ``torch.serialization.add_safe_globals`` takes them."""
    return [(stand_in, name) for name, stand_in in STAND_INS.items()]


def plain(value: Any, name: str) -> Any:
    """Return a value of a checkpoint without stand-ins: containers, tensors, numbers, text and NumPy arrays.

    Args:
        value: What ``torch.load`` gave; not nested without end, which ``pickled`` has made sure of.
        name: What to call the file in messages.

    Raises:
        UnsafeCheckpoint: If it holds arrays of objects, or stand-ins put together in a way no such class is pickled.
    """
    try:
        return _plain(value, {})
    except (TypeError, ValueError, AttributeError, KeyError, IndexError, OverflowError) as error:
        raise CorruptCheckpoint(
            f"checkpoint {name} holds an object of NumPy or mmengine that is not as they write it ({error}), expected "
            "plain numbers. Download it again, or save its weights alone: torch.save(model.state_dict(), FILE)."
        ) from error
    except _ArrayOfObjects as error:
        raise UnsafeCheckpoint(
            f"checkpoint {name} holds a NumPy array of type {error}, expected numbers or text; an array of objects can "
            "run code of its author. Save its weights alone: torch.save(model.state_dict(), FILE)."
        ) from error


class _ArrayOfObjects(Exception):
    pass


def _plain(value: Any, done: dict[int, tuple[Any, Any]]) -> Any:
    # What a file holds once is made once: nesting the same list twice, thirty times over, must not take 2**30 steps.
    # The original is kept beside the result, because the id of an object that is gone may be given to another.
    if id(value) in done:
        return done[id(value)][1]
    result = _new_plain(value, done)
    done[id(value)] = (value, result)
    return result


def _new_plain(value: Any, done: dict[int, tuple[Any, Any]]) -> Any:
    kind = type(value)
    if kind in (dict, OrderedDict, Counter):
        result: Any = kind()
        for key, entry in value.items():
            if type(entry) is not _Method:  # of an object whose constructor sets it again
                result[key] = _plain(entry, done)
        metadata = value.__dict__.get("_metadata") if kind is OrderedDict else None
        if isinstance(metadata, dict):
            result.__dict__["_metadata"] = _plain(metadata, done)
        return result
    if kind in (list, tuple):
        return kind(_plain(entry, done) for entry in value)
    if kind is _Namespace:
        return {key: _plain(entry, done) for key, entry in value.state.items()}
    if kind is _History:
        state = value.state
        max_length, log, count = state["max_length"], state["_log_history"], state["_count_history"]
        if type(max_length) is not int:
            raise TypeError(f"max_length is a {type(max_length).__name__}")
        return HistoryRecord(max_length, _plain(log, done), _plain(count, done))
    if kind is _Path:
        return "/".join(value.args).replace("//", "/", 1) if value.args else "."
    if kind is _Scalar:
        code, data = value.args
        return _numpy_array(code, (), data)[()]
    if kind is _Array:
        _, shape, code, fortran, data = value.state
        return _numpy_array(code, shape, data, order="F" if fortran else "C")
    if isinstance(value, _StandIn) or (isinstance(value, type) and issubclass(value, (_StandIn, _DictStub))):
        return None  # a bare dtype, class or method: nothing that a loader of weights needs
    return value


def _numpy_array(code: Any, shape: tuple[int, ...], data: Any, order: Any = "C") -> Any:
    import numpy as np

    text, byte_order = code.args[0], code.state[1]
    if type(text) is not str or not _NUMPY_CODE.fullmatch(text):
        raise _ArrayOfObjects(repr(text))
    if type(data) is not bytes or byte_order not in ("<", ">", "|", "="):
        raise TypeError(f"data of type {type(data).__name__}, byte order {byte_order!r}")
    dtype = np.dtype(byte_order + text)
    return np.frombuffer(data, dtype=dtype).reshape(shape, order=order).copy(order=order)
