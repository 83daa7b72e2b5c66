"""Writing a checkpoint and its manifest so that at every moment a whole one is on the disk."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import platform
import shutil
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from types import MappingProxyType

import torch

from mmvmamba.checkpoints.atomic import replacing, sync_file, sync_folder
from mmvmamba.checkpoints.manifest import Manifest, manifest_path, manifest_text
from mmvmamba.checkpoints.reader import check_file
from mmvmamba.errors import CheckpointError, SaveError
from mmvmamba.version import __version__


def write_checkpoint(
    path: Path,
    content: bytes,
    *,
    iteration: int | None = None,
    epoch: int | None = None,
    seed: int | None = None,
    world_size: int | None = None,
    resumable: bool = False,
    source: Mapping[str, str] | None = None,
    prove: bool = False,
) -> Manifest:
    """Write a checkpoint and its manifest; both are on the disk (fsync) when this returns.

    Whatever can fail for want of space is done under temporary names first. Only then the manifest of an older file of
    the same name goes, the new file replaces that one and gets its own manifest; a crash in between leaves a whole file
    without a manifest.

    Args:
        path: The file to write; its folder is made if it is absent.
        content: What to write.
        iteration: For the manifest, as the following ones; see ``Manifest``.
        prove: Check the written file as ``read_checkpoint`` does before it takes its name (zip of ``torch.save`` only).

    Raises:
        SaveError: If it could not be written or proved; earlier files are as they were, nothing unfinished is left.
    """
    manifest = Manifest(
        sha256=hashlib.sha256(content).hexdigest(),
        size=len(content),
        iteration=iteration,
        epoch=epoch,
        seed=seed,
        world_size=world_size,
        versions=dict(program_versions()),
        resumable=resumable,
        source=source,
    )
    with reporting_failures(path, len(content)):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(manifest_path(path)) as unfinished_manifest:
            unfinished_manifest.write_text(manifest_text(path, manifest))
            sync_file(unfinished_manifest)
            with replacing(path) as unfinished:
                unfinished.write_bytes(content)
                sync_file(unfinished)
                if prove:
                    _prove(unfinished, path)
                forget_manifest(path)
    return manifest


def _prove(unfinished: Path, path: Path) -> None:
    try:
        check_file(unfinished)
    except CheckpointError as error:
        raise SaveError(
            f"checkpoint {str(path)!r} was not kept, because no training could go on from it: {error} The files saved "
            "before are as they were."
        ) from error


def forget_manifest(path: Path) -> None:
    """Remove the manifest of a file, and make that last, before the file changes."""
    if manifest_path(path).exists():
        manifest_path(path).unlink()
        sync_folder(path.parent)


def write_pointer(path: Path, text: str) -> None:
    """Write a short text file, such as ``last_checkpoint``, at once or not at all.

    Raises:
        SaveError: If it could not be written; the earlier one is as it was.
    """
    with reporting_failures(path, len(text.encode())), replacing(path) as unfinished:
        unfinished.write_text(text)


@contextlib.contextmanager
def reporting_failures(path: Path, size: int) -> Iterator[None]:
    """Turn the errors of the operating system into ``SaveError``.

    Args:
        path: What is being written.
        size: How many bytes it needs.
    """
    try:
        yield
    except OSError as error:
        raise SaveError(
            f"checkpoint {str(path)!r} could not be written ({error}): it needs {size:,} bytes, {_free(path.parent)} "
            "there. The files saved before are as they were and nothing unfinished is left. Free some space or name "
            "another folder (--work-dir), then go on with --resume."
        ) from error


@functools.cache
def program_versions() -> Mapping[str, str]:
    """Return the versions on which the last bit of a training depends, by name."""
    versions = {"mmvmamba": __version__, "torch": torch.__version__, "python": platform.python_version()}
    for name, distributions in {"numpy": ("numpy",), "mmengine": ("mmengine", "onedl-mmengine")}.items():
        for distribution in distributions:
            with contextlib.suppress(metadata.PackageNotFoundError):
                versions[name] = metadata.version(distribution)
    return MappingProxyType({name: str(version) for name, version in versions.items()})


def _free(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free:,} are free"
    except OSError as error:
        return f"how many are free is unknown ({error.strerror})"
