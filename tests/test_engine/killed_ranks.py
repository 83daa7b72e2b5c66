"""Kill a process of a distributed training from within: imported by the configs of ``test_distributed_failures.py``."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from mmengine import dist
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module(force=True)
class KillRank(Hook):
    """End process ``rank`` by SIGKILL, once: at the begin of iteration ``iteration``, or while its checkpoint is saved.

    Args:
        mark: A file that is made then, and keeps a second start from being killed, too.
        rank: Who.
        iteration: When, counted from 1.
        saving: Not before that iteration, but in the save that follows it: everything is on the disk, nothing has its
            name yet.
        number: Another signal.
    """

    priority = "VERY_LOW"

    def __init__(
        self, mark: str, rank: int, iteration: int, saving: bool = False, number: int = signal.SIGKILL
    ) -> None:
        self.done, self.rank, self.iteration, self.saving = Path(mark), rank, iteration, saving
        self.number = number

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        if not self.saving and runner.iter + 1 == self.iteration:
            self._kill()

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        if self.saving and checkpoint["meta"]["iter"] == self.iteration and not self.done.exists():
            os.replace = lambda *paths: self._kill()

    def _kill(self) -> None:
        if dist.get_rank() == self.rank and not self.done.exists():
            self.done.touch()
            os.kill(os.getpid(), self.number)
