"""EfficientVMamba: constructor arguments and checkpoints of TerryPei/EfficientVMamba.

Its stages of inverted residuals are flat sequences (a permutation, the blocks, a permutation, the downsampling); here
they have ``blocks`` and a ``downsample`` as all stages have.
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
from mmvmamba.converters.vssm import HEAD_OF_CLASSIFIER, head_rules
from mmvmamba.errors import CheckpointMismatch, ConfigError
from mmvmamba.models.backbones.efficientvmamba import ARCHS, SCAN_STAGES, EfficientVMamba, EfficientVMambaArch

FORMS = ("classifier", "backbone")

# ---------------------------------------------------------------- constructor arguments -> our options

# Upstream takes every word but "v2" for "v1"; a misspelt one is refused here.
_DOWNSAMPLES = {"v1": "patch_merging", "v2": "conv2x2"}
#: Arguments that upstream's classes take, or its configs pass, and that change nothing there: the state has 16 entries,
#: the rank is a sixteenth of the channels, rounded up, the stem is the patchifying one, and scans and perceptrons are
#: those of the class it derives from at its defaults, whatever they say.
_WITHOUT_EFFECT = (
    "attn_drop_rate",
    "d_state",
    "drop_rate",
    "dt_rank",
    "forward_type",
    "mlp_act_layer",
    "mlp_drop_rate",
    "patchembed_version",
    "shared_ssm",
    "softmax_version",
    "ssm_act_layer",
    "ssm_conv",
    "ssm_conv_bias",
    "ssm_d_state",
    "ssm_drop_rate",
    "ssm_dt_rank",
    "ssm_rank_ratio",
    "ssm_simple_init",
    "window_size",
)


def _upstream_arguments(
    patch_size: int = 4,
    in_chans: int = 3,
    num_classes: int = 1000,  # noqa: ARG001 (belongs to the head)
    depths: Sequence[int] = (2, 2, 9, 2),
    dims: int | Sequence[int] = (96, 192, 384, 768),
    ssm_ratio: float = 2.0,
    drop_path_rate: float = 0.1,
    mlp_ratio: float = 4.0,
    patch_norm: bool = True,
    norm_layer: Any = nn.LayerNorm,
    downsample_version: str = "v2",
    use_checkpoint: bool = False,
    step_size: int = 2,
) -> dict[str, Any]:
    """Translate the arguments of upstream's ``EfficientVSSM`` (names and defaults are its) to ours."""
    if step_size != 2:
        raise ConfigError(
            f"step_size is {step_size!r}, expected 2: the four scans of upstream's operator visit every pixel at this "
            "step only. Leave it out."
        )
    if norm_layer is not nn.LayerNorm and str(norm_layer).lower() != "ln":
        raise ConfigError(
            f"norm_layer is {norm_layer!r}, expected torch.nn.LayerNorm or 'ln', as all released models have it. "
            "Leave it out."
        )
    depths = tuple(depths)
    arch = EfficientVMambaArch(
        dims=widths(dims, len(depths)),
        depths=depths,
        drop_path_rate=drop_path_rate,
        ssm_ratio=ssm_ratio,
        mlp_ratio=mlp_ratio,
        downsample=translate("downsample_version", downsample_version, _DOWNSAMPLES),  # type: ignore[arg-type]
    )
    return dict(arch=arch, in_channels=in_chans, patch_size=patch_size, patch_norm=patch_norm, with_cp=use_checkpoint)


_DEFAULTS = {name: p.default for name, p in inspect.signature(_upstream_arguments).parameters.items()}
# ``pretrained`` names a file upstream loads in the constructor; here weights are loaded by init_cfg.
_BACKBONE_DEFAULTS: dict[str, Any] = {"out_indices": (0, 1, 2, 3), "pretrained": None}

_RELEASED_OPTIONS = dict(mlp_ratio=0.0, downsample_version="v1")
UPSTREAM_FUNCTIONS: dict[str, dict[str, Any]] = {
    "efficientvmamba_tiny": dict(_RELEASED_OPTIONS, depths=(2, 2, 4, 2), dims=48),
    "efficientvmamba_small": dict(_RELEASED_OPTIONS, depths=(2, 2, 4, 2), dims=64),
    "efficientvmamba_base": dict(_RELEASED_OPTIONS, depths=(2, 2, 9, 2), dims=96),
}

# ---------------------------------------------------------------- building


def _build(form: str, kwargs: Mapping[str, Any]) -> nn.Module:
    _, kwargs = released_arguments(kwargs, UPSTREAM_FUNCTIONS)
    known = [*_DEFAULTS, *_WITHOUT_EFFECT, *(_BACKBONE_DEFAULTS if form == "backbone" else ())]
    reject_unknown_arguments(kwargs, known, f"efficientvmamba {form}")
    kwargs = {name: value for name, value in kwargs.items() if name not in _WITHOUT_EFFECT}
    if form == "classifier":
        options = _upstream_arguments(**kwargs)
        dims = options["arch"].dims
        backbone = EfficientVMamba(**options, out_indices=(len(dims) - 1,))
        return build_classifier(backbone, dims[-1], kwargs.get("num_classes", _DEFAULTS["num_classes"]))
    extra = {name: kwargs.pop(name, default) for name, default in _BACKBONE_DEFAULTS.items()}
    refuse_pretrained(extra["pretrained"])
    return EfficientVMamba(**_upstream_arguments(**kwargs), out_indices=tuple(extra["out_indices"]))


# ---------------------------------------------------------------- state dicts

_PLAIN = r"(?:weight|bias)"
_OP_PARAMETERS = ("x_proj_weight", "dt_projs_weight", "dt_projs_bias", "A_logs", "Ds")
_OP = rf"(?:{'|'.join(_OP_PARAMETERS)}|out_norm\.{_PLAIN}|(?:in|out)_proj\.weight|conv2d\.{_PLAIN})"
_SE = rf"se\.(?:norm|global_reduce|channel_select)\.{_PLAIN}"
_INVERTED = rf"(?:conv_(?:pw|dw|pw2)\.(?:0\.weight|1\.{AFFINE})|se\.conv_(?:reduce|expand)\.{_PLAIN})"
_DOWNSAMPLE = rf"(?:norm\.{_PLAIN}|reduction\.weight|[13]\.{_PLAIN})"
#: What follows a block's name in the vectors that have as many entries as the stage has channels.
_WIDTH = r"(?:norm|conv_pw2\.1)\.weight"

#: Names shared by both forms, once flat stages have blocks and a downsampling.
_TRUNK = (
    Rule(rf"(patch_embed\.[02]\.{_PLAIN})", r"\1"),
    Rule(rf"({BLOCK}norm2?\.{_PLAIN})", r"\1"),
    Rule(rf"({BLOCK}op\.{_OP})", r"\1"),
    Rule(rf"({BLOCK}conv_branch\.(?:[03]\.{_PLAIN}|1\.{AFFINE}))", r"\1"),
    Rule(rf"({BLOCK}{_SE})", r"\1"),
    Rule(rf"({BLOCK}mlp\.fc[12]\.{_PLAIN})", r"\1"),
    Rule(rf"({BLOCK}{_INVERTED})", r"\1"),
    Rule(rf"(layers\.\d+\.downsample\.{_DOWNSAMPLE})", r"\1"),
)
#: Names of VMamba's first releases, which upstream renames when it loads.
_OLD_TRUNK = (
    Rule(rf"patch_embed\.proj\.({_PLAIN})", r"patch_embed.0.\1"),
    Rule(rf"patch_embed\.norm\.({_PLAIN})", r"patch_embed.2.\1"),
    Rule(rf"({BLOCK})ln_1\.({_PLAIN})", r"\1norm.\2"),
    Rule(rf"({BLOCK})self_attention\.({_OP})", r"\1op.\2"),
)
_FLAT = re.compile(rf"(layers\.\d+)\.(\d+)\.(?:({_INVERTED})|({_DOWNSAMPLE}))")
#: Order in which upstream registers what is inside a scan and inside a patch merging.
_ORDERS = {
    ".op.": (*_OP_PARAMETERS, "out_norm", "in_proj", "conv2d", "out_proj"),
    ".downsample.": ("reduction", "norm"),
}


def _nested(name: str) -> str:
    """Return the name of an entry of a flat stage as one of a block or a downsampling; all others as they are."""
    match = _FLAT.fullmatch(name)
    if match is None:
        return name
    stage, index, in_block, in_downsample = match.groups()
    # Index 0 is the permutation before the blocks.
    return f"{stage}.blocks.{int(index) - 1}.{in_block}" if in_block else f"{stage}.downsample.{in_downsample}"


def _with_nested_names(state_dict: Mapping[str, Tensor]) -> StateDict:
    nested: StateDict = {}
    for name, value in state_dict.items():
        own = _nested(name)
        if own in nested:
            raise CheckpointMismatch(
                f"two entries of an EfficientVMamba become {own!r}, the second is {name!r}; expected each name once. "
                "The state dict mixes models or names: remove one of them."
            )
        nested[own] = value
    return nested


def _with_flat_names(state_dict: Mapping[str, Tensor]) -> StateDict:
    """Return entries in upstream's names of flat stages; nothing else changes."""
    depths: dict[str, int] = {}
    for name in state_dict:
        if match := re.match(r"(layers\.\d+)\.blocks\.(\d+)\.", name):
            depths[match[1]] = max(depths.get(match[1], 0), int(match[2]) + 1)
    flat: StateDict = {}
    for name, value in state_dict.items():
        match = re.fullmatch(r"(layers\.(\d+))\.(?:blocks\.(\d+)|downsample)\.(.*)", name)
        if match and int(match[2]) >= SCAN_STAGES:
            # Behind the blocks comes a permutation, then the downsampling.
            index = depths.get(match[1], 0) + 2 if match[3] is None else int(match[3]) + 1
            name = f"{match[1]}.{index}.{match[4]}"
        flat[name] = value
    return flat


def _read(form: str, state_dict: Mapping[str, Tensor], stages: Sequence[int]) -> StateDict:
    state_dict = _with_nested_names(state_dict)
    if form == "backbone":
        drop = (HEAD_OF_CLASSIFIER,) if stages else ()
        rules = (*_TRUNK, *_OLD_TRUNK, OUT_NORM)
        return fill_out_norms(rename(state_dict, rules, "an EfficientVMamba feature extractor", drop), stages, _WIDTH)
    refuse_out_norms(form, stages)
    trunk = rename(without(state_dict, HEAD_OF_CLASSIFIER), (*_TRUNK, *_OLD_TRUNK), "an EfficientVMamba classifier")
    of_head = head_rules(num_stages(trunk, "EfficientVMamba") - 1, _PLAIN)
    head = rename(only(state_dict, HEAD_OF_CLASSIFIER), of_head, "the head of an EfficientVMamba classifier")
    return {**{f"backbone.{name}": value for name, value in trunk.items()}, **head}


def _knows(form: str, name: str) -> bool:
    own = head_rules(0, _PLAIN) if form == "classifier" else (OUT_NORM,)
    return known_to((*_TRUNK, *_OLD_TRUNK, *own), _nested(name))


def _write(form: str, state_dict: Mapping[str, Tensor]) -> StateDict:
    if form == "backbone":
        ours = rename(state_dict, (*_TRUNK, OUT_NORM), "our EfficientVMamba feature extractor")
    else:
        rules = [
            Rule(rf"backbone\.outnorm\d+\.({_PLAIN})", r"classifier.norm.\1"),
            Rule(r"head\.fc\.(weight|bias)", r"classifier.head.\1"),
            *(Rule(rf"backbone\.{rule.pattern}", rule.target) for rule in _TRUNK),
        ]
        ours = rename(state_dict, rules, "our EfficientVMamba classifier")
    return _with_flat_names(in_order(ours, _ORDERS))


#: The name of each released model as an arch of ours: "efficientvmamba_tiny" is "tiny".
_RELEASED = {name.removeprefix("efficientvmamba_"): {"function": name} for name in UPSTREAM_FUNCTIONS}

CONVERTER = Converter(
    FORMS,
    _build,
    _read,
    _write,
    title="EfficientVMamba",
    released=_RELEASED,
    mark=r"layers\.\d+\.blocks\.\d+\.se\.global_reduce\.weight",
    head=HEAD_OF_CLASSIFIER,
    knows=_knows,
    sketch=lambda trunk: sketch(trunk, _WIDTH),
    sketches={name: in_words(ARCHS[name].depths, ARCHS[name].dims) for name in _RELEASED},
)
