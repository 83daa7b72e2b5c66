"""Remember the running batch, so that a failure can be described."""

from __future__ import annotations

from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmvmamba.registry import HOOKS


@HOOKS.register_module()
class LastBatchHook(Hook):
    """Keep the batch that the runner works on; ``mmvmamba.apis.train`` describes it when memory runs out.

    No batch lives longer for it: the loop itself keeps one until the next has come.

    Attributes:
        batch: The last batch, as the data loader gave it.
        stage: "train", or "val" while a validation runs.
    """

    # Before all hooks that allocate something for the batch.
    priority = "HIGHEST"

    def __init__(self) -> None:
        self.batch: Any = None
        self.stage = "train"

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:  # noqa: ARG002
        """Note a batch of the training."""
        self.batch, self.stage = data_batch, "train"

    def before_val_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:  # noqa: ARG002
        """Note a batch of the validation."""
        self.batch, self.stage = data_batch, "val"

    def after_val_epoch(self, runner: Runner, metrics: Any = None) -> None:  # noqa: ARG002
        """Let go of the last batch of a validation."""
        self.batch, self.stage = None, "train"
