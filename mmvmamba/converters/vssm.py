"""What converters of VMamba and of the repositories grown out of its code share: words, and the classifier's head."""

from __future__ import annotations

from mmvmamba.converters.base import Rule
from mmvmamba.converters.hierarchical import AFFINE

NORMS = {"ln": "layer_norm", "ln2d": "layer_norm", "bn": "batch_norm"}
PATCH_EMBEDS = {"v1": "patchify", "v2": "overlapping"}
DOWNSAMPLES = {"v1": "patch_merging", "v2": "conv2x2", "v3": "conv3x3", "none": "none"}
SSM_INITS = {"v0": "mamba", "v1": "random", "v2": "zero"}
ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "relu": "relu", "sigmoid": "sigmoid"}

#: Names of the classifier's head, today's and those of the first releases.
HEAD_OF_CLASSIFIER = r"(?:classifier\.(?:norm|head)|norm|head)\..*"


def head_rules(last: int, field: str = AFFINE) -> tuple[Rule, Rule]:
    """Return the rules of the classification head, whose norm is the out norm of stage ``last`` here.

    Args:
        last: Number of the last stage.
        field: Pattern of what its norm has.
    """
    return (
        Rule(rf"(?:classifier\.)?norm\.({field})", rf"backbone.outnorm{last}.\1"),
        Rule(r"(?:classifier\.)?head\.(weight|bias)", r"head.fc.\1"),
    )
