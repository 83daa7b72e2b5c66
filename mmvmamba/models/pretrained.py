"""Reading weights from files and URLs: tensors only, no code of the file is run, every failure says what to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.model.weight_init import PretrainedInit
from torch import Tensor, nn

from mmvmamba.checkpoints.matching import renamed
from mmvmamba.checkpoints.mmengine_loader import load_from_mmvmamba
from mmvmamba.errors import CheckpointMismatch, ConfigError, nearest_spelling

_NAMES_SHOWN = 10
_PRETRAINED_KEYS = ("type", "checkpoint", "prefix", "map_location")


def split_init_cfg(init_cfg: Any) -> tuple[list[dict[str, Any]], list[Any]]:
    """Return the arguments of every Pretrained entry of an MMEngine ``init_cfg``, and the other entries.

    Args:
        init_cfg: None, one dict or a list; the type is ``"Pretrained"``, with or without a scope
            (``"mmengine.Pretrained"``), or the class itself.

    Raises:
        ConfigError: If an entry has no type, or a Pretrained entry has an unknown key or no checkpoint.
    """
    entries = [] if init_cfg is None else [init_cfg] if isinstance(init_cfg, Mapping) else list(init_cfg)
    pretrained, others = [], []
    for entry in entries:
        kind = entry.get("type") if isinstance(entry, Mapping) else None
        if isinstance(entry, Mapping) and kind is None:
            raise ConfigError(
                f"init_cfg: type missing, found {sorted(entry)}, expected type='Pretrained' for the weights of a file. "
                "Add it, on a command line as --cfg-options model.backbone.init_cfg.type=Pretrained: the config names "
                "no weights that a file could take the place of."
            )
        if kind is PretrainedInit or (isinstance(kind, str) and kind.rpartition(".")[2] == "Pretrained"):
            pretrained.append(_check_pretrained(entry))
        else:
            others.append(entry)
    return pretrained, others


def _check_pretrained(entry: Mapping[str, Any]) -> dict[str, Any]:
    for key in entry:
        if key not in _PRETRAINED_KEYS:
            raise ConfigError(
                f"init_cfg of type Pretrained: unknown key {key!r}, expected keys among {', '.join(_PRETRAINED_KEYS)}."
                f"{nearest_spelling(key, _PRETRAINED_KEYS)} Remove or rename it."
            )
    if not entry.get("checkpoint"):
        raise ConfigError(
            f"init_cfg of type Pretrained: checkpoint is {entry.get('checkpoint')!r}, expected a file or an https "
            "URL. Name one, or set init_cfg=None to train from scratch."
        )
    return {key: value for key, value in entry.items() if key != "type"}


def read_weights(checkpoint: str, prefix: str | None = None, map_location: Any = "cpu") -> dict[str, Tensor]:
    """Return the tensors of a checkpoint under our names.

    Known layouts are ``{"state_dict": ...}`` (MMEngine), ``{"model": ...}`` (official classifiers) and the bare state
    dict. Nothing the file holds is executed. Entries of official files get our names, see
    ``mmvmamba.checkpoints.official.adapt``.

    Args:
        checkpoint: A file, an https URL, which is downloaded once to the cache folder of ``torch.hub``, or a name of
            MMEngine's tables such as ``torchvision://resnet50``.
        prefix: Take the entries of this part only, and remove the name; with or without the closing dot.
        map_location: Where the tensors go, as for ``torch.load``.

    Raises:
        CheckpointError: If the file is absent, broken or of another kind.
        CheckpointMismatch: If no entry begins with ``prefix``.
    """
    state = load_from_mmvmamba(str(checkpoint), map_location)["state_dict"]
    return cut(state, prefix, checkpoint) if prefix else state


def cut(state: Mapping[str, Tensor], prefix: str, checkpoint: str) -> dict[str, Tensor]:
    """Return the entries whose names begin with ``prefix``, without it.

    Raises:
        CheckpointMismatch: If there is none.
    """
    start = prefix.rstrip(".") + "."
    part = renamed(state, lambda name: name[len(start) :] if name.startswith(start) else None, repr(checkpoint))
    if not part:
        raise CheckpointMismatch(
            f"checkpoint {checkpoint!r}: none of {len(state)} entries begins with prefix {start!r}; found parts "
            f"{parts(state)[:_NAMES_SHOWN]}. Correct prefix."
        )
    return part


def parts(state: Mapping[str, Tensor]) -> list[str]:
    """Return the first parts of the names, sorted."""
    return sorted({name.split(".")[0] for name in state})


def innermost(model: nn.Module) -> nn.Module:
    """Return the model inside MMEngine's wrappers for distribution and test-time augmentation."""
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.get_submodule("module")
    return model
