"""Give the checkpoints of MMEngine's other runner, ``FlexibleRunner``, the plain form."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor

from mmvmamba.engine.plain_form import make_plain, restore
from mmvmamba.registry import HOOKS


@HOOKS.register_module()
class PlainFormHook(Hook):
    """Store only tensors and plain values, and turn them back when the training resumes (``engine.plain_form``).

    ``mmvmamba.CheckpointHook`` does the same and more, but writes files in a way that only ``Runner`` knows. Without
    the plain form a checkpoint of ``FlexibleRunner`` might not be read again: our reader refuses objects, and tensors
    that FSDP gathers carry a mark of its own that is stored as one.
    """

    # After the hooks that put something into a checkpoint.
    priority = "LOWEST"

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:  # noqa: ARG002
        """Bring the checkpoint into the plain form.

        Raises:
            SaveError: If it holds an object that has no plain form.
        """
        for key, value in checkpoint.items():
            checkpoint[key] = _without_marks(value)
        make_plain(checkpoint)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:  # noqa: ARG002
        """Turn the plain form back into what MMEngine expects."""
        restore(checkpoint)


def _without_marks(value: Any) -> Any:
    """Return ``value`` with tensors that have no attributes but their own; they share their memory."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, MutableMapping):
        for key, item in value.items():
            value[key] = _without_marks(item)
    elif isinstance(value, Mapping):
        return {key: _without_marks(item) for key, item in value.items()}
    return value
