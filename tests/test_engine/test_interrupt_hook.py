"""InterruptHook: a signal ends the training with a checkpoint of the last finished iteration."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import threading
import time

import pytest
import torch

pytest.importorskip("mmengine")

from mmengine.hooks import EMAHook, Hook
from mmengine.registry import HOOKS

from mmvmamba.apis import train
from mmvmamba.checkpoints import read_checkpoint
from mmvmamba.engine import CheckpointHook, InterruptHook
from mmvmamba.errors import ConfigError, TrainingInterrupted
from tests.test_engine.guarded_training import make_runner

SIGNALS = ("SIGTERM", "SIGUSR1", "SIGINT")


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setattr("mmengine.runner.runner.Runner.dump_config", lambda self: None)


@pytest.fixture(autouse=True)
def _handlers_are_back():
    # A shell starts what it runs in the background with Ctrl-C ignored, and the hook respects that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    before = [signal.getsignal(name) for name in map(signal.Signals.__getitem__, SIGNALS)]
    yield
    assert [signal.getsignal(name) for name in map(signal.Signals.__getitem__, SIGNALS)] == before


class Send(Hook):
    """Send signals to the own process at one place of the training.

    Args:
        names: The signals, one after the other.
        place: The method of a hook at which they are sent.
        iteration: In which iteration, counted from 1.
        priority: Of this hook.
    """

    def __init__(self, *names, place="before_train_iter", iteration=4, priority="NORMAL"):
        self.names, self.iteration, self.priority = names, iteration, priority
        setattr(self, place, self.send)

    def send(self, runner, **arguments):
        if runner.iter + 1 == self.iteration:
            self.iteration = -1
            for name in self.names:
                os.kill(os.getpid(), signal.Signals[name])
                signal.getsignal(signal.SIGTERM)  # a bytecode at which Python runs the handler


def _interrupt(tmp_path, *hooks, **settings):
    runner = make_runner(
        tmp_path,
        [*hooks, InterruptHook()],
        default_hooks={"checkpoint": CheckpointHook(interval=100, by_epoch=False)},
        **settings,
    )
    with pytest.raises(TrainingInterrupted) as stop:
        train(runner)
    return runner, stop.value


@pytest.mark.parametrize("name", SIGNALS)
@pytest.mark.parametrize("place", ["before_train_iter", "after_train_iter"])
def test_the_running_iteration_is_finished_and_saved(tmp_path, name, place, capfd):
    runner, stop = _interrupt(tmp_path, Send(name, place=place))
    assert stop.signal_number == signal.Signals[name]
    path = tmp_path / "iter_4.pth"
    assert str(stop).startswith(f"{name} has ended the training after iteration 4; its checkpoint is {path}.")
    stored = read_checkpoint(path)
    assert stored["meta"]["iter"] == 4 and stored["optimizer"]["state"][0]["step"] == 4
    for key, value in runner.model.state_dict().items():
        assert torch.equal(stored["state_dict"][key], value)
    assert f"{name}: stopping after this iteration" in capfd.readouterr().err


@pytest.mark.parametrize("names", [("SIGTERM", "SIGTERM"), ("SIGTERM", "SIGINT"), ("SIGUSR1", "SIGTERM", "SIGUSR1")])
def test_the_first_signal_counts(tmp_path, names):
    _, stop = _interrupt(tmp_path, Send(*names))
    assert stop.signal_number == signal.Signals[names[0]]
    assert (tmp_path / "iter_4.pth").is_file()


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    runner = make_runner(tmp_path, [Send("SIGINT", "SIGINT"), InterruptHook()],
                         default_hooks={"checkpoint": CheckpointHook(interval=3, by_epoch=False)})  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        train(runner)
    assert [path.name for path in tmp_path.glob("*.pth")] == ["iter_3.pth"]


@pytest.mark.parametrize("own_error", [None, SyntaxError])
def test_a_second_ctrl_c_is_not_lost_in_a_bare_except(tmp_path, own_error):
    """MMEngine formats the config for every checkpoint with such code: a soak trial met it."""

    class Swallow(Send):
        def send(self, runner, **arguments):
            try:
                super().send(runner, **arguments)
            except BaseException as error:
                if own_error is not None:
                    raise own_error from error

    runner = make_runner(tmp_path, [Swallow("SIGINT", "SIGINT"), InterruptHook()])
    with pytest.raises(KeyboardInterrupt):
        train(runner)
    assert runner.iter == 3


def test_a_signal_during_a_regular_save_keeps_that_checkpoint(tmp_path):
    class SendWhileSaving(Hook):
        def before_save_checkpoint(self, runner, checkpoint):
            os.kill(os.getpid(), signal.SIGTERM)

    runner = make_runner(tmp_path, [SendWhileSaving(), InterruptHook()],
                         default_hooks={"checkpoint": CheckpointHook(interval=3, by_epoch=False)})  # fmt: skip
    with pytest.raises(TrainingInterrupted, match=r"after iteration 3; its checkpoint is .*iter_3\.pth"):
        train(runner)
    assert read_checkpoint(tmp_path / "iter_3.pth")["meta"]["iter"] == 3


def test_a_validation_is_cut_short_and_the_weights_are_not_the_averaged_ones(tmp_path):
    validated = []

    class Record(Hook):
        def after_val_iter(self, runner, batch_idx, **arguments):
            validated.append(batch_idx)

    average = EMAHook(momentum=0.5)
    hooks = [average, Record(), Send("SIGTERM", place="before_val_iter", iteration=4)]
    runner, _ = _interrupt(tmp_path, *hooks, validation=16)
    assert validated == [0] and runner.iter == 3
    stored = read_checkpoint(tmp_path / "iter_3.pth")
    assert stored["meta"]["iter"] == 3
    # As in every checkpoint with an EMAHook: the averages are in state_dict, the trained weights in ema_state_dict.
    trained = stored["ema_state_dict"]["module.head.weight"]
    assert not torch.equal(trained, stored["state_dict"]["head.weight"])
    make_runner(tmp_path / "plain", [EMAHook(momentum=0.5)], iterations=3).train()
    uninterrupted = make_runner(tmp_path / "again", [], iterations=3)
    uninterrupted.train()
    assert torch.equal(trained, uninterrupted.model.head.weight)


def test_without_a_checkpoint_hook_it_says_so(tmp_path):
    runner = make_runner(tmp_path, [Send("SIGTERM"), InterruptHook()])
    with pytest.raises(TrainingInterrupted, match="after iteration 4; no checkpoint was written"):
        train(runner)


def test_a_training_without_signals_goes_to_its_end(tmp_path):
    runner = make_runner(tmp_path, [InterruptHook()])
    train(runner)
    assert runner.iter == 8


def test_signals_that_were_ignored_stay_ignored(tmp_path):
    old = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        runner = make_runner(tmp_path, [Send("SIGUSR1"), InterruptHook()])
        train(runner)
    finally:
        signal.signal(signal.SIGUSR1, old)
    assert runner.iter == 8


def test_handlers_are_back_after_another_error_too(tmp_path):
    class Fail(Hook):
        def after_train_iter(self, runner, **arguments):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(make_runner(tmp_path, [Fail(), InterruptHook()]))


def test_outside_the_main_thread_it_only_warns(tmp_path):
    runner = make_runner(tmp_path, [InterruptHook()])
    warnings = []
    runner.logger.warning = warnings.append
    thread = threading.Thread(target=train, args=(runner,))
    thread.start()
    thread.join()
    assert runner.iter == 8 and any("does not run in the main thread" in text for text in warnings)


@pytest.mark.parametrize("signals", ["SIGTERM", ["SIGKILL"], ["TERM"]])
def test_other_signals_are_refused(signals):
    with pytest.raises(ConfigError, match="InterruptHook: signals is"):
        HOOKS.build(dict(type="mmvmamba.InterruptHook", signals=signals))


@pytest.mark.parametrize("name", SIGNALS)
def test_workers_leave_the_signal_to_the_main_process(tmp_path, name):
    """As Slurm and Ctrl-C do it: the signal goes to every process there is. Then the workers obey the main process."""

    class SendToAll(Hook):
        def before_train_iter(self, runner, batch_idx, data_batch=None):
            if runner.iter == 3:
                self.workers = multiprocessing.active_children()
                command = ["kill", f"-{name}", *(str(worker.pid) for worker in self.workers), str(os.getpid())]
                subprocess.run(command, check=True)
                time.sleep(0.3)  # time for a worker to die, were it to

    hook = SendToAll()
    _, stop = _interrupt(tmp_path, hook, workers=2, iterations=12)
    assert "after iteration 4; its checkpoint is" in str(stop)
    assert len(hook.workers) == 2
    for worker in hook.workers:
        assert worker.is_alive()
        worker.terminate()
        worker.join(timeout=10)
        assert worker.exitcode == 0


def test_the_loader_is_as_before_afterwards(tmp_path):
    runner = make_runner(tmp_path, [InterruptHook()], workers=1, validation=16)
    train(runner)
    assert runner.train_dataloader.worker_init_fn is None and runner.val_dataloader.worker_init_fn is None
