"""The form ``backbone_neck``: a feature extractor and the neck behind it, under the names they have in a detector."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from mmvmamba.converters.base import StateDict, reject_unknown_arguments
from mmvmamba.errors import CheckpointMismatch, ConfigError
from mmvmamba.models.necks import EfficientViTFPN

FORM = "backbone_neck"
_BACKBONE, _NECK = "backbone.", "neck."


class BackboneWithNeck(nn.Module):
    """What a detector has before its heads.

    Args:
        backbone: The feature extractor.
        neck: What its maps go through.
    """

    def __init__(self, backbone: nn.Module, neck: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = neck

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return the neck's maps (b, c, h_i, w_i) for an image (b, c, h, w)."""
        out: tuple[Tensor, ...] = self.neck(self.backbone(image))
        return out


def split_arguments(family: str, kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arguments of the backbone and those of the neck.

    Raises:
        ConfigError: If there is anything else, or one of them is missing.
    """
    if kwargs.keys() != {"backbone", "neck"}:
        raise ConfigError(
            f"{family} {FORM}: the arguments are {sorted(kwargs)}, expected 'backbone' and 'neck', each a dict of "
            "upstream's arguments. Correct them."
        )
    return dict(kwargs["backbone"]), dict(kwargs["neck"])


def build_neck(family: str, kwargs: Mapping[str, Any]) -> nn.Module:
    """Build the pyramid of the mobile families from upstream's arguments, which are ours but for ``type``.

    Raises:
        ConfigError: If an argument is unknown or impossible.
    """
    kwargs = dict(kwargs)
    kind = kwargs.pop("type", "EfficientViTFPN")
    if kind != "EfficientViTFPN":
        raise ConfigError(f"{family} {FORM}: the neck is {kind!r}, expected 'EfficientViTFPN'. Build others by hand.")
    known = [name for name in inspect.signature(EfficientViTFPN).parameters if name != "init_cfg"]
    reject_unknown_arguments(kwargs, known, f"{family} {FORM} neck")
    return EfficientViTFPN(**kwargs)


def split_entries(family: str, state_dict: Mapping[str, Tensor]) -> tuple[StateDict, StateDict]:
    """Return the entries of the backbone, without that prefix, and those of the neck, with theirs.

    Raises:
        CheckpointMismatch: If there are others.
    """
    wrong = [name for name in state_dict if not name.startswith((_BACKBONE, _NECK))]
    if wrong:
        raise CheckpointMismatch(
            f"{len(wrong)} of {len(state_dict)} entries are neither of a backbone nor of a neck: {wrong[:10]}. Check "
            f"form {FORM!r} of family {family!r}: names begin with {_BACKBONE!r} or {_NECK!r} there."
        )
    trunk = {name[len(_BACKBONE) :]: value for name, value in state_dict.items() if name.startswith(_BACKBONE)}
    return trunk, {name: value for name, value in state_dict.items() if name.startswith(_NECK)}


def join_entries(trunk: Mapping[str, Tensor], neck: Mapping[str, Tensor]) -> StateDict:
    """Return the entries of a model of both: the inverse of `split_entries`."""
    return {**{_BACKBONE + name: value for name, value in trunk.items()}, **neck}
