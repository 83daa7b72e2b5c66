"""The manifest beside a checkpoint: what the file must hold, byte for byte, and where in the training it belongs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from mmvmamba.checkpoints.atomic import replacing
from mmvmamba.errors import CorruptCheckpoint

_FORMAT = 1
_CHUNK = 1 << 20
_MAX_SIZE = 1 << 20


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


_FIELDS = {field.name for field in dataclasses.fields(Manifest)}


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
    """Return the manifest beside a checkpoint or, for a link, beside what it leads to; None where there is none.

    The name in it is not compared: a checkpoint may be renamed together with its manifest, whose sha256 is the proof.

    Raises:
        CorruptCheckpoint: If there is one that cannot be understood.
    """
    path = manifest_path(checkpoint)
    if not path.is_file() and checkpoint.is_symlink():
        path = manifest_path(checkpoint.resolve())
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_SIZE + 1)
        if len(data) > _MAX_SIZE:
            raise ValueError(f"more than {_MAX_SIZE} bytes")
        content = json.loads(data)
        if content["format"] != _FORMAT:
            raise ValueError("another format")
        # A later version may know more; what it says of itself is no reason to leave the hash unproved.
        manifest = Manifest(**{name: value for name, value in content.items() if name in _FIELDS})
        _check_fields(manifest)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OSError) as error:
        raise CorruptCheckpoint(
            f"manifest {str(path)!r} cannot be understood ({error}), expected JSON of format {_FORMAT} as mmvmamba "
            "writes it. If you trust the checkpoint, delete the manifest."
        ) from error
    return manifest


def _check_fields(manifest: Manifest) -> None:
    if not isinstance(manifest.sha256, str) or not re.fullmatch("[0-9a-f]{64}", manifest.sha256):
        raise ValueError("no sha256")
    if type(manifest.size) is not int or manifest.size < 0:
        raise ValueError("no size")
    for name in ("iteration", "epoch", "seed", "world_size"):
        value = getattr(manifest, name)
        if value is not None and (type(value) is not int or value < 0):
            raise ValueError(f"{name} is {value!r}")
    if not isinstance(manifest.versions, dict) or not isinstance(manifest.source or {}, dict):
        raise ValueError("versions or source are no dict")


def sha256_of(file: BinaryIO) -> tuple[str, int]:
    """Return the sha256 (hexadecimal) and the size in bytes of an open file, read from its beginning."""
    file.seek(0)
    digest, size = hashlib.sha256(), 0
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
        size += len(chunk)
    return digest.hexdigest(), size
