"""Finding out before a test that its weights belong to another model."""

from __future__ import annotations

from mmengine.model import BaseTTAModel, is_model_wrapper
from torch import Tensor, nn

from mmvmamba.errors import CheckpointMismatch
from mmvmamba.models.pretrained import read_weights

_NAMES_SHOWN = 10


def check_weights(model: nn.Module, checkpoint: str) -> None:
    """Raise unless a checkpoint has exactly the entries of ``model``, in the same shapes.

    MMEngine loads what fits and logs the rest: a test would go on with random weights and print a score of 0.

    Args:
        model: The built model; wrappers for distribution or test-time augmentation are looked through.
        checkpoint: A file or an http(s) URL.

    Raises:
        CheckpointError: If the checkpoint cannot be read.
        CheckpointMismatch: If entries are missing, unexpected or of another shape; the message names some.
    """
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.get_submodule("module")
    own, stored = model.state_dict(), read_weights(checkpoint)
    # Checkpoints from before PyTorch 0.4.1 have no such counters, and no test uses them.
    missing = [name for name in own if name not in stored and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in stored if name not in own]
    shapes = [
        f"{name} {tuple(stored[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in stored and not _fits(name, stored[name], own[name])
    ]
    if missing or unexpected or shapes:
        raise CheckpointMismatch(
            f"checkpoint {checkpoint!r} is not of this {type(model).__name__}: {len(missing)} of {len(own)} entries "
            f"missing {missing[:_NAMES_SHOWN]}, {len(unexpected)} unexpected {unexpected[:_NAMES_SHOWN]}, "
            f"{len(shapes)} of another shape {shapes[:_NAMES_SHOWN]}. Give the config the checkpoint was trained with."
        )


def _fits(name: str, stored: Tensor, own: Tensor) -> bool:
    """Return whether an entry loads: as it is, as a 1x1 convolution, or as an embedding that is resized."""
    if stored.ndim == 4 and own.ndim == 2 and stored.shape[2:] == (1, 1):
        return stored.shape[:2] == own.shape
    if name.endswith("pos_embed") and stored.ndim == own.ndim == 4:
        return stored.shape[:2] == own.shape[:2]
    return stored.shape == own.shape
