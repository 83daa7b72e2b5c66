"""Turning an official file into one of ours and back, with every tensor accounted for, bit for bit."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmvmamba.checkpoints.download import fetch
from mmvmamba.checkpoints.manifest import read_manifest, sha256_of
from mmvmamba.checkpoints.official import Recognition, adapt, recognise
from mmvmamba.checkpoints.reader import read_checkpoint
from mmvmamba.checkpoints.weights_file import check_target, write_pth, write_safetensors
from mmvmamba.converters.base import CONVERTERS, StateDict, convert_state_dict, to_upstream_state_dict
from mmvmamba.errors import CheckpointError, CheckpointMismatch, ConfigError

_NAMES_SHOWN = 10
#: Under this name a ``.pth`` file of ours has in its ``meta`` what a safetensors file has as metadata.
NOTES = "mmvmamba"
_KEPT = (NOTES, "dataset_meta", "family", "variant", "form", "names", "source_", "format")


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What was done.

    Attributes:
        source: The file read.
        target: The file written.
        found: What the source is.
        tensors: Number of tensors, the same in both.
        left_out: Other entries of the source, which the target has not.
    """

    source: str
    target: Path
    found: Recognition
    tensors: int
    left_out: tuple[str, ...]

    def line(self) -> str:
        """Return it in one line."""
        left_out = f"; left out: {', '.join(self.left_out)}" if self.left_out else ""
        return f"{self.found}: {self.tensors}/{self.tensors} tensors from {self.source} to {self.target}{left_out}"


def convert_file(
    source: str | Path, target: str | Path, *, section: str | None = None, sha256: str | None = None
) -> Conversion:
    """Write the weights of an official file, or of one of ours, under our names.

    A classifier becomes an MMPretrain classifier (``backbone.``, ``head.``); in a detector or segmentor the backbone
    gets our names; a bare backbone stays bare. Values, shapes and dtypes stay. Only weights and ``dataset_meta`` are
    kept. The names of the source are noted in the target, so that ``restore_file`` gives them back.

    Args:
        source: A file or an https URL.
        target: A new file ending in ``.safetensors`` or ``.pth``; a manifest is written beside it.
        section: Entry of the source with the weights, such as ``"model_ema"``; by default see ``read_checkpoint``.
        sha256: What the source must hash to.

    Raises:
        CheckpointError: If the source cannot be read (its classes say why) or is of no known family
            (``CheckpointMismatch``, also if an entry is none of the family's).
        ConfigError: If the target has another ending.
        SaveError: If the target exists or cannot be written.
    """
    target = Path(target)
    check_target(target)
    content, origin = _read(source, section, sha256)
    state: StateDict = content["state_dict"]
    found = _recognised(state, source)
    ours = _checked_ours(state, found, source)
    _check_same(adapt(_upstream(ours)), ours, source)
    notes = {
        "family": found.family,
        "variant": found.variant or found.sketch,
        "form": found.form,
        "names": json.dumps(_names(state, ours)),
        **{f"source_{key}": value for key, value in origin.items()},
    }
    meta = _dataset_meta(content)
    if target.suffix == ".safetensors":
        if meta:
            notes["dataset_meta_json"] = json.dumps(meta)
        write_safetensors(target, ours, notes, origin)
    else:
        whole = {NOTES: notes, **({"dataset_meta": meta} if meta else {})}
        write_pth(target, {"state_dict": ours, "meta": whole}, origin)
    return Conversion(str(source), target, found, len(ours), _left_out(content))


def restore_file(source: str | Path, target: str | Path, *, sha256: str | None = None) -> Conversion:
    """Write the weights of one of our files in the official layout.

    A classifier and a bare backbone become ``{"model": ...}``, a detector or segmentor
    ``{"state_dict": ..., "meta": ...}``. A file made by ``convert_file`` gets back the names it had, any other the
    present official ones.

    Args:
        source: A file of ``convert_file``, of a training, or an https URL.
        target: A new file ending in ``.pth``; a manifest is written beside it.
        sha256: What the source must hash to.

    Raises:
        CheckpointError, ConfigError, SaveError: See ``convert_file``.
    """
    target = Path(target)
    if target.suffix != ".pth":
        raise ConfigError(f"target is {str(target)!r}, expected a name ending in .pth: official files are. Change it.")
    check_target(target)
    content, origin = _read(source, None, sha256)
    ours: StateDict = content["state_dict"]
    found = _recognised(ours, source)
    if found.upstream:
        raise CheckpointMismatch(
            f"checkpoint {str(source)!r} has official names already, expected ours. Use it as it is."
        )
    names = _noted_names(content, ours, source)
    state = {official: ours[own] for official, own in names.items()} if names else _upstream(ours)
    _check_same(adapt(dict(state)), ours, source)
    if found.form == "classifier" or not found.prefix:
        write_pth(target, {"model": state}, origin)
    else:
        write_pth(target, {"state_dict": state, "meta": {"dataset_meta": _dataset_meta(content)}}, origin)
    return Conversion(str(source), target, found, len(state), _left_out(content))


def _read(source: str | Path, section: str | None, sha256: str | None) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the content of a file and where it came from."""
    url = str(source) if "://" in str(source) else None
    path = fetch(url, sha256) if url else Path(source).expanduser()
    if sha256 is None and path.is_file():
        manifest = read_manifest(path)
        with path.open("rb") as file:
            sha256 = manifest.sha256 if manifest else sha256_of(file)[0]
    # The reader proves the hash on the very file that it reads.
    content = read_checkpoint(path, sha256=sha256, section=section)
    return content, {**({"url": url} if url else {}), "file": path.name, "sha256": str(sha256)}


def _recognised(state: Mapping[str, Tensor], source: str | Path) -> Recognition:
    found = recognise(state)
    if found is None:
        raise CheckpointMismatch(
            f"checkpoint {str(source)!r} is of no family known here ({', '.join(CONVERTERS)}); its {len(state)} "
            f"entries begin {list(state)[:_NAMES_SHOWN]}. Check the path, or the section of the file."
        )
    return found


def _checked_ours(state: StateDict, found: Recognition, source: str | Path) -> StateDict:
    """Return the entries under our names; one that the family has not is refused."""
    if not found.prefix:
        return convert_state_dict(found.family, found.form, state)
    convert_state_dict(found.family, _inner_form(found), _part(state, found.prefix))
    return adapt(dict(state), repr(str(source)))


def _upstream(ours: StateDict) -> StateDict:
    """Return entries of ours under the present official names."""
    found = recognise(ours)
    if found is None:
        return ours
    if found.form == "classifier":
        return to_upstream_state_dict(found.family, "classifier", ours)
    official = to_upstream_state_dict(found.family, _inner_form(found), _part(ours, found.prefix))
    others = {name: value for name, value in ours.items() if not name.startswith(found.prefix)} if found.prefix else {}
    return {**{found.prefix + name: value for name, value in official.items()}, **others}


def _inner_form(found: Recognition) -> str:
    return "adapter" if found.adapter else "backbone"


def _part(state: StateDict, prefix: str) -> StateDict:
    return {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}


def _check_same(back: StateDict, ours: StateDict, source: str | Path) -> None:
    """Raise unless two state dicts are equal, bit for bit."""
    wrong = [name for name in {**ours, **back} if not _is_same(ours.get(name), back.get(name))]
    if wrong:
        raise CheckpointError(
            f"checkpoint {str(source)!r}: {len(wrong)} entries {wrong[:_NAMES_SHOWN]} do not come back from the "
            "official names as they were, expected all of them. Nothing was written: convert the official file anew, "
            "or report this if it is one."
        )


def _is_same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None or a.dtype != b.dtype or a.shape != b.shape:
        return False
    return a is b or torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


def _names(state: StateDict, ours: StateDict) -> dict[str, str]:
    """Return which of our entries is which of the source; none where a family stores the same in other tensors."""
    own = {id(value): name for name, value in ours.items()}
    names = {name: own[id(value)] for name, value in state.items() if id(value) in own}
    return names if len(names) == len(state) == len(ours) else {}


def _noted_names(content: Mapping[str, Any], ours: StateDict, source: str | Path) -> dict[str, str]:
    """Return the official name -> our name that ``convert_file`` noted; none in any other file."""
    meta = content.get("meta")
    notes = meta.get(NOTES, meta) if isinstance(meta, Mapping) else {}
    if not isinstance(notes, Mapping) or "names" not in notes:
        return {}
    names: dict[str, str] = {}
    try:
        names = json.loads(notes["names"])
        fits = sorted(names.values()) == sorted(ours)
    except (ValueError, TypeError, AttributeError):
        fits = False
    if not fits and names != {}:
        raise CheckpointMismatch(
            f"checkpoint {str(source)!r}: its note of official names does not name its {len(ours)} entries, expected "
            "each once. It was changed after it was converted: convert the official file anew."
        )
    return names


def _dataset_meta(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the classes and palette that a detector or segmentor was trained with, as far as they are plain values."""
    meta = content.get("meta")
    if not isinstance(meta, Mapping):
        return {}
    whole = meta.get("dataset_meta", {})
    with contextlib.suppress(ValueError, TypeError):
        whole = json.loads(meta["dataset_meta_json"]) if "dataset_meta_json" in meta else whole
    return {key: value for key, value in whole.items() if _is_plain(value)} if isinstance(whole, Mapping) else {}


def _is_plain(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def _left_out(content: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of what is neither weights nor classes."""
    meta = content.get("meta")
    inner = [f"meta.{key}" for key in meta if not str(key).startswith(_KEPT)] if isinstance(meta, Mapping) else []
    dataset = meta.get("dataset_meta") if isinstance(meta, Mapping) else None
    odd = (
        [f"meta.dataset_meta.{k}" for k, v in dataset.items() if not _is_plain(v)] if isinstance(dataset, dict) else []
    )
    return (*(str(key) for key in content if key not in ("state_dict", "meta")), *inner, *odd)
