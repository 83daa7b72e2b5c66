"""VMamba: constructor arguments and checkpoints of MzeroMiko/VMamba (``VSSM`` and ``Backbone_VSSM``)."""

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
    OUT_NORM,
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
    widths,
    without,
)
from mmvmamba.converters.vssm import (
    ACTIVATIONS,
    DOWNSAMPLES,
    HEAD_OF_CLASSIFIER,
    NORMS,
    PATCH_EMBEDS,
    SSM_INITS,
    head_rules,
)
from mmvmamba.errors import ConfigError, nearest_spelling
from mmvmamba.models.backbones.vmamba import ARCHS, VMamba, VMambaArch

FORMS = ("classifier", "backbone")

# ---------------------------------------------------------------- constructor arguments -> our options

_BASE_FORWARDS: dict[str, str] = {
    # They differ in kernels and in the types of intermediate results, not in what they compute.
    **dict.fromkeys(("v01", "v02", "v03", "v04", "v05", "v1", "v2", "v3", "v4"), "cross"),
    **dict.fromkeys(("v051d", "v31d"), "unidirectional"),
    **dict.fromkeys(("v052d", "v32d"), "bidirectional"),
    "v052d3": "rotated",
    **dict.fromkeys(("v052dc", "v32dc"), "cascade"),
}
_VANILLA_FORWARDS = ("v0", "v0seq")
OUT_NORMS: dict[str, str] = {
    "": "layer_norm",
    "_onnone": "none",
    "_ondwconv3": "depthwise_conv",
    "_oncnorm": "norm_depthwise_conv",
    "_onsoftmax": "softmax",
    "_onsigmoid": "sigmoid",
}
# Upstream strips the suffixes from the end in one fixed order; written forwards, they can only appear like this.
_FORWARD_TYPE = re.compile(
    r"(?P<base>[a-z0-9]+)(?P<out_norm>_on(?:none|dwconv3|cnorm|softmax|sigmoid))?"
    r"(?P<nozact>_nozact)?(?P<noz>_noz)?(?P<oact>_oact)?(?P<no32>_no32)?"
)


def _upstream_vssm(
    patch_size: int = 4,
    in_chans: int = 3,
    num_classes: int = 1000,  # noqa: ARG001 (belongs to the head)
    depths: Sequence[int] = (2, 2, 9, 2),
    dims: int | Sequence[int] = (96, 192, 384, 768),
    ssm_d_state: int = 16,
    ssm_ratio: float = 2.0,
    ssm_dt_rank: str | int = "auto",
    ssm_act_layer: str = "silu",
    ssm_conv: int = 3,
    ssm_conv_bias: bool = True,
    ssm_drop_rate: float = 0.0,
    ssm_init: str = "v0",
    forward_type: str = "v2",
    mlp_ratio: float = 4.0,
    mlp_act_layer: str = "gelu",
    mlp_drop_rate: float = 0.0,
    gmlp: bool = False,
    drop_path_rate: float = 0.1,
    patch_norm: bool = True,
    norm_layer: str = "LN",
    downsample_version: str = "v2",
    patchembed_version: str = "v1",
    use_checkpoint: bool = False,
    posembed: bool = False,
    imgsize: int = 224,
) -> dict[str, Any]:
    """Translate the arguments of upstream's ``VSSM`` (names and defaults are its) to those of ``VMamba``."""
    depths = tuple(depths)
    arch: dict[str, Any] = dict(
        dims=widths(dims, len(depths)),
        depths=depths,
        drop_path_rate=drop_path_rate,
        d_state=ssm_d_state,
        ssm_ratio=ssm_ratio,
        dt_rank=None if ssm_dt_rank == "auto" else ssm_dt_rank,
        ssm_act=translate("ssm_act_layer", ssm_act_layer, ACTIVATIONS),
        conv_kernel=ssm_conv,
        conv_bias=ssm_conv_bias,
        ssm_dropout=ssm_drop_rate,
        ssm_init=translate("ssm_init", ssm_init, SSM_INITS),
        mlp_ratio=mlp_ratio,
        mlp_act=translate("mlp_act_layer", mlp_act_layer, ACTIVATIONS),
        mlp_dropout=mlp_drop_rate,
        gated_mlp=gmlp,
        norm=translate("norm_layer", norm_layer, NORMS),
        patch_embed=translate("patchembed_version", patchembed_version, PATCH_EMBEDS),
        downsample=translate("downsample_version", downsample_version, DOWNSAMPLES),
    )
    if ssm_ratio > 0:
        arch |= parse_forward_type(forward_type)
        if forward_type in _VANILLA_FORWARDS and norm_layer.lower() != "ln":
            raise ConfigError(
                f"norm_layer is {norm_layer!r} with forward_type={forward_type!r}, expected 'ln': upstream has this "
                "operator for channels-last models only. Use norm_layer='ln' or forward_type='v05'."
            )
    side = imgsize // patch_size
    return dict(
        arch=VMambaArch(**arch),
        in_channels=in_chans,
        patch_size=patch_size,
        patch_norm=patch_norm,
        pos_embed_size=(side, side) if posembed else None,
        with_cp=use_checkpoint,
    )


_VSSM_DEFAULTS = {name: p.default for name, p in inspect.signature(_upstream_vssm).parameters.items()}
# ``pretrained`` names a file upstream loads in the constructor; here weights are loaded by init_cfg.
_BACKBONE_DEFAULTS: dict[str, Any] = {"out_indices": (0, 1, 2, 3), "pretrained": None, "norm_layer": "ln"}


def parse_forward_type(forward_type: str) -> dict[str, Any]:
    """Translate upstream's ``forward_type`` string to fields of ``VMambaArch``.

    Raises:
        ConfigError: If upstream would not know the string, or would drop part of it.
    """
    if forward_type in _VANILLA_FORWARDS:
        # The first generation ignores these arguments of the constructor.
        return dict(scan="cross", gated=True, ssm_act="silu", conv_kernel=3, conv_bias=True, ssm_init="mamba")
    match = _FORWARD_TYPE.fullmatch(forward_type)
    if match is None or match["base"] not in _BASE_FORWARDS:
        raise ConfigError(
            f"forward_type is {forward_type!r}, expected one of {', '.join((*_VANILLA_FORWARDS, *_BASE_FORWARDS))}; "
            "all but the first two may be followed by at most one out norm "
            f"({', '.join(name for name in OUT_NORMS if name)}) and then, in this order, by _nozact, _noz, _oact and "
            f"_no32.{nearest_spelling(forward_type, _BASE_FORWARDS)} Reorder or correct the suffixes."
        )
    return dict(
        scan=_BASE_FORWARDS[match["base"]],
        out_norm=OUT_NORMS[match["out_norm"] or ""],
        gated=match["noz"] is None,
        gate_act=match["nozact"] is None,
        out_act=match["oact"] is not None,
    )


# ---------------------------------------------------------------- released variants

_V2 = dict(
    ssm_d_state=1,
    ssm_conv_bias=False,
    forward_type="v05_noz",
    norm_layer="ln2d",
    downsample_version="v3",
    patchembed_version="v2",
)
_V0 = dict(forward_type="v0", mlp_ratio=0.0, norm_layer="ln", downsample_version="v1", patchembed_version="v1")
UPSTREAM_FUNCTIONS: dict[str, dict[str, Any]] = {
    "vanilla_vmamba_tiny": dict(_V0, depths=(2, 2, 9, 2), dims=96, drop_path_rate=0.2),
    "vanilla_vmamba_small": dict(_V0, depths=(2, 2, 27, 2), dims=96, drop_path_rate=0.3),
    "vanilla_vmamba_base": dict(_V0, depths=(2, 2, 27, 2), dims=128, drop_path_rate=0.6),
    "vmamba_tiny_s2l5": dict(_V2, depths=(2, 2, 5, 2), dims=96, drop_path_rate=0.2),
    "vmamba_small_s2l15": dict(_V2, depths=(2, 2, 15, 2), dims=96, drop_path_rate=0.3),
    "vmamba_base_s2l15": dict(_V2, depths=(2, 2, 15, 2), dims=128, drop_path_rate=0.6),
    "vmamba_tiny_s1l8": dict(_V2, depths=(2, 2, 8, 2), dims=96, drop_path_rate=0.2, ssm_ratio=1.0),
    "vmamba_small_s1l20": dict(_V2, depths=(2, 2, 20, 2), dims=96, drop_path_rate=0.3, ssm_ratio=1.0),
    "vmamba_base_s1l20": dict(_V2, depths=(2, 2, 20, 2), dims=128, drop_path_rate=0.5, ssm_ratio=1.0),
}


# ---------------------------------------------------------------- building


def _build(form: str, kwargs: Mapping[str, Any]) -> nn.Module:
    _, kwargs = released_arguments(kwargs, UPSTREAM_FUNCTIONS)
    known = [*_VSSM_DEFAULTS, *(name for name in _BACKBONE_DEFAULTS if form == "backbone" and name != "norm_layer")]
    reject_unknown_arguments(kwargs, known, f"vmamba {form}")
    if form == "classifier":
        return _build_classifier(kwargs)
    extra = {name: kwargs.pop(name, default) for name, default in _BACKBONE_DEFAULTS.items()}
    refuse_pretrained(extra["pretrained"])
    options = _upstream_vssm(**kwargs, norm_layer=extra["norm_layer"])
    # Upstream's feature extractor owns a position embedding but never adds it.
    return VMamba(**options, out_indices=tuple(extra["out_indices"]), use_pos_embed=False)


def _build_classifier(kwargs: dict[str, Any]) -> nn.Module:
    options = _upstream_vssm(**kwargs)
    dims = options["arch"].dims
    num_classes = kwargs.get("num_classes", _VSSM_DEFAULTS["num_classes"])
    return build_classifier(VMamba(**options, out_indices=(len(dims) - 1,)), dims[-1], num_classes)


# ---------------------------------------------------------------- state dicts

_OP = r"(?:x_proj_weight|dt_projs_(?:weight|bias)|A_logs|Ds|(?:in|out)_proj\.weight|conv2d\.(?:weight|bias))"
_WIDTH = r"norm2?\.weight"

#: Names shared by both forms, unchanged in ours.
_TRUNK = (
    Rule(rf"(patch_embed\.[0257]\.{AFFINE})", r"\1"),
    Rule(r"(pos_embed)", r"\1"),
    Rule(rf"({BLOCK}(?:norm|norm2)\.{AFFINE})", r"\1"),
    Rule(rf"({BLOCK}op\.{_OP})", r"\1"),
    Rule(rf"({BLOCK}op\.out_norm\.(?:[012]\.)?(?:weight|bias))", r"\1"),
    Rule(rf"({BLOCK}mlp\.fc[12]\.(?:weight|bias))", r"\1"),
    Rule(rf"(layers\.\d+\.downsample\.(?:[13]|norm)\.{AFFINE})", r"\1"),
    Rule(r"(layers\.\d+\.downsample\.reduction\.weight)", r"\1"),
)
#: Names of the first releases.
_OLD_TRUNK = (
    Rule(r"patch_embed\.proj\.(weight|bias)", r"patch_embed.0.\1"),
    Rule(rf"patch_embed\.norm\.({AFFINE})", r"patch_embed.2.\1"),
    Rule(rf"({BLOCK})ln_1\.({AFFINE})", r"\1norm.\2"),
    Rule(rf"({BLOCK})self_attention\.((?:out_norm\.(?:weight|bias))|{_OP})", r"\1op.\2"),
)
_PARAMETERS = ("x_proj_weight", "A_logs", "Ds", "dt_projs_weight", "dt_projs_bias")
_OP_ORDER = (*_PARAMETERS, "out_norm", "in_proj", "conv2d", "out_proj")
_VANILLA_OP_ORDER = (*_PARAMETERS, "in_proj", "conv2d", "out_norm", "out_proj")
_DOWNSAMPLE_ORDER = ("reduction", "norm")


def _read(form: str, state_dict: Mapping[str, Tensor], stages: Sequence[int]) -> StateDict:
    if form == "backbone":
        drop = (HEAD_OF_CLASSIFIER,) if stages else ()
        ours = rename(state_dict, (*_TRUNK, *_OLD_TRUNK, OUT_NORM), "a VMamba feature extractor", drop)
        head_norm = {name.rsplit(".", 1)[1] for name in state_dict if re.match(r"(?:classifier\.)?norm\.", name)}
        return fill_out_norms(ours, stages, _WIDTH, sorted(head_norm) or ("bias", "weight"))
    refuse_out_norms(form, stages)
    trunk = rename(without(state_dict, HEAD_OF_CLASSIFIER), (*_TRUNK, *_OLD_TRUNK), "a VMamba classifier")
    last = num_stages(trunk, "VMamba") - 1
    head = rename(
        only(state_dict, HEAD_OF_CLASSIFIER),
        head_rules(last),
        "the head of a VMamba classifier",
    )
    return {**{f"backbone.{name}": value for name, value in trunk.items()}, **head}


def _knows(form: str, name: str) -> bool:
    own = head_rules(0) if form == "classifier" else (OUT_NORM,)
    return known_to((*_TRUNK, *_OLD_TRUNK, *own), name)


def _write(form: str, state_dict: Mapping[str, Tensor]) -> StateDict:
    if form == "backbone":
        return _in_upstream_order(rename(state_dict, (*_TRUNK, OUT_NORM), "our VMamba feature extractor"))
    rules = [
        Rule(rf"backbone\.outnorm\d+\.({AFFINE})", r"classifier.norm.\1"),
        Rule(r"head\.fc\.(weight|bias)", r"classifier.head.\1"),
        *(Rule(rf"backbone\.{rule.pattern}", rule.target) for rule in _TRUNK),
    ]
    return _in_upstream_order(rename(state_dict, rules, "our VMamba classifier"))


def _in_upstream_order(state_dict: StateDict) -> StateDict:
    """Sort the entries inside each scan and each patch merging as upstream registers them; the rest keeps its place."""
    # Only the first generation (forward type v0, without MLPs) registers its out norm after the convolution.
    in_op = _OP_ORDER if any(".mlp." in name for name in state_dict) else _VANILLA_OP_ORDER
    return in_order(state_dict, {".op.": in_op, ".downsample.": _DOWNSAMPLE_ORDER})


#: The name of each of upstream's functions as an arch of ours: "vmamba_tiny_s1l8" is "tiny-s1l8".
_RELEASED = {
    name.replace("vanilla_vmamba", "vanilla").removeprefix("vmamba_").replace("_", "-"): {"function": name}
    for name in UPSTREAM_FUNCTIONS
}

CONVERTER = Converter(
    FORMS,
    _build,
    _read,
    _write,
    title="VMamba",
    released=_RELEASED,
    mark=r"layers\.\d+\.blocks\.\d+\.(?:op|self_attention)\.A_logs",
    head=HEAD_OF_CLASSIFIER,
    knows=_knows,
    sketch=lambda trunk: sketch(trunk, _WIDTH),
    sketches={name: in_words(ARCHS[name].depths, ARCHS[name].dims) for name in _RELEASED},
)
