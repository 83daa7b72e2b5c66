"""What a hook implements that has to gather something of every process before a checkpoint is written."""

from __future__ import annotations

import abc

from mmengine.runner import Runner


class PreparesSave(abc.ABC):
    """A hook whose state lies on all processes; ``mmvmamba.CheckpointHook`` asks it before each checkpoint.

    MMEngine calls ``before_save_checkpoint`` on the first process alone, where nothing can be gathered any more.
    """

    @abc.abstractmethod
    def prepare_save(self, runner: Runner) -> None:
        """Gather what ``before_save_checkpoint`` will store; called on every process at the same time.

        Args:
            runner: The runner of the training.
        """
