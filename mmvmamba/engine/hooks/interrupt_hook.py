"""Save a checkpoint and stop when a signal asks for the end of the training."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch
from mmengine import dist
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmvmamba.engine.hooks.checkpoint_hook import CheckpointHook
from mmvmamba.engine.worker_signals import WorkerShield, loaders_of
from mmvmamba.errors import ConfigError, TrainingInterrupted
from mmvmamba.registry import HOOKS

_SIGNALS = ("SIGTERM", "SIGUSR1", "SIGINT")


@HOOKS.register_module()
class InterruptHook(Hook):
    """Finish the running iteration, save a checkpoint and raise ``TrainingInterrupted`` after a signal.

    SIGTERM is what ``kill``, torchrun and Slurm send, SIGUSR1 what ``sbatch --signal=USR1@60`` sends a minute before
    the time is up, and SIGINT is Ctrl-C. The handler only takes a note. After the running iteration, of the training
    or of a validation, ``CheckpointHook.save_now`` writes a checkpoint. So the training ends within one iteration
    and one save, except while a data loader is waited for or an evaluator computes its metrics.

    - Signals that follow change nothing, except a second Ctrl-C: it ends the training at once, without a checkpoint.
    - All processes of a distributed training stop after the same iteration, whichever of them got the signal; this
      costs a reduction of one number per iteration. Where their validations have different lengths, they stop after
      the validation, at the next iteration of the training.
    - DataLoader workers leave these signals to the main process (``mmvmamba.engine.worker_signals``).
    - Signals that were ignored when the training began (``nohup`` and the like) stay ignored. After the training the
      handlers are as they were before.

    Args:
        signals: Names of the signals that are to be heeded.

    Raises:
        ConfigError: If one of them is none of "SIGTERM", "SIGUSR1" and "SIGINT".
    """

    # After every other hook: save_now counts on it.
    priority = "LOWEST"

    def __init__(self, signals: Sequence[str] = _SIGNALS) -> None:
        if isinstance(signals, str) or not set(signals) <= set(_SIGNALS):
            raise ConfigError(
                f"InterruptHook: signals is {signals!r}, expected a sequence of some of {', '.join(_SIGNALS)}. Correct "
                "the entry in custom_hooks."
            )
        self._watched = [signal.Signals[name] for name in signals]
        self._previous: dict[signal.Signals, Any] = {}
        self._shield: WorkerShield | None = None
        self._received: signal.Signals | None = None
        self._keystrokes = 0
        self._process = 0
        self._speaks = False
        self._validations_match = True

    def before_train(self, runner: Runner) -> None:
        """Install the signal handlers."""
        self.restore()
        self._received, self._keystrokes = None, 0
        self._process, self._speaks = os.getpid(), dist.is_main_process()
        if threading.current_thread() is not threading.main_thread():
            runner.logger.warning(
                "InterruptHook: the training does not run in the main thread, where alone Python receives signals; "
                "SIGTERM, SIGUSR1 and Ctrl-C end it without a checkpoint"
            )
            return
        if _checkpoint_hook(runner) is None:
            runner.logger.warning(
                "InterruptHook: the config has no mmvmamba.CheckpointHook, so a signal ends the training without a "
                "checkpoint of its own"
            )
        for number in self._watched:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._note)
        self._shield = WorkerShield(loaders_of([runner.train_loop, runner.val_loop]))

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None  # noqa: ARG002
    ) -> None:  # fmt: skip
        """Stop if a signal has come.

        Raises:
            TrainingInterrupted: After the checkpoint.
        """
        self._stop_if_asked(runner, runner.iter + 1)

    def before_val_epoch(self, runner: Runner) -> None:
        """Find out whether all processes validate in step."""
        lengths = dist.all_gather(torch.tensor([len(runner.val_loop.dataloader)]))
        self._validations_match = len({int(length) for length in lengths}) == 1

    def after_val_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Sequence[Any] | None = None  # noqa: ARG002
    ) -> None:  # fmt: skip
        """Stop if a signal has come.

        Raises:
            TrainingInterrupted: After the checkpoint.
        """
        if self._process and self._validations_match:
            self._stop_if_asked(runner, runner.iter)

    def after_train(self, runner: Runner) -> None:  # noqa: ARG002
        """Put the old handlers back."""
        self.restore()

    def restore(self) -> None:
        """Put the old handlers back; call it when an exception has ended the training."""
        for number, handler in self._previous.items():
            # None: a handler that was not installed by Python, which cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()
        if self._shield is not None:
            self._shield.lift()
            self._shield = None
        self._process = 0

    @property
    def at_once(self) -> bool:
        """Whether Ctrl-C was pressed twice: the training is to end without another checkpoint."""
        return self._keystrokes > 1

    def _note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if os.getpid() != self._process:
            return  # a worker that has just been forked
        self._keystrokes += number == signal.SIGINT
        if self.at_once:
            raise KeyboardInterrupt
        if self._received is None:
            self._received = signal.Signals(number)
            if self._speaks:
                advice = "; Ctrl-C once more: at once, without one" if number == signal.SIGINT else ""
                text = f"\n{self._received.name}: stopping after this iteration, with a checkpoint{advice}\n"
                os.write(2, text.encode())  # print may be interrupted in the middle of printing

    def _stop_if_asked(self, runner: Runner, iteration: int) -> None:
        if self.at_once:
            raise KeyboardInterrupt  # once more: MMEngine and others have places where a bare except swallows it
        number = int(self._received or 0)
        if dist.get_world_size() > 1:
            answer = torch.tensor([number])
            dist.all_reduce(answer, op="max")
            number = int(answer)
        if not number:
            return
        hook = _checkpoint_hook(runner)
        saved = "no checkpoint was written, as the config has no mmvmamba.CheckpointHook"
        if hook is not None:
            saved = f"its checkpoint is {hook.save_now(runner)}. To go on, use the same command with --resume"
        name = signal.Signals(number).name
        raise TrainingInterrupted(f"{name} has ended the training after iteration {iteration}; {saved}.", number)


def _checkpoint_hook(runner: Runner) -> CheckpointHook | None:
    return next((hook for hook in runner.hooks if isinstance(hook, CheckpointHook)), None)
