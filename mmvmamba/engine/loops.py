"""MMEngine's two training loops, able to go on exactly where a training was interrupted."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

from mmengine import dist
from mmengine.runner import BaseLoop, Runner
from mmengine.runner import EpochBasedTrainLoop as MMEngineEpochBasedTrainLoop
from mmengine.runner import IterBasedTrainLoop as MMEngineIterBasedTrainLoop
from torch import nn
from torch.utils.data import DataLoader

from mmvmamba.engine.data_order import DataPosition, ResumableDataLoader, is_endless
from mmvmamba.errors import CheckpointError, DataError
from mmvmamba.registry import LOOPS


class ResumableLoop(BaseLoop):
    """What the two loops share: they know how far they are in the data.

    The differences from MMEngine's loops:

    - The DataLoader is a ``ResumableDataLoader``: the samples' augmentation does not depend on the number of workers.
    - A training resumed in the middle of an epoch goes on with the next batch; MMEngine starts the epoch anew. The
      batches before are skipped without loading them, whatever the sampler.
    - A checkpoint that was written before a validation is followed by that validation when the training is resumed, as
      it would have been; MMEngine leaves it out, and with it the best score and a step of ReduceOnPlateau.
    """

    dataloader: ResumableDataLoader
    _epoch: int
    _iter: int

    def _make_resumable(self) -> None:
        self.dataloader = ResumableDataLoader(self.dataloader, dist.get_rank())
        self._position = DataPosition()

    @property
    def position(self) -> DataPosition:
        """How far the training has come, counting the iteration whose ``after_train_iter`` hooks are being called."""
        return self._position

    def position_to_store(self) -> dict[str, Any]:
        """Return the position as a dict of numbers for a checkpoint."""
        return dataclasses.asdict(
            dataclasses.replace(
                self._position,
                sampler_seed=self.dataloader.sampler_seed,
                batch_size=self.dataloader.samples_per_batch,
            )
        )

    def resume_at(self, position: DataPosition, world_size: int) -> None:
        """Begin at a position that a checkpoint holds.

        Args:
            position: Where to begin.
            world_size: Number of processes that wrote the checkpoint.
        """
        if position.sampler_seed is not None and position.sampler_seed != self.dataloader.sampler_seed:
            self.runner.logger.info(f"the sampler gets the seed of the interrupted training, {position.sampler_seed}")
            self.dataloader.restore_sampler_seed(position.sampler_seed)
        own_size = self.dataloader.samples_per_batch
        size = own_size if position.batch_size is None else position.batch_size
        if size != own_size:
            self.runner.logger.warning(
                f"the checkpoint was written with batches of {size} samples per process, this training has batches of "
                f"{own_size}: the training goes on after the samples it has seen, but is no more the same"
            )
        if size is not None and own_size is not None:
            # The same samples of the pass are done; those of a batch that was begun are seen again.
            done = position.batch * world_size * size // (dist.get_world_size() * own_size)
            position = dataclasses.replace(position, batch=done)
        else:
            position = dataclasses.replace(position, batch=position.batch * world_size // dist.get_world_size())
        self._position = position

    def note_validation(self) -> None:
        """Note that the validation that may have been due is over."""
        self._position = dataclasses.replace(self._position, validation_due=False)

    def _find_position(self) -> None:
        """Compare the position with MMEngine's counters, or derive it from them if the checkpoint had none."""
        if self._position != DataPosition():
            found, expected = self._position, self._derived_position()
            if found.iteration != self._iter or not self._is_of_this_epoch(found):
                raise CheckpointError(
                    f"the checkpoint contradicts itself: data_position is iteration {found.iteration} in pass "
                    f"{found.data_pass} over the data, meta is iteration {self._iter} in pass {expected.data_pass}. "
                    "Resume from another checkpoint."
                )
            return
        if not self._iter:
            return
        self._position = self._derived_position()
        self.runner.logger.warning(
            f"the checkpoint does not say how far it is in the data; derived from {self._iter} iterations: batch "
            f"{self._position.batch} of pass {self._position.data_pass}"
        )

    @abstractmethod
    def _derived_position(self) -> DataPosition:
        """Return where a training is that did ``_iter`` iterations without an interruption."""

    def _is_of_this_epoch(self, position: DataPosition) -> bool:  # noqa: ARG002 (the loop over epochs has an answer)
        return True

    def _start_pass(self, data_pass: int, batch: int) -> Iterator[Any]:
        self.dataloader.start_at(self.runner.seed, data_pass, batch)
        return iter(self.dataloader)

    def _train_on(self, batch_idx: int, data_batch: Any, data_pass: int, batch: int) -> None:
        """Do one iteration, the one that finishes batch number ``batch`` of pass ``data_pass``."""
        runner = self.runner
        runner.call_hook("before_train_iter", batch_idx=batch_idx, data_batch=data_batch)
        outputs = runner.model.train_step(data_batch, optim_wrapper=runner.optim_wrapper)
        self._position = DataPosition(self._iter + 1, data_pass, batch + 1, self._validates_between_batches)
        runner.call_hook("after_train_iter", batch_idx=batch_idx, data_batch=data_batch, outputs=outputs)
        self._iter += 1

    _validates_between_batches = False

    def _validate_if_due(self, done: int, last: int) -> None:
        """Validate if the number of epochs or iterations ``done`` says so."""
        self._decide_current_val_interval()
        if (
            self.runner.val_loop is not None
            and done >= self.val_begin
            and (done % self.val_interval == 0 or done == last)
        ):
            self.runner.val_loop.run()
        self.note_validation()


@LOOPS.register_module()
class EpochBasedTrainLoop(ResumableLoop, MMEngineEpochBasedTrainLoop):
    """Train for a number of epochs; see ``ResumableLoop`` for the differences from MMEngine's loop of this name.

    Args:
        runner: The runner.
        dataloader: A DataLoader or the config of one.
        max_epochs: Epochs to train.
        val_begin: First epoch that a validation may follow.
        val_interval: Epochs between two validations.
        dynamic_intervals: Pairs (epoch, val_interval from that epoch on).
    """

    def __init__(
        self,
        runner: Runner,
        dataloader: DataLoader[Any] | dict[str, Any],
        max_epochs: int,
        val_begin: int = 1,
        val_interval: int = 1,
        dynamic_intervals: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        super().__init__(runner, dataloader, max_epochs, val_begin, val_interval, dynamic_intervals)
        self._make_resumable()

    def run(self) -> nn.Module:
        """Train to the end."""
        self.runner.call_hook("before_train")
        self._find_position()
        if self._position.validation_due:
            self._validate_if_due(self._epoch, self._max_epochs)
        while self._epoch < self._max_epochs and not self.stop_training:
            self.run_epoch()
            self._validate_if_due(self._epoch, self._max_epochs)
        self.runner.call_hook("after_train")
        return self.runner.model

    def run_epoch(self) -> None:
        """Train one epoch, or the rest of the one that was interrupted."""
        self.runner.call_hook("before_train_epoch")
        self.runner.model.train()
        done = self._position.batch if self._position.data_pass == self._epoch else 0
        if done:
            self.runner.logger.info(f"epoch {self._epoch + 1} goes on after its first {done} batches")
        for number, data_batch in enumerate(self._start_pass(self._epoch, done), start=done):
            self.run_iter(number, data_batch)
        # Before the hooks: a checkpoint that they write counts this epoch as finished.
        self._position = DataPosition(self._iter, self._epoch + 1, 0, validation_due=True)
        self.runner.call_hook("after_train_epoch")
        self._epoch += 1

    def run_iter(self, idx: int, data_batch: Any) -> None:
        """Train on one batch."""
        self._train_on(idx, data_batch, self._epoch, idx)

    def _derived_position(self) -> DataPosition:
        batch = min(max(self._iter - self._epoch * len(self.dataloader), 0), len(self.dataloader))
        return DataPosition(self._iter, self._epoch, batch)

    def _is_of_this_epoch(self, position: DataPosition) -> bool:
        return position.data_pass == self._epoch


@LOOPS.register_module()
class IterBasedTrainLoop(ResumableLoop, MMEngineIterBasedTrainLoop):
    """Train for a number of iterations; see ``ResumableLoop`` for the differences from MMEngine's loop of this name.

    Args:
        runner: The runner.
        dataloader: A DataLoader or the config of one.
        max_iters: Iterations to train.
        val_begin: First iteration that a validation may follow.
        val_interval: Iterations between two validations.
        dynamic_intervals: Pairs (iteration, val_interval from that iteration on).
        fast_forward_on_resume: Accepted for configs of MMEngine's loop, where True leaves out the batches' loading and
            the place in the data with it. Here the place is always found, and nothing is loaded to find it.
    """

    _validates_between_batches = True

    def __init__(
        self,
        runner: Runner,
        dataloader: DataLoader[Any] | dict[str, Any],
        max_iters: int,
        val_begin: int = 1,
        val_interval: int = 1000,
        dynamic_intervals: Sequence[tuple[int, int]] | None = None,
        fast_forward_on_resume: bool = False,
    ) -> None:
        super().__init__(runner, dataloader, max_iters, val_begin, val_interval, dynamic_intervals)
        self.fast_forward_on_resume = fast_forward_on_resume
        if fast_forward_on_resume:
            runner.logger.info(
                "train_cfg.fast_forward_on_resume changes nothing: a resumed training finds its place in the data "
                "without loading what comes before"
            )
        self._make_resumable()
        self.dataloader_iterator = self._batches()
        self._present = (0, 0)

    def run(self) -> nn.Module:
        """Train to the end."""
        self.runner.call_hook("before_train")
        self.runner.call_hook("before_train_epoch")
        self._find_position()
        if self._position.validation_due:
            self._validate_if_due(self._iter, self._max_iters)
        while self._iter < self._max_iters and not self.stop_training:
            self.runner.model.train()
            self.run_iter(next(self.dataloader_iterator))
            self._validate_if_due(self._iter, self._max_iters)
        self.runner.call_hook("after_train_epoch")
        self.runner.call_hook("after_train")
        return self.runner.model

    def run_iter(self, data_batch: Any) -> None:
        """Train on one batch."""
        self._train_on(self._iter, data_batch, *self._present)

    def _batches(self) -> Iterator[Any]:
        """Yield batches from the position on, pass after pass; ``_present`` is the place of the last one."""
        data_pass, done = self._position.data_pass, self._position.batch
        if self._iter:
            self.runner.logger.info(f"pass {data_pass + 1} over the data goes on after its first {done} batches")
        while True:
            self.dataloader.set_epoch(data_pass)
            empty = not done
            for number, data_batch in enumerate(self._start_pass(data_pass, done), start=done):
                empty = False
                self._present = (data_pass, number)
                yield data_batch
            if empty:
                raise DataError(
                    "train_dataloader gives no batch, expected at least one per pass over the data. Add samples, or "
                    "set a smaller batch_size or drop_last=False."
                )
            data_pass, done = data_pass + 1, 0

    def _derived_position(self) -> DataPosition:
        sampler = getattr(self.dataloader.batch_sampler, "sampler", self.dataloader.sampler)
        if is_endless(sampler):
            return DataPosition(self._iter, 0, self._iter)
        return DataPosition(self._iter, *divmod(self._iter, len(self.dataloader)))
