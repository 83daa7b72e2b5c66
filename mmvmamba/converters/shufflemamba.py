"""ShuffleMamba: constructor arguments and checkpoints of huangzizheng01/ShuffleMamba.

``models_shuffle.VisionMamba`` is form ``"classifier"``, ``models_reg.VisionMamba`` form ``"classifier_reg"``,
``models_openmm.Backbone_VideoMamba`` form ``"backbone"`` and ``models_openmm.Mamba_Adapter`` form ``"adapter"``.

Names and shapes of the plain models with RMS norms are Vim's: the place of the class token, first here and in the
middle there, is not among them. A file of the sizes that both have is taken for Vim's; upstream has released none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from mmvmamba.converters.base import (
    Converter,
    Rule,
    StateDict,
    known_to,
    reject_unknown_arguments,
    rename,
)
from mmvmamba.converters.hierarchical import (
    refuse_out_norms,
    refuse_pretrained,
    released_arguments,
    translate,
    without,
)
from mmvmamba.errors import CheckpointMismatch, ConfigError
from mmvmamba.models.backbones.shufflemamba import ARCHS, ShuffleMamba, ShuffleMambaArch, Tokens
from mmvmamba.models.heads import build_register_cls_head
from mmvmamba.models.layers.shuffle import GivenShuffle

FORMS = ("classifier", "classifier_reg", "backbone", "adapter")
_NORMS = {"rms": "rms_norm", "ln": "layer_norm"}

# ---------------------------------------------------------------- constructor arguments -> our options

#: Arguments of every form; ``norm`` stands for ``rms_norm`` and ``fused_add_norm`` in the parity data.
_OF_ALL = (
    "norm",
    "rms_norm",
    "fused_add_norm",
    "residual_in_fp32",
    "norm_epsilon",
    "img_size",
    "patch_size",
    "stride",
    "embed_dim",
    "depth",
    "d_state",
    "channels",
    "drop_rate",
    "drop_path_rate",
    "shuffle_rate",
    # Without effect but with registers, where the head needs them; upstream's other modules swallow them.
    "num_classes",
    "num_cls_tokens",
    "cls_reduce",
    "pretrained",
)
#: Argument of upstream's adapter -> our option.
_OF_ADAPTER = {
    "conv_inplane": "spatial_channels",
    "n_points": "num_points",
    "deform_num_heads": "num_heads",
    "cffn_ratio": "ffn_ratio",
    "deform_ratio": "value_ratio",
    "interaction_indexes": "interaction_indexes",
    "init_values": "injector_scale",
    "with_cffn": "with_ffn",
}
_OWN = {
    "classifier": ("permutations",),
    "classifier_reg": ("permutations",),
    "backbone": ("out_indices",),
    "adapter": ("out_indices", "pretrain_size", "add_vit_feature", "use_extra_extractor", *_OF_ADAPTER),
}
_NUM_CLASSES = 1000


def _upstream_norm(kwargs: Mapping[str, Any]) -> str:
    if "norm" in kwargs:
        return translate("norm", kwargs["norm"], _NORMS)
    return _NORMS["rms" if kwargs.get("rms_norm", True) else "ln"]


def _upstream_trunk(kwargs: Mapping[str, Any], num_registers: int) -> dict[str, Any]:
    """Translate the arguments that all of upstream's modules have to those of ours."""
    if not kwargs.get("residual_in_fp32", True):
        raise ConfigError("residual_in_fp32 is False, expected True: the residual stream is float32 here. Remove it.")
    if kwargs.get("drop_rate", 0.0):
        raise ConfigError(
            f"drop_rate is {kwargs['drop_rate']!r}, expected 0: no model of the family has dropout. Remove it."
        )
    patch_size = kwargs.get("patch_size", 16)
    arch = ShuffleMambaArch(
        dim=kwargs.get("embed_dim", 192),
        depth=kwargs.get("depth", 24),
        drop_path_rate=kwargs.get("drop_path_rate", 0.1),
        patch_size=patch_size,
        stride=kwargs.get("stride", patch_size),
        d_state=kwargs.get("d_state", 16),
        norm=_upstream_norm(kwargs),  # type: ignore[arg-type]  # a value of the table
        norm_eps=kwargs.get("norm_epsilon", 1e-5),
        num_registers=num_registers,
    )
    size = kwargs.get("img_size", 224)
    return dict(
        arch=arch,
        in_channels=kwargs.get("channels", 3),
        img_size=size if isinstance(size, int) else tuple(size),
        shuffle_rate=kwargs.get("shuffle_rate", 0.0),
    )


def _of_function(arch: ShuffleMambaArch, reduction: int | None) -> dict[str, Any]:
    kwargs: dict[str, Any] = dict(norm="rms" if arch.norm == "rms_norm" else "ln", embed_dim=arch.dim, depth=arch.depth)
    return kwargs if reduction is None else {**kwargs, "num_cls_tokens": arch.num_registers, "cls_reduce": reduction}


#: Our variant -> upstream's function and, of those with registers, how many times narrower its head makes them.
_FUNCTIONS: dict[str, tuple[str, int | None]] = {
    "tiny": ("models_shuffle.mambar_tiny_patch16_224", None),
    "small": ("models_shuffle.mambar_small_patch16_224", None),
    "middle": ("models_shuffle.mambar_middle_patch16_224", None),
    "base": ("models_shuffle.mambar_base_patch16_224", None),
    "large40": ("models_shuffle.mambar_large_patch16_224_40", None),
    "large48": ("models_shuffle.mambar_large_patch16_224", None),
    "reg-tiny": ("models_reg.mambar_tiny_patch16_224", 1),
    "reg-small": ("models_reg.mambar_small_patch16_224", 2),
    "reg-base": ("models_reg.mambar_base_patch16_224", 4),
    "reg-large": ("models_reg.mambar_large_patch16_224", 8),
}
UPSTREAM_FUNCTIONS = {
    function: _of_function(ARCHS[name], reduction) for name, (function, reduction) in _FUNCTIONS.items()
}


# ---------------------------------------------------------------- building


def _build(form: str, kwargs: Mapping[str, Any]) -> nn.Module:
    function, kwargs = released_arguments(kwargs, UPSTREAM_FUNCTIONS)
    with_registers = function is not None and function.startswith("models_reg.")
    if function is not None and form != "backbone" and with_registers != (form == "classifier_reg"):
        raise ConfigError(
            f"function is {function!r} for form {form!r}, expected one of models_reg for 'classifier_reg' and of "
            "models_shuffle for 'classifier'. Change one of them."
        )
    reject_unknown_arguments(kwargs, (*_OF_ALL, *_OWN[form]), f"shufflemamba {form}")
    refuse_pretrained(kwargs.pop("pretrained", None))
    if form == "adapter":
        return _build_adapter(kwargs)
    if form == "backbone":
        registers = kwargs["num_cls_tokens"] if with_registers else 0
        # A classifier's function gives its trunk as it is; upstream's feature extractor has no tokens but the patches.
        place: Tokens | None = None if function is not None else "none"
        return ShuffleMamba(
            **_upstream_trunk(kwargs, registers), out_indices=kwargs.get("out_indices"), cls_token=place
        )
    registers = kwargs.get("num_cls_tokens", 1) if form == "classifier_reg" else 0
    backbone = ShuffleMamba(**_upstream_trunk(kwargs, registers), out_type="cls_token")
    if kwargs.get("permutations") is not None:
        _give_permutations(backbone, kwargs["permutations"])
    return _build_classifier(backbone, kwargs, registers)


def _give_permutations(backbone: ShuffleMamba, permutations: Sequence[Sequence[int] | None]) -> None:
    if len(permutations) != len(backbone.depths):
        raise ConfigError(
            f"permutations has {len(permutations)} entries, expected {len(backbone.depths)}, one per layer. Correct it."
        )
    backbone.shuffle = GivenShuffle(permutations)


def _build_classifier(backbone: ShuffleMamba, kwargs: Mapping[str, Any], registers: int) -> nn.Module:
    # Only these forms need MMPretrain.
    from mmengine.registry import DefaultScope
    from mmpretrain.models import ImageClassifier, LinearClsHead

    classes, dim = kwargs.get("num_classes", _NUM_CLASSES), backbone.arch.dim
    # MMPretrain builds its loss and preprocessor by bare names, which a detector's scope would take for mmdet's.
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        if registers:
            reduction = kwargs.get("cls_reduce", 1)
            head = build_register_cls_head(classes, dim, registers, reduction, backbone.arch.norm)
        else:
            head = LinearClsHead(classes, dim)
        return ImageClassifier(backbone=backbone, head=head)


def _build_adapter(kwargs: Mapping[str, Any]) -> nn.Module:
    from mmvmamba.models.adapters import ViTAdapter
    from mmvmamba.models.adapters.vit_adapter import TrunkFeatures

    trunk = ShuffleMamba(
        **_upstream_trunk(kwargs, 0),
        cls_token="none",  # noqa: S106 (no password)
        last_feature="hidden",
        final_norm=False,
    )
    options = {ours: kwargs[theirs] for theirs, ours in _OF_ADAPTER.items() if theirs in kwargs}
    features: TrunkFeatures = "each" if kwargs.get("add_vit_feature", True) else "none"
    extra = 2 if kwargs.get("use_extra_extractor", True) else 0
    return ViTAdapter(trunk, trunk_features=features, extra_extractors=extra, **options)


# ---------------------------------------------------------------- state dicts

_FIELD = r"(?:weight|bias)"
_DIRECTION = rf"(?:conv1d(?:_b)?\.{_FIELD}|x_proj(?:_b)?\.weight|dt_proj(?:_b)?\.{_FIELD}|A_log|A_b_log|D|D_b)"
_LAYER = rf"layers\.\d+\.(?:norm\.{_FIELD}|mixer\.(?:{_DIRECTION}|in_proj\.weight|out_proj\.weight))"
_TOKENS = r"(?:cls_token|pos_embed|pos_embed_cls)"
_TRUNK = Rule(rf"({_TOKENS}|patch_embed\.proj\.{_FIELD}|{_LAYER}|norm_f\.{_FIELD})", r"\1")

_HEAD_OF_CLASSIFIER = r"(?:head|neck|norm_neck)\..*"
_HEAD = (
    Rule(rf"head\.({_FIELD})", r"head.fc.\1"),
    Rule(r"neck\.weight", "head.neck.weight"),
    Rule(rf"norm_neck\.({_FIELD})", r"head.norm.\1"),
)
_HEAD_TO_UPSTREAM = (
    Rule(rf"head\.fc\.({_FIELD})", r"head.\1"),
    Rule(r"head\.neck\.weight", "neck.weight"),
    Rule(rf"head\.norm\.({_FIELD})", r"norm_neck.\1"),
)
#: What an adapter adds to a trunk; it has upstream's names.
_ADAPTER = Rule(r"((?:level_embed|spm\..*|interactions\..*|up\..*|norm[1-4]\..*))", r"\1")
_ORDER = (
    "cls_token",
    "pos_embed_cls",
    "pos_embed",
    "level_embed",
    "patch_embed",
    "neck",
    "norm_neck",
    "head",
    "layers",
    "norm_f",
    "spm",
)


def _inside(rule: Rule) -> Rule:
    """Return the rule for a trunk that is part of our module."""
    return Rule(rule.pattern, f"backbone.{rule.target}")


def _outside(rule: Rule) -> Rule:
    """Return the rule that takes a trunk out of our module."""
    return Rule(rf"backbone\.{rule.pattern}", rule.target)


def _knows(form: str, name: str) -> bool:
    extra: Sequence[Rule] = ()
    if form.startswith("classifier"):
        extra = _HEAD
    elif form == "adapter":
        extra = (_ADAPTER,)
    return known_to((_TRUNK, *extra), name)


def _read(form: str, state_dict: Mapping[str, Tensor], stages: Sequence[int]) -> StateDict:
    if form == "backbone":
        ours = rename(without(state_dict, _HEAD_OF_CLASSIFIER), (_TRUNK,), "a ShuffleMamba feature extractor")
        depth = _depth(ours)
        for stage in stages:
            if not 0 <= stage < depth:
                raise CheckpointMismatch(
                    f"fill_out_norms names layer {stage}, but the state dict has {depth} layers. Name only layers from "
                    "0 to that number less one."
                )
        # No layer has an out norm of its own, and the one behind the last is in every classifier.
        return ours
    refuse_out_norms(form, stages)
    if form == "adapter":
        return rename(state_dict, (_inside(_TRUNK), _ADAPTER), "a ShuffleMamba with adapter")
    ours = rename(state_dict, (_inside(_TRUNK), *_HEAD), "a ShuffleMamba classifier")
    _depth(state_dict)
    return ours


def _write(form: str, state_dict: Mapping[str, Tensor]) -> StateDict:
    if form == "backbone":
        renamed = rename(state_dict, (_TRUNK,), "our ShuffleMamba feature extractor")
    elif form == "adapter":
        renamed = rename(state_dict, (_outside(_TRUNK), _ADAPTER), "our ShuffleMamba with adapter")
    else:
        renamed = rename(state_dict, (_outside(_TRUNK), *_HEAD_TO_UPSTREAM), "our ShuffleMamba classifier")
    ranks = {name: rank for rank, name in enumerate(_ORDER)}
    ordered = sorted(renamed, key=lambda name: ranks.get(name.split(".")[0], len(_ORDER)))
    return {name: renamed[name] for name in ordered}


# ---------------------------------------------------------------- recognition


def _depth(trunk: Mapping[str, Tensor]) -> int:
    layers = {int(match[1]) for name in trunk if (match := re.match(r"layers\.(\d+)\.", name))}
    if not layers:
        raise CheckpointMismatch(
            "the state dict has no entry 'layers.*', expected those of a ShuffleMamba. Check family, form and prefix."
        )
    return max(layers) + 1


def _in_words(dim: int, depth: int) -> str:
    return f"with dim {dim} and depth {depth}"


def _sketch(trunk: Mapping[str, Tensor]) -> str:
    widths = [value.numel() for name, value in trunk.items() if re.fullmatch(r"layers\.\d+\.norm\.weight", name)]
    return _in_words(widths[0] if widths else 0, _depth(trunk))


_RELEASED = {
    name: {"function": function, "drop_path_rate": ARCHS[name].drop_path_rate}
    for name, (function, _) in _FUNCTIONS.items()
}

CONVERTER = Converter(
    FORMS,
    _build,
    _read,
    _write,
    title="ShuffleMamba",
    released=_RELEASED,
    mark=r"layers\.\d+\.mixer\.A_b_log",
    head=_HEAD_OF_CLASSIFIER,
    knows=_knows,
    sketch=_sketch,
    sketches={name: _in_words(ARCHS[name].dim, ARCHS[name].depth) for name in _RELEASED},
)
