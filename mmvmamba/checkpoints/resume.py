"""Choosing the checkpoint that a training goes on from: by what the files hold, not by their names or a pointer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mmvmamba.checkpoints.manifest import Manifest, read_manifest, sha256_of
from mmvmamba.checkpoints.reader import read_checkpoint
from mmvmamba.errors import CheckpointError, CorruptCheckpoint, HashMismatch


class _NoState(CheckpointError):
    """A file is whole as far as it says, but holds weights only, such as the best ones and published ones."""


class Newest(NamedTuple):
    """What was found in a folder.

    Attributes:
        path: The newest complete checkpoint that a training can go on from, or None.
        passed_over: Files that may be newer, each with the reason why it was not taken; if there is no ``path``, also
            those that were never meant to be gone on from.
    """

    path: Path | None
    passed_over: list[tuple[Path, str]]


@dataclasses.dataclass(frozen=True)
class TrainingState:
    """Where in a training a verified checkpoint was written.

    Attributes:
        iteration: Finished iterations.
        epoch: Finished epochs.
        seed: Seed of the training, or None if the file does not say.
        world_size: Number of processes that trained, or None if the file does not say.
        versions: Of the programs that trained, by name, as far as the file says.
    """

    iteration: int
    epoch: int
    seed: int | None
    world_size: int | None
    versions: Mapping[str, str]


def newest_complete(folder: Path) -> Newest:
    """Return the newest checkpoint of a folder that is whole and can be gone on from.

    Newest is the one of most iterations. A file with a manifest is whole if it has the size and sha256 written there;
    one without (a crash came between the two, or another program wrote it) if all of it can be read.

    Args:
        folder: Where to look, not below; it may be absent.
    """
    candidates: list[tuple[tuple[int, int, float], Path]] = []
    passed_over: list[tuple[Path, str]] = []
    weights: list[tuple[Path, str]] = []
    verified: set[Path] = set()
    # Manifests tell what a file of another ending is; a file without one is looked at if its name says checkpoint.
    proved = {path.with_suffix("") for path in folder.glob("*.json") if path.with_suffix("").is_file()}
    for path in sorted({*folder.glob("*.pth"), *proved}):
        try:
            manifest = read_manifest(path)
            if manifest is None:
                state = _state_of_content(path)
                verified.add(path)
            else:
                state = _state_of_manifest(path, manifest)
        except _NoState as error:
            weights.append((path, str(error)))
            continue
        except CheckpointError as error:
            passed_over.append((path, str(error)))
            continue
        candidates.append(((state.iteration, state.epoch, path.stat().st_mtime), path))
    for _, path in sorted(candidates, reverse=True):
        try:
            if path not in verified:
                verify(path)
        except CheckpointError as error:
            passed_over.append((path, str(error)))
            continue
        return Newest(path, passed_over)
    return Newest(None, passed_over + weights)


def training_state(path: Path) -> TrainingState:
    """Verify a checkpoint that a training is to go on from, and return where it stands.

    Raises:
        CheckpointError: If the file is absent, not whole, or no state of a training.
    """
    if not path.is_file():
        raise CheckpointError(f"checkpoint {str(path)!r} is no file, expected one to go on from. Correct the path.")
    manifest = read_manifest(path)
    if manifest is None:
        return _state_of_content(path)
    state = _state_of_manifest(path, manifest)
    verify(path)
    return state


def verify(path: Path) -> None:
    """Compare a file with the manifest beside it.

    Raises:
        CorruptCheckpoint: If it has another size, or the manifest cannot be understood.
        HashMismatch: If it has another sha256.
    """
    manifest = read_manifest(path)
    if manifest is None:
        return
    advice = "It is damaged."
    with path.open("rb") as file:
        size = path.stat().st_size
        if size != manifest.size:
            raise CorruptCheckpoint(
                f"checkpoint {str(path)!r} has {size:,} bytes, its manifest says {manifest.size:,}. {advice}"
            )
        sha256, _ = sha256_of(file)
    if sha256 != manifest.sha256:
        raise HashMismatch(
            f"checkpoint {str(path)!r} has the sha256 {sha256}, its manifest says {manifest.sha256}. {advice}"
        )


def _state_of_manifest(path: Path, manifest: Manifest) -> TrainingState:
    if not manifest.resumable or manifest.iteration is None:
        raise _NoState(_not_a_state(path, "its manifest says that it holds weights only"))
    return TrainingState(manifest.iteration, manifest.epoch or 0, manifest.seed, manifest.world_size, manifest.versions)


def _state_of_content(path: Path) -> TrainingState:
    content = read_checkpoint(path)
    meta: Any = content.get("meta")
    if not isinstance(meta, dict) or not isinstance(meta.get("iter"), int) or not isinstance(meta.get("epoch"), int):
        raise _NoState(_not_a_state(path, "it has no meta.iter and meta.epoch"))
    if "optimizer" not in content:
        raise _NoState(_not_a_state(path, "it has no state of an optimizer"))
    seed = meta.get("seed")
    return TrainingState(meta["iter"], meta["epoch"], seed if isinstance(seed, int) else None, None, {})


def _not_a_state(path: Path, found: str) -> str:
    return (
        f"checkpoint {str(path)!r} is not the state of a training ({found}), expected a file that the training saved "
        "to be resumed. To start from its weights alone, set load_from in the config."
    )
