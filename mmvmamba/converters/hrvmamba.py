"""HRVMamba: constructor arguments and checkpoints of zhanghao5201/HRVMamba.

Forms: ``"classifier"`` is ``HRVmamba`` of its classification folder, ``"classifier_se_lpu"`` is ``HRVmamba_se_lpu``,
``"backbone_seg"`` the ``Backbone_HRVMamba`` of its segmentation folder and ``"backbone_pose"`` the ``HRVmamba`` of its
pose folder. Form ``"backbone"`` is ``"backbone_seg"``, and with ``neck_channels=None`` the ``Backbone_HRVMamba`` of the
classification folder, which has no neck and a norm for every branch.

The widths of neck and head are literals upstream; here they are arguments: ``neck_channels``, ``neck_out_channels``,
``num_classes``. ``form`` is that of the parity data: ``"se_lpu"`` asks for such blocks in every form.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmvmamba.converters.base import Converter, Rule, StateDict, known_to, reject_unknown_arguments, rename
from mmvmamba.converters.hierarchical import (
    AFFINE,
    OUT_NORM,
    build_classifier,
    in_order,
    in_words,
    only,
    refuse_out_norms,
    refuse_pretrained,
    released_arguments,
    translate,
    without,
)
from mmvmamba.converters.vssm import ACTIVATIONS, SSM_INITS
from mmvmamba.errors import CheckpointMismatch, ConfigError, nearest_spelling
from mmvmamba.models.backbones.hrvmamba import ARCHS, HRVMamba, HRVMambaArch

CLASSIFIERS = ("classifier", "classifier_se_lpu")
FORMS = (*CLASSIFIERS, "backbone", "backbone_seg", "backbone_pose")
#: What ``form`` among the arguments may say.
_FORM_WORDS = ("cls", "se_lpu", "seg", "pose")
STAGES = ("stage1", "stage2", "stage3", "stage4")
_NECK, _NECK_OUT = (128, 256, 512, 1024), 2048

# ---------------------------------------------------------------- constructor arguments -> our options

#: What a stage of blocks says of its shape; all else is the same in all of them.
_SHAPE = ("num_modules", "num_branches", "block", "num_blocks", "num_channels")
#: Arguments of a stage whose value is refused unless it is this one, and what another one would mean.
_FIXED = {
    "ssm_conv": (3, "the deformable aggregation has nine points"),
    "ssm_conv_bias": (False, "there is no convolution to have a bias"),
    "forward_type": ("v05_noz", "the other scans of VMamba were never used"),
    "gmlp": (False, "no gated perceptron was ever used"),
}
_BLOCK_DEFAULTS: dict[str, Any] = {
    "ssm_d_state": 1,
    "ssm_ratio": 2.0,
    "ssm_dt_rank": "auto",
    "ssm_act_layer": "silu",
    "ssm_drop_rate": 0.0,
    "ssm_init": "v0",
    "mlp_ratio": 2.0,
    "mlp_act_layer": "gelu",
    "mlp_drop_rate": 0.0,
    **{name: value for name, (value, _) in _FIXED.items()},
}


def _shape(name: str, options: Mapping[str, Any], branches: int) -> tuple[int, int, tuple[int, ...]]:
    """Return modules, blocks in a row and widths of a stage with this number of branches."""
    missing = [key for key in _SHAPE if key not in options]
    if missing:
        raise ConfigError(f"extra[{name!r}] lacks {', '.join(missing)}, expected {', '.join(_SHAPE)}. Add them.")
    for key, kind, words in (
        ("num_modules", int, "an integer"),
        ("num_blocks", list | tuple, "a list"),
        ("num_channels", list | tuple, "a list"),
    ):
        if not isinstance(options[key], kind):
            raise ConfigError(f"extra[{name!r}]: {key} is {options[key]!r}, expected {words}. Correct it.")
    block = "BOTTLENECK" if branches == 1 else "HRVmambaBlock"
    blocks, widths = tuple(options["num_blocks"]), tuple(options["num_channels"])
    found = (options["num_branches"], len(blocks), len(widths))
    if options["block"] != block or found != (branches,) * 3 or len(set(blocks)) != 1:
        raise ConfigError(
            f"extra[{name!r}] has block {options['block']!r}, {found[0]} branches, num_blocks {blocks} and "
            f"num_channels {widths}, expected block {block!r} and {branches} branches, with one number of blocks, the "
            "same for all, and one of channels each. Correct it."
        )
    return options["num_modules"], blocks[0], widths


def _block_options(extra: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the blocks of all stages have in common."""
    every = [
        {**_BLOCK_DEFAULTS, **{k: v for k, v in extra[name].items() if k not in (*_SHAPE, "multiscale_output")}}
        for name in STAGES[1:]
    ]
    for name, options in zip(STAGES[1:], every, strict=True):
        reject_unknown_arguments(options, tuple(_BLOCK_DEFAULTS), f"extra[{name!r}]")
        differing = [key for key in options if options[key] != every[0][key]]
        if differing:
            raise ConfigError(
                f"extra[{name!r}] has another {', '.join(differing)} than extra['stage2'], expected the blocks of all "
                "stages alike. Give all of them the same."
            )
    options = every[0]
    for key, (expected, reason) in _FIXED.items():
        if options[key] != expected:
            raise ConfigError(f"{key} is {options[key]!r}, expected {expected!r}: {reason}. Remove it.")
    rank = options["ssm_dt_rank"]
    return dict(
        d_state=options["ssm_d_state"],
        ssm_ratio=options["ssm_ratio"],
        dt_rank=None if rank == "auto" else rank,
        ssm_act=translate("ssm_act_layer", options["ssm_act_layer"], ACTIVATIONS),
        ssm_dropout=options["ssm_drop_rate"],
        ssm_init=translate("ssm_init", options["ssm_init"], SSM_INITS),
        mlp_ratio=options["mlp_ratio"],
        mlp_act=translate("mlp_act_layer", options["mlp_act_layer"], ACTIVATIONS),
        mlp_dropout=options["mlp_drop_rate"],
    )


def _arch(
    extra: Mapping[str, Any], neck_channels: Sequence[int] | None, neck_out_channels: int | None, se_lpu: bool
) -> HRVMambaArch:
    """Translate upstream's nested dict."""
    if not isinstance(extra, Mapping):
        raise ConfigError(f"extra is {extra!r}, expected upstream's dict of {', '.join(STAGES)}. Correct it.")
    reject_unknown_arguments(extra, ("drop_path_rate", *STAGES), "extra")
    missing = [name for name in STAGES if not isinstance(extra.get(name), Mapping)]
    if missing:
        raise ConfigError(
            f"extra lacks {', '.join(missing)}, expected a dict for each of {', '.join(STAGES)}. Add them."
        )
    reject_unknown_arguments(extra["stage1"], _SHAPE, "extra['stage1']")
    shapes = [_shape(name, extra[name], branches + 1) for branches, name in enumerate(STAGES)]
    dims = shapes[-1][2]
    for branches, (_, _, channels) in enumerate(shapes[1:], start=2):
        if channels != dims[:branches]:
            raise ConfigError(
                f"extra[{STAGES[branches - 1]!r}]: num_channels is {channels} where the last stage has {dims}, "
                f"expected {dims[:branches]}: branches keep their width. Correct one of them."
            )
    return HRVMambaArch(
        dims=dims,
        depths=tuple(modules * blocks for modules, blocks, _ in shapes),
        modules=tuple(modules for modules, _, _ in shapes),
        drop_path_rate=extra.get("drop_path_rate", 0.0),
        bottleneck_dim=shapes[0][2][0],
        neck_dims=_NECK if neck_channels is None else tuple(neck_channels),
        neck_out_dim=_NECK_OUT if neck_out_channels is None else neck_out_channels,
        se_lpu=se_lpu,
        **_block_options(extra),
    )


def _upstream_hrvmamba(
    extra: Mapping[str, Any],
    in_channels: int = 3,
    norm_cfg: Mapping[str, Any] | None = None,
    norm_eval: bool = False,
    with_cp: bool = False,
    neck_channels: Sequence[int] | None = _NECK,
    neck_out_channels: int | None = _NECK_OUT,
    num_classes: int | None = 1000,  # noqa: ARG001 (belongs to the head)
    *,
    se_lpu: bool = False,
) -> dict[str, Any]:
    """Translate the arguments of upstream's constructors to those of ours.

    ``norm_cfg`` may ask for batch norms of either kind, which differ while training in parallel alone.
    """
    kind = "BN" if norm_cfg is None else norm_cfg.get("type")
    if kind not in ("BN", "SyncBN"):
        raise ConfigError(f"norm_cfg is {norm_cfg!r}, expected type 'BN' or 'SyncBN'. Remove it.")
    arch = _arch(extra, neck_channels, neck_out_channels, se_lpu)
    return dict(arch=arch, in_channels=in_channels, norm_eval=norm_eval, with_cp=with_cp)


_ARGUMENTS = tuple(name for name in inspect.signature(_upstream_hrvmamba).parameters if name != "se_lpu")


# ---------------------------------------------------------------- released variants


def _extra(dims: Sequence[int], width: int, drop_path_rate: float) -> dict[str, Any]:
    def stage(modules: int, branches: int) -> dict[str, Any]:
        shape = dict(num_modules=modules, num_branches=branches, block="HRVmambaBlock")
        return {**shape, "num_blocks": (2,) * branches, "num_channels": tuple(dims[:branches])}

    first = dict(num_modules=1, num_branches=1, block="BOTTLENECK", num_blocks=(2,), num_channels=(width,))
    return dict(drop_path_rate=drop_path_rate, stage1=first, stage2=stage(1, 2), stage3=stage(4, 3), stage4=stage(2, 4))


def _functions() -> dict[str, dict[str, Any]]:
    functions: dict[str, dict[str, Any]] = {}
    for name, arch in ARCHS.items():
        size, *kind = name.split("-")
        if name == "nano":
            continue
        word = f"hrvmamba_{size}"
        cls = _extra(arch.dims, arch.bottleneck_dim, arch.drop_path_rate)
        if kind == ["se", "lpu"]:
            functions[f"{word}_se_lpu"] = dict(extra=cls, form="se_lpu")
            continue
        functions[word] = dict(extra=cls, form="cls")
        functions[f"{word}_backbone_pose"] = dict(extra=cls, form="pose")
        functions[f"{word}_backbone_seg"] = dict(extra={**cls, "drop_path_rate": 0.15}, form="seg")
    return functions


#: The names of the key lists; upstream has no functions but configs.
UPSTREAM_FUNCTIONS = _functions()

# ---------------------------------------------------------------- building


def _build(form: str, kwargs: Mapping[str, Any]) -> nn.Module:
    _, kwargs = released_arguments(kwargs, UPSTREAM_FUNCTIONS)
    word = kwargs.pop("form", "se_lpu" if form == "classifier_se_lpu" else None)
    if word is not None and word not in _FORM_WORDS:
        raise ConfigError(
            f"form is {word!r} among the arguments, expected one of {', '.join(map(repr, _FORM_WORDS))}."
            f"{nearest_spelling(word, _FORM_WORDS)} Remove it."
        )
    if form == "classifier_se_lpu" and word != "se_lpu":
        raise ConfigError(
            f"form is {word!r} among the arguments for form 'classifier_se_lpu', expected 'se_lpu'. Use form "
            "'classifier' for models without these blocks."
        )
    refuse_pretrained(kwargs.pop("pretrained", None))
    known = _ARGUMENTS if form in CLASSIFIERS else (*_ARGUMENTS, "out_indices")
    reject_unknown_arguments(kwargs, known, f"hrvmamba {form}")
    if "extra" not in kwargs:
        raise ConfigError(f"hrvmamba {form}: extra is missing, expected upstream's dict of four stages. Add it.")
    out_indices = kwargs.pop("out_indices", None)
    options = _upstream_hrvmamba(**kwargs, se_lpu=word == "se_lpu")
    multiscale = kwargs["extra"]["stage4"].get("multiscale_output", form != "backbone_pose")
    if form != "backbone_pose" and not multiscale:
        raise ConfigError(
            f"extra['stage4']: multiscale_output is {multiscale!r}, expected True or nothing for form {form!r}, whose "
            "neck needs all branches. Remove it."
        )
    if form in CLASSIFIERS:
        backbone = HRVMamba(**options, out_indices=(3,), out_norms=False)
        classes = kwargs.get("num_classes")
        return build_classifier(backbone, options["arch"].neck_out_dim, 1000 if classes is None else classes)
    every = tuple(range(len(STAGES)))
    if form == "backbone_pose":
        return HRVMamba(**options, out_indices=out_indices or (every if multiscale else (0,)), out_type="branches")
    bare = form == "backbone" and "neck_channels" in kwargs and kwargs["neck_channels"] is None
    return HRVMamba(
        **options, out_indices=out_indices or every, out_type="branches" if bare else "fused", out_norms=True
    )


# ---------------------------------------------------------------- state dicts

_FIELD = r"(?:weight|bias)"
_BLOCK = (
    rf"cpe[12]\.{_FIELD}|conv2d\.[0-3]\.{_FIELD}|norm[02]?\.{_FIELD}|mlp\.fc[12]\.{_FIELD}"
    rf"|op\.(?:x_proj_weight|A_logs|Ds|dt_projs_weight|dt_projs_bias|out_norm\.{_FIELD}|(?:in|out)_proj\.weight"
    rf"|conv2d\.offset_mask(?:_dw)?\.{_FIELD}|se\.fc\.[02]\.weight)"
)
#: Stages of ours that have branches; upstream counts from 1.
_LATER = range(1, len(STAGES))


def _pair(ours: str, conv: str, norm: str) -> tuple[tuple[str, str], tuple[str, str]]:
    """Return the templates (our name, upstream's) of a convolution and its batch norm."""
    return (f"{ours}.conv.weight", f"{conv}.weight"), (f"{ours}.norm.@", f"{norm}.@")


def _bottleneck(ours: str, theirs: str) -> list[tuple[str, str]]:
    shortcut = _pair(f"{ours}.shortcut", f"{theirs}.downsample.0", f"{theirs}.downsample.1")
    return [*_pair(f"{ours}.conv#", f"{theirs}.conv#", f"{theirs}.bn#"), *shortcut]


def _templates() -> list[tuple[str, str]]:
    """Return all pairs (our name, upstream's): # is a number, = the first one again, @ a field of a norm, $ of a block.

    They are tried in order.
    """
    pairs: list[tuple[str, str]] = []
    for k in (0, 1):
        pairs += _pair(f"patch_embed.{k}", f"conv{k + 1}", f"bn{k + 1}")
    pairs += _bottleneck("layers.0.blocks.#", "layer1.#")
    # The branch that a stage begins has one level more than those that go on.
    pairs += _pair("layers.#.transition.=", "transition#.=.0.0", "transition#.=.0.1")
    pairs += _pair("layers.#.transition.#", "transition#.#.0", "transition#.#.1")
    for s in _LATER:
        theirs, ours = f"stage{s + 1}.#", f"layers.{s}.units.#"
        pairs.append((f"{ours}.branches.#.#.$", f"{theirs}.branches.#.#.$"))
        pairs += _pair(f"{ours}.fuse.#.#", f"{theirs}.fuse_layers.#.#.0", f"{theirs}.fuse_layers.#.#.1")
        for k in (0, 1):
            step = f"{theirs}.fuse_layers.#.#.#"
            pairs += _pair(f"{ours}.fuse.#.#.#.{k}", f"{step}.{2 * k}", f"{step}.{2 * k + 1}")
    pairs += _bottleneck("neck.increase.#", "neck.increase_layers.#.0")
    pairs += _pair("neck.downsample.#", "neck.downsample_layers.#.conv", "neck.downsample_layers.#.bn")
    pairs += _pair("neck.final", "neck.final_layer.conv", "neck.final_layer.bn")
    return pairs


def _pattern(template: str) -> str:
    pattern = re.escape(template).replace(r"\#", r"(\d+)").replace("=", r"\1")
    return pattern.replace("@", f"({AFFINE})").replace(r"\$", f"({_BLOCK})")


def _rule(source: str, target: str) -> Rule:
    """Return the renaming of one template to another, which has the same placeholders in the same order."""
    numbers = iter(range(1, 10))
    return Rule(_pattern(source), re.sub(r"[#@$]", lambda _: rf"\{next(numbers)}", target).replace("=", r"\1"))


_UPSTREAM_TRUNK = tuple(_rule(theirs, ours) for ours, theirs in _templates())
_TO_UPSTREAM = tuple(_rule(ours, theirs) for ours, theirs in _templates())
#: One pattern, for there is nothing to rename.
_OWN = "|".join(
    rule.pattern.replace("(", "(?:").replace("(?:?:", "(?:") for rule in _TO_UPSTREAM if r"\1" not in rule.pattern
)
_TRUNK = (*_UPSTREAM_TRUNK, Rule(f"({_OWN})", r"\1"))
_HEAD_OF_CLASSIFIER = r"head\..*"
_HEAD = Rule(r"head\.(weight|bias)", r"head.fc.\1")
_OWN_HEAD = Rule(r"head\.fc\.(weight|bias)", r"head.fc.\1")


def _read(form: str, state_dict: Mapping[str, Tensor], stages: Sequence[int]) -> StateDict:
    if form not in CLASSIFIERS:
        drop = (_HEAD_OF_CLASSIFIER,) if stages else ()
        ours = rename(state_dict, (*_TRUNK, OUT_NORM), "an HRVMamba feature extractor", drop)
        return _for_outputs(form, ours, stages) if stages else ours
    refuse_out_norms(form, stages)
    trunk = rename(without(state_dict, _HEAD_OF_CLASSIFIER), _TRUNK, "an HRVMamba classifier")
    head = rename(only(state_dict, _HEAD_OF_CLASSIFIER), (_HEAD, _OWN_HEAD), "the head of an HRVMamba classifier")
    return {**{f"backbone.{name}": value for name, value in trunk.items()}, **head}


def _for_outputs(form: str, ours: StateDict, outputs: Sequence[int]) -> StateDict:
    """Make a classifier's entries those of a feature extractor: add out norms, or leave out what pose has not."""
    if form == "backbone_pose":
        units = [name.split(".") for name in ours if re.match(r"layers\.3\.units\.\d+\.fuse\.", name)]
        last = max((int(parts[3]) for parts in units), default=0)
        rows = "|".join(str(i) for i in range(len(STAGES)) if i not in outputs)
        return without(ours, rf"neck\..*|layers\.3\.units\.{last}\.fuse\.(?:{rows})\..*" if rows else r"neck\..*")
    likes = {i: f"neck.increase.{i}.conv3.norm.weight" for i in range(len(STAGES) - 1)}
    likes[len(STAGES) - 1] = "neck.final.norm.weight"
    for i in outputs:
        if f"outnorm{i}.weight" in ours:
            continue
        if likes.get(i) not in ours:
            raise CheckpointMismatch(
                f"fill_out_norms names output {i}, of which the state dict has no entry {likes.get(i)!r}. Name only "
                "outputs from 0 to 3, of a checkpoint with a neck."
            )
        like = ours[likes[i]]
        ours[f"outnorm{i}.weight"], ours[f"outnorm{i}.bias"] = torch.ones_like(like), torch.zeros_like(like)
    return ours


def _knows(form: str, name: str) -> bool:
    own = (_HEAD, _OWN_HEAD) if form in CLASSIFIERS else (OUT_NORM,)
    return known_to((*_TRUNK, *own), name)


_OP_ORDER = (
    *("x_proj_weight", "A_logs", "Ds", "dt_projs_weight", "dt_projs_bias"),
    *("out_norm", "in_proj", "conv2d", "se", "out_proj"),
)


def _write(form: str, state_dict: Mapping[str, Tensor]) -> StateDict:
    if form not in CLASSIFIERS:
        renamed = rename(state_dict, (*_TO_UPSTREAM, OUT_NORM), "our HRVMamba feature extractor")
    else:
        rules = [*(Rule(rf"backbone\.{rule.pattern}", rule.target) for rule in _TO_UPSTREAM)]
        rules.append(Rule(r"head\.fc\.(weight|bias)", r"head.\1"))
        renamed = rename(state_dict, rules, "our HRVMamba classifier")
    return in_order(renamed, {".op.": _OP_ORDER})


def _sketch(trunk: Mapping[str, Tensor]) -> str:
    """Return depths and dims in words, as far as our entries tell."""
    rows: dict[int, set[str]] = {}
    dims: dict[int, int] = {}
    for name, value in trunk.items():
        if match := re.match(r"layers\.0\.blocks\.(\d+)\.", name):
            rows.setdefault(0, set()).add(match[1])
        elif match := re.fullmatch(r"layers\.(\d+)\.units\.(\d+)\.branches\.(\d+)\.(\d+)\.norm\.weight", name):
            rows.setdefault(int(match[1]), set()).add(f"{match[2]}.{match[4]}")
            dims[int(match[3])] = value.numel()
    return in_words([len(rows[stage]) for stage in sorted(rows)], [dims[branch] for branch in sorted(dims)])


def _released(name: str) -> dict[str, str]:
    return {"function": f"hrvmamba_{name.removesuffix('-plain').replace('-', '_')}"}


_RELEASED = {name: _released(name) for name in ARCHS if name != "nano"}

CONVERTER = Converter(
    FORMS,
    _build,
    _read,
    _write,
    title="HRVMamba",
    released=_RELEASED,
    mark=r"(?:stage\d+|layers\.\d+\.units)\.\d+\.branches\.\d+\.\d+\.op\.A_logs",
    head=_HEAD_OF_CLASSIFIER,
    knows=_knows,
    sketch=_sketch,
    sketches={name: in_words(ARCHS[name].depths, ARCHS[name].dims) for name in _RELEASED},
)
