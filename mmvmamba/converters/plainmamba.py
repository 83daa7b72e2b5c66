"""PlainMamba: constructor arguments and checkpoints of ChenhongyiYang/PlainMamba (``PlainMamba`` and its subclasses).

Its classifiers are models of MMClassification, so their entries are ``backbone.*`` and ``head.fc.*`` already. Forms
``"backbone"`` and ``"backbone_seg"`` are ``PlainMambaSeg``, ``"adapter"`` is ``PlainMambaAdapter``.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmvmamba.converters.adapter import TRUNK, is_adapters, read_adapter, upstream_adapter, write_adapter
from mmvmamba.converters.base import Converter, Rule, StateDict, known_to, reject_unknown_arguments, rename
from mmvmamba.converters.hierarchical import (
    AFFINE,
    OUT_NORM,
    build_classifier,
    in_words,
    num_stages,
    only,
    refuse_out_norms,
    refuse_pretrained,
    released_arguments,
    translate,
    without,
)
from mmvmamba.errors import CheckpointMismatch, ConfigError
from mmvmamba.models.adapters import ViTAdapter
from mmvmamba.models.backbones.plainmamba import ARCHS, PlainMamba, PlainMambaArch

FORMS = ("classifier", "backbone", "backbone_seg", "adapter")

# ---------------------------------------------------------------- constructor arguments -> our options

_NORM = dict(type="LN", eps=1e-6)
#: What the mixers of all released models have; upstream's own defaults where ``mamba_cfg`` is given.
_RELEASED_MIXER = dict(bias=True)


def _upstream_plainmamba(
    img_size: int | Sequence[int] = 224,
    in_channels: int = 3,
    arch: str | None = None,
    patch_size: int = 16,
    embed_dims: int = 192,
    num_layers: int = 20,
    num_convs_patch_embed: int = 1,
    with_pos_embed: bool = True,
    out_indices: int | Sequence[int] = -1,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    norm_cfg: Mapping[str, Any] = _NORM,
    final_norm: bool = True,
    interpolate_mode: str = "bicubic",
    layer_cfgs: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    layers_with_dwconv: Sequence[int] = (),
    test_cfg: object = None,  # noqa: ARG001 (nothing depends on it)
    convert_syncbn: bool = False,  # noqa: ARG001 (how it is trained on many GPUs)
    freeze_patch_embed: bool = False,
) -> dict[str, Any]:
    """Translate the arguments of upstream's ``PlainMamba`` (names and defaults are its) to those of ours.

    ``layer_cfgs`` left out means the mixers of the released models, as with ``arch``: without ``mamba_cfg`` upstream
    has no layers to build.
    """
    if dict(norm_cfg) != _NORM or interpolate_mode != "bicubic":
        raise ConfigError(
            f"norm_cfg is {norm_cfg!r} and interpolate_mode {interpolate_mode!r}, expected {_NORM} and 'bicubic': no "
            "released model has others. Build others by hand."
        )
    if arch is None:
        options = PlainMambaArch(
            dim=embed_dims,
            depth=num_layers,
            num_convs=num_convs_patch_embed,
            dwconv_layers=tuple(layers_with_dwconv),
            patch_size=patch_size,
            **_mixer(layer_cfgs),
        )
    else:  # the arguments above have no effect upstream where a variant is named
        options = ARCHS[translate("arch", arch, {name: name for name in _VARIANTS})]
    options = dataclasses.replace(options, drop_path_rate=drop_path_rate, use_pos_embed=with_pos_embed)
    indices = [out_indices] if isinstance(out_indices, int) else list(out_indices)
    return dict(
        arch=options,
        img_size=img_size,
        in_channels=in_channels,
        out_indices=tuple(index + options.depth if index < 0 else index for index in indices),
        dropout=drop_rate,
        final_norm=final_norm,
        frozen_stages=0 if freeze_patch_embed else -1,
    )


def _mixer(layer_cfgs: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None) -> dict[str, Any]:
    """Return our options for upstream's ``layer_cfgs``."""
    if layer_cfgs is not None and not isinstance(layer_cfgs, Mapping):
        raise ConfigError("layer_cfgs is a list, expected one dict for all layers. Build others by hand.")
    cfg = dict(layer_cfgs or {})
    reject_unknown_arguments(cfg, ("use_rms_norm", "mamba_cfg"), "plainmamba layer_cfgs")
    if cfg.get("use_rms_norm", False):
        raise ConfigError("layer_cfgs: use_rms_norm is True, expected False: no released model has it. Remove it.")
    return _upstream_mixer(**(cfg.get("mamba_cfg") or _RELEASED_MIXER))


def _upstream_mixer(
    d_state: int = 16,
    expand: float = 2,
    dt_rank: int | str = "auto",
    conv_size: int = 7,
    conv_bias: bool = True,
    bias: bool = False,
    init_layer_scale: float | None = None,
    default_hw_shape: object = None,  # noqa: ARG001 (a cache)
    dt_min: float = 0.001,  # noqa: ARG001 (this and what follows: initial values, which the recipe overwrites)
    dt_max: float = 0.1,  # noqa: ARG001
    dt_init: str = "random",  # noqa: ARG001
    dt_scale: float = 1.0,  # noqa: ARG001
    dt_init_floor: float = 1e-4,  # noqa: ARG001
) -> dict[str, Any]:
    """Translate the arguments of upstream's ``PlainMamba2D``."""
    return dict(
        d_state=d_state,
        expansion=expand,
        dt_rank=None if isinstance(dt_rank, str) else dt_rank,
        conv_kernel=conv_size,
        conv_bias=conv_bias,
        bias=bias,
        layer_scale=init_layer_scale,
    )


_VARIANTS = tuple(name for name in ARCHS if name != "nano")
_TRUNK_ARGUMENTS = tuple(inspect.signature(_upstream_plainmamba).parameters)
_ADAPTER_ARGUMENTS = tuple(inspect.signature(upstream_adapter).parameters)
#: Stochastic depth in a detector or segmentor, and heads of the adapter's attention.
_DOWNSTREAM = {"l1": (0.1, 6), "l2": (0.2, 6), "l3": (0.3, 8)}


def _functions() -> dict[str, dict[str, Any]]:
    """Return the released networks by the names of their key lists."""
    functions: dict[str, dict[str, Any]] = {}
    for name in _VARIANTS:
        quarter, (rate, heads) = ARCHS[name].depth // 4, _DOWNSTREAM[name]
        ends = [quarter * (i + 1) - 1 for i in range(4)]
        functions[f"plainmamba_{name}"] = dict(arch=name.upper())
        functions[f"plainmamba_{name}_upernet_backbone"] = dict(
            arch=name.upper(), out_indices=ends, drop_path_rate=rate
        )
        functions[f"plainmamba_{name}_adapter_backbone"] = dict(
            arch=name.upper(),
            drop_path_rate=rate,
            deform_num_heads=heads,
            interaction_indexes=[[end - quarter + 1, end] for end in ends],
        )
    return functions


UPSTREAM_FUNCTIONS = _functions()


# ---------------------------------------------------------------- building


def _build(form: str, kwargs: Mapping[str, Any]) -> nn.Module:
    _, kwargs = released_arguments(kwargs, UPSTREAM_FUNCTIONS)
    refuse_pretrained(kwargs.pop("init_cfg", None))
    kwargs.pop("classifier", None)  # how the key lists say what they are of
    num_classes = kwargs.pop("num_classes", 1000)
    known = [*_TRUNK_ARGUMENTS, "num_classes", *(_ADAPTER_ARGUMENTS if form == "adapter" else ())]
    reject_unknown_arguments(kwargs, known, f"plainmamba {form}")
    if form == "adapter":
        # Upstream's detectors say so; its adapter calls no norm behind the layers.
        trunk = {"final_norm": False, **{name: value for name, value in kwargs.items() if name in _TRUNK_ARGUMENTS}}
        options = _upstream_plainmamba(**trunk)
        options["out_indices"] = _with_last(options)
        own = {name: value for name, value in kwargs.items() if name in _ADAPTER_ARGUMENTS}
        return ViTAdapter(
            PlainMamba(**options), **upstream_adapter(**own), drop_path_rate=kwargs.get("drop_path_rate", 0.0)
        )
    options = _upstream_plainmamba(**kwargs)
    if form != "classifier":
        return PlainMamba(**options)
    options["out_indices"] = _with_last(options)
    return build_classifier(PlainMamba(**options), options["arch"].dim, num_classes)


def _with_last(options: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the out indices and the last layer: upstream has norms of outputs also where nobody uses these."""
    return tuple(sorted({*options["out_indices"], options["arch"].depth - 1}))


# ---------------------------------------------------------------- state dicts

_FIELD = r"(?:weight|bias)"
_PROJECTION = r"(?:in_proj|conv2d|x_proj|dt_proj|out_proj)"
#: Names that are the same in upstream and here.
_TRUNK = (
    Rule(r"(pos_embed)", r"\1"),
    Rule(rf"(patch_embed\.(?:stem|convs)\.\d+\.{AFFINE})", r"\1"),
    Rule(rf"(patch_embed\.projection\.{_FIELD})", r"\1"),
    Rule(rf"(layers\.\d+\.norm\.{_FIELD})", r"\1"),
    Rule(rf"(layers\.\d+\.dw\.[01]\.{AFFINE})", r"\1"),
    Rule(rf"(layers\.\d+\.mamba\.(?:gamma|A_log|D|direction_Bs|{_PROJECTION}\.{_FIELD}))", r"\1"),
    Rule(rf"(ln1\.{_FIELD})", r"\1"),
)
_OUT_NORMS = Rule(rf"norm_layer(\d+\.{_FIELD})", r"outnorm\1")
_BACKBONE = (*_TRUNK, _OUT_NORMS, OUT_NORM)
_TO_UPSTREAM = (*_TRUNK, Rule(rf"outnorm(\d+\.{_FIELD})", r"norm_layer\1"))
_HEAD_OF_CLASSIFIER = r"head\..*"
_HEAD = (Rule(rf"(head\.fc\.{_FIELD})", r"\1"),)
_WIDTH = r"layers\.(\d+)\.norm\.weight"


def _read(form: str, state_dict: Mapping[str, Tensor], stages: Sequence[int]) -> StateDict:
    if form == "adapter":
        refuse_out_norms(form, stages)
        return read_adapter(state_dict, lambda trunk: rename(trunk, _BACKBONE, "a PlainMamba adapter"))
    body = without(state_dict, _HEAD_OF_CLASSIFIER)
    if body and all(name.startswith(TRUNK) for name in body):
        body = {name.removeprefix(TRUNK): value for name, value in body.items()}
    if form != "classifier":
        ours = rename(body, _BACKBONE, "a PlainMamba feature extractor")
        return _fill_out_norms(ours, stages) if stages else ours
    refuse_out_norms(form, stages)
    trunk = rename(body, _BACKBONE, "a PlainMamba classifier")
    num_stages(trunk, "PlainMamba")
    head = rename(only(state_dict, _HEAD_OF_CLASSIFIER), _HEAD, "the head of a PlainMamba classifier")
    return {**{TRUNK + name: value for name, value in trunk.items()}, **head}


def _fill_out_norms(ours: StateDict, stages: Sequence[int]) -> StateDict:
    """Add the norms of outputs before the last layer, whose norm a classifier has, at their initial values."""
    layers = num_stages(ours, "PlainMamba")
    like = next(value for name, value in ours.items() if re.fullmatch(_WIDTH, name))
    for layer in stages:
        if not 0 <= layer < layers:
            raise CheckpointMismatch(
                f"fill_out_norms names layer {layer}, but the state dict has {layers} layers. Name only layers "
                "from 0 to that number less one."
            )
        if layer != layers - 1 and f"outnorm{layer}.weight" not in ours:
            ours |= {f"outnorm{layer}.weight": torch.ones_like(like), f"outnorm{layer}.bias": torch.zeros_like(like)}
    return ours


def _knows(form: str, name: str) -> bool:
    if form == "adapter":
        return is_adapters(name) or known_to(_BACKBONE, name.removeprefix(TRUNK))
    return known_to(_BACKBONE, name) or (form == "classifier" and known_to(_HEAD, name))


def _write(form: str, state_dict: Mapping[str, Tensor]) -> StateDict:
    if form == "adapter":
        return write_adapter(state_dict, lambda trunk: rename(trunk, _TO_UPSTREAM, "our PlainMamba adapter"), "ad_norm")
    if form != "classifier":
        return rename(state_dict, _TO_UPSTREAM, "our PlainMamba feature extractor")
    rules = (*(Rule(rf"backbone\.{rule.pattern}", rf"backbone.{rule.target}") for rule in _TO_UPSTREAM), *_HEAD)
    return rename(state_dict, rules, "our PlainMamba classifier")


def _sketch(trunk: Mapping[str, Tensor]) -> str:
    norms = {int(match[1]): value for name, value in trunk.items() if (match := re.fullmatch(_WIDTH, name))}
    return in_words([len(norms)], sorted({value.numel() for value in norms.values()}))


CONVERTER = Converter(
    FORMS,
    _build,
    _read,
    _write,
    title="PlainMamba",
    released={name: {"arch": name.upper(), "drop_path_rate": ARCHS[name].drop_path_rate} for name in _VARIANTS},
    # Direction vectors.
    mark=r"layers\.0\.mamba\.direction_Bs",
    head=_HEAD_OF_CLASSIFIER,
    knows=_knows,
    sketch=_sketch,
    sketches={name: in_words([ARCHS[name].depth], [ARCHS[name].dim]) for name in _VARIANTS},
    optional=r"ln1\..*",
)
