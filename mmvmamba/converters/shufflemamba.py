"""ShuffleMamba: constructor arguments and checkpoints of huangzizheng01/ShuffleMamba.

``models_shuffle.VisionMamba`` is form ``"classifier"``, ``models_reg.VisionMamba`` form ``"classifier_reg"``,
``models_openmm.Backbone_VideoMamba`` form ``"backbone"`` and ``models_openmm.Mamba_Adapter`` form ``"adapter"``.

Names and shapes of the plain models with RMS norms are Vim's: the place of the class token, first here and in the
middle there, is not among them. A file of the sizes that both have is taken for Vim's; upstream has released none.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from mmvmamba.converters.adapter import TRUNK, is_adapters, read_adapter, upstream_adapter, write_adapter
from mmvmamba.converters.base import Converter, Rule, StateDict, known_to, reject_unknown_arguments, rename
from mmvmamba.converters.columnar import (
    LINEAR_HEAD,
    LINEAR_HEAD_TO_UPSTREAM,
    TWO_STREAM_TRUNK,
    build_token_classifier,
    check_layers,
    in_order,
    inside,
    out_of,
    sketch,
)
from mmvmamba.converters.hierarchical import (
    in_words,
    refuse_out_norms,
    refuse_pretrained,
    released_arguments,
    translate,
    without,
)
from mmvmamba.errors import ConfigError
from mmvmamba.models.adapters import ViTAdapter
from mmvmamba.models.backbones.shufflemamba import ARCHS, ShuffleMamba, ShuffleMambaArch, Tokens
from mmvmamba.models.heads import build_register_cls_head
from mmvmamba.models.layers.shuffle import GivenShuffle

FORMS = ("classifier", "classifier_reg", "backbone", "adapter")
_NORMS = {"rms": "rms_norm", "ln": "layer_norm"}

# ---------------------------------------------------------------- constructor arguments -> our options

#: Arguments of every form; ``norm`` stands for ``rms_norm`` and ``fused_add_norm`` in the parity data. What kernels run
#: (``fused_add_norm``) has no effect here, and the residual stream is float32 whatever ``residual_in_fp32`` says.
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
    # Without effect but in classifiers, the last two but with registers; upstream's other modules swallow them.
    "num_classes",
    "num_cls_tokens",
    "cls_reduce",
    "pretrained",
)
_ADAPTER_ARGUMENTS = tuple(inspect.signature(upstream_adapter).parameters)
_OWN = {
    "classifier": ("permutations",),
    "classifier_reg": ("permutations",),
    "backbone": ("out_indices",),
    # An adapter has its four maps, whatever its trunk would return.
    "adapter": ("out_indices", *_ADAPTER_ARGUMENTS),
}
_NUM_CLASSES = 1000


def _upstream_norm(kwargs: Mapping[str, Any]) -> str:
    if "norm" in kwargs:
        return translate("norm", kwargs["norm"], _NORMS)
    return _NORMS["rms" if kwargs.get("rms_norm", True) else "ln"]


def _upstream_trunk(kwargs: Mapping[str, Any], num_registers: int) -> dict[str, Any]:
    """Translate the arguments that all of upstream's modules have to those of ours."""
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
    classes, dim = kwargs.get("num_classes", _NUM_CLASSES), backbone.arch.dim
    if not registers:
        return build_token_classifier(backbone, dim, classes)
    reduction, arch = kwargs.get("cls_reduce", 1), backbone.arch
    return build_token_classifier(
        backbone,
        dim,
        classes,
        lambda: build_register_cls_head(classes, dim, registers, reduction, arch.norm, arch.norm_eps),
    )


def _build_adapter(kwargs: Mapping[str, Any]) -> nn.Module:
    trunk = ShuffleMamba(
        **_upstream_trunk(kwargs, 0),
        cls_token="none",  # noqa: S106 (no password)
        last_feature="hidden",
        final_norm=False,
    )
    own = {name: value for name, value in kwargs.items() if name in _ADAPTER_ARGUMENTS}
    return ViTAdapter(trunk, **{"trunk_features": "each", **upstream_adapter(**own)})


# ---------------------------------------------------------------- state dicts

_FIELD = r"(?:weight|bias)"
_TRUNK_RULES = (Rule(r"(pos_embed_cls)", r"\1"), *TWO_STREAM_TRUNK)
_HEAD_OF_CLASSIFIER = r"(?:head|neck|norm_neck)\..*"
_HEAD = (*LINEAR_HEAD, Rule(r"neck\.weight", "head.neck.weight"), Rule(rf"norm_neck\.({_FIELD})", r"head.norm.\1"))
_HEAD_TO_UPSTREAM = (
    *LINEAR_HEAD_TO_UPSTREAM,
    Rule(r"head\.neck\.weight", "neck.weight"),
    Rule(rf"head\.norm\.({_FIELD})", r"norm_neck.\1"),
)
_ORDER = (
    "cls_token",
    "pos_embed_cls",
    "pos_embed",
    "patch_embed.",
    "neck.",
    "norm_neck.",
    "head.",
    "layers.",
    "norm_f.",
)


def _read_trunk(state_dict: Mapping[str, Tensor]) -> StateDict:
    return rename(state_dict, _TRUNK_RULES, "a ShuffleMamba feature extractor")


def _write_trunk(state_dict: Mapping[str, Tensor]) -> StateDict:
    return in_order(rename(state_dict, _TRUNK_RULES, "our ShuffleMamba feature extractor"), _ORDER)


def _read(form: str, state_dict: Mapping[str, Tensor], stages: Sequence[int]) -> StateDict:
    if form == "backbone":
        ours = _read_trunk(without(state_dict, _HEAD_OF_CLASSIFIER))
        # There are no out norms to fill, but the layers are looked for, as in every family.
        check_layers(ours, stages, "ShuffleMamba")
        return ours
    refuse_out_norms(form, stages)
    if form == "adapter":
        return read_adapter(state_dict, _read_trunk)
    return rename(state_dict, (*inside("backbone", _TRUNK_RULES), *_HEAD), "a ShuffleMamba classifier")


def _knows(form: str, name: str) -> bool:
    if form == "adapter":
        return is_adapters(name) or known_to(_TRUNK_RULES, name.removeprefix(TRUNK))
    return known_to(_TRUNK_RULES, name) or (form.startswith("classifier") and known_to(_HEAD, name))


def _write(form: str, state_dict: Mapping[str, Tensor]) -> StateDict:
    if form == "backbone":
        return _write_trunk(state_dict)
    if form == "adapter":
        return write_adapter(state_dict, _write_trunk, "norm")
    rules = (*out_of("backbone", _TRUNK_RULES), *_HEAD_TO_UPSTREAM)
    return in_order(rename(state_dict, rules, "our ShuffleMamba classifier"), _ORDER)


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
    # As Vim; which of the two it is, their sizes and what else they have decide.
    mark=r"layers\.\d+\.mixer\.A_b_log",
    head=_HEAD_OF_CLASSIFIER,
    knows=_knows,
    sketch=sketch,
    sketches={name: in_words((ARCHS[name].depth,), (ARCHS[name].dim,)) for name in _RELEASED},
)
