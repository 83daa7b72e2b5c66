"""The file backend through which ``mmvmamba.CheckpointHook`` lets MMEngine write and delete checkpoints."""

from __future__ import annotations

import itertools
import weakref
from pathlib import Path
from typing import Any, Protocol

from mmengine.fileio import LocalBackend, register_backend

_BACKEND = "mmvmamba.checkpoint_files"


class FileKeeper(Protocol):
    """Who decides how a file is written and when it is deleted."""

    def write_file(self, path: Path, content: bytes) -> None:
        """Write a file."""

    def discard_file(self, path: Path) -> None:
        """Note that a file is no more needed."""


class CheckpointFiles(LocalBackend):
    """Local files of a keeper.

    MMEngine's hook deletes before it saves, and saves in place. Through this backend, which is its own way to be
    extended, the order and the manner change while what it saves and deletes stays its decision.

    Args:
        keeper: Number of the keeper: MMEngine wants arguments that are JSON.
    """

    def __init__(self, keeper: int) -> None:
        self._keeper = keeper

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Let the keeper write a file."""
        _KEEPERS[self._keeper].write_file(Path(filepath), obj)

    def remove(self, filepath: str | Path) -> None:
        """Tell the keeper that a file is no more needed."""
        _KEEPERS[self._keeper].discard_file(Path(filepath))


_KEEPERS: weakref.WeakValueDictionary[int, FileKeeper] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def backend_of(keeper: FileKeeper) -> dict[str, Any]:
    """Return MMEngine's ``backend_args`` for files that a keeper writes."""
    number = next(_numbers)
    _KEEPERS[number] = keeper
    return {"backend": _BACKEND, "keeper": number}


register_backend(_BACKEND, CheckpointFiles, force=True)
