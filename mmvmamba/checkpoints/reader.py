"""Reading a checkpoint file: tensors and plain values only, no code is run, every failure says what to do."""

from __future__ import annotations

import pickle
import re
import urllib.error
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import torch
from torch import Tensor

from mmvmamba.errors import CheckpointError

_NAMES_SHOWN = 10


class _DictStub:
    """Stands for a class derived from dict: unpickles to an ordered dict, the only kind PyTorch fills."""

    def __new__(cls, *_: object) -> Any:
        return OrderedDict()


class _Inert:
    """Stands for anything else: takes arguments and state, does nothing."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


#: What well-known files hold beside their weights. None of it is needed: each name is replaced by a stub.
_STUBS: dict[str, type] = {
    # The training configuration in the official ImageNet checkpoints.
    "yacs.config.CfgNode": _DictStub,
    # The curves of the training in MMEngine's checkpoints.
    **dict.fromkeys(
        (
            "mmengine.logging.history_buffer.HistoryBuffer",
            "numpy.dtype",
            "numpy.ndarray",
            "numpy.core.multiarray.scalar",
            "numpy.core.multiarray._reconstruct",
            "numpy._core.multiarray.scalar",
            "numpy._core.multiarray._reconstruct",
            "builtins.getattr",
        ),
        _Inert,
    ),
}


def read_checkpoint(source: str | Path, *, sha256: str | None = None, map_location: Any = "cpu") -> dict[str, Any]:  # noqa: ARG001
    """Return the content of a checkpoint; its weights are under ``"state_dict"``, by name.

    Args:
        source: A file or an https URL.
        sha256: What the file must hash to, 64 hexadecimal digits; by default its manifest's, if it has one.
        map_location: Where the tensors go, as for ``torch.load``.

    Raises:
        CheckpointError: If the file is absent, broken, of another kind or dangerous.
    """
    text = str(source)
    path = _fetch(text) if text.startswith(("http://", "https://")) else Path(source).expanduser()
    _check_file(path)
    content = _load(path, map_location)
    return {**(content if isinstance(content, Mapping) else {}), "state_dict": _state_dict(path, content)}


def _fetch(url: str) -> Path:
    path = Path(torch.hub.get_dir()) / "checkpoints" / unquote(Path(urlparse(url).path).name)
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(path), progress=False)
    except (OSError, urllib.error.URLError) as error:
        raise CheckpointError(
            f"checkpoint {url!r} could not be downloaded to {str(path)!r}: {error}. Download it elsewhere and put it "
            "there, or name a file instead of the URL."
        ) from error
    return path


def _check_file(path: Path) -> None:
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        raise CheckpointError(
            f"checkpoint {str(path)!r} {found}, expected a file. Train or download it first, or correct the path."
        )
    with path.open("rb") as file:
        head = file.read(256)
    if not head:
        raise CheckpointError(f"checkpoint {str(path)!r} has 0 bytes, expected weights. Download or train it anew.")
    if head.startswith((b"PK", b"\x80")):
        return
    text = head.decode("utf-8", "replace").strip()
    if "\0" not in text and "\N{REPLACEMENT CHARACTER}" not in text:
        kind = "an HTML page" if text.startswith("<") else "a text file"
        raise CheckpointError(
            f"checkpoint {str(path)!r} is {kind} beginning {text[:40]!r}, expected a file of torch.save. The download "
            "gave something else: delete the file and fetch the real one."
        )
    raise CheckpointError(
        f"checkpoint {str(path)!r} begins with the bytes {head[:8]!r}, expected a file of torch.save. Check the path."
    )


def _load(path: Path, map_location: Any) -> Any:
    stubs: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [(stub, name) for name, stub in _STUBS.items()]
    try:
        with torch.serialization.safe_globals(stubs):
            return torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        names = _foreign_globals(path, str(error))
        if not names:
            raise _broken(path, error) from error
        raise CheckpointError(
            f"checkpoint {str(path)!r} holds objects of {', '.join(names)}, expected tensors only; such a file can run "
            "code of its author when it is read. If you trust it, save its weights alone, where those packages are "
            "installed: torch.save({'model': torch.load(FILE, weights_only=False)['model']}, NEW_FILE)."
        ) from error
    except (RuntimeError, EOFError, OSError, KeyError, IndexError, ValueError) as error:
        raise _broken(path, error) from error


def _broken(path: Path, error: Exception) -> CheckpointError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return CheckpointError(
        f"checkpoint {str(path)!r} cannot be read ({lines[0]}), expected a complete file of torch.save. It is probably "
        "cut off: delete it and download or train it anew."
    )


def _foreign_globals(path: Path, message: str) -> list[str]:
    """Name the classes and functions a file refers to that are neither PyTorch's nor stubbed."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except (pickle.UnpicklingError, ValueError, RuntimeError):
        # Files of the format before PyTorch 1.6 cannot be searched; the message names the first one.
        names = re.findall(r"GLOBAL ([\w.]+)", message)
    return [name for name in names if name not in _STUBS]


def _state_dict(path: Path, content: Any) -> dict[str, Tensor]:
    state = content
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            state = content[key]
            break
    if not isinstance(state, Mapping):
        raise CheckpointError(
            f"checkpoint {str(path)!r} holds a {type(state).__name__}, expected a dict of tensors, alone or under "
            "'state_dict' or 'model'. Save model.state_dict()."
        )
    wrong = [f"{name!r} ({type(value).__name__})" for name, value in state.items() if not isinstance(value, Tensor)]
    if wrong or not state:
        raise CheckpointError(
            f"checkpoint {str(path)!r}: {', '.join(wrong[:_NAMES_SHOWN]) or 'the state dict'} "
            f"{'are no tensors' if wrong else 'is empty'}, expected a dict of tensors, alone or under 'state_dict' or "
            "'model'. Save model.state_dict()."
        )
    return dict(state)
