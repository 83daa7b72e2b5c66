"""Weight decay and learning rates as the backbone wants them, in a detector, a segmentor or a classifier alike."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIMIZERS
from torch import nn

from mmvmamba.errors import ConfigError, nearest_spelling
from mmvmamba.registry import OPTIM_WRAPPER_CONSTRUCTORS

Group = dict[str, Any]

#: What MMEngine's constructor understands, and what is ours.
_KEYS = (
    "custom_keys",
    "bias_lr_mult",
    "bias_decay_mult",
    "norm_decay_mult",
    "dwconv_decay_mult",
    "flat_decay_mult",
    "dcn_offset_lr_mult",
    "bypass_duplicate",
    "layer_decay_rate",
)
#: What wrappers of PyTorch put into the names of parameters.
_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
_FLAT = "_flat_param"


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class SSMOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Build an optimizer that spares from weight decay what the model says, and may train early layers more slowly.

    Every module of the model that has a method ``no_weight_decay() -> set[str]`` is asked for its parameters without
    weight decay; a backbone of mmvmamba names its norms and the A, D and time-step bias of its scans. They have none
    whatever ``paramwise_cfg`` says of it; all else in ``paramwise_cfg`` is MMEngine's, heads follow it alone.

    ``paramwise_cfg=dict(layer_decay_rate=r)`` adds layer-wise learning rates: a parameter of the backbone at depth i of
    n (``get_layer_depth``) has its learning rate times r ** (n - 1 - i), everything else its own.

    Differences from MMEngine's constructor: a parameter that is shared comes once, parameters of equal settings are one
    group (one group per parameter makes an optimizer step hundreds of small ones), unknown keys are refused.

    Args:
        optim_wrapper_cfg: The config of the optimizer wrapper, with ``optimizer``.
        paramwise_cfg: MMEngine's options of parameters, and ``layer_decay_rate``.

    Raises:
        ConfigError: If a key or the optimizer is unknown, or ``layer_decay_rate`` impossible; when called,
            if no module of the model can be asked, or its parameters were flattened.
    """

    def __init__(self, optim_wrapper_cfg: dict[str, Any], paramwise_cfg: Mapping[str, Any] | None = None) -> None:
        options = dict(paramwise_cfg or {})
        _check_keys("paramwise_cfg", options, _KEYS)
        self.layer_decay_rate = _checked_rate(options.pop("layer_decay_rate", None))
        # With an empty dict MMEngine's constructor asks for no groups at all.
        super().__init__(optim_wrapper_cfg, options or {"custom_keys": {}})
        accepted = ("lr_mult", "decay_mult", *_group_options(self.optimizer_cfg["type"]))
        for key, entry in self.paramwise_cfg.get("custom_keys", {}).items():
            _check_keys(f"paramwise_cfg.custom_keys[{key!r}]", entry, accepted)
        if self.layer_decay_rate is not None and self.base_lr is None:
            raise ConfigError(
                "paramwise_cfg.layer_decay_rate: optimizer.lr is missing, expected the learning rate that is scaled. "
                "Set optim_wrapper.optimizer.lr."
            )

    def add_params(
        self, params: list[Group], module: nn.Module, prefix: str = "", is_dcn_module: int | float | None = None
    ) -> None:
        """Append the groups of all parameters of ``module``; MMEngine calls it for the model, then for what is inside.

        Args:
            params: Groups so far, changed in place.
            module: The model, or a module of it.
            prefix: Name of ``module`` in the model, empty for the model itself.
            is_dcn_module: Whether the parent is a deformable convolution.
        """
        super().add_params(params, module, prefix, is_dcn_module)
        if not prefix:
            params[:] = self._adjusted(params, module)

    def _adjusted(self, groups: list[Group], model: nn.Module) -> list[Group]:
        """Return the groups of single parameters with the model's wishes, merged where they are equal."""
        spared, scales = _wishes(model, self.layer_decay_rate)
        merged: list[Group] = []
        seen: set[int] = set()
        for group in groups:
            (parameter,) = group["params"]
            key = id(parameter)
            if key in seen:
                continue
            seen.add(key)
            settings = self._settings(group)
            if key in spared:
                settings["weight_decay"] = 0.0
            if key in scales:
                settings["lr"] *= scales[key]
            same = next((other for other in merged if _without_params(other) == settings), None)
            if same is None:
                same = {"params": [], **settings}
                merged.append(same)
            same["params"].append(parameter)
        line = f"{len(seen)} parameters in {len(merged)} groups, {len(seen & spared)} without weight decay by the model"
        if scales:
            line += f", learning rates of the backbone times {min(scales.values()):.3g} to {max(scales.values()):.3g}"
        print_log(f"{type(self).__name__}: {line}", logger="current")
        return merged

    def _settings(self, group: Group) -> Group:
        """Return what MMEngine wants of a parameter, with the common values written out, so that equal is equal."""
        settings = {key: value for key, value in group.items() if key not in ("params", "lr_mult", "decay_mult")}
        for name, value in (("lr", self.base_lr), ("weight_decay", self.base_wd)):
            if value is not None:
                settings.setdefault(name, value)
        return settings


def _wishes(model: nn.Module, rate: float | None) -> tuple[set[int], dict[int, float]]:
    """Return the parameters without decay, and factors of learning rates if there is a rate, by id of the parameter."""
    named = dict(model.named_parameters(remove_duplicate=False))
    spared: set[int] = set()
    scales: dict[int, float] = {}
    asked = False
    for name, module in _answering(model):
        asked = True
        prefix = f"{name}." if name else ""
        # A list of another author may name what only some of his variants have.
        spared |= {id(named[prefix + own]) for own in module.no_weight_decay() if prefix + own in named}
        depth_of = getattr(module, "get_layer_depth", None)
        if rate is None or not callable(depth_of):
            continue
        for own, parameter in module.named_parameters():
            depth, depths = depth_of(_plain(own))
            scales[id(parameter)] = rate ** (depths - 1 - depth)
    if not asked:
        raise ConfigError(
            f"SSMOptimWrapperConstructor: no module of {type(model).__name__} has a method no_weight_decay(), expected "
            "a backbone of mmvmamba. Use one, or drop optim_wrapper.constructor for MMEngine's own."
        )
    if flat := next((name for name in named if name.endswith(_FLAT)), None):
        raise ConfigError(
            f"SSMOptimWrapperConstructor: {flat} holds many parameters of the model in one, expected them one by one, "
            "as they differ in weight decay. Set use_orig_params=True for FSDP."
        )
    return spared, scales


def _answering(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield (name, module) of the modules that have ``no_weight_decay``."""
    for name, module in model.named_modules():
        if callable(getattr(module, "no_weight_decay", None)):
            yield name, module


def _plain(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _without_params(group: Group) -> Group:
    return {key: value for key, value in group.items() if key != "params"}


def _group_options(kind: Any) -> list[str]:
    """Return what an optimizer, by name or class, takes besides the parameters."""
    found = kind
    if isinstance(kind, str):
        with OPTIMIZERS.switch_scope_and_registry(None) as registry:
            found = registry.get(kind)
        if found is None:
            raise ConfigError(
                f"optim_wrapper.optimizer.type is {kind!r}, expected the name of a registered optimizer."
                f"{nearest_spelling(kind, list(OPTIMIZERS.module_dict))} Correct it, or import what registers it."
            )
    return list(inspect.signature(found).parameters)[1:]


def _check_keys(where: str, found: Any, accepted: tuple[str, ...]) -> None:
    if not isinstance(found, Mapping):
        raise ConfigError(
            f"optim_wrapper.{where} is {found!r}, expected a dict with keys among "
            f"{', '.join(accepted)}. Write it as one."
        )
    for key in found:
        if key not in accepted:
            raise ConfigError(
                f"optim_wrapper.{where}: unknown key {key!r}, expected keys among {', '.join(accepted)}."
                f"{nearest_spelling(key, accepted)} Remove or rename it."
            )


def _checked_rate(rate: Any) -> float | None:
    if rate is None:
        return None
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0.0 < rate <= 1.0:
        raise ConfigError(
            f"optim_wrapper.paramwise_cfg.layer_decay_rate is {rate!r}, expected a number above 0 and up to 1 (no "
            "decay). Usual ones are 0.7 to 0.95."
        )
    return float(rate)
