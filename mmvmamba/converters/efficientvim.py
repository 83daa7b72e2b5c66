"""EfficientViM: constructor arguments and checkpoints of mlvlab/EfficientViM (``EfficientViM``).

Upstream has a classifier and, in detection/ and segmentation/, a feature extractor of the same names without norms on
its outputs; a checkpoint of the former starts the latter, whose names it has all. Form ``"backbone_neck"`` is the
feature extractor with the pyramid of its detectors.
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
    OUT_NORM,
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
from mmvmamba.converters.mobile import build_with_neck, join_neck, knows_with_neck, split_neck
from mmvmamba.models.backbones.efficientvim import ARCHS, EfficientViM, EfficientViMArch
from mmvmamba.models.heads import build_efficientvim_cls_head

FORMS = ("classifier", "backbone", "backbone_neck")

# ---------------------------------------------------------------- constructor arguments -> our options


def _upstream_efficientvim(
    in_dim: int = 3,
    num_classes: int = 1000,  # noqa: ARG001 (belongs to the head)
    embed_dim: Sequence[int] = (128, 256, 512),
    depths: Sequence[int] = (2, 2, 2),
    mlp_ratio: float = 4.0,
    ssd_expand: float = 1,
    state_dim: Sequence[int] = (49, 25, 9),
    distillation: bool = False,  # noqa: ARG001 (belongs to the head)
) -> dict[str, Any]:
    """Translate the arguments of upstream's ``EfficientViM`` (names and defaults are its) to those of ours."""
    arch = EfficientViMArch(
        dims=tuple(embed_dim),
        depths=tuple(depths),
        state_dims=tuple(state_dim),
        mlp_ratio=mlp_ratio,
        expansion=ssd_expand,
    )
    return dict(arch=arch, in_channels=in_dim)


_DEFAULTS = {name: p.default for name, p in inspect.signature(_upstream_efficientvim).parameters.items()}

UPSTREAM_FUNCTIONS: dict[str, dict[str, Any]] = {
    f"EfficientViM_{name.upper()}": dict(embed_dim=arch.dims, depths=arch.depths, state_dim=arch.state_dims)
    for name, arch in ARCHS.items()
    if name != "nano"
}


# ---------------------------------------------------------------- building


def _build(form: str, kwargs: Mapping[str, Any]) -> nn.Module:
    if form == "backbone_neck":
        reject_unknown_arguments(kwargs, ("backbone", "neck"), "efficientvim backbone_neck")
        return build_with_neck(_feature_extractor(kwargs.get("backbone", {})), kwargs.get("neck", {}))
    if form == "backbone":
        return _feature_extractor(kwargs)
    _, kwargs = released_arguments(kwargs, UPSTREAM_FUNCTIONS)
    refuse_pretrained(kwargs.pop("pretrained", None))
    reject_unknown_arguments(kwargs, list(_DEFAULTS), f"efficientvim {form}")
    options = _upstream_efficientvim(**kwargs)
    stages = tuple(range(len(options["arch"].dims)))
    num_classes, distillation = (kwargs.get(name, _DEFAULTS[name]) for name in ("num_classes", "distillation"))
    return _classifier(EfficientViM(**options, out_indices=stages, out_type="hidden_states"), num_classes, distillation)


def _feature_extractor(kwargs: Mapping[str, Any]) -> EfficientViM:
    kwargs = dict(kwargs)
    # In upstream's configs a released variant is a type, and beside it is an argument that has no effect.
    name = kwargs.pop("type", "EfficientViM")
    kwargs.pop("in_channels", None)
    if name != "EfficientViM":
        kwargs.setdefault("function", name)
    _, kwargs = released_arguments(kwargs, UPSTREAM_FUNCTIONS)
    refuse_pretrained(kwargs.pop("pretrained", None))
    reject_unknown_arguments(kwargs, [*_DEFAULTS, "out_indices", "frozen_stages"], "efficientvim backbone")
    out_indices = kwargs.pop("out_indices", None)
    # Upstream freezes its stem, and nothing else, whatever the number is.
    frozen_stages = min(kwargs.pop("frozen_stages", -1), 0)
    options = _upstream_efficientvim(**kwargs)
    stages = range(len(options["arch"].dims)) if out_indices is None else out_indices
    # Upstream's feature extractor trains with the statistics that it has.
    return EfficientViM(**options, out_indices=tuple(stages), frozen_stages=frozen_stages, norm_eval=True)


def _classifier(backbone: EfficientViM, num_classes: int, distillation: bool) -> nn.Module:
    """Return MMPretrain's ``ImageClassifier`` without a neck: the head pools what the stages have."""
    # Only this form needs MMPretrain.
    from mmengine.registry import DefaultScope
    from mmpretrain.models import ImageClassifier

    # MMPretrain builds its loss and preprocessor by bare names, which a detector's scope would take for mmdet's.
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        head = build_efficientvim_cls_head(num_classes, backbone.stage_channels, distillation)
        return ImageClassifier(backbone=backbone, head=head)


# ---------------------------------------------------------------- state dicts

_NORMED = rf"(conv\.weight|norm\.{AFFINE})"
_PARTS = r"(mixer\.(?:A|D)|norm\.(?:weight|bias))"
_CONVS = r"(dwconv[12]|ffn\.fc[12])"
_MIXER = r"mixer\.(BCdt_proj|dw|hz_proj|out_proj)"
_WIDTH = r"norm\.weight"
#: Places in upstream's merging of patches, a Sequential, and their names here; between them is the excitation.
_MERGING = {"0": "conv1", "1": "conv2", "3": "conv3"}

_UPSTREAM_TRUNK = (
    Rule(rf"patch_embed\.conv\.(\d+)\.{_NORMED}", r"patch_embed.convs.\1.\2"),
    Rule(r"stages\.(\d+)\.blocks\.(\d+)\.alpha", r"layers.\1.blocks.\2.alpha"),
    Rule(rf"stages\.(\d+)\.blocks\.(\d+)\.{_PARTS}", r"layers.\1.blocks.\2.\3"),
    Rule(rf"stages\.(\d+)\.blocks\.(\d+)\.{_MIXER}\.conv\.weight", r"layers.\1.blocks.\2.mixer.\3.weight"),
    Rule(rf"stages\.(\d+)\.blocks\.(\d+)\.{_CONVS}\.{_NORMED}", r"layers.\1.blocks.\2.\3.\4"),
    *(
        Rule(rf"stages\.(\d+)\.downsample\.conv\.{place}\.{_NORMED}", rf"layers.\1.downsample.merging.{name}.\2")
        for place, name in _MERGING.items()
    ),
    Rule(r"stages\.(\d+)\.downsample\.conv\.2\.(fc[12]\.(?:weight|bias))", r"layers.\1.downsample.merging.se.\2"),
    Rule(rf"stages\.(\d+)\.downsample\.(dwconv[12])\.{_NORMED}", r"layers.\1.downsample.\2.\3"),
)
_OWN_TRUNK = (
    Rule(rf"(patch_embed\.convs\.\d+\.){_NORMED}", r"\1\2"),
    Rule(r"(layers\.\d+\.blocks\.\d+\.alpha)", r"\1"),
    Rule(rf"(layers\.\d+\.blocks\.\d+\.){_PARTS}", r"\1\2"),
    Rule(rf"(layers\.\d+\.blocks\.\d+\.){_MIXER}\.weight", r"\1mixer.\2.weight"),
    Rule(rf"(layers\.\d+\.blocks\.\d+\.){_CONVS}\.{_NORMED}", r"\1\2.\3"),
    Rule(rf"(layers\.\d+\.downsample\.merging\.conv[123]\.){_NORMED}", r"\1\2"),
    Rule(r"(layers\.\d+\.downsample\.merging\.se\.fc[12]\.(?:weight|bias))", r"\1"),
    Rule(rf"(layers\.\d+\.downsample\.dwconv[12]\.){_NORMED}", r"\1\2"),
)
_TRUNK = (*_UPSTREAM_TRUNK, *_OWN_TRUNK)

_HEAD_OF_CLASSIFIER = r"(?:norm|heads|heads_dist)\..*|weights|weights_dist"
_HEAD = (
    Rule(r"(norm\.\d+\.(?:weight|bias))", r"head.\1"),
    Rule(r"weights(_dist)?", r"head.fused\1.weights"),
    Rule(r"heads(_dist)?\.(\d+\.(?:weight|bias))", r"head.fused\1.heads.\2"),
)


def _read(form: str, state_dict: Mapping[str, Tensor], stages: Sequence[int]) -> StateDict:
    if form == "backbone_neck":
        backbone, neck = split_neck(state_dict)
        return join_neck(_read("backbone", backbone, stages), neck)
    body = _flat(without(state_dict, _HEAD_OF_CLASSIFIER))
    if form == "backbone":
        ours = rename(body, (*_TRUNK, OUT_NORM), "an EfficientViM feature extractor")
        # This form has no out norms: the stages are looked for, as in every family, and nothing is added.
        fill_out_norms(dict(ours), stages, _WIDTH)
        return ours
    refuse_out_norms(form, stages)
    trunk = rename(body, _TRUNK, "an EfficientViM classifier")
    num_stages(trunk, "EfficientViM")
    head = rename(_flat(only(state_dict, _HEAD_OF_CLASSIFIER)), _HEAD, "the head of an EfficientViM classifier")
    return {**{f"backbone.{name}": value for name, value in trunk.items()}, **head}


def _knows(form: str, name: str) -> bool:
    if form == "backbone_neck":
        return knows_with_neck(name, lambda own: _knows("backbone", own))
    return known_to((*_TRUNK, *(_HEAD if form == "classifier" else (OUT_NORM,))), name)


_TO_UPSTREAM = (
    Rule(rf"patch_embed\.convs\.(\d+)\.{_NORMED}", r"patch_embed.conv.\1.\2"),
    Rule(r"layers\.(\d+)\.blocks\.(\d+)\.alpha", r"stages.\1.blocks.\2.alpha"),
    Rule(rf"layers\.(\d+)\.blocks\.(\d+)\.{_PARTS}", r"stages.\1.blocks.\2.\3"),
    Rule(rf"layers\.(\d+)\.blocks\.(\d+)\.{_MIXER}\.weight", r"stages.\1.blocks.\2.mixer.\3.conv.weight"),
    Rule(rf"layers\.(\d+)\.blocks\.(\d+)\.{_CONVS}\.{_NORMED}", r"stages.\1.blocks.\2.\3.\4"),
    *(
        Rule(rf"layers\.(\d+)\.downsample\.merging\.{name}\.{_NORMED}", rf"stages.\1.downsample.conv.{place}.\2")
        for place, name in _MERGING.items()
    ),
    Rule(r"layers\.(\d+)\.downsample\.merging\.se\.(fc[12]\.(?:weight|bias))", r"stages.\1.downsample.conv.2.\2"),
    Rule(rf"layers\.(\d+)\.downsample\.(dwconv[12])\.{_NORMED}", r"stages.\1.downsample.\2.\3"),
)
_HEAD_TO_UPSTREAM = (
    Rule(r"head\.(norm\.\d+\.(?:weight|bias))", r"\1"),
    Rule(r"head\.fused(_dist)?\.weights", r"weights\1"),
    Rule(r"head\.fused(_dist)?\.heads\.(\d+\.(?:weight|bias))", r"heads\1.\2"),
)
#: Parts of upstream's names in an order that is right at every level.
_ORDER = (
    *("weights", "weights_dist", "patch_embed", "stages", "blocks", "downsample", "alpha", "mixer"),
    *("A", "D", "BCdt_proj", "dw", "hz_proj", "out_proj", "conv", "norm", "dwconv1", "dwconv2", "ffn", "fc1", "fc2"),
    *("heads", "heads_dist", "weight", "bias", "running_mean", "running_var", "num_batches_tracked"),
)
_RANKS = {part: rank for rank, part in enumerate(_ORDER)}


def _write(form: str, state_dict: Mapping[str, Tensor]) -> StateDict:
    if form == "backbone_neck":
        backbone, neck = split_neck(state_dict)
        return join_neck(_write("backbone", backbone), neck)
    if form == "backbone":
        renamed = rename(state_dict, (*_TO_UPSTREAM, OUT_NORM), "our EfficientViM feature extractor")
    else:
        rules = [*(Rule(rf"backbone\.{rule.pattern}", rule.target) for rule in _TO_UPSTREAM), *_HEAD_TO_UPSTREAM]
        renamed = rename(state_dict, rules, "our EfficientViM classifier")
    ordered = sorted(renamed, key=_place)
    last = max((int(m[1]) for m in (re.match(r"norm\.(\d+)\.", name) for name in renamed) if m), default=-1)
    return {name: _shaped(name, renamed[name], last) for name in ordered}


def _place(name: str) -> tuple[int, ...]:
    """Return where an entry of upstream stands: what to sort by."""
    return tuple(int(part) if part.isdigit() else _RANKS.get(part, len(_RANKS)) for part in name.split("."))


def _flat(state_dict: Mapping[str, Tensor]) -> StateDict:
    """Give norms one axis, and the mixer's projections the four of the other convolutions.

    Upstream has norms of (b, c, l) and (b, c, h, w), whose weights have those axes, and convolutions of one dimension.
    """
    flat: StateDict = {}
    for name, value in state_dict.items():
        if re.fullmatch(r"(?:.*\.)?norm\.(?:\d+\.)?(?:weight|bias)", name) and value.ndim in (3, 4):
            value = value.flatten()
        elif name.endswith("_proj.conv.weight") and value.ndim == 3:
            value = value.unsqueeze(-1)
        flat[name] = value
    return flat


def _shaped(name: str, value: Tensor, last_norm: int) -> Tensor:
    """Give an entry the axes that upstream has: the inverse of `_flat`, for the names of upstream."""
    if name.endswith("_proj.conv.weight"):
        return value.squeeze(-1)
    norm = re.fullmatch(r"(?:stages\.\d+\.blocks\.\d+\.norm|norm\.(\d+))\.(?:weight|bias)", name)
    if norm is None:
        return value
    # The last norm of the head is that of the map.
    return value.reshape(1, -1, 1, 1) if norm[1] is not None and int(norm[1]) == last_norm else value.reshape(1, -1, 1)


_RELEASED: dict[str, dict[str, Any]] = {
    name: {"function": f"EfficientViM_{name.upper()}"} for name in ARCHS if name != "nano"
}

CONVERTER = Converter(
    FORMS,
    _build,
    _read,
    _write,
    title="EfficientViM",
    released=_RELEASED,
    mark=r"(?:stages|layers)\.\d+\.blocks\.\d+\.mixer\.BCdt_proj(?:\.conv)?\.weight",
    head=_HEAD_OF_CLASSIFIER,
    knows=_knows,
    sketch=lambda trunk: sketch(trunk, _WIDTH),
    sketches={name: in_words(ARCHS[name].depths, ARCHS[name].dims) for name in _RELEASED},
)
