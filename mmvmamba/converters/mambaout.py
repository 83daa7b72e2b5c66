"""MambaOut: constructor arguments and checkpoints of yuweihao/MambaOut (``MambaOut``), also under the names of timm.

Upstream has a classifier only. Form ``"backbone"`` is what a feature pyramid would take of it: the output of every
stage as it is, without a norm; the classifier's norm and head are left out by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from mmvmamba.converters.base import Converter, Rule, StateDict, known_to, reject_unknown_arguments, rename
from mmvmamba.converters.hierarchical import (
    OUT_NORM,
    build_classifier,
    fill_out_norms,
    in_words,
    num_stages,
    only,
    refuse_out_norms,
    refuse_pretrained,
    released_arguments,
    sketch,
    without,
)
from mmvmamba.errors import ConfigError
from mmvmamba.models.backbones.mambaout import ARCHS, MambaOut, MambaOutArch
from mmvmamba.models.heads import build_mambaout_cls_head

FORMS = ("classifier", "backbone")
#: Upstream has a stem and three downsamplings.
MOST_STAGES = 4

# ---------------------------------------------------------------- constructor arguments -> our options


def _upstream_mambaout(
    in_chans: int = 3,
    num_classes: int = 1000,  # noqa: ARG001 (belongs to the head)
    depths: int | Sequence[int] = (3, 3, 9, 3),
    dims: int | Sequence[int] = (96, 192, 384, 576),
    conv_ratio: float = 1.0,
    kernel_size: int = 7,
    drop_path_rate: float = 0.0,
    head_dropout: float = 0.0,  # noqa: ARG001 (belongs to the head)
) -> dict[str, Any]:
    """Translate the arguments of upstream's ``MambaOut`` (names and defaults are its) to those of ours."""
    dims = (dims,) if isinstance(dims, int) else tuple(dims)
    depths = (depths,) if isinstance(depths, int) else tuple(depths)
    if len(depths) > MOST_STAGES:
        raise ConfigError(
            f"depths is {depths}, expected at most {MOST_STAGES} stages: upstream has no downsampling for more. "
            "Shorten it, or build MambaOut by hand."
        )
    arch = MambaOutArch(
        dims=dims,
        depths=depths,
        drop_path_rate=drop_path_rate,
        kernel_size=kernel_size,
        conv_ratio=conv_ratio,
    )
    return dict(arch=arch, in_channels=in_chans, out_norms=False)


_DEFAULTS = {name: p.default for name, p in inspect.signature(_upstream_mambaout).parameters.items()}
#: Upstream's arguments that are classes or functions, of which every released model has the default.
_CLASSES = ("downsample_layers", "norm_layer", "act_layer", "output_norm", "head_fn")

#: As upstream's functions have them: without stochastic depth, which is an argument of its training script.
UPSTREAM_FUNCTIONS: dict[str, dict[str, Any]] = {
    f"mambaout_{name}": dict(depths=arch.depths, dims=arch.dims) for name, arch in ARCHS.items() if name != "nano"
}


# ---------------------------------------------------------------- building


def _build(form: str, kwargs: Mapping[str, Any]) -> nn.Module:
    _, kwargs = released_arguments(kwargs, UPSTREAM_FUNCTIONS)
    for name in _CLASSES:
        if kwargs.pop(name, None) is not None:
            raise ConfigError(
                f"mambaout {form}: {name} is given, expected it left out or None: it names classes, and ours are "
                "upstream's own (layer norms with eps 1e-6, exact GELU, perceptron head). Build others by hand."
            )
    refuse_pretrained(kwargs.pop("pretrained", None))
    known = [*_DEFAULTS, *(["out_indices"] if form == "backbone" else [])]
    reject_unknown_arguments(kwargs, known, f"mambaout {form}")
    out_indices = kwargs.pop("out_indices", None)
    options = _upstream_mambaout(**kwargs)
    dims = options["arch"].dims
    if form == "backbone":
        return MambaOut(**options, out_indices=tuple(range(len(dims)) if out_indices is None else out_indices))

    num_classes = kwargs.get("num_classes", _DEFAULTS["num_classes"])
    dropout = kwargs.get("head_dropout", _DEFAULTS["head_dropout"])
    return build_classifier(
        MambaOut(**options, out_indices=(len(dims) - 1,)),
        dims[-1],
        num_classes,
        lambda: build_mambaout_cls_head(num_classes, dims[-1], dropout),
    )


# ---------------------------------------------------------------- state dicts

_FIELD = r"(weight|bias)"
_STEM = r"((?:conv|norm)[12]\.(?:weight|bias))"
_PART = r"((?:norm|fc1|conv|fc2)\.(?:weight|bias))"
_DOWNSAMPLE = r"((?:conv|norm)\.(?:weight|bias))"
_WIDTH = r"norm\.weight"

#: A downsampling counts to the stage before it here, and to the one behind it in upstream and timm.
_BEHIND = [(stage, stage - 1) for stage in range(1, MOST_STAGES)]
_UPSTREAM_TRUNK = (
    Rule(rf"downsample_layers\.0\.{_STEM}", r"patch_embed.\1"),
    *(Rule(rf"downsample_layers\.{i}\.{_DOWNSAMPLE}", rf"layers.{j}.downsample.\1") for i, j in _BEHIND),
    Rule(rf"stages\.(\d+)\.(\d+)\.{_PART}", r"layers.\1.blocks.\2.\3"),
)
_TIMM_TRUNK = (
    Rule(rf"stem\.{_STEM}", r"patch_embed.\1"),
    *(Rule(rf"stages\.{i}\.downsample\.{_DOWNSAMPLE}", rf"layers.{j}.downsample.\1") for i, j in _BEHIND),
    Rule(rf"stages\.(\d+)\.blocks\.(\d+)\.{_PART}", r"layers.\1.blocks.\2.\3"),
)
_OWN_TRUNK = (
    Rule(rf"patch_embed\.{_STEM}", r"patch_embed.\1"),
    Rule(rf"layers\.(\d+)\.downsample\.{_DOWNSAMPLE}", r"layers.\1.downsample.\2"),
    Rule(rf"layers\.(\d+)\.blocks\.(\d+)\.{_PART}", r"layers.\1.blocks.\2.\3"),
)
_TRUNK = (*_UPSTREAM_TRUNK, *_TIMM_TRUNK, *_OWN_TRUNK)

_HEAD_OF_CLASSIFIER = r"(?:norm|head)\..*"
_HEAD = (
    Rule(rf"norm\.{_FIELD}", r"head.pre_norm.\1"),
    Rule(rf"head\.(fc1|norm|fc2)\.{_FIELD}", r"head.\1.\2"),
)
_TIMM_HEAD = (
    Rule(rf"head\.norm\.{_FIELD}", r"head.pre_norm.\1"),
    Rule(rf"head\.pre_logits\.fc\.{_FIELD}", r"head.fc1.\1"),
    Rule(rf"head\.pre_logits\.norm\.{_FIELD}", r"head.norm.\1"),
    Rule(rf"head\.fc\.{_FIELD}", r"head.fc2.\1"),
)


def _read(form: str, state_dict: Mapping[str, Tensor], stages: Sequence[int]) -> StateDict:
    body = without(state_dict, _HEAD_OF_CLASSIFIER)
    if form == "backbone":
        ours = rename(body, (*_TRUNK, OUT_NORM), "a MambaOut feature extractor")
        # This form has no out norms: the stages are looked for, as in every family, and nothing is added.
        fill_out_norms(dict(ours), stages, _WIDTH)
        return ours
    refuse_out_norms(form, stages)
    trunk = rename(body, _TRUNK, "a MambaOut classifier")
    num_stages(trunk, "MambaOut")
    # Upstream and timm call different norms "head.norm"; only timm has a module for what is before the last linear map.
    is_timm = any(name.startswith(("stem.", "head.pre_logits.")) for name in state_dict)
    rules = _TIMM_HEAD if is_timm else _HEAD
    head = rename(only(state_dict, _HEAD_OF_CLASSIFIER), rules, "the head of a MambaOut classifier")
    return {**{f"backbone.{name}": value for name, value in trunk.items()}, **head}


def _knows(form: str, name: str) -> bool:
    own = (*_HEAD, *_TIMM_HEAD) if form == "classifier" else (OUT_NORM,)
    return known_to((*_TRUNK, *own), name)


_TO_UPSTREAM = (
    Rule(rf"patch_embed\.{_STEM}", r"downsample_layers.0.\1"),
    *(Rule(rf"layers\.{j}\.downsample\.{_DOWNSAMPLE}", rf"downsample_layers.{i}.\1") for i, j in _BEHIND),
    Rule(rf"layers\.(\d+)\.blocks\.(\d+)\.{_PART}", r"stages.\1.\2.\3"),
)
_HEAD_TO_UPSTREAM = (
    Rule(rf"head\.pre_norm\.{_FIELD}", r"norm.\1"),
    Rule(rf"head\.(fc1|norm|fc2)\.{_FIELD}", r"head.\1.\2"),
)
_ORDER = ("downsample_layers", "stages")


def _write(form: str, state_dict: Mapping[str, Tensor]) -> StateDict:
    if form == "backbone":
        renamed = rename(state_dict, (*_TO_UPSTREAM, OUT_NORM), "our MambaOut feature extractor")
    else:
        rules = [*(Rule(rf"backbone\.{rule.pattern}", rule.target) for rule in _TO_UPSTREAM), *_HEAD_TO_UPSTREAM]
        renamed = rename(state_dict, rules, "our MambaOut classifier")
    ranks = {name: rank for rank, name in enumerate(_ORDER)}
    ordered = sorted(renamed, key=lambda name: ranks.get(name.split(".")[0], len(_ORDER)))
    return {name: renamed[name] for name in ordered}


_RELEASED = {
    name: {"function": f"mambaout_{name}", "drop_path_rate": arch.drop_path_rate}
    for name, arch in ARCHS.items()
    if f"mambaout_{name}" in UPSTREAM_FUNCTIONS
}

CONVERTER = Converter(
    FORMS,
    _build,
    _read,
    _write,
    title="MambaOut",
    released=_RELEASED,
    # A linear map directly in a block.
    mark=r"(?:stages\.\d+|stages\.\d+\.blocks|layers\.\d+\.blocks)\.\d+\.fc1\.weight",
    head=_HEAD_OF_CLASSIFIER,
    knows=_knows,
    sketch=lambda trunk: sketch(trunk, _WIDTH),
    sketches={name: in_words(ARCHS[name].depths, ARCHS[name].dims) for name in _RELEASED},
)
