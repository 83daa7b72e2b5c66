"""Finding out before a test that its weights belong to another model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from mmvmamba.checkpoints.matching import Match, check
from mmvmamba.models.pretrained import innermost, read_weights


def check_weights(model: nn.Module, checkpoint: str, weights: Mapping[str, Tensor] | None = None) -> Match:
    """Raise unless a checkpoint has exactly the entries of ``model``, in the same shapes.

    MMEngine loads what fits and logs the rest: a test would go on with random weights and print a score of 0. The
    runner checks again when it loads (``CheckpointCheckHook``); this is the early answer, before a data set is read.

    Args:
        model: The built model; wrappers for distribution or test-time augmentation are looked through.
        checkpoint: A file or an https URL.
        weights: What ``read_weights`` gave for it, if it was read before; else it is read now.

    Returns:
        What was found; nothing is loaded.

    Raises:
        CheckpointError: If the checkpoint cannot be read.
        CheckpointMismatch: If entries are missing, unexpected or do not fit; the message names some.
    """
    return check(
        innermost(model),
        read_weights(checkpoint) if weights is None else weights,
        source=repr(checkpoint),
        advice="Give the config the checkpoint was trained with.",
    )
