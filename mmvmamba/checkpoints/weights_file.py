"""Writing files of weights: whole or not at all, each with its manifest, never over another file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from mmvmamba.checkpoints.atomic import replacing
from mmvmamba.checkpoints.manifest import Manifest, manifest_path, sha256_of, write_manifest
from mmvmamba.errors import ConfigError, SaveError
from mmvmamba.version import __version__

SUFFIXES = (".safetensors", ".pth")


def check_target(target: Path) -> None:
    """Raise unless a file of weights can be written to ``target``.

    Raises:
        ConfigError: If its ending is none of ``SUFFIXES``.
        SaveError: If it or its manifest exists, or its folder cannot be made.
    """
    if target.suffix not in SUFFIXES:
        raise ConfigError(
            f"target is {str(target)!r}, expected a name ending in {' or '.join(SUFFIXES)}. Add the ending."
        )
    for path in (target, manifest_path(target)):
        if path.exists() or path.is_symlink():
            raise SaveError(
                f"{str(path)!r} exists, expected a new name: nothing is overwritten. Choose another, or delete it."
            )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SaveError(
            f"folder {str(target.parent)!r} cannot be made ({error.strerror}), expected a place to write to. Choose "
            "another target."
        ) from error


def write_safetensors(
    target: Path, state: Mapping[str, Tensor], notes: Mapping[str, str], source: Mapping[str, str]
) -> None:
    """Write tensors and a few texts about them.

    Args:
        target: A new file ending in ``.safetensors``.
        state: Names to tensors.
        notes: The metadata of the file.
        source: Where the weights came from, for the manifest.

    Raises:
        ConfigError, SaveError: See ``check_target``; also ``SaveError`` if the disk is full or the like.
    """
    # Copies, because safetensors stores no views; they are written once and gone.
    tensors = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in state.items()}
    _write(target, source, lambda path: safetensors.torch.save_file(tensors, path, {"format": "pt", **notes}))


def write_pth(target: Path, content: Mapping[str, Any], source: Mapping[str, str]) -> None:
    """Write a dict of tensors and plain values as ``torch.save`` does.

    Args:
        target: A new file ending in ``.pth``.
        content: What to save; PyTorch must be able to read it with ``weights_only`` and no allow-list.
        source: Where the weights came from, for the manifest.

    Raises:
        ConfigError, SaveError: See ``check_target``; also ``SaveError`` if the disk is full or the like.
    """
    _write(target, source, lambda path: torch.save(dict(content), path))


def _write(target: Path, source: Mapping[str, str], save: Any) -> None:
    check_target(target)
    try:
        with replacing(target) as path:
            save(path)
            with path.open("rb") as file:
                sha256, size = sha256_of(file)
        versions = {"torch": torch.__version__, "mmvmamba": __version__}
        write_manifest(target, Manifest(sha256, size, versions=versions, source=dict(source)))
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        raise SaveError(
            f"{str(target)!r} could not be written: {error}. Make room or choose another; the source is as it was."
        ) from error
