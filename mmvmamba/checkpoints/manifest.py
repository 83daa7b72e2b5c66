"""The manifest beside a checkpoint: what the file must hold, byte for byte, and where in the training it belongs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from mmvmamba.checkpoints.atomic import replacing
from mmvmamba.errors import CorruptCheckpoint

_FORMAT = 1
_CHUNK = 1 << 20


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What is known of a checkpoint.

    Attributes:
        sha256: Of the whole file, 64 hexadecimal digits.
        size: Bytes.
        iteration: Finished iterations of the training, or None for a file that is no state of a training.
        epoch: Finished epochs, or None likewise.
        seed: Seed of the training, or None likewise.
        world_size: Number of processes that trained, or None likewise.
        versions: Name of a program -> version, such as ``{"torch": "2.11.0"}``.
        resumable: Whether a training can go on from the file (it holds the state of the optimizer).
        source: Where a converted or downloaded file came from (URL, file name, sha256), or None.
    """

    sha256: str
    size: int
    iteration: int | None = None
    epoch: int | None = None
    seed: int | None = None
    world_size: int | None = None
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    resumable: bool = False
    source: Mapping[str, str] | None = None


def manifest_path(checkpoint: Path) -> Path:
    """Return where the manifest of a checkpoint is: ``epoch_1.pth`` -> ``epoch_1.pth.json``."""
    return checkpoint.with_name(checkpoint.name + ".json")


def write_manifest(checkpoint: Path, manifest: Manifest) -> None:
    """Write the manifest of a finished checkpoint beside it, atomically."""
    with replacing(manifest_path(checkpoint)) as path:
        path.write_text(manifest_text(checkpoint, manifest))


def manifest_text(checkpoint: Path, manifest: Manifest) -> str:
    """Return what the manifest's file of a checkpoint holds."""
    return json.dumps({"format": _FORMAT, "file": checkpoint.name, **dataclasses.asdict(manifest)}, indent=2) + "\n"


def read_manifest(checkpoint: Path) -> Manifest | None:
    """Return the manifest beside a checkpoint, or None where there is none.

    Raises:
        CorruptCheckpoint: If there is one that cannot be understood.
    """
    path = manifest_path(checkpoint)
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
        if content.pop("format") != _FORMAT:
            raise ValueError("another format")
        content.pop("file")
        manifest = Manifest(**content)
        if len(bytes.fromhex(manifest.sha256)) != 32 or not isinstance(manifest.size, int):
            raise ValueError("no sha256 or no size")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CorruptCheckpoint(
            f"manifest {str(path)!r} cannot be understood ({error}), expected JSON of format {_FORMAT} as mmvmamba "
            "writes it. If you trust the checkpoint, delete the manifest."
        ) from error
    return manifest


def sha256_of(file: BinaryIO) -> tuple[str, int]:
    """Return the sha256 (hexadecimal) and the size in bytes of an open file, read from its beginning."""
    file.seek(0)
    digest, size = hashlib.sha256(), 0
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
        size += len(chunk)
    return digest.hexdigest(), size
