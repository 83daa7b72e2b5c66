"""Writing a file so that a crash at any instruction leaves the old one or the new one, whole."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

#: Ends every unfinished file; whoever cleans a folder may remove what ends so.
TEMPORARY_SUFFIX = ".unfinished"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path beside ``path`` to write to; what was written replaces ``path`` when the block ends.

    The new file and its folder are on the disk (fsync) before this returns. If the block raises, the unfinished file
    is removed and ``path`` is as it was.

    Args:
        path: The file to write; its folder exists.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    try:
        yield temporary
        sync_file(temporary)
        os.replace(temporary, path)  # noqa: PTH105 (the system call that is meant)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def remove_leftovers(folder: Path) -> list[Path]:
    """Remove the unfinished files that processes which are no more left in a folder, and return their names.

    Only call this when this process is writing nothing there: a file that bears its own number is a leftover, too
    (in a container every training may have the same one).

    Args:
        folder: Where to look, not below; it may be absent.
    """
    removed = []
    for path in sorted(folder.glob(f".*{TEMPORARY_SUFFIX}")):
        number = path.name.removesuffix(TEMPORARY_SUFFIX).rpartition(".")[2]
        if number.isdecimal() and (int(number) == os.getpid() or not _is_running(int(number))):
            path.unlink(missing_ok=True)
            removed.append(path)
    return removed


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def sync_folder(folder: Path) -> None:
    """Make renames and deletions in a folder last."""
    sync_file(folder)


def sync_file(path: Path) -> None:
    """Make what was written to a file last."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
