"""MSVMamba: constructor arguments and checkpoints of YuHengsss/MSVMamba, both generations.

Generation v1 is the branch master (c394019), v3 the branch v2 (fca4a39). Their constructors have other arguments under
the same names, so a form says which is meant: ``"v1_classifier"``, ``"v3_backbone"`` and so on. The plain
``"classifier"`` and ``"backbone"`` take either, told apart by an argument that only one of them has.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
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
from mmvmamba.errors import ConfigError
from mmvmamba.models.backbones.msvmamba import ARCHS, MSVMamba, MSVMambaArch

FORMS = ("v1_classifier", "v1_backbone", "v3_classifier", "v3_backbone", "classifier", "backbone")

# ---------------------------------------------------------------- constructor arguments -> our options

_MULTI_SCALE = "multiscale_4scan_12"
#: Scan of the full map and scans of the half map by ``full_res_index`` of v3.
_V3_ROUTES = {
    1: ("row", ("row_reversed", "column", "column_reversed")),
    2: ("row_reversed", ("row", "column", "column_reversed")),
}
_V3_FORWARD = re.compile(r"vms(?P<nozact>_nozact)?(?P<noz>_noz)?(?P<oact>_oact)?(?:_no32)?")
#: Arguments of v1's constructor and configuration that change nothing in a network of this kind.
_V1_WITHOUT_EFFECT = (
    "recurrent", "recurrent_stride", "inter_block_ssm", "grid_size", "multiscale_ratio", "multiscale_ksize",
    "continous_patch", "adaptive_merge", "b1_seq", "b1_ratio", "ms_fusion", "up_sample", "lpu",
)  # fmt: skip


def _upstream_v1(
    patch_size: int = 4,
    in_chans: int = 3,
    num_classes: int = 1000,  # noqa: ARG001 (belongs to the head)
    depths: Sequence[int] = (2, 2, 9, 2),
    dims: int | Sequence[int] = (96, 192, 384, 768),
    ssm_d_state: int = 16,
    ssm_ratio: float = 2.0,
    ssm_rank_ratio: float = 2.0,
    ssm_dt_rank: str | int = "auto",
    ssm_act_layer: str = "silu",
    ssm_conv: int = 3,
    ssm_conv_bias: bool = True,
    ssm_drop_rate: float = 0.0,
    ssm_simple_init: bool = False,
    forward_type: str = "v2",
    mlp_ratio: float = 4.0,
    mlp_act_layer: str = "gelu",
    mlp_drop_rate: float = 0.0,
    drop_path_rate: float = 0.1,
    patch_norm: bool = True,
    norm_layer: str = "LN",
    downsample_version: str = "v2",
    patchembed_version: str = "v1",
    use_checkpoint: bool = False,
    sscore_type: str = "None",
    add_conv: bool = True,
    add_se: bool = False,
    convFFN: bool = False,
    sep_norm: bool = False,
    ms_stage: Sequence[int] = (),
    ms_split: Sequence[int] = (1, 3),
    ffn_dropout: float = 0.2,
) -> dict[str, Any]:
    """Translate the arguments of v1's ``VSSM`` (names and defaults are its) to those of ``MSVMamba``."""
    depths = tuple(depths)
    _only_official("sscore_type", sscore_type, _MULTI_SCALE, "without it the network is a VMamba")
    _only_official("ms_stage", sorted(ms_stage), list(range(len(depths))), "other stages would be VMamba's")
    _only_official("add_conv", add_conv, True)
    _only_official("sep_norm", sep_norm, False)
    _only_official("ssm_simple_init", ssm_simple_init, False)
    _only_official("norm_layer", str(norm_layer).lower(), "ln")
    if re.search("nozact|softmax|sigmoid", forward_type):
        _only_official("forward_type", forward_type, "v2")
    if 0 < ssm_rank_ratio < ssm_ratio:
        _only_official("ssm_rank_ratio", ssm_rank_ratio, ssm_ratio, "a smaller one adds low-rank projections")
    if convFFN and mlp_ratio > 0:
        _only_official("mlp_ratio", mlp_ratio, 0.0, "with convFFN upstream would apply both")
    _only_official("ms_split", list(ms_split), [1, 3], "upstream's scan fails at fewer parts")
    return dict(
        arch=MSVMambaArch(
            dims=widths(dims, len(depths)),
            depths=depths,
            drop_path_rate=drop_path_rate,
            generation="v1",
            patch_embed=translate(  # type: ignore[arg-type]  # a Literal as a str, here and below
                "patchembed_version", patchembed_version, PATCH_EMBEDS
            ),
            downsample=translate("downsample_version", downsample_version, DOWNSAMPLES),  # type: ignore[arg-type]
            squeeze_excite=bool(add_se),
            **_scan_options(ssm_d_state, ssm_ratio, ssm_dt_rank, ssm_act_layer, ssm_conv, ssm_conv_bias, ssm_drop_rate),
            **_ffn_options(convFFN, 2.0, ffn_dropout, mlp_ratio, mlp_act_layer, mlp_drop_rate),
        ),
        in_channels=in_chans,
        patch_size=patch_size,
        patch_norm=patch_norm,
        with_cp=use_checkpoint,
    )


def _upstream_v3(
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
    imgsize: int = 224,  # noqa: ARG001 (the size of a position embedding, which there is none of)
    post_norm: bool = False,
    convffn: bool = False,
    conv_ffn_ratio: float = 2,
    add_se: bool = False,
    full_res_index: int = 1,
) -> dict[str, Any]:
    """Translate the arguments of v3's ``VSSM`` (names and defaults are its) to those of ``MSVMamba``."""
    depths = tuple(depths)
    _only_official("posembed", posembed, False)
    _only_official("post_norm", post_norm, False)
    if not convffn and mlp_ratio > 0:
        _only_official("gmlp", gmlp, False)
    if full_res_index not in _V3_ROUTES:
        _only_official("full_res_index", full_res_index, 1, "upstream merges the parts of 3 and 4 wrongly")
    full_route, half_routes = _V3_ROUTES[full_res_index]
    channels_first = translate("norm_layer", norm_layer, NORMS) == "batch_norm" or str(norm_layer).lower() == "ln2d"
    return dict(
        arch=MSVMambaArch(
            dims=widths(dims, len(depths)),
            depths=depths,
            drop_path_rate=drop_path_rate,
            generation="v3",
            full_route=full_route,  # type: ignore[arg-type]  # a Literal as a str, here and below
            half_routes=half_routes,  # type: ignore[arg-type]
            ssm_init=translate("ssm_init", ssm_init, SSM_INITS),  # type: ignore[arg-type]
            norm=translate("norm_layer", norm_layer, NORMS),  # type: ignore[arg-type]
            patch_embed=translate("patchembed_version", patchembed_version, PATCH_EMBEDS),  # type: ignore[arg-type]
            downsample=translate("downsample_version", downsample_version, DOWNSAMPLES),  # type: ignore[arg-type]
            squeeze_excite=bool(add_se),
            # Of the channel-first models only: upstream wrote that path's feed-forward part apart.
            ffn_post_norm=bool(convffn) and channels_first,
            **_parse_forward_type(forward_type),
            **_scan_options(ssm_d_state, ssm_ratio, ssm_dt_rank, ssm_act_layer, ssm_conv, ssm_conv_bias, ssm_drop_rate),
            **_ffn_options(convffn, conv_ffn_ratio, 0.0, mlp_ratio, mlp_act_layer, mlp_drop_rate),
        ),
        in_channels=in_chans,
        patch_size=patch_size,
        patch_norm=patch_norm,
        with_cp=use_checkpoint,
    )


def _scan_options(
    d_state: int, ratio: float, dt_rank: str | int, act: str, conv: int, conv_bias: bool, dropout: float
) -> dict[str, Any]:
    if not isinstance(ratio, int | float) or ratio <= 0:
        _only_official("ssm_ratio", ratio, 2.0, "a network without scans is no MSVMamba")
    if conv < 2:
        _only_official("ssm_conv", conv, 3, "upstream has no multi-scale scan without it")
    return dict(
        d_state=d_state,
        ssm_ratio=ratio,
        dt_rank=None if dt_rank == "auto" else dt_rank,
        ssm_act=translate("ssm_act_layer", act, ACTIVATIONS),
        conv_kernel=conv,
        conv_bias=conv_bias,
        ssm_dropout=dropout,
    )


def _ffn_options(
    conv_ffn: bool, conv_ratio: float, conv_dropout: float, mlp_ratio: float, mlp_act: str, mlp_dropout: float
) -> dict[str, Any]:
    if conv_ffn:
        return dict(ffn="conv", ffn_ratio=conv_ratio, ffn_dropout=conv_dropout)
    if mlp_ratio > 0:
        act = translate("mlp_act_layer", mlp_act, ACTIVATIONS)
        return dict(ffn="mlp", ffn_ratio=mlp_ratio, ffn_act=act, ffn_dropout=mlp_dropout)
    return dict(ffn="none")


def _parse_forward_type(forward_type: str | Sequence[str]) -> dict[str, Any]:
    """Translate v3's ``forward_type`` to fields of ``MSVMambaArch``; a list has one for every stage."""
    types = {forward_type} if isinstance(forward_type, str) else set(forward_type)
    match = _V3_FORWARD.fullmatch(types.pop()) if len(types) == 1 else None
    if match is None:
        raise ConfigError(
            f"forward_type is {forward_type!r}, expected 'vms', the same for all stages, perhaps followed by "
            "_nozact, _noz, _oact and _no32 in this order. Take one of these; the other networks there are no MSVMamba."
        )
    return dict(gated=match["noz"] is None, gate_act=match["nozact"] is None, out_act=match["oact"] is not None)


def _only_official(argument: str, value: object, expected: object, why: str = "") -> None:
    """Raise ``ConfigError`` unless an argument has the one value that is known here."""
    if value != expected:
        reason = f" ({why})" if why else ", the value of all released models"
        raise ConfigError(f"{argument} is {value!r}, expected {expected!r}{reason}. Use it.")


_BUILDERS: dict[str, Callable[..., dict[str, Any]]] = {"v1": _upstream_v1, "v3": _upstream_v3}
_ARGUMENTS = {generation: list(inspect.signature(f).parameters) for generation, f in _BUILDERS.items()}
_ARGUMENTS["v1"] += _V1_WITHOUT_EFFECT
# ``pretrained`` names a file upstream loads in the constructor; here weights are loaded by init_cfg.
_BACKBONE_DEFAULTS: dict[str, Any] = {"out_indices": (0, 1, 2, 3), "pretrained": None}

# ---------------------------------------------------------------- released variants

_V1: dict[str, Any] = dict(
    ssm_d_state=1,
    mlp_ratio=0.0,
    downsample_version="v1",
    patchembed_version="v1",
    drop_path_rate=0.2,
    sscore_type=_MULTI_SCALE,
    convFFN=True,
    add_se=True,
    ms_stage=(0, 1, 2, 3),
    ms_split=(1, 3),
    ffn_dropout=0.0,
)
_V3: dict[str, Any] = dict(
    ssm_d_state=1,
    ssm_ratio=1.0,
    forward_type="vms_noz",
    downsample_version="v3",
    patchembed_version="v2",
    norm_layer="ln2d",
    convffn=True,
    add_se=True,
    conv_ffn_ratio=4,
)
#: Upstream has configuration files instead of functions; these are the names of the released files.
UPSTREAM_FUNCTIONS: dict[str, dict[str, Any]] = {
    "msvmamba_nano": dict(_V1, depths=(1, 2, 5, 2), dims=48),
    "msvmamba_micro": dict(_V1, depths=(1, 2, 5, 2), dims=64),
    "msvmamba_tiny": dict(_V1, depths=(1, 2, 9, 2), dims=96),
    "msvmambav3_tiny": dict(_V3, depths=(2, 2, 9, 2), dims=96, drop_path_rate=0.2),
    "msvmambav3_small": dict(_V3, depths=(2, 3, 20, 2), dims=96, drop_path_rate=0.4),
    "msvmambav3_base": dict(_V3, depths=(2, 4, 18, 2), dims=128, drop_path_rate=0.5, forward_type="vms"),
}

# ---------------------------------------------------------------- building


def _build(form: str, kwargs: Mapping[str, Any]) -> nn.Module:
    _, kwargs = released_arguments(kwargs, UPSTREAM_FUNCTIONS)
    generation, kind = _generation(form, kwargs), form.rpartition("_")[2]
    known = [*_ARGUMENTS[generation], *(_BACKBONE_DEFAULTS if kind == "backbone" else ())]
    reject_unknown_arguments(kwargs, known, f"msvmamba {generation} {kind}")
    kwargs = {name: value for name, value in kwargs.items() if name not in _V1_WITHOUT_EFFECT}
    extra = {name: kwargs.pop(name, default) for name, default in _BACKBONE_DEFAULTS.items()}
    refuse_pretrained(extra["pretrained"])
    options = _BUILDERS[generation](**kwargs)
    dims = options["arch"].dims
    if kind == "classifier":
        backbone = MSVMamba(**options, out_indices=(len(dims) - 1,))
        return build_classifier(backbone, dims[-1], kwargs.get("num_classes", 1000))
    return MSVMamba(**options, out_indices=tuple(extra["out_indices"]))


def _generation(form: str, kwargs: Mapping[str, Any]) -> str:
    """Return the generation that the form names or, for a plain form, that alone has one of the arguments."""
    if "_" in form:
        return form.partition("_")[0]
    only_v1 = set(_ARGUMENTS["v1"]) - set(_ARGUMENTS["v3"])
    return "v1" if only_v1 & set(kwargs) else "v3"


# ---------------------------------------------------------------- state dicts

_OP = (
    r"(?:x_proj_weight|dt_projs_(?:weight|bias)|A_logs|Ds|(?:in|out)_proj\.weight|conv2d(?:_b1)?\.(?:weight|bias)"
    r"|se\.fc\.[02]\.weight)"
)
_WIDTH = r"norm\.weight"

#: Names shared by all forms, unchanged in ours.
_TRUNK = (
    Rule(rf"(patch_embed\.[0257]\.{AFFINE})", r"\1"),
    Rule(rf"({BLOCK}(?:norm|norm2)\.{AFFINE})", r"\1"),
    Rule(rf"({BLOCK}op\.{_OP})", r"\1"),
    Rule(rf"({BLOCK}op\.out_norm\.(?:weight|bias))", r"\1"),
    Rule(rf"({BLOCK}convFFN\.(?:linear[12]|dwc)\.(?:weight|bias))", r"\1"),
    Rule(rf"({BLOCK}mlp\.fc[12]\.(?:weight|bias))", r"\1"),
    Rule(rf"(layers\.\d+\.downsample\.(?:[13]|norm)\.{AFFINE})", r"\1"),
    Rule(r"(layers\.\d+\.downsample\.reduction\.weight)", r"\1"),
)
#: Names of VMamba's first releases, which upstream still reads.
_OLD_TRUNK = (
    Rule(r"patch_embed\.proj\.(weight|bias)", r"patch_embed.0.\1"),
    Rule(rf"patch_embed\.norm\.({AFFINE})", r"patch_embed.2.\1"),
    Rule(rf"({BLOCK})ln_1\.({AFFINE})", r"\1norm.\2"),
    Rule(rf"({BLOCK})self_attention\.((?:out_norm\.(?:weight|bias))|{_OP})", r"\1op.\2"),
)
_PARAMETERS = ("x_proj_weight", "dt_projs_weight", "dt_projs_bias", "A_logs", "Ds", "out_norm", "se")
_OP_ORDERS = {
    "v1": (*_PARAMETERS, "in_proj", "conv2d", "conv2d_b1", "out_proj"),
    "v3": (*_PARAMETERS, "conv2d_b1", "in_proj", "conv2d", "out_proj"),
}
_FFN_ORDER = ("linear1", "linear2", "dwc")
_DOWNSAMPLE_ORDER = ("reduction", "norm")


def _read(form: str, state_dict: Mapping[str, Tensor], stages: Sequence[int]) -> StateDict:
    if form.endswith("backbone"):
        drop = (HEAD_OF_CLASSIFIER,) if stages else ()
        ours = rename(state_dict, (*_TRUNK, *_OLD_TRUNK, OUT_NORM), "an MSVMamba feature extractor", drop)
        head_norm = {name.rsplit(".", 1)[1] for name in state_dict if re.match(r"(?:classifier\.)?norm\.", name)}
        return fill_out_norms(ours, stages, _WIDTH, sorted(head_norm) or ("bias", "weight"))
    refuse_out_norms(form, stages)
    trunk = rename(without(state_dict, HEAD_OF_CLASSIFIER), (*_TRUNK, *_OLD_TRUNK), "an MSVMamba classifier")
    last = num_stages(trunk, "MSVMamba") - 1
    head = rename(only(state_dict, HEAD_OF_CLASSIFIER), head_rules(last), "the head of an MSVMamba classifier")
    return {**{f"backbone.{name}": value for name, value in trunk.items()}, **head}


def _knows(form: str, name: str) -> bool:
    own = head_rules(0) if form.endswith("classifier") else (OUT_NORM,)
    return known_to((*_TRUNK, *_OLD_TRUNK, *own), name)


def _write(form: str, state_dict: Mapping[str, Tensor]) -> StateDict:
    if form.endswith("backbone"):
        theirs = rename(state_dict, (*_TRUNK, OUT_NORM), "our MSVMamba feature extractor")
    else:
        rules = [
            Rule(rf"backbone\.outnorm\d+\.({AFFINE})", r"classifier.norm.\1"),
            Rule(r"head\.fc\.(weight|bias)", r"classifier.head.\1"),
            *(Rule(rf"backbone\.{rule.pattern}", rule.target) for rule in _TRUNK),
        ]
        theirs = rename(state_dict, rules, "our MSVMamba classifier")
    # The stems differ, which is all that tells the generations' entries apart.
    stem = "v3" if "patch_embed.5.weight" in theirs else "v1"
    orders = {
        ".op.": _OP_ORDERS[form.partition("_")[0] if "_" in form else stem],
        ".convFFN.": _FFN_ORDER,
        ".downsample.": _DOWNSAMPLE_ORDER,
    }
    return in_order(theirs, orders)


#: "msvmamba_tiny" is our "v1-tiny", "msvmambav3_tiny" our "v3-tiny".
_RELEASED = {
    name.replace("msvmambav3_", "v3-").replace("msvmamba_", "v1-"): {"function": name} for name in UPSTREAM_FUNCTIONS
}

CONVERTER = Converter(
    FORMS,
    _build,
    _read,
    _write,
    title="MSVMamba",
    released=_RELEASED,
    mark=r"layers\.\d+\.blocks\.\d+\.(?:op|self_attention)\.conv2d_b1\.weight",
    head=HEAD_OF_CLASSIFIER,
    knows=_knows,
    sketch=lambda trunk: sketch(trunk, _WIDTH),
    sketches={name: in_words(ARCHS[name].depths, ARCHS[name].dims) for name in _RELEASED},
)
