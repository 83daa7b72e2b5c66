"""What the converters of the mobile families share: a backbone with the pyramid neck that their detectors put on it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from mmvmamba.converters.base import StateDict
from mmvmamba.converters.hierarchical import only, without
from mmvmamba.errors import ConfigError
from mmvmamba.models.backbones.base import BaseBackbone
from mmvmamba.models.necks import EfficientViTFPN

#: Arguments of upstream's neck that may have this value alone, with which they change nothing: no recipe has another.
_NEUTRAL: dict[str, Any] = {
    "end_level": -1,
    "conv_cfg": None,
    "norm_cfg": None,
    "act_cfg": None,
    "upsample_cfg": {"mode": "nearest"},
}
#: The neck has upstream's names here.
_NECK = r"neck\..*"
_BACKBONE = "backbone."


class BackboneWithNeck(nn.Module):
    """A feature extractor and its pyramid.

    Args:
        backbone: The feature extractor.
        neck: What takes its maps.
    """

    def __init__(self, backbone: BaseBackbone, neck: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = neck

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return the pyramid's maps (b, c, h_i, w_i), the finest first, of an image (b, c, h, w)."""
        out: tuple[Tensor, ...] = self.neck(self.backbone(image))
        return out


def build_with_neck(backbone: BaseBackbone, neck: Mapping[str, Any]) -> BackboneWithNeck:
    """Return the feature extractor with a neck of upstream's constructor arguments.

    These are those of ours, those of `_NEUTRAL`, ``no_norm_on_lateral``, which changes nothing where no norm is, and
    ``extra_convs_on_inputs``, which says what ``add_extra_convs=True`` means.

    Raises:
        ConfigError: If an argument is unknown, or the neck wants other maps than the backbone gives.
    """
    arguments = {name: value for name, value in neck.items() if name not in ("type", "no_norm_on_lateral")}
    for name, value in _NEUTRAL.items():
        if arguments.pop(name, value) != value:
            raise ConfigError(f"neck: {name} is {neck[name]!r}, expected {value!r}, as all recipes have it. Remove it.")
    if not arguments.pop("extra_convs_on_inputs", True) and arguments.get("add_extra_convs") is True:
        arguments["add_extra_convs"] = "on_output"
    try:
        built = EfficientViTFPN(**arguments)
    except TypeError as error:
        raise ConfigError(
            f"neck: {error}; expected arguments of EfficientViTFPN, found {sorted(arguments)}. Add or remove it."
        ) from error
    given = [backbone.stage_channels[i] for i in backbone.out_indices]
    if list(built.in_channels) != given:
        raise ConfigError(
            f"neck: in_channels is {list(built.in_channels)}, but the backbone gives maps of {given} channels. "
            "Correct one of them."
        )
    return BackboneWithNeck(backbone, built)


def split_neck(state_dict: Mapping[str, Tensor]) -> tuple[StateDict, StateDict]:
    """Return the entries of a backbone, without ``backbone.``, and those of the neck."""
    body = without(state_dict, _NECK)
    return {name.removeprefix(_BACKBONE): value for name, value in body.items()}, only(state_dict, _NECK)


def join_neck(backbone: Mapping[str, Tensor], neck: Mapping[str, Tensor]) -> StateDict:
    """Undo `split_neck`."""
    return {**{_BACKBONE + name: value for name, value in backbone.items()}, **neck}


def knows_with_neck(name: str, knows: Callable[[str], bool]) -> bool:
    """Return whether an entry of this name is the neck's, or the backbone's by ``knows``, which takes its own name."""
    return re.fullmatch(_NECK, name) is not None or (name.startswith(_BACKBONE) and knows(name.removeprefix(_BACKBONE)))
