"""Vim: constructor arguments and checkpoints of hustvl/Vim.

Forms: ``"classifier"`` is ``VisionMamba``, ``"backbone"`` its trunk, as feature extractors start from it;
``"backbone_seg"`` is ``VisionMambaSeg`` of seg/, whose pyramid is a neck here, and ``"backbone_det"`` is
``SimpleFeaturePyramid(VisionMambaDet)`` of det/, likewise. At the commit of the fact sheet the segmentation configs
build another network than they mean (two arguments are passed by position where others stand now); the meaning is what
is built here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn

from mmvmamba.converters.base import Converter, Rule, StateDict, known_to, reject_unknown_arguments, rename
from mmvmamba.converters.columnar import (
    LINEAR_HEAD,
    LINEAR_HEAD_TO_UPSTREAM,
    TWO_STREAM_TRUNK,
    BackboneWithNeck,
    StoredRotation,
    build_token_classifier,
    check_layers,
    in_order,
    inside,
    out_of,
    require,
    sketch,
)
from mmvmamba.converters.hierarchical import (
    AFFINE,
    in_words,
    refuse_out_norms,
    refuse_pretrained,
    released_arguments,
    translate,
)
from mmvmamba.errors import ConfigError
from mmvmamba.models.backbones.columnar import ClassToken, image_size, quarters
from mmvmamba.models.backbones.two_stream import LastFeature
from mmvmamba.models.backbones.vim import ARCHS, Vim, VimArch
from mmvmamba.models.necks import FourScalePyramid, SimpleFeaturePyramid

FORMS = ("classifier", "backbone", "backbone_seg", "backbone_det")

# ---------------------------------------------------------------- constructor arguments -> our options

#: Arguments of all forms and upstream's values of them.
_DEFAULTS: dict[str, Any] = dict(
    img_size=224,
    patch_size=16,
    stride=16,
    depth=24,
    embed_dim=192,
    d_state=16,
    channels=3,
    drop_path_rate=0.1,
    norm_epsilon=1e-5,
    rms_norm=True,
    if_rope=False,
    if_rope_residual=False,
    if_divide_out=True,
    init_layer_scale=None,
)
#: Values that mean the same network; other values are ablations that no released model has.
_FIXED: dict[str, tuple[Any, ...]] = dict(
    ssm_cfg=(None, {}),
    drop_rate=(0, 0.0),
    initializer_cfg=(None, {}),
    pt_hw_seq_len=(14,),
    if_bidirectional=(False,),
    if_abs_pos_embed=(True,),
    flip_img_sequences_ratio=(-1.0, -1, 0, 0.0),
    if_bimamba=(False,),
    bimamba_type=("v2",),
    use_double_cls_token=(False,),
    if_random_cls_token_position=(False,),
    if_random_token_rank=(False,),
)
_WHY = "no released model has another"
#: Without effect on what is computed in float32: which kernels run, the type of the residual stream (always float32
#: here), the device, a misspelling in upstream's ``vim_base``, the number of classes where there is no head.
_IGNORED = ("fused_add_norm", "residual_in_fp32", "device", "dtype", "ft_seq_len", "if_devide_out")

#: What the feature extractors take besides, likewise without effect: recomputation and the name of a dict's one entry.
_IGNORED_BY_EXTRACTORS: dict[str, Any] = dict(use_checkpoint=False, out_feature="last_feat")

_LAST = {"none": "hidden", "add": "residual", "add & norm": "normed"}


def _official(dim: int, **more: Any) -> dict[str, Any]:
    return dict(embed_dim=dim, depth=24, **more)


_RATES = {name: arch.drop_path_rate for name, arch in ARCHS.items()}
#: Variants under the names of their key lists; upstream's own follow.
UPSTREAM_FUNCTIONS: dict[str, dict[str, Any]] = {
    "vim_tiny": _official(192),
    "vim_tiny_plus": _official(192, stride=8),
    "vim_small": _official(384),
    "vim_small_plus": _official(384, stride=8),
    "vim_base": _official(768),
}
_TAIL = "224_bimambav2_final_pool_mean_abs_pos_embed_with"
UPSTREAM_FUNCTIONS |= {
    f"vim_tiny_patch16_{_TAIL}_midclstok_div2": UPSTREAM_FUNCTIONS["vim_tiny"],
    f"vim_tiny_patch16_stride8_{_TAIL}_midclstok_div2": UPSTREAM_FUNCTIONS["vim_tiny_plus"],
    f"vim_small_patch16_{_TAIL}_midclstok_div2": UPSTREAM_FUNCTIONS["vim_small"],
    f"vim_small_patch16_stride8_{_TAIL}_midclstok_div2": UPSTREAM_FUNCTIONS["vim_small_plus"],
    f"vim_base_patch16_{_TAIL}_middle_cls_token_div2": UPSTREAM_FUNCTIONS["vim_base"],
}


def _take(form: str, kwargs: Mapping[str, Any], own: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split checked arguments into those of every form and those of this one, with defaults.

    Args:
        form: The form.
        kwargs: Upstream's arguments.
        own: Arguments of this form alone and their defaults.
    """
    given = dict(kwargs)
    refuse_pretrained(given.pop("pretrained", None))
    what = f"vim {form}"
    known = [*_DEFAULTS, *own, *_FIXED, *_IGNORED]
    reject_unknown_arguments(given, known, what)
    require(what, given, _FIXED, _WHY)
    common = {name: given.pop(name, default) for name, default in _DEFAULTS.items()}
    return common, {name: given.pop(name, default) for name, default in own.items()}


def _options(form: str, common: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of our backbone for the arguments of every form."""
    if common["if_rope_residual"] and not common["if_rope"]:
        raise ConfigError(
            f"vim {form}: if_rope_residual is True but if_rope is False, expected both or neither: upstream has no "
            "tables for it then. Set if_rope=True."
        )
    arch = VimArch(
        dim=common["embed_dim"],
        depth=common["depth"],
        drop_path_rate=common["drop_path_rate"],
        patch_size=common["patch_size"],
        stride=common["stride"],
        d_state=common["d_state"],
        halve=bool(common["if_divide_out"]),
        layer_scale=common["init_layer_scale"],
        norm="rms_norm" if common["rms_norm"] else "layer_norm",
        norm_eps=common["norm_epsilon"],
    )
    rope = ("both" if common["if_rope_residual"] else "hidden") if common["if_rope"] else "none"
    return dict(arch=arch, in_channels=common["channels"], img_size=common["img_size"], rope=rope)


def _with_tables(backbone: Vim, common: Mapping[str, Any]) -> Vim:
    """Give the backbone a place for upstream's rotary tables, whose grid is that of patches side by side."""
    if common["if_rope"]:
        height, width = image_size(common["img_size"])
        size = common["patch_size"]
        backbone.rope = StoredRotation(height // size, width // size, common["embed_dim"])
    return backbone


# ---------------------------------------------------------------- building


def _build(form: str, kwargs: Mapping[str, Any]) -> nn.Module:
    _, kwargs = released_arguments(kwargs, UPSTREAM_FUNCTIONS)
    builders = {"classifier": _classifier, "backbone": _trunk, "backbone_seg": _seg, "backbone_det": _det}
    return builders[form](kwargs)


_OF_CLASSIFIER: dict[str, Any] = dict(
    num_classes=1000, if_cls_token=True, use_middle_cls_token=True, final_pool_type="mean"
)


def _place(form: str, common: Mapping[str, Any], own: Mapping[str, Any]) -> ClassToken:
    """Return where the class token stands."""
    if not own["if_cls_token"]:
        return "none"
    if own["use_middle_cls_token"] and common["if_rope"]:
        raise ConfigError(
            f"vim {form}: if_rope is True with the class token in the middle, expected it without a class token: "
            "upstream then rotates the wrong tokens, and no released model has both. Set if_cls_token=False."
        )
    return "middle" if own["use_middle_cls_token"] else "first"


def _classifier(kwargs: Mapping[str, Any]) -> nn.Module:
    common, own = _take("classifier", kwargs, _OF_CLASSIFIER)
    place = _place("classifier", common, own)
    if place == "none":
        require("vim classifier without class token", own, {"final_pool_type": ("mean",)}, _WHY)
    backbone = Vim(
        **_options("classifier", common),
        cls_token=place,
        out_type="avg_featmap" if place == "none" else "cls_token",
        out_indices=(common["depth"] - 1,),
    )
    return build_token_classifier(_with_tables(backbone, common), common["embed_dim"], own["num_classes"])


def _trunk(kwargs: Mapping[str, Any]) -> nn.Module:
    common, own = _take("backbone", kwargs, {**_OF_CLASSIFIER, "out_indices": None})
    backbone = Vim(
        **_options("backbone", common),
        cls_token=_place("backbone", common, own),
        out_indices=own["out_indices"] or quarters(common["depth"]),
    )
    return _with_tables(backbone, common)


def _seg(kwargs: Mapping[str, Any]) -> nn.Module:
    own_defaults = dict(
        # The class token is deleted after loading, with a row of the position embedding: neither is here.
        if_cls_token=False,
        use_middle_cls_token=False,
        final_pool_type="none",
        num_classes=80,
        in_chans=None,
        out_indices=(3, 5, 7, 11),
        use_residual_as_feature=False,
        last_layer_process="none",
        if_fpn=True,
        **_IGNORED_BY_EXTRACTORS,
    )
    common, own = _take("backbone_seg", kwargs, own_defaults)
    if own["in_chans"] is not None:
        common["channels"] = own["in_chans"]
    residual = bool(own["use_residual_as_feature"])
    last = cast("LastFeature", translate("last_layer_process", own["last_layer_process"], _LAST))
    backbone = Vim(
        **_options("backbone_seg", common),
        cls_token="none",  # noqa: S106 (no password)
        out_indices=tuple(own["out_indices"]),
        feature="residual" if residual else "hidden",
        # Upstream appends the processed output of the last layer only where features are the residual stream.
        last_feature=last if residual else "hidden",
    )
    neck = FourScalePyramid(common["embed_dim"], common["patch_size"]) if own["if_fpn"] else nn.Identity()
    return BackboneWithNeck(_with_tables(backbone, common), neck)


def _det(kwargs: Mapping[str, Any]) -> nn.Module:
    own_defaults = dict(
        if_cls_token=False,
        use_middle_cls_token=False,
        final_pool_type="none",
        num_classes=80,
        in_chans=None,
        out_channels=256,
        last_layer_process="add",
        if_fpn=True,  # its pyramid stands around it, whatever this says
        **_IGNORED_BY_EXTRACTORS,
    )
    common, own = _take("backbone_det", kwargs, own_defaults)
    if own["in_chans"] is not None:
        common["channels"] = own["in_chans"]
    last = cast("LastFeature", translate("last_layer_process", own["last_layer_process"], _LAST))
    if last == "normed":
        raise ConfigError(
            f"vim backbone_det: last_layer_process is {own['last_layer_process']!r}, expected 'add' or 'none': "
            "upstream deletes the norm of its detection backbone. Use one of these."
        )
    backbone = Vim(
        **_options("backbone_det", common),
        cls_token="none",  # noqa: S106 (no password)
        out_indices=(common["depth"] - 1,),
        last_feature=last,
        final_norm=False,
    )
    neck = SimpleFeaturePyramid(common["embed_dim"], own["out_channels"])
    return BackboneWithNeck(_with_tables(backbone, common), neck)


# ---------------------------------------------------------------- state dicts

_HEAD_OF_CLASSIFIER = r"head\..*"
_BIAS_OF_NORM = re.compile(r"(?:layers\.\d+\.norm|norm_f)\.bias")
_SEG_NECK = (Rule(rf"(fpn[1-4]\.\d+\.{AFFINE})", r"\1"),)
_DET_NECK = (Rule(r"(simfp_[2-5]\.\d+\.(?:norm\.)?(?:weight|bias))", r"\1"),)
#: Form -> rules from upstream's names to ours.
_READ: dict[str, tuple[Rule, ...]] = {
    "classifier": (*inside("backbone", TWO_STREAM_TRUNK), *LINEAR_HEAD),
    "backbone": TWO_STREAM_TRUNK,
    "backbone_seg": (*inside("backbone", TWO_STREAM_TRUNK), *inside("neck", _SEG_NECK)),
    "backbone_det": (*inside("backbone", TWO_STREAM_TRUNK, "net."), *inside("neck", _DET_NECK)),
}
#: Form -> rules back, and upstream's order of the entries.
_WRITE: dict[str, tuple[tuple[Rule, ...], tuple[str, ...]]] = {
    "classifier": (
        (*out_of("backbone", TWO_STREAM_TRUNK), *LINEAR_HEAD_TO_UPSTREAM),
        ("cls_token", "pos_embed", "patch_embed.", "head.", "rope.", "layers.", "norm_f."),
    ),
    "backbone": (TWO_STREAM_TRUNK, ("cls_token", "pos_embed", "patch_embed.", "rope.", "layers.", "norm_f.")),
    "backbone_seg": (
        (*out_of("backbone", TWO_STREAM_TRUNK), *out_of("neck", _SEG_NECK)),
        ("pos_embed", "patch_embed.", "rope.", "layers.", "norm_f.", "fpn"),
    ),
    "backbone_det": (
        (*out_of("backbone", TWO_STREAM_TRUNK, "net."), *out_of("neck", _DET_NECK)),
        ("simfp_", "net.pos_embed", "net.patch_embed.", "net.rope.", "net.layers."),
    ),
}


def _read(form: str, state_dict: Mapping[str, Tensor], stages: Sequence[int]) -> StateDict:
    what = f"a Vim {form}"
    if form != "backbone":
        refuse_out_norms(form, stages)
        return rename(state_dict, _READ[form], what)
    # A trunk is a classifier's: upstream has it with the head alone.
    ours = rename(state_dict, _READ[form], what, (_HEAD_OF_CLASSIFIER,))
    # There are no out norms to fill, but the layers are looked for, as in every family.
    if stages:
        check_layers(ours, stages, "Vim")
    return ours


def _knows(form: str, name: str) -> bool:
    # A bias makes it a layer norm, which none of upstream's has, but some of ShuffleMamba's.
    return known_to(_READ[form], name) and not _BIAS_OF_NORM.fullmatch(name)


def _write(form: str, state_dict: Mapping[str, Tensor]) -> StateDict:
    rules, order = _WRITE[form]
    return in_order(rename(state_dict, rules, f"our Vim {form}"), order)


_RELEASED = {
    name: {"function": f"vim_{name.replace('-', '_')}", "drop_path_rate": rate}
    for name, rate in _RATES.items()
    if name != "nano"
}

CONVERTER = Converter(
    FORMS,
    _build,
    _read,
    _write,
    title="Vim",
    released=_RELEASED,
    # Depth-wise parameters of the second direction, directly in a layer.
    mark=r"layers\.\d+\.mixer\.A_b_log",
    head=_HEAD_OF_CLASSIFIER,
    knows=_knows,
    sketch=sketch,
    sketches={name: in_words((ARCHS[name].depth,), (ARCHS[name].dim,)) for name in _RELEASED},
)
