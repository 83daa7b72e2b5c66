"""D4: real trainings by ``tools/train.py``, and signals from outside at any time."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("mmpretrain")

from mmvmamba.checkpoints import read_checkpoint

ROOT = Path(__file__).parents[2]
LENGTH = 2000
#: A signal, to whom it goes, how often, and what the training is doing then.
TRIALS = [
    (name, target, count, moment)
    for name in ("SIGTERM", "SIGUSR1", "SIGINT")
    for target, count, moment in (
        ("process", 1, "training"),
        ("group", 1, "training"),
        ("group", 1, "validating"),
        ("process", 1, "saving"),
        ("group", 2, "training"),
        ("process", 2, "saving"),
    )
] + [("SIGTERM", "process", 1, "validating"), ("SIGINT", "process", 1, "validating")]
IN_CI = [
    ("SIGTERM", "group", 1, "training"),
    ("SIGUSR1", "process", 1, "validating"),
    ("SIGINT", "process", 2, "saving"),
]

CONFIG = """
default_scope = 'mmpretrain'
custom_imports = dict(imports=['guarded_training'])
model = dict(type='mmengine.SlowModel')
loader = dict(batch_size=2, num_workers=2, dataset=dict(type='mmengine.Images', count={images}))
train_dataloader = dict(**loader, sampler=dict(type='DefaultSampler', shuffle=True))
val_dataloader = dict(**dict(loader, dataset=dict(type='mmengine.Images', count=12)),
                      sampler=dict(type='DefaultSampler', shuffle=False))
val_evaluator = dict(type='mmengine.Count')
val_cfg = dict()
train_cfg = dict(type='{loop}', {length}, val_interval={interval})
optim_wrapper = dict(optimizer=dict(type='AdamW', lr=0.001))
default_hooks = dict(checkpoint=dict(type='CheckpointHook', interval=9, by_epoch=False, max_keep_ckpts=2))
custom_hooks = [dict(type='EMAHook'), dict(type='mmengine.Progress', folder={folder!r})]
work_dir = {folder!r}
"""


def _write_config(folder: Path, *, by_epoch: bool, length: int = LENGTH) -> Path:
    path = folder / "config.py"
    loop = dict(loop="EpochBasedTrainLoop", length=f"max_epochs={length // 20}", images=40, interval=1)
    if not by_epoch:
        loop = dict(loop="IterBasedTrainLoop", length=f"max_iters={length}", images=2 * LENGTH, interval=20)
    path.write_text(CONFIG.format(folder=str(folder), **loop))
    return path


def _start(config: Path, *arguments: str) -> subprocess.Popen[str]:
    paths = f"{ROOT}:{Path(__file__).parent}"
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", str(ROOT / "tools/train.py"), str(config), *arguments],
        cwd=config.parent, env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
        # A test run in the background of a shell would hand on that SIGINT is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def _iterations(folder: Path) -> list[int]:
    file = folder / "iterations"
    return [int(line) for line in file.read_text().split()] if file.is_file() else []


def _wait_for(moment: str, folder: Path, process: subprocess.Popen[str]) -> None:
    """Wait until the training is at work; for another moment, until it comes for the second time."""
    _wait_until(lambda: len(_iterations(folder)) >= (3 if moment == "training" else 12), process)
    if moment != "training":
        (folder / moment).unlink(missing_ok=True)
        _wait_until((folder / moment).is_file, process)


def _wait_until(reached: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 90
    while not reached():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.005)


def _interrupt(folder: Path, trial: tuple[str, str, int, str], seed: int) -> None:
    name, target, count, moment = trial
    number = signal.Signals[name]
    rng = random.Random(seed)
    process = _start(_write_config(folder, by_epoch=bool(seed % 2)))
    try:
        _wait_for(moment, folder, process)
        time.sleep(rng.uniform(0, {"training": 1.5, "validating": 0.1, "saving": 0.15}[moment]))
        began = time.monotonic()
        for _ in range(count):
            (os.killpg if target == "group" else os.kill)(process.pid, number)
            time.sleep(rng.uniform(0, 0.05))
        _, errors = process.communicate(timeout=30)
        took = time.monotonic() - began
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    done = _iterations(folder)[-1]
    pointer = folder / "last_checkpoint"
    saved = read_checkpoint(pointer.read_text())["meta"]["iter"] if pointer.is_file() else 0
    print(f"{trial} after {done} iterations: exit code {process.returncode} in {took:.1f} s, checkpoint of {saved}")
    assert process.returncode == 128 + number, errors
    assert took < 30 and "Traceback" not in errors, errors
    assert not [path for path in folder.iterdir() if path.name.endswith(".unfinished")]
    if name == "SIGINT" and count == 2:
        # At once: a regular checkpoint or that of the stop, unless it was being saved.
        assert saved in (done, done - done % 9, done - done % 9 - 9)
        return
    assert saved == done
    said = f"interrupted: {name} has ended the training after iteration {done}; its checkpoint is {pointer.read_text()}"
    assert said in errors


@pytest.mark.parametrize("trial", IN_CI, ids=lambda trial: "-".join(map(str, trial)))
def test_a_signal_leaves_the_last_finished_iteration(tmp_path, trial):
    _interrupt(tmp_path, trial, seed=IN_CI.index(trial))


@pytest.mark.soak
@pytest.mark.parametrize("number", range(len(TRIALS)))
def test_many_signals_at_random_times(tmp_path, number):
    assert len(TRIALS) == 20
    _interrupt(tmp_path, TRIALS[number], seed=number)


@pytest.mark.slow
@pytest.mark.parametrize("by_epoch", [False, True])
def test_resume_goes_on_where_the_signal_came(tmp_path, by_epoch):
    config = _write_config(tmp_path, by_epoch=by_epoch, length=60)
    process = _start(config)
    _wait_for("training", tmp_path, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 143
    done = _iterations(tmp_path)[-1]
    again = _start(config, "--resume")
    _, errors = again.communicate(timeout=60)
    assert again.returncode == 0, errors
    assert _iterations(tmp_path) == list(range(1, 61)) and 3 <= done < 60
