"""The classification head of EfficientViM: the hidden states of all stages and the last map, fused by learnt weights.

Paper: https://arxiv.org/abs/2411.15241, section 4.3. Upstream: mlvlab/EfficientViM,
classification/models/EfficientViM.py (``EfficientViM.norm``, ``heads``, ``weights`` and their twins ``_dist``).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn

from mmvmamba.errors import ConfigError
from mmvmamba.models.layers import LayerNorm, Linear
from mmvmamba.registry import MODELS


# A function, so that a config can name it where MMPretrain is not installed.
@MODELS.register_module(name="EfficientViMClsHead")
def build_efficientvim_cls_head(
    num_classes: int, in_channels: Sequence[int], distillation: bool = False, **settings: Any
) -> BaseModule:
    """Build a head of MMPretrain's ``ImageClassifier`` without neck, for ``EfficientViM(out_type="hidden_states")``.

    Every hidden state is normed over its channels and averaged over the states, the last map over its pixels; each has
    a linear map, and a softmax of four numbers says how much it counts.

    With ``distillation`` there are two such sets of linear maps, one trained on labels and one on what a teacher says.
    In evaluation the scores are their mean, in training the call returns both. There is no teacher here: ``loss`` is
    the mean of the losses of both on the labels, which fine-tunes a distilled checkpoint but is not its recipe.

    Args:
        num_classes: Number of classes.
        in_channels: Channels of the hidden states, in order; the last map has those of the last.
        distillation: Whether there is a second set of linear maps.
        settings: Arguments of ``ClsHead`` (``loss``, ``topk``, ``cal_acc``, ``init_cfg``), which refuses others.

    Raises:
        ConfigError: If a number is impossible.
        ImportError: If MMPretrain is not installed.
    """
    widths = list(in_channels) if isinstance(in_channels, Sequence) else []
    if not widths or not all(isinstance(n, int) and n > 0 for n in (num_classes, *widths)):
        raise ConfigError(
            f"EfficientViMClsHead: num_classes is {num_classes!r} and in_channels {in_channels!r}, expected a positive "
            "integer and one for every output stage of the backbone, such as (128, 192, 320). Correct them."
        )
    return _head_class()(num_classes, widths, distillation, **settings)


class FusedHeads(nn.Module):
    """Linear maps of several vectors, whose sum is weighted by the softmax of a parameter.

    Args:
        channels: Channels of the vectors.
        num_classes: Channels of the result.
    """

    def __init__(self, channels: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.ones(len(channels)))
        self.heads = nn.ModuleList(Linear(width, num_classes) for width in channels)

    def forward(self, feats: Sequence[Tensor]) -> Tensor:
        """Map vectors (b, c_i) to scores (b, classes)."""
        scores = torch.stack([head(x) for head, x in zip(self.heads, feats, strict=True)], dim=-1)
        out: Tensor = scores @ self.weights.softmax(0).to(scores.dtype)
        return out

    def as_linear(self) -> tuple[Tensor, Tensor]:
        """Return weight (classes, sum of c_i) and bias (classes,) of one linear map of all vectors, in float64."""
        shares = self.weights.double().softmax(0)
        pairs = list(zip(shares, self.heads, strict=True))
        weight = torch.cat([share * head.weight.double() for share, head in pairs], dim=1)
        return weight, torch.stack([share * head.bias.double() for share, head in pairs]).sum(0)


class FoldedHeads(nn.Module):
    """One linear map that does what the mean of several sets of linear maps does.

    Args:
        parts: The sets.
    """

    @torch.no_grad()
    def __init__(self, parts: Sequence[FusedHeads]) -> None:
        super().__init__()
        weights, biases = zip(*(part.as_linear() for part in parts), strict=True)
        weight, bias = torch.stack(weights).mean(0), torch.stack(biases).mean(0)
        old = parts[0].weights
        self.fc = Linear(weight.shape[1], weight.shape[0], device=old.device, dtype=old.dtype)
        self.fc.weight.copy_(weight)
        self.fc.bias.copy_(bias)
        self.requires_grad_(False)

    def forward(self, feats: Sequence[Tensor]) -> Tensor:
        """Map vectors (b, c_i) to scores (b, classes)."""
        out: Tensor = self.fc(torch.cat(tuple(feats), dim=1))
        return out


@functools.cache
def _head_class() -> type[BaseModule]:
    from mmpretrain.models.heads import ClsHead

    class EfficientViMClsHead(ClsHead):
        """See ``build_efficientvim_cls_head``."""

        def __init__(self, num_classes: int, in_channels: list[int], distillation: bool, **settings: Any) -> None:
            super().__init__(**settings)
            self.num_classes, self.in_channels, self.distillation = num_classes, tuple(in_channels), distillation
            widths = [*in_channels, in_channels[-1]]
            self.norm = nn.ModuleList(LayerNorm(width) for width in widths)
            self.fused: nn.Module = FusedHeads(widths, num_classes)
            self.fused_dist = FusedHeads(widths, num_classes) if distillation else None

        def no_weight_decay(self) -> set[str]:
            """Return the parameters of its own that a recipe must not pull towards zero: the logits of the fusion."""
            return {"fused.weights"} | ({"fused_dist.weights"} if self.distillation else set())

        def pre_logits(self, feats: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            """Return a vector (b, c_i) of every hidden state (b, n_i, c_i) and of the map (b, c, h, w) behind them."""
            *states, last = feats
            tokens = [*states, last.flatten(2).transpose(1, 2)]
            return tuple(norm(x).mean(1) for norm, x in zip(self.norm, tokens, strict=True))

        def forward(self, feats: tuple[Tensor, ...]) -> Tensor | tuple[Tensor, Tensor]:
            """Return the scores (b, classes); with distillation in training those of both sets of linear maps."""
            vectors = self.pre_logits(feats)
            scores: Tensor = self.fused(vectors)
            if self.fused_dist is None:
                return scores
            of_teacher = self.fused_dist(vectors)
            return (scores, of_teacher) if self.training else (scores + of_teacher) / 2

        def loss(self, feats: tuple[Tensor, ...], data_samples: list[Any], **settings: Any) -> dict[str, Tensor]:
            """Return the loss on the labels, half of each set of linear maps; accuracies are those of the first."""
            scores = self(feats)
            if isinstance(scores, Tensor):
                return self._get_loss(scores, data_samples, **settings)
            losses = self._get_loss(scores[0], data_samples, **settings)
            of_teacher = self._get_loss(scores[1], data_samples, **settings)
            return {**losses, "loss": (losses["loss"] + of_teacher["loss"]) / 2}

        def fold_batch_norms(self) -> None:
            """Make one linear map of all. For `mmvmamba.models.deploy` alone."""
            self.fused = FoldedHeads([part for part in (self.fused, self.fused_dist) if isinstance(part, FusedHeads)])
            self.fused_dist = None

    return EfficientViMClsHead
