"""Reading a checkpoint file: tensors and plain values only, no code is run, every failure says what to do.

The file is opened once. What is hashed, checked and loaded is that open file, whatever happens to its name meanwhile.
"""

from __future__ import annotations

import io
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO

import safetensors
import torch
from torch import Tensor

from mmvmamba.checkpoints import stand_ins
from mmvmamba.checkpoints.archive import check_archive, read_record
from mmvmamba.checkpoints.calls import Malformed, Storage, described_storage
from mmvmamba.checkpoints.config_text import take_config_text
from mmvmamba.checkpoints.download import fetch, known_hash
from mmvmamba.checkpoints.legacy import check_legacy
from mmvmamba.checkpoints.manifest import Manifest, read_manifest, sha256_of
from mmvmamba.checkpoints.pickled import follow
from mmvmamba.errors import CheckpointError, CorruptCheckpoint, HashMismatch, UnsafeCheckpoint

_NAMES_SHOWN = 10
_SECTIONS = ("state_dict", "model", "ema_model")
_MAX_HEADER = 100 << 20
_LIST_LOCK = threading.Lock()
#: Protocols 0 and 1 have no mark at their beginning: a list, dict or tuple, or the name of something to call.
_OLD_PICKLE = re.compile(rb"[\]}(][lpdqtc(.]|[\]}(]?c[\w.]+\n[\w.]+\n")
_FOREIGN = {
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"\x1f\x8b": "compressed by gzip",
    b"BZh": "compressed by bzip2",
    b"\xfd7zXZ": "compressed by xz",
    b"\x28\xb5\x2f\xfd": "compressed by zstandard",
    b"Rar!": "a rar archive",
}


def read_checkpoint(
    source: str | Path,
    *,
    sha256: str | None = None,
    map_location: Any = "cpu",
    section: str | None = None,
    allow_nan: bool = False,
) -> dict[str, Any]:
    """Return the content of a checkpoint; its weights are under ``"state_dict"``, by name.

    Known layouts are ``{"state_dict": ...}`` (mmengine), ``{"model": ...}`` (official classifiers),
    ``{"ema_model": ...}`` (an average alone), the bare state dict and safetensors; ``module.`` of a distributed
    training, however often, is taken off the names. Other entries of the file stay as they are, with NumPy arrays and
    numbers as such, a ``HistoryBuffer`` as ``HistoryRecord``, a ``CfgNode`` or ``Namespace`` as a dict. The text of a
    config is found under ``"config_text"`` only, never where mmengine would run it. The metadata of a safetensors file
    is under ``"meta"``.

    Args:
        source: A file or an https URL.
        sha256: What the file must hash to, 64 hexadecimal digits; by default its manifest's, if it has one.
        map_location: Where the tensors go, as for ``torch.load``.
        section: Entry of the file that holds the weights, such as ``"model_ema"``; by default ``"state_dict"``, else
            ``"model"``, whose figures the official repositories publish.
        allow_nan: Accept weights that are NaN.

    Raises:
        UnsafeCheckpoint: If the file could run code, or is of a kind that can. Nothing of it was run.
        CorruptCheckpoint: If it is cut off, damaged or no checkpoint.
        HashMismatch: If it is not the file that ``sha256`` or its manifest describes.
        CheckpointError: If it is absent or its weights are of no use.
    """
    _check_device(map_location)
    text = str(source)
    if "://" in text:
        # Of the URL as well as given: it is proved on the file that is opened here, not only on the one in the cache.
        sha256 = known_hash(text, sha256)
        path = fetch(text, sha256)
    else:
        path = Path(source).expanduser()
    name = repr(str(path))
    with _open(path, name) as file:
        size = os.fstat(file.fileno()).st_size
        _verify(file, size, name, read_manifest(path), sha256)
        content = _content(file, size, name, map_location)
    return _arranged(content, name, section, allow_nan)


def _check_device(map_location: Any) -> None:
    """Raise if the tensors are to go to a device that is not here, which says nothing about the file."""
    if not isinstance(map_location, (str, torch.device)):
        return
    try:
        device = torch.device(map_location)
        if device.type in ("cpu", "meta"):
            return
        module = torch.get_device_module(device)
        here = module.device_count() if module.is_available() else 0
    except (RuntimeError, AttributeError) as error:
        raise CheckpointError(
            f"map_location is {str(map_location)!r}, expected a device of this PyTorch, such as 'cpu' or 'cuda:0'."
        ) from error
    if (device.index or 0) >= here:
        raise CheckpointError(
            f"map_location is {str(map_location)!r}, but {here} devices of that kind are here. Give map_location='cpu'."
        )


def check_file(path: Path) -> None:
    """Raise unless a zip file of ``torch.save`` is one that ``read_checkpoint`` loads; no tensor is loaded.

    All its bytes are read. Whether weights are finite and what a config text holds is not looked at.

    Raises:
        CheckpointError: As ``read_checkpoint``.
    """
    name = repr(str(path))
    with _open(path, name) as file:
        size = os.fstat(file.fileno()).st_size
        _check_zip(file, size, name)


def _open(path: Path, name: str) -> BinaryIO:
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "is no ordinary file" if path.exists() else "does not exist"
        raise CheckpointError(
            f"checkpoint {name} {found}, expected a file. Train or download it first, or correct the path."
        )
    try:
        return path.open("rb")
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {name} cannot be opened ({error.strerror}), expected a file that you may read. Correct its "
            "permissions or the path."
        ) from error


def _verify(file: BinaryIO, size: int, name: str, manifest: Manifest | None, sha256: str | None) -> None:
    if manifest is not None and size != manifest.size:
        raise CorruptCheckpoint(
            f"checkpoint {name} has {size} bytes, expected the {manifest.size} of its manifest. It is cut off or "
            "another file: delete both and download or train it anew, or go on from an earlier one."
        )
    wanted = {text.lower() for text in (sha256, manifest.sha256 if manifest else None) if text}
    if not wanted:
        return
    for text in wanted:
        if len(text) != 64 or set(text) - set("0123456789abcdef"):
            raise HashMismatch(f"sha256 is {text!r}, expected 64 hexadecimal digits. A shortened hash proves nothing.")
    found, _ = sha256_of(file)
    for text in wanted - {found}:
        whose = "sha256" if sha256 is not None and text == sha256.lower() else "its manifest"
        raise HashMismatch(
            f"checkpoint {name} has sha256 {found}, expected {text} ({whose}). It is damaged or another file: delete "
            "it and download or train it anew, or go on from an earlier one."
        )


def _content(file: BinaryIO, size: int, name: str, map_location: Any) -> Any:
    """Return what an open file holds, whichever of the three kinds it is."""
    file.seek(0)
    head = file.read(512)
    if not head:
        raise CorruptCheckpoint(f"checkpoint {name} has 0 bytes, expected weights. Download or train it anew.")
    # First, because the length it begins with may look like the beginning of a pickle.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= min(size - 8, _MAX_HEADER):
        return _load_safetensors(file, name, map_location)
    if head.startswith(b"PK\3\4"):
        _check_zip(file, size, name)
        return _load(file, name, map_location)
    if head.startswith(b"\x80"):
        check_legacy(file, size, name)
        return _load(file, name, map_location)
    raise _no_checkpoint(head, size, name)


def _no_checkpoint(head: bytes, size: int, name: str) -> CheckpointError:
    for start, kind in _FOREIGN.items():
        if head.startswith(start):
            return UnsafeCheckpoint(
                f"checkpoint {name} is {kind}, expected a file of torch.save or safetensors. Unpack it first."
            )
    if head[257:262] == b"ustar":
        return UnsafeCheckpoint(
            f"checkpoint {name} is a tar archive, expected a file of torch.save or safetensors. PyTorch before 0.1.10 "
            "wrote such files, and reading them runs code: save the weights anew on a machine you trust."
        )
    if _OLD_PICKLE.match(head):
        return UnsafeCheckpoint(
            f"checkpoint {name} begins like a pickle of protocol 0 or 1, expected a file of torch.save or safetensors; "
            "such a file can run code of its author. Nothing of it was run. Do not load it."
        )
    text = head.decode("utf-8", "replace").strip()
    if "\0" not in text and "\N{REPLACEMENT CHARACTER}" not in text:
        kind = "an HTML page" if text.startswith("<") else "a text file"
        return CorruptCheckpoint(
            f"checkpoint {name} is {kind} beginning {text[:40]!r} ({size} bytes), expected a file of torch.save or "
            "safetensors. The download gave something else: delete the file and fetch the real one."
        )
    return CorruptCheckpoint(
        f"checkpoint {name} begins with the bytes {head[:8]!r} ({size} bytes), expected a file of torch.save or "
        "safetensors. Check the path, or download it again."
    )


def _check_zip(file: BinaryIO, size: int, name: str) -> None:
    records = check_archive(file, size, name)
    if "byteorder" in records and read_record(file, records["byteorder"]) != b"little":
        raise CheckpointError(f"checkpoint {name} is of a big-endian machine. Save it anew on an ordinary one.")
    for record in ("version", ".format_version", ".storage_alignment"):
        if record in records and not read_record(file, records[record]).strip().isdigit():
            raise CorruptCheckpoint(f"checkpoint {name} is damaged: its {record!r} is no number. Download it again.")

    def storage_of(reference: tuple[Any, ...]) -> Storage:
        storage = described_storage(reference, fields=5)
        record = records.get(f"data/{storage.key}")
        if record is None or record.size != storage.size:
            found = "no bytes" if record is None else f"{record.size} bytes"
            raise Malformed(f"storage {storage.key[:20]!r} claims {storage.size} bytes and has {found}")
        return storage

    data = io.BytesIO(read_record(file, records["data.pkl"]))
    follow(data, size, name, storage_of)
    if data.read(1):
        raise CorruptCheckpoint(f"checkpoint {name} is damaged: its list of contents goes on. Download it again.")


def _load(file: BinaryIO, name: str, map_location: Any) -> Any:
    """Give a checked file to PyTorch, which checks again in its own way; there is no second try with less care."""
    file.seek(0)
    try:
        with _LIST_LOCK:
            # What other code of the process allowed is not allowed here.
            others = torch.serialization.get_safe_globals()
            torch.serialization.clear_safe_globals()
            try:
                with torch.serialization.safe_globals(stand_ins.torch_list()):
                    content = torch.load(file, map_location=map_location, weights_only=True, mmap=False)
            finally:
                torch.serialization.clear_safe_globals()
                torch.serialization.add_safe_globals(others)
    except UnpicklingError as error:
        raise UnsafeCheckpoint(
            f"checkpoint {name} is refused by PyTorch ({str(error).strip().splitlines()[0]}), expected tensors and "
            "plain values. Nothing of it was run. Save its weights alone: torch.save(model.state_dict(), FILE)."
        ) from error
    except torch.OutOfMemoryError:
        raise
    except (
        RuntimeError,
        EOFError,
        OSError,
        LookupError,
        ValueError,
        TypeError,
        AssertionError,
        AttributeError,
    ) as error:
        raise _broken(name, error) from error
    return stand_ins.plain(content, name)


def _load_safetensors(file: BinaryIO, name: str, map_location: Any) -> dict[str, Any]:
    device = map_location if isinstance(map_location, (str, torch.device)) else "cpu"
    try:
        # The same open file again: its name may mean another one by now.
        with safetensors.safe_open(f"/proc/self/fd/{file.fileno()}", framework="pt", device="cpu") as opened:
            # A copy, because a tensor that is a window on the file would change with it.
            state = {key: opened.get_tensor(key).clone() for key in opened.keys()}  # noqa: SIM118
            metadata = dict(opened.metadata() or {})
    except (safetensors.SafetensorError, OSError, ValueError, RuntimeError, LookupError, TypeError) as error:
        raise _broken(name, error) from error
    for key, value in state.items():
        if max(value.shape, default=0) >= 1 << 48:
            raise CorruptCheckpoint(f"checkpoint {name} is damaged: {key!r} has the shape {tuple(value.shape)}.")
        if str(value.dtype) not in stand_ins.DTYPES:
            raise CheckpointError(
                f"checkpoint {name}: {key!r} is of type {value.dtype}, expected one of {', '.join(stand_ins.DTYPES)}. "
                "Save it as one of these."
            )
    return {"state_dict": {key: value.to(device) for key, value in state.items()}, "meta": metadata}


def _broken(name: str, error: Exception) -> CheckpointError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if "map_location" in str(error):
        return CheckpointError(
            f"checkpoint {name} was saved on a device that is not here, expected map_location to name one. Give "
            "map_location='cpu'."
        )
    if "allocate" in str(error):
        return CheckpointError(
            f"checkpoint {name} does not fit the memory ({lines[0]}), expected room for all its tensors. Free some, or "
            "save the weights alone: torch.save(model.state_dict(), FILE)."
        )
    return CorruptCheckpoint(
        f"checkpoint {name} cannot be read ({lines[0]}), expected a complete file of torch.save or safetensors. It is "
        "probably cut off: delete it and download or train it anew."
    )


def _arranged(content: Any, name: str, section: str | None, allow_nan: bool) -> dict[str, Any]:
    """Return the content with the weights under ``"state_dict"`` and without text that could be run."""
    whole = isinstance(content, Mapping)
    found = section if section else next((k for k in _SECTIONS if whole and isinstance(content.get(k), Mapping)), None)
    if section and not (whole and isinstance(content.get(section), Mapping)):
        entries = [key for key, value in content.items() if isinstance(value, Mapping)] if whole else []
        raise CheckpointError(f"checkpoint {name} has no section {section!r}; found {entries}. Name one of these.")
    state = _state_dict(content[found] if found else content, name)
    others = {key: value for key, value in content.items() if key != found} if found else {}
    arranged = {**others, "state_dict": state}
    if "meta" in arranged and not isinstance(arranged["meta"], dict):
        raise CorruptCheckpoint(f"checkpoint {name}: meta is a {type(arranged['meta']).__name__}, expected a dict.")
    take_config_text(arranged, name)
    if not allow_nan:
        _check_no_nan(state, name)
        if isinstance(arranged.get("ema_state_dict"), dict):
            _check_no_nan(arranged["ema_state_dict"], name)
    return arranged


def _is_of_tensors(value: Mapping[Any, Any]) -> bool:
    return bool(value) and all(isinstance(entry, Tensor) for entry in value.values())


def _state_dict(state: Any, name: str) -> dict[str, Tensor]:
    if not isinstance(state, Mapping):
        raise CheckpointError(
            f"checkpoint {name} holds a {type(state).__name__}, expected a dict of tensors, alone or under "
            "'state_dict' or 'model'. Save model.state_dict()."
        )
    wrong = [f"{key!r} ({type(value).__name__})" for key, value in state.items() if not isinstance(value, Tensor)]
    wrong += [f"{key!r}, a name that is no text" for key in state if not isinstance(key, str)]
    sections = [key for key, value in state.items() if isinstance(value, Mapping) and _is_of_tensors(value)]
    advice = (
        f"The sections {sections[:_NAMES_SHOWN]} hold tensors: give read_checkpoint one of them as section, or save it "
        f"alone: torch.save(content[{sections[0]!r}], FILE)."
        if sections
        else "Save model.state_dict()."
    )
    if wrong or not state:
        raise CheckpointError(
            f"checkpoint {name}: {', '.join(wrong[:_NAMES_SHOWN]) or 'the state dict'} "
            f"{'are no tensors' if wrong else 'is empty'}, expected a dict of tensors, alone or under 'state_dict' or "
            f"'model'. {advice}"
        )
    prefix = ""
    # An average of a distributed model has it twice.
    while all(key.startswith(f"{prefix}module.") for key in state):
        prefix += "module."
    result: OrderedDict[str, Tensor] = OrderedDict((key[len(prefix) :], value) for key, value in state.items())
    metadata = getattr(state, "_metadata", None)
    if metadata is not None:
        # Versions of the modules, by which PyTorch and mmcv recognise old entries.
        result._metadata = (  # type: ignore[attr-defined]
            OrderedDict((f"{key}.".removeprefix(prefix).rstrip("."), value) for key, value in metadata.items())
            if prefix
            else metadata
        )
    return result


def _check_no_nan(state: Mapping[str, Any], name: str) -> None:
    seen = set()
    for key, value in state.items():
        if id(value) in seen:
            continue
        seen.add(id(value))
        if (
            not isinstance(value, Tensor)
            or value.is_meta
            or not value.numel()
            or not (value.is_floating_point() or value.is_complex())
        ):
            continue
        # Infinite values are often meant, as in masks and observers; NaN never is. float8 has no isnan of its own.
        if (value if value.element_size() > 1 else value.float()).isnan().any():
            raise CheckpointError(
                f"checkpoint {name}: {key!r} holds NaN, expected numbers. If a training that diverged wrote it, use an "
                "earlier checkpoint; read_checkpoint(..., allow_nan=True) reads it as it is."
            )
