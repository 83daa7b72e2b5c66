"""What converters of columnar backbones share. Names here are ours: ``layers.<layer>.``."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmvmamba.converters.base import Rule, StateDict
from mmvmamba.converters.hierarchical import in_words
from mmvmamba.errors import CheckpointMismatch, ConfigError
from mmvmamba.models.layers.rope import rotation

#: What a bidirectional mixer has in a state dict, as a part of a pattern.
BIDIRECTIONAL_MIXER = (
    r"mixer\.(?:A_log|D|A_b_log|D_b|gamma|(?:in|out)_proj\.weight|x_proj(?:_b)?\.weight"
    r"|(?:conv1d|dt_proj)(?:_b)?\.(?:weight|bias))"
)
#: Entries of Vim and ShuffleMamba that have the same names here, but for the class tokens of the latter.
TWO_STREAM_TRUNK = (
    Rule(r"(cls_token|pos_embed)", r"\1"),
    Rule(r"(patch_embed\.proj\.(?:weight|bias))", r"\1"),
    Rule(r"(rope\.freqs_(?:cos|sin))", r"\1"),
    Rule(rf"(layers\.\d+\.{BIDIRECTIONAL_MIXER})", r"\1"),
    Rule(r"(layers\.\d+\.norm\.(?:weight|bias))", r"\1"),
    Rule(r"(norm_f\.(?:weight|bias))", r"\1"),
)
#: Entries of a linear head, which MMPretrain calls ``head.fc``.
LINEAR_HEAD = (Rule(r"head\.(weight|bias)", r"head.fc.\1"),)
LINEAR_HEAD_TO_UPSTREAM = (Rule(r"head\.fc\.(weight|bias)", r"head.\1"),)


class BackboneWithNeck(nn.Module):
    """An upstream feature extractor that has its pyramid inside.

    Args:
        backbone: The feature extractor here.
        neck: What follows it.
    """

    def __init__(self, backbone: nn.Module, neck: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = neck

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return the maps (b, c, h, w) of the pyramid for an image (b, c, h, w)."""
        outs: tuple[Tensor, ...] = self.neck(self.backbone(image))
        return outs


class StoredRotation(nn.Module):
    """A place for the rotary tables of a checkpoint, which the backbone computes itself: they come and go with it.

    Args:
        rows: Rows of the grid for which upstream has them.
        columns: Its columns.
        dim: Channels of the tokens.
    """

    freqs_cos: Tensor
    freqs_sin: Tensor

    def __init__(self, rows: int, columns: int, dim: int) -> None:
        super().__init__()
        tables = rotation(rows, columns, dim, torch.get_default_device(), torch.float32)
        for name, table in zip(("freqs_cos", "freqs_sin"), tables, strict=True):
            self.register_buffer(name, table.repeat_interleave(2, -1))


def build_token_classifier(
    backbone: nn.Module, channels: int, num_classes: int, head: Callable[[], nn.Module] | None = None
) -> nn.Module:
    """Return MMPretrain's ``ImageClassifier`` of a backbone whose output is a vector (b, c), so without a neck.

    Args:
        backbone: The feature extractor.
        channels: Length of its last vector.
        num_classes: Number of classes.
        head: Builds the head; None for one linear map.
    """
    # Only this form needs MMPretrain.
    from mmengine.registry import DefaultScope
    from mmpretrain.models import ImageClassifier, LinearClsHead

    # MMPretrain builds its loss and preprocessor by bare names, which a detector's scope would take for mmdet's.
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        return ImageClassifier(backbone=backbone, head=LinearClsHead(num_classes, channels) if head is None else head())


def inside(part: str, rules: Iterable[Rule], upstream_part: str = "") -> tuple[Rule, ...]:
    """Return rules that lead from upstream's names to those of a part of our model.

    Args:
        part: Its name here, such as ``"backbone"``.
        rules: Those of the part by itself.
        upstream_part: What upstream's names begin with, such as ``"net."``.
    """
    return tuple(Rule(re.escape(upstream_part) + rule.pattern, rf"{part}.{rule.target}") for rule in rules)


def out_of(part: str, rules: Iterable[Rule], upstream_part: str = "") -> tuple[Rule, ...]:
    """Return rules that lead from the names of a part of our model to upstream's; see `inside`."""
    return tuple(Rule(rf"{part}\.{rule.pattern}", upstream_part + rule.target) for rule in rules)


def in_order(state_dict: Mapping[str, Tensor], order: Sequence[str]) -> StateDict:
    """Return the entries with those first whose names begin with the entries of ``order``, in that order."""
    ranks = {name: next((i for i, start in enumerate(order) if name.startswith(start)), len(order))
             for name in state_dict}  # fmt: skip
    return {name: state_dict[name] for name in sorted(state_dict, key=ranks.__getitem__)}


def sketch(trunk: Mapping[str, Tensor]) -> str:
    """Return depth and width in words, as far as our entries tell."""
    layers = {int(match[1]) for name in trunk if (match := re.match(r"layers\.(\d+)\.", name))}
    width = next((v.numel() for name, v in trunk.items() if re.fullmatch(r"layers\.\d+\.norm\.weight", name)), 0)
    return in_words((len(layers),), (width,))


def check_layers(trunk: Mapping[str, Tensor], layers: Sequence[int], title: str) -> None:
    """Raise ``CheckpointMismatch`` if there are no layers in our entries, or not those whose outputs are wanted."""
    depth = len({match[1] for name in trunk if (match := re.match(r"layers\.(\d+)\.", name))})
    if not depth:
        raise CheckpointMismatch(
            f"the state dict has no entry 'layers.*', expected those of a {title}. Check family, form and prefix."
        )
    missing = [layer for layer in layers if not 0 <= layer < depth]
    if missing:
        raise CheckpointMismatch(
            f"fill_out_norms names stage {missing[0]}, but the state dict has {depth} stages. Name only stages from 0 "
            "to that number less one."
        )


def require(form: str, kwargs: dict[str, Any], allowed: Mapping[str, Sequence[Any]], why: str) -> None:
    """Take arguments out of ``kwargs`` that must have one of some values, or raise ``ConfigError``.

    Args:
        form: Family and form, for messages.
        kwargs: Upstream's arguments; those of ``allowed`` are removed.
        allowed: Argument -> the values it may have.
        why: What no released model has, for messages.
    """
    for name, values in allowed.items():
        value = kwargs.pop(name, values[0])
        if value not in values:
            raise ConfigError(
                f"{form}: {name} is {value!r}, expected {' or '.join(map(repr, values))}: {why}. Use one of these."
            )
