"""VSSD: constructor arguments and checkpoints of YuHengsss/VSSD (``VMAMBA2`` and ``Backbone_VMAMBA2``).

A checkpoint does not say which sign the weights of its tokens have: the released variants are positive, and
``ssd_positve_dA=False`` (upstream's spelling) is for whoever trained the ablation.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from mmvmamba.converters.base import Converter, Rule, StateDict, known_to, reject_unknown_arguments, rename
from mmvmamba.converters.hierarchical import (
    AFFINE,
    BLOCK,
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
    translate,
    widths,
    without,
)
from mmvmamba.errors import ConfigError
from mmvmamba.models.backbones.vssd import ARCHS, VSSD, VSSDArch

FORMS = ("classifier", "backbone")

# ---------------------------------------------------------------- constructor arguments -> our options

_MIXERS = {"mamba2": "ssd", "standard": "attention"}
_DEFAULT_MIXERS = ("mamba2", "mamba2", "mamba2", "standard")
#: Arguments whose value is refused unless it is this one, and what the other value would be.
_FIXED = {
    "linear_attn_duality": (True, "the causal scan of an ablation"),
    "simple_patch_embed": (False, "a patch embedding that no released model has"),
    "simple_downsample": (False, "a downsampling that no released model has"),
}


def _upstream_vmamba2(
    img_size: int = 224,  # noqa: ARG001 (no weight and no result depends on it)
    patch_size: int = 4,  # noqa: ARG001 (the stem's stride is 4 whatever it says)
    in_chans: int = 3,
    num_classes: int = 1000,  # noqa: ARG001 (belongs to the head)
    embed_dim: int = 64,
    depths: Sequence[int] = (2, 4, 12, 4),
    num_heads: Sequence[int] = (2, 4, 8, 16),
    mlp_ratio: float = 4.0,
    qkv_bias: bool = True,  # noqa: ARG001 (the attention has none whatever it says)
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.2,
    use_checkpoint: bool = False,
    ssd_expansion: float = 2,
    ssd_expand: float = 2,  # noqa: ARG001 (upstream's configs pass it, its code reads ssd_expansion)
    ssd_ngroups: int = 1,
    ssd_chunk_size: int = 256,  # noqa: ARG001 (of the causal scan)
    linear_attn_duality: bool = True,
    bidirection: bool = False,  # noqa: ARG001 (of the causal scan)
    d_state: int = 64,
    attn_types: Sequence[str] = _DEFAULT_MIXERS,
    ssd_positve_dA: bool = True,
    simple_patch_embed: bool = False,
    simple_downsample: bool = False,
) -> dict[str, Any]:
    """Translate the arguments of upstream's ``VMAMBA2`` (names and defaults are its) to those of ``VSSD``.

    Without effect there, and accepted here: ``img_size``, ``patch_size``, ``qkv_bias``, ``ssd_expand`` and, unless
    ``linear_attn_duality`` is off, ``ssd_chunk_size`` and ``bidirection``.
    """
    given = dict(
        linear_attn_duality=linear_attn_duality,
        simple_patch_embed=simple_patch_embed,
        simple_downsample=simple_downsample,
    )
    for name, value in given.items():
        expected, other = _FIXED[name]
        if bool(value) is not expected:
            raise ConfigError(
                f"{name} is {value!r}, expected {expected}: the other value is {other}, which is not here. Remove it."
            )
    # Upstream reads one entry per stage and takes no notice of more.
    mixers = tuple(translate("attn_types", kind, _MIXERS) for kind in attn_types)[: len(depths)]
    arch = VSSDArch(
        dims=widths(embed_dim, len(depths)),
        depths=tuple(depths),
        num_heads=tuple(num_heads)[: len(depths)],
        drop_path_rate=drop_path_rate,
        d_state=d_state,
        expansion=ssd_expansion,
        num_groups=None if ssd_ngroups == -1 else ssd_ngroups,
        positive_weight=bool(ssd_positve_dA),
        mixers=mixers,  # type: ignore[arg-type]  # checked by the class
        mlp_ratio=mlp_ratio,
        dropout=drop_rate,
    )
    return dict(arch=arch, in_channels=in_chans, with_cp=use_checkpoint)


_VMAMBA2_DEFAULTS = {name: p.default for name, p in inspect.signature(_upstream_vmamba2).parameters.items()}
# ``pretrained`` names a file upstream loads in the constructor and ``key`` the part of it; here init_cfg loads weights.
_BACKBONE_DEFAULTS: dict[str, Any] = {"out_indices": (0, 1, 2, 3), "pretrained": None, "key": "model"}

# ---------------------------------------------------------------- released variants

UPSTREAM_FUNCTIONS: dict[str, dict[str, Any]] = {
    "vssd_micro": dict(embed_dim=48, depths=(2, 2, 8, 4), num_heads=(2, 4, 8, 16), d_state=48, drop_path_rate=0.2),
    "vssd_tiny": dict(embed_dim=64, depths=(2, 4, 8, 4), num_heads=(2, 4, 8, 16), d_state=64, drop_path_rate=0.2),
    "vssd_small": dict(embed_dim=64, depths=(3, 4, 21, 5), num_heads=(2, 4, 8, 16), d_state=64, drop_path_rate=0.4),
    "vssd_base": dict(embed_dim=96, depths=(3, 4, 21, 5), num_heads=(3, 6, 12, 24), d_state=64, drop_path_rate=0.6),
}

# ---------------------------------------------------------------- building


def _build(form: str, kwargs: Mapping[str, Any]) -> nn.Module:
    _, kwargs = released_arguments(kwargs, UPSTREAM_FUNCTIONS)
    known = [*_VMAMBA2_DEFAULTS, *(_BACKBONE_DEFAULTS if form == "backbone" else ())]
    reject_unknown_arguments(kwargs, known, f"vssd {form}")
    if form == "classifier":
        return _build_classifier(kwargs)
    extra = {name: kwargs.pop(name, default) for name, default in _BACKBONE_DEFAULTS.items()}
    refuse_pretrained(extra["pretrained"])
    return VSSD(**_upstream_vmamba2(**kwargs), out_indices=tuple(extra["out_indices"]))


def _build_classifier(kwargs: dict[str, Any]) -> nn.Module:
    num_classes = kwargs.get("num_classes", _VMAMBA2_DEFAULTS["num_classes"])
    if num_classes < 1:
        raise ConfigError(
            f"num_classes is {num_classes!r}, expected at least 1 for form 'classifier': upstream then has no head. "
            "Use form='backbone' for features."
        )
    options = _upstream_vmamba2(**kwargs)
    dims = options["arch"].dims
    return build_classifier(VSSD(**options, out_indices=(len(dims) - 1,)), dims[-1], num_classes)


# ---------------------------------------------------------------- state dicts

_WEIGHT_BIAS = r"(?:weight|bias)"
_SSD = rf"attn\.(?:dt_bias|A_log|D|(?:in|out)_proj\.weight|(?:conv2d|norm)\.{_WEIGHT_BIAS})"
_ATTENTION = rf"attn\.(?:to_qkv\.weight|to_out\.{_WEIGHT_BIAS})"
_WIDTH = r"norm[12]\.weight"

#: Names shared by both forms, unchanged in ours.
_TRUNK = (
    Rule(rf"(patch_embed\.conv(?:1|2\.[01]|3\.[01])\.(?:conv\.weight|norm\.{AFFINE}))", r"\1"),
    Rule(rf"({BLOCK}(?:cpe[12]|norm[12])\.{_WEIGHT_BIAS})", r"\1"),
    Rule(rf"({BLOCK}(?:{_SSD}|{_ATTENTION}))", r"\1"),
    Rule(rf"({BLOCK}mlp\.fc[12]\.{_WEIGHT_BIAS})", r"\1"),
    Rule(rf"(layers\.\d+\.downsample\.conv\.(?:[012]\.conv\.{_WEIGHT_BIAS}|2\.norm\.{AFFINE}))", r"\1"),
)
_HEAD_OF_CLASSIFIER = r"(?:norm|head)\..*"


def _read(form: str, state_dict: Mapping[str, Tensor], stages: Sequence[int]) -> StateDict:
    if form == "backbone":
        drop = (_HEAD_OF_CLASSIFIER,) if stages else ()
        ours = rename(state_dict, (*_TRUNK, OUT_NORM), "a VSSD feature extractor", drop)
        return fill_out_norms(ours, stages, _WIDTH)
    refuse_out_norms(form, stages)
    trunk = rename(without(state_dict, _HEAD_OF_CLASSIFIER), _TRUNK, "a VSSD classifier")
    last = num_stages(trunk, "VSSD") - 1
    head = rename(only(state_dict, _HEAD_OF_CLASSIFIER), _head_rules(last), "the head of a VSSD classifier")
    return {**{f"backbone.{name}": value for name, value in trunk.items()}, **head}


def _head_rules(last: int) -> tuple[Rule, Rule]:
    """Return the rules of the classification head, whose norm is the out norm of stage ``last`` here."""
    return (
        Rule(rf"norm\.({_WEIGHT_BIAS})", rf"backbone.outnorm{last}.\1"),
        Rule(rf"head\.({_WEIGHT_BIAS})", r"head.fc.\1"),
    )


def _knows(form: str, name: str) -> bool:
    own = _head_rules(0) if form == "classifier" else (OUT_NORM,)
    return known_to((*_TRUNK, *own), name)


def _write(form: str, state_dict: Mapping[str, Tensor]) -> StateDict:
    if form == "backbone":
        return rename(state_dict, (*_TRUNK, OUT_NORM), "our VSSD feature extractor")
    rules = [
        Rule(rf"backbone\.outnorm\d+\.({_WEIGHT_BIAS})", r"norm.\1"),
        Rule(rf"head\.fc\.({_WEIGHT_BIAS})", r"head.\1"),
        *(Rule(rf"backbone\.{rule.pattern}", rule.target) for rule in _TRUNK),
    ]
    return rename(state_dict, rules, "our VSSD classifier")


#: The name of each released variant as an arch of ours: "vssd_tiny" is "tiny".
_RELEASED = {name.removeprefix("vssd_"): {"function": name} for name in UPSTREAM_FUNCTIONS}

CONVERTER = Converter(
    FORMS,
    _build,
    _read,
    _write,
    title="VSSD",
    released=_RELEASED,
    mark=r"layers\.\d+\.blocks\.\d+\.attn\.A_log",
    head=_HEAD_OF_CLASSIFIER,
    knows=_knows,
    sketch=lambda trunk: sketch(trunk, _WIDTH),
    sketches={name: in_words(ARCHS[name].depths, ARCHS[name].dims) for name in _RELEASED},
)
