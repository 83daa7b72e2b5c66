"""MobileMamba: constructor arguments and checkpoints of lewandofskee/MobileMamba (``MobileMamba`` and its copies).

Upstream's stages are flat sequences called ``blocks1`` to ``blocks3``, whose later ones begin with three modules that
halve the map; here these belong to the stage before. Variants b1, b2 and b4 are one network: whose weights a file
holds cannot be seen in it, and it is called b1.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from mmvmamba.converters.base import Converter, Rule, StateDict, known_to, reject_unknown_arguments, rename
from mmvmamba.converters.hierarchical import (
    AFFINE,
    BLOCK,
    build_classifier,
    fill_out_norms,
    in_order,
    in_words,
    num_stages,
    only,
    refuse_out_norms,
    refuse_pretrained,
    released_arguments,
    sketch,
    translate,
    without,
)
from mmvmamba.converters.mobile import build_with_neck, join_neck, knows_with_neck, split_neck
from mmvmamba.errors import CheckpointMismatch, ConfigError
from mmvmamba.models.backbones.mobilemamba import ARCHS, MobileMamba, MobileMambaArch
from mmvmamba.models.heads import build_mobilemamba_cls_head

FORMS = ("classifier", "backbone", "backbone_neck")
#: Upstream names its stages one by one.
_STAGES = 3

# ---------------------------------------------------------------- constructor arguments -> our options

#: Upstream's stages halve the map between them and not behind the last one; its models have no other list.
_DOWN_OPS = (("subsample", 2), ("subsample", 2), ("",))
#: Two directions by rows. Upstream reads the suffixes and gates in any case.
_FORWARDS = dict.fromkeys(("v052d", "v052d_noz", "v052d_nozact"), "rows, both ways")


def _upstream_arguments(
    img_size: int = 224,  # noqa: ARG001 (without effect upstream, too: any size works)
    in_chans: int = 3,
    num_classes: int = 1000,  # noqa: ARG001 (belongs to the head)
    stages: Sequence[str] = ("s",) * _STAGES,
    embed_dim: Sequence[int] = (192, 384, 448),
    global_ratio: Sequence[float] = (0.8, 0.7, 0.6),
    local_ratio: Sequence[float] = (0.2, 0.2, 0.3),
    depth: Sequence[int] = (1, 2, 2),
    kernels: Sequence[int] = (7, 5, 3),
    down_ops: Sequence[Sequence[Any]] = _DOWN_OPS,
    drop_path: float = 0.0,
    distillation: bool = False,  # noqa: ARG001 (belongs to the head)
    ssm_ratio: float = 1,
    forward_type: str = "v052d",
) -> dict[str, Any]:
    """Translate the arguments of upstream's ``MobileMamba`` (names and defaults are its) to those of ours.

    The default of ``ssm_ratio`` is that of no released model: all of them are given 2.
    """
    if len(embed_dim) != _STAGES or tuple(stages) != ("s",) * _STAGES:
        raise ConfigError(
            f"embed_dim is {embed_dim!r} and stages {stages!r}, expected {_STAGES} widths and {['s'] * _STAGES}: "
            "upstream has no other. Correct them, or build MobileMamba by hand."
        )
    if tuple(tuple(op) for op in down_ops) != _DOWN_OPS:
        raise ConfigError(
            f"down_ops is {down_ops!r}, expected {[list(op) for op in _DOWN_OPS]}: no model halves its maps elsewhere. "
            "Remove it."
        )
    translate("forward_type", forward_type, _FORWARDS)
    arch = MobileMambaArch(
        dims=tuple(embed_dim),
        depths=tuple(depth),
        drop_path_rate=drop_path,
        global_ratio=tuple(global_ratio),
        local_ratio=tuple(local_ratio),
        kernels=tuple(kernels),
        ssm_ratio=ssm_ratio,
    )
    return dict(arch=arch, in_channels=in_chans)


_DEFAULTS = {name: p.default for name, p in inspect.signature(_upstream_arguments).parameters.items()}
_OF_HEAD = ("num_classes", "distillation")
# ``pretrained`` names a file upstream loads in the constructor; here weights are loaded by init_cfg. ``sync_bn`` makes
# batch norms synchronise in parallel training, which in MMEngine a model wrapper does, and changes nothing else.
_BACKBONE_DEFAULTS: dict[str, Any] = {
    "sync_bn": False,
    "out_indices": (1, 2, 3),
    "frozen_stages": -1,
    "norm_eval": False,
    "pretrained": None,
}

#: Size of the images of every released model, by our name for it.
_SIZES = {"t2": 192, "t4": 192, "s6": 224, "b1": 256, "b2": 384, "b4": 512}
UPSTREAM_FUNCTIONS: dict[str, dict[str, Any]] = {
    f"MobileMamba_{name.upper()}": dict(
        img_size=size,
        embed_dim=ARCHS[name].dims,
        depth=ARCHS[name].depths,
        drop_path=ARCHS[name].drop_path_rate,
        ssm_ratio=ARCHS[name].ssm_ratio,
    )
    for name, size in _SIZES.items()
}

# ---------------------------------------------------------------- building


def _build(form: str, kwargs: Mapping[str, Any]) -> nn.Module:
    if form == "backbone_neck":
        reject_unknown_arguments(kwargs, ("backbone", "neck"), "mobilemamba backbone_neck")
        backbone = _build_backbone(kwargs.get("backbone", {}))
        return build_with_neck(backbone, kwargs.get("neck", {}))
    if form == "backbone":
        return _build_backbone(kwargs)
    _, kwargs = released_arguments(kwargs, UPSTREAM_FUNCTIONS)
    refuse_pretrained(kwargs.pop("pretrained", None))
    reject_unknown_arguments(kwargs, list(_DEFAULTS), "mobilemamba classifier")
    options = _upstream_arguments(**kwargs)
    num_classes, distillation = (kwargs.get(name, _DEFAULTS[name]) for name in _OF_HEAD)
    channels = options["arch"].dims[-1]
    backbone = MobileMamba(**options, out_indices=(_STAGES,))
    return build_classifier(
        backbone, channels, num_classes, lambda: build_mobilemamba_cls_head(num_classes, channels, distillation)
    )


def _build_backbone(kwargs: Mapping[str, Any]) -> MobileMamba:
    _, kwargs = released_arguments(kwargs, UPSTREAM_FUNCTIONS)
    kwargs.pop("type", None)
    reject_unknown_arguments(kwargs, [*_DEFAULTS, *_BACKBONE_DEFAULTS], "mobilemamba backbone")
    extra = {name: kwargs.pop(name, default) for name, default in _BACKBONE_DEFAULTS.items()}
    refuse_pretrained(extra.pop("pretrained"))
    del extra["sync_bn"]
    return MobileMamba(**_upstream_arguments(**kwargs), **{**extra, "out_indices": tuple(extra["out_indices"])})


# ---------------------------------------------------------------- state dicts

_PLAIN = r"(?:weight|bias)"
_DOWNSAMPLE = r"layers\.\d+\.downsample\."
_SCAN = "mixer.m.attn.global_op.global_atten"
_WAVELET, _LOCAL = "mixer.m.attn.global_op", "mixer.m.attn.local_op"
_SCAN_PARAMETERS = ("x_proj_weight", "Ds", "A_logs", "dt_projs_weight", "dt_projs_bias")
#: What follows a block's name in the vectors that have as many entries as the stage has channels.
_WIDTH = r"dw0\.norm\.weight"

#: (What stands before, upstream's name, ours, what follows) of every entry; first convolutions with their norms.
_PAIRS: list[tuple[str, str, str]] = [
    *(("", f"patch_embed.{2 * i}", f"patch_embed.convs.{i}") for i in range(4)),
    *((BLOCK, f"dw{i}.m", f"dw{i}") for i in (0, 1)),
    *((BLOCK, f"ffn{i}.m.pw{j}", f"ffn{i}.fc{j}") for i in (0, 1) for j in (1, 2)),
    *((BLOCK, f"{_SCAN}.{name}", f"mixer.global_op.scan.{name}") for name in ("in_proj", "out_proj")),
    (BLOCK, "mixer.m.attn.proj.1", "mixer.proj"),
    *((_DOWNSAMPLE, f"{part}.0.m", f"{part}.0") for part in ("before", "after")),
    *((_DOWNSAMPLE, f"{part}.1.m.pw{j}", f"{part}.1.fc{j}") for part in ("before", "after") for j in (1, 2)),
    *((_DOWNSAMPLE, f"merge.conv{i}", f"merge.conv{i}") for i in (1, 2, 3)),
]
_ENTRIES: list[tuple[str, str, str, str]] = [
    *((before, f"{name}.c", f"{own}.conv", "weight") for before, name, own in _PAIRS),
    *((before, f"{name}.bn", f"{own}.norm", AFFINE) for before, name, own in _PAIRS),
    (BLOCK, f"{_LOCAL}.dwconv3x3", "mixer.local_op.0.conv", "weight"),
    (BLOCK, f"{_LOCAL}.bn1", "mixer.local_op.0.norm", AFFINE),
    (BLOCK, f"{_LOCAL}.dwconv1x1", "mixer.local_op.1.conv", "weight"),
    (BLOCK, f"{_LOCAL}.bn2", "mixer.local_op.1.norm", AFFINE),
    (BLOCK, _SCAN, "mixer.global_op.scan", f"(?:{'|'.join(_SCAN_PARAMETERS)}|(?:conv2d|out_norm)\\.{_PLAIN})"),
    (BLOCK, _WAVELET, "mixer.global_op", "(?:wt_filter|iwt_filter)"),
    (BLOCK, f"{_WAVELET}.wavelet_convs.0", "mixer.global_op.conv", "weight"),
    *((_DOWNSAMPLE, f"merge.se.fc{i}", f"merge.se.fc{i}", _PLAIN) for i in (1, 2)),
]
#: Modules upstream, parameters here.
_SCALES = [(f"{_WAVELET}.base_scale.weight", "base_scale"), (f"{_WAVELET}.wavelet_scale.0.weight", "scale")]


def _rule(before: str, name: str, target: str, after: str) -> Rule:
    return Rule(rf"({before}){re.escape(name)}\.({after})", rf"\1{target}.\2")


#: From upstream's names, once its flat stages have blocks and a downsampling, and back.
_UPSTREAM_TRUNK = (
    *(_rule(before, name, own, after) for before, name, own, after in _ENTRIES),
    *(Rule(rf"({BLOCK}){re.escape(name)}", rf"\1mixer.global_op.{own}") for name, own in _SCALES),
)
_TO_UPSTREAM = (
    *(_rule(before, own, name, after) for before, name, own, after in _ENTRIES),
    *(Rule(rf"({BLOCK})mixer\.global_op\.{own}", rf"\1{name}") for name, own in _SCALES),
)
_OWN_TRUNK = (
    *(Rule(rf"({before}{re.escape(own)}\.{after})", r"\1") for before, _, own, after in _ENTRIES),
    *(Rule(rf"({BLOCK}mixer\.global_op\.{own})", r"\1") for _, own in _SCALES),
)
_TRUNK = (*_UPSTREAM_TRUNK, *_OWN_TRUNK)

_HEAD_OF_CLASSIFIER = r"head(?:_dist)?\..*"
_HEAD = (
    Rule(rf"(head(?:_dist)?)\.bn\.({AFFINE})", r"head.\1.norm.\2"),
    Rule(rf"(head(?:_dist)?)\.l\.({_PLAIN})", r"head.\1.fc.\2"),
)
_HEAD_TO_UPSTREAM = (
    Rule(rf"head\.(head(?:_dist)?)\.norm\.({AFFINE})", r"\1.bn.\2"),
    Rule(rf"head\.(head(?:_dist)?)\.fc\.({_PLAIN})", r"\1.l.\2"),
)

_PARTS = ("before", "merge", "after")
#: Order in which upstream registers what is inside these modules.
_ORDERS = (
    {".global_op.": ("wt_filter", "iwt_filter", "global_atten", "base_scale", "wavelet_convs", "wavelet_scale")},
    {".global_atten.": (*_SCAN_PARAMETERS, "out_norm", "in_proj", "conv2d", "out_proj")},
)


def _nested(name: str) -> str:
    """Return an entry's name with blocks and a downsampling instead of a flat stage; all others as they are."""
    match = re.fullmatch(r"blocks(\d+)\.(\d+)\.(.*)", name)
    if match is None:
        return name
    stage, index, rest = int(match[1]), int(match[2]), match[3]
    if stage == 1:
        return f"layers.1.blocks.{index}.{rest}"
    if index < len(_PARTS):
        return f"layers.{stage - 1}.downsample.{_PARTS[index]}.{rest}"
    return f"layers.{stage}.blocks.{index - len(_PARTS)}.{rest}"


def _flat(name: str) -> str:
    """Undo `_nested`."""
    if match := re.fullmatch(r"layers\.(\d+)\.downsample\.([a-z]+)\.(.*)", name):
        return f"blocks{int(match[1]) + 1}.{_PARTS.index(match[2])}.{match[3]}"
    if match := re.fullmatch(r"layers\.(\d+)\.blocks\.(\d+)\.(.*)", name):
        first = 0 if match[1] == "1" else len(_PARTS)
        return f"blocks{match[1]}.{int(match[2]) + first}.{match[3]}"
    return name


def _with_nested_names(state_dict: Mapping[str, Tensor]) -> StateDict:
    nested: StateDict = {}
    for name, value in state_dict.items():
        own = _nested(name)
        if own in nested:
            raise CheckpointMismatch(
                f"two entries of a MobileMamba become {own!r}, the second is {name!r}; expected each name once. "
                "The state dict mixes models or names: remove one of them."
            )
        nested[own] = value
    return nested


def _read_trunk(state_dict: Mapping[str, Tensor], what: str) -> StateDict:
    trunk = rename(_with_nested_names(state_dict), _TRUNK, what)
    num_stages(trunk, "MobileMamba")
    return trunk


def _read(form: str, state_dict: Mapping[str, Tensor], stages: Sequence[int]) -> StateDict:
    if form == "backbone":
        body = _with_nested_names(without(state_dict, _HEAD_OF_CLASSIFIER))
        ours = rename(body, _TRUNK, "a MobileMamba feature extractor")
        # This form has no out norms: the stages are looked for, as in every family, and nothing is added.
        fill_out_norms(dict(ours), [stage for stage in stages if stage > 0], _WIDTH)
        return ours
    refuse_out_norms(form, stages)
    if form == "backbone_neck":
        body, neck = split_neck(state_dict)
        return join_neck(_read_trunk(body, "a MobileMamba with its neck"), neck)
    trunk = _read_trunk(without(state_dict, _HEAD_OF_CLASSIFIER), "a MobileMamba classifier")
    head = rename(only(state_dict, _HEAD_OF_CLASSIFIER), _HEAD, "the head of a MobileMamba classifier")
    return {**{f"backbone.{name}": value for name, value in trunk.items()}, **head}


def _knows(form: str, name: str) -> bool:
    if form == "backbone_neck":
        return knows_with_neck(name, lambda own: known_to(_TRUNK, _nested(own)))
    return known_to((*_TRUNK, *(_HEAD if form == "classifier" else ())), _nested(name))


def _write_trunk(state_dict: Mapping[str, Tensor], what: str) -> StateDict:
    theirs: StateDict = {_flat(name): value for name, value in rename(state_dict, _TO_UPSTREAM, what).items()}
    for order in _ORDERS:
        theirs = in_order(theirs, order)
    return theirs


def _write(form: str, state_dict: Mapping[str, Tensor]) -> StateDict:
    if form == "backbone":
        return _write_trunk(state_dict, "our MobileMamba feature extractor")
    if form == "backbone_neck":
        body, neck = split_neck(state_dict)
        return join_neck(_write_trunk(body, "our MobileMamba with its neck"), neck)
    heads = r"head\..*"
    body = {name.removeprefix("backbone."): value for name, value in without(state_dict, heads).items()}
    trunk = _write_trunk(body, "our MobileMamba classifier")
    return {**trunk, **rename(only(state_dict, heads), _HEAD_TO_UPSTREAM, "the head of our MobileMamba classifier")}


_RELEASED = {name: {"function": f"MobileMamba_{name.upper()}"} for name in _SIZES}

CONVERTER = Converter(
    FORMS,
    _build,
    _read,
    _write,
    title="MobileMamba",
    released=_RELEASED,
    mark=r"(?:blocks\d+\.\d+\.mixer\.m\.attn|layers\.\d+\.blocks\.\d+\.mixer)\.global_op\.wt_filter",
    head=_HEAD_OF_CLASSIFIER,
    knows=_knows,
    sketch=lambda trunk: sketch(trunk, _WIDTH),
    sketches={name: in_words(ARCHS[name].depths, ARCHS[name].dims) for name in _RELEASED},
)
