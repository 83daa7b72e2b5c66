"""How a training ends that does not end by itself: advice, exit codes, and what is left as it was."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import re
import signal
import time

import pytest
import torch

pytest.importorskip("mmengine")

from mmengine.config import Config
from mmengine.hooks import Hook

from mmvmamba.apis import run_command, train
from mmvmamba.apis.failures import is_out_of_memory, is_worker_failure
from mmvmamba.apis.guards import guard_failures
from mmvmamba.engine import CheckpointHook, InterruptHook, LastBatchHook, NonFiniteHook
from mmvmamba.errors import DataError, OutOfMemory, TrainingInterrupted, WorkerError
from tests.test_engine.guarded_training import Images, make_runner


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setattr("mmengine.runner.runner.Runner.dump_config", lambda self: None)


def _as_cuda_would():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8 GiB")


def _as_the_allocator_of_the_cpu_does():
    torch.empty(2**50, dtype=torch.uint8)


def _as_python_and_numpy_do():
    raise MemoryError


def _fail_at(iteration, failure):
    class Fail(Hook):
        def after_train_iter(self, runner, **arguments):
            if runner.iter + 1 == iteration:
                failure()

    return Fail()


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (_as_cuda_would, "CUDA out of memory. Tried to allocate 2.00 GiB."),
        (_as_the_allocator_of_the_cpu_does, "you tried to allocate 1125899906842624 bytes"),
        (_as_python_and_numpy_do, "MemoryError"),
    ],
)
def test_want_of_memory_is_explained_and_the_checkpoint_intact(tmp_path, failure, said):
    """D9."""
    hooks = [_fail_at(4, failure), LastBatchHook()]
    runner = make_runner(
        tmp_path, hooks, default_hooks={"checkpoint": CheckpointHook(interval=3, by_epoch=False)}
    )  # fmt: skip
    digests = []
    runner.register_hook(_fail_at(4, lambda: digests.append(_digest(tmp_path / "iter_3.pth"))), priority="HIGHEST")
    with pytest.raises(OutOfMemory) as error:
        train(runner)
    message = str(error.value)
    assert message.startswith("out of memory in iteration 4, at ") and said in message
    assert "test_failures.py" in message.splitlines()[0]
    assert "batch: 2 images per process, the largest 3 x 8 x 8 (channels, height, width)" in message
    assert "--amp" in message and "train_dataloader.batch_size" in message
    assert "the data goes on in the right place, but it is no more the same training" in message
    assert f"the newest checkpoint, {tmp_path / 'iter_3.pth'}, is untouched; go on from it with --resume" in message
    assert digests == [_digest(tmp_path / "iter_3.pth")]
    assert error.value.__cause__ is not None


def _digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_only_what_is_not_done_yet_is_advised(tmp_path):
    runner = make_runner(tmp_path, [_fail_at(1, _as_cuda_would)])
    runner.cfg.model = dict(backbone=dict(type="mmvmamba.VMamba", with_cp=True))
    runner.cfg.train_dataloader = dict(batch_size=1)
    with pytest.raises(OutOfMemory) as error:
        train(runner)
    message = str(error.value)
    assert "with_cp" not in message and "batch_size" not in message and "--amp" in message
    assert "its images are unknown" in message and "there is no checkpoint yet" in message
    runner = make_runner(
        tmp_path / "b", [_fail_at(1, _as_cuda_would)], optim_wrapper={"type": "mmvmamba.Bfloat16OptimWrapper"}
    )
    runner.cfg.model = dict(backbone=dict(type="mmvmamba.VMamba"))
    runner.cfg.train_dataloader = dict(batch_size=6)
    with pytest.raises(OutOfMemory, match=r"try one of: --cfg-options model\.backbone\.with_cp=True.*batch_size=3"):
        train(runner)


def test_want_of_memory_in_a_validation(tmp_path):
    class Fail(Hook):
        def after_val_iter(self, runner, **arguments):
            _as_cuda_would()

    runner = make_runner(tmp_path, [Fail(), LastBatchHook()], validation=16)
    with pytest.raises(OutOfMemory, match=r"^out of memory in the validation after iteration 3, at"):
        train(runner)


def test_other_errors_are_not_touched(tmp_path):
    def fail():
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="^shape mismatch$"):
        train(make_runner(tmp_path, [_fail_at(2, fail)]))
    assert not is_out_of_memory(RuntimeError("out of memory, says somebody"))


def test_a_worker_that_dies_is_explained(tmp_path):
    """D6: what the main process says."""

    class Kill(Hook):
        def before_train_iter(self, runner, **arguments):
            if runner.iter == 3:
                os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
                time.sleep(30)  # PyTorch raises its error wherever the main process is

    runner = make_runner(tmp_path, [Kill()], iterations=40, workers=1,
                         default_hooks={"checkpoint": CheckpointHook(interval=3, by_epoch=False)})  # fmt: skip
    with pytest.raises(WorkerError) as error:
        train(runner)
    message = str(error.value)
    assert message.startswith("a DataLoader worker died after iteration 3: DataLoader worker (pid")
    assert "try one of: fewer workers" in message
    assert f"the newest checkpoint, {tmp_path / 'iter_3.pth'}, is untouched; go on from it with --resume" in message
    assert isinstance(error.value.__cause__, RuntimeError)


class Hanging(Images):
    """Its samples take for ever, in code that lets no other thread of the worker run."""

    def __getitem__(self, index):
        return re.match("(a+)+$", "a" * 60 + "b")


def test_a_worker_that_hangs_is_explained_and_ended(tmp_path):
    others = multiprocessing.active_children()  # of loaders that keep their workers
    runner = make_runner(tmp_path, [InterruptHook()], dataset=Hanging(), workers=1)
    runner.train_dataloader.timeout = 1
    with pytest.raises(WorkerError) as error:
        train(runner)
    message = str(error.value)
    assert message.startswith("a DataLoader worker gave no batch in time after iteration 0: DataLoader timed out after")
    assert "or a longer train_dataloader.timeout" in message and "there is no checkpoint yet" in message

    def main():
        raise error.value

    (worker,) = set(multiprocessing.active_children()) - set(others)
    pytorchs = signal.getsignal(signal.SIGCHLD)
    try:
        with pytest.raises(SystemExit):
            run_command(main)
        worker.join(timeout=5)
    finally:
        signal.signal(signal.SIGCHLD, pytorchs)
    assert worker.exitcode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("DataLoader worker (pid 12) is killed by signal: Bus error. It is possible that ...", True),
        ("DataLoader worker (pid(s) 12, 13) exited unexpectedly", True),
        ("DataLoader worker (pid 12) exited unexpectedly with exit code 1. Details are lost ...", True),
        ("DataLoader timed out after 5 seconds", True),
        ("Caught RuntimeError in DataLoader worker process 0.", False),
        ("Pin memory thread exited unexpectedly", False),
    ],
)
def test_worker_failures_are_told_by_pytorchs_words(text, answer):
    assert is_worker_failure(RuntimeError(text)) is answer
    assert not is_worker_failure(ValueError(text))


def _ends(capsys, error):
    def main():
        if error is not None:
            raise error

    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    try:
        with pytest.raises(SystemExit) as end:
            run_command(main)
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGUSR1), before, strict=True):
            signal.signal(number, handler)
    return end.value.code, capsys.readouterr().err


def test_exit_codes(capsys):
    assert _ends(capsys, None) == (0, "")
    assert _ends(capsys, DataError("no data")) == ("error: no data", "")  # Python prints it and exits with 1
    assert _ends(capsys, TrainingInterrupted("SIGTERM has ended it", 15)) == (
        143,
        "interrupted: SIGTERM has ended it\n",
    )
    assert _ends(capsys, TrainingInterrupted("x", signal.SIGUSR1))[0] == 128 + signal.SIGUSR1
    code, text = _ends(capsys, KeyboardInterrupt())
    assert code == 130 and "interrupted by Ctrl-C" in text
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 / 0)


def test_every_training_gets_the_hooks_once():
    cfg = Config(dict(custom_hooks=[dict(type="NonFiniteHook", max_skipped=3), dict(type="EMAHook")]))
    for _ in range(2):
        guard_failures(cfg)
    assert [hook["type"] for hook in cfg.custom_hooks] == [
        "NonFiniteHook", "EMAHook", "mmvmamba.InterruptHook", "mmvmamba.LastBatchHook",
    ]  # fmt: skip
    assert cfg.custom_hooks[0].max_skipped == 3
    built = Config(dict(custom_hooks=[dict(type=NonFiniteHook)]))
    guard_failures(built)
    assert len(built.custom_hooks) == 3
