"""What a hook implements that has to gather something of every process before a checkpoint is written."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterator

import torch
from mmengine import dist
from mmengine.runner import Runner

from mmvmamba.errors import SaveError


class PreparesSave(abc.ABC):
    """A hook whose state lies on all processes; ``mmvmamba.CheckpointHook`` asks it before each checkpoint.

    MMEngine calls ``before_save_checkpoint`` on the first process alone, where nothing can be gathered any more.
    """

    @abc.abstractmethod
    def prepare_save(self, runner: Runner) -> None:
        """Gather what ``before_save_checkpoint`` will store; called on every process at the same time.

        What may fail on one process alone belongs into ``all_or_none``, before the first collective operation: the
        other processes would wait there for the one that failed.

        Args:
            runner: The runner of the training.
        """

    def save_is_over(self, runner: Runner) -> None:  # noqa: B027 (most hooks have nothing to do)
        """Forget what was gathered; called on every process after the save, also after one that failed.

        In between, ``before_save_checkpoint`` is called for each file: a best checkpoint may be followed by another
        and by the regular one.

        Args:
            runner: The runner of the training.
        """


@contextlib.contextmanager
def all_or_none(task: str) -> Iterator[None]:
    """Let the block fail on all processes if it fails on one, so that none waits for it for ever.

    Args:
        task: What the block does, for the message of those that did not fail themselves.

    Raises:
        SaveError: If the block failed on another process.
    """
    failed = True
    try:
        yield
        failed = False
    finally:
        if dist.is_distributed():
            answer = torch.tensor((dist.get_rank() + 1) * failed)
            dist.all_reduce(answer, "max")
            if answer.item() and not failed:
                raise SaveError(f"process {answer.item() - 1} could not {task}; its message says why.")
