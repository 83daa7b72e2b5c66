"""A training resumed from any iteration ends bit for bit where the uninterrupted one ends."""

import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("mmengine")

from mmengine.hooks import Hook

from mmvmamba.engine import CheckpointHook
from mmvmamba.errors import CheckpointError, TrainingInterrupted
from tests.test_engine.random_training import config, differences, state, train

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ITERATIONS = 40
#: Name -> arguments of ``config``. There are 5 iterations per epoch, so 8 epochs.
VARIANTS = {
    "epochs": dict(length=8),
    "one worker": dict(length=8, workers=1),
    "two workers": dict(length=8, workers=2),
    "bfloat16": dict(length=8, optim=dict(type="mmvmamba.Bfloat16OptimWrapper")),
    "accumulation": dict(length=8, optim=dict(type="OptimWrapper", accumulative_counts=3)),
    "iterations": dict(length=ITERATIONS, by_epoch=False, val_interval=7),
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Name of a variant -> its final state and the folder of its checkpoints, one per iteration."""
    done = {}

    def get(name):
        if name not in done:
            folder = tmp_path_factory.mktemp("uninterrupted")
            done[name] = (state(train(config(folder, **VARIANTS[name]))), folder)
        return done[name]

    return get


def _resumed(folder, tmp_path, iteration, **arguments):
    cfg = config(tmp_path / f"resumed_{iteration}", **arguments)
    cfg.default_hooks.checkpoint.interval = 1000
    return train(cfg, folder / f"iter_{iteration}.pth")


ALL = range(1, ITERATIONS + 1)
#: The first, around the edges of epochs and of accumulation, and the last.
SOME = (1, 4, 5, 6, 23, 39, 40)


@pytest.mark.parametrize(
    ("name", "iterations"),
    [
        ("epochs", ALL),
        ("iterations", (1, 5, 6, 7, 8, 14, 27, 40)),
        ("bfloat16", SOME),
        ("accumulation", range(19, 26)),
        ("one worker", (5, 23, 38)),
        ("two workers", (5, 23, 38)),
        pytest.param("iterations", ALL, marks=pytest.mark.soak),
        pytest.param("bfloat16", ALL, marks=pytest.mark.soak),
        pytest.param("accumulation", ALL, marks=pytest.mark.soak),
        pytest.param("one worker", ALL, marks=pytest.mark.soak),
        pytest.param("two workers", ALL, marks=pytest.mark.soak),
    ],
)
def test_resumed_training_is_bitwise_equal(uninterrupted, tmp_path, name, iterations):
    expected, folder = uninterrupted(name)
    assert expected["counters"][1] == ITERATIONS
    wrong = {}
    for iteration in iterations:
        runner = _resumed(folder, tmp_path, iteration, **VARIANTS[name])
        if found := differences(expected, state(runner)):
            wrong[iteration] = found
    assert not wrong
    print(f"{name}: {len(iterations)} of {len(iterations)} resumed trainings bitwise equal")


@pytest.mark.parametrize("name", ["one worker", "two workers"])
def test_workers_change_nothing(uninterrupted, name):
    assert not differences(uninterrupted("epochs")[0], uninterrupted(name)[0])


def test_two_processes_resume_bitwise(tmp_path):
    """Gloo; three iterations share a step, so the gradients and batch norms that each process has for itself matter."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(HERE / "distributed_resume.py"), str(tmp_path), "4", "6"],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            env={
                **os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}", "OMP_NUM_THREADS": "1",
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        assert [process.wait(120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    answers = [json.loads((tmp_path / f"answer_{rank}.json").read_text()) for rank in range(2)]
    assert [answer["found"] for answer in answers] == [{"4": [], "6": []}] * 2
    assert answers[0]["counters"] == [3, 9]
    assert answers[0]["random"] != answers[1]["random"]


class Stop(Hook):
    """Saves a checkpoint out of turn, as a signal has it done, and ends the training.

    Args:
        where: Name of the method of hooks in which it happens.
        iteration: Finished iterations when it happens.
    """

    priority = "LOWEST"

    def __init__(self, where, iteration):
        self.iteration = iteration
        setattr(self, where, self._stop)

    def _stop(self, runner, **_):
        if runner.train_loop.position.iteration == self.iteration:
            saver = next(hook for hook in runner.hooks if isinstance(hook, CheckpointHook))
            raise TrainingInterrupted(saver.save_now(runner), signal_number=15)


@pytest.mark.parametrize(
    ("where", "iteration"),
    [
        ("after_train_iter", 7),
        ("after_train_iter", 10),
        ("after_val_iter", 10),
        ("before_val_epoch", 10),
        ("after_val_epoch", 10),
    ],
)
@pytest.mark.parametrize("by_epoch", [True, False])
def test_checkpoint_out_of_turn_resumes_bitwise(tmp_path, by_epoch, where, iteration):
    """In the middle of an epoch, at its end, and in a validation, while the model has the averaged weights."""

    def settings(name):
        cfg = config(
            tmp_path / name, by_epoch=by_epoch, length=3 if by_epoch else 15, val_interval=1 if by_epoch else 5
        )
        cfg.default_hooks.checkpoint.update(by_epoch=by_epoch, interval=1 if by_epoch else 4)
        return cfg

    expected = state(train(settings("uninterrupted")))
    interrupted = settings("interrupted")
    interrupted.custom_hooks.append(Stop(where, iteration))
    with pytest.raises(TrainingInterrupted) as caught:
        train(interrupted)
    assert not differences(expected, state(train(settings("resumed"), caught.value.args[0])))


def test_validation_after_the_checkpoint_of_an_epoch_is_made_up_for(tmp_path):
    """MMEngine would leave it out, and its metrics with it."""
    cfg = config(tmp_path / "uninterrupted", length=2)
    cfg.default_hooks.checkpoint.by_epoch = True
    expected = state(train(cfg))
    for epoch in (1, 2):
        resumed = train(config(tmp_path / f"resumed_{epoch}", length=2), tmp_path / f"uninterrupted/epoch_{epoch}.pth")
        assert not differences(expected, state(resumed))
        assert len(expected["scalar val/tiny/loss.0"]) == 2


@pytest.mark.parametrize("by_epoch", [True, False])
def test_training_without_a_seed_resumes_bitwise(tmp_path, by_epoch):
    def settings(name):
        cfg = config(tmp_path / name, by_epoch=by_epoch, length=2 if by_epoch else 10)
        cfg.randomness = dict(seed=None)
        return cfg

    expected = state(train(settings("uninterrupted")))
    resumed = state(train(settings("resumed"), tmp_path / "uninterrupted/iter_3.pth"))
    assert not differences(expected, resumed)


def test_another_training_is_another(tmp_path):
    """The comparison is not blind: another seed shows everywhere."""
    cfg = config(tmp_path, length=2, default_hooks=dict(checkpoint=dict(interval=1000, save_last=False)))
    first = state(train(cfg))
    other = config(tmp_path, length=2, default_hooks=dict(checkpoint=dict(interval=1000, save_last=False)))
    other.randomness.seed = 4
    found = differences(first, state(train(other)))
    assert {"model.head.weight", "ema.module.head.weight", "scalar train/loss.0", "python.1", "numpy", "torch"} <= {
        *found
    }


class Strip(Hook):
    """Takes parts of our section out of every checkpoint.

    Args:
        change: Called with the checkpoint.
    """

    priority = "VERY_LOW"

    def __init__(self, change):
        self.change = change

    def before_save_checkpoint(self, runner, checkpoint):
        self.change(checkpoint)


@pytest.mark.parametrize(("by_epoch", "endless"), [(True, False), (False, False), (False, True)])
def test_checkpoint_of_mmengine_goes_on_in_the_right_place(tmp_path, by_epoch, endless):
    """The order of the data goes on where it was; only the random numbers are others, and that is said."""

    def settings(name):
        cfg = config(tmp_path / name, by_epoch=by_epoch, length=3 if by_epoch else 15, val_interval=100)
        cfg.train_dataloader.sampler.type = "InfiniteSampler" if endless else "DefaultSampler"
        cfg.custom_hooks += [Strip(lambda checkpoint: checkpoint.pop("mmvmamba")), Seen()]
        return cfg

    expected = Seen.by(train(settings("uninterrupted")))
    assert len(expected) == 15
    passes = [[labels for _, labels in expected[first : first + 5]] for first in (0, 5, 10)]
    assert passes[0] != passes[1] != passes[2]
    assert Seen.by(train(settings("resumed"), tmp_path / "uninterrupted/iter_7.pth")) == expected[7:]


class Seen(Hook):
    """Notes the number and the labels of every batch."""

    def __init__(self):
        self.batches = []

    @staticmethod
    def by(runner):
        """Return what the hook of a runner, a copy of the config's, has noted."""
        return next(hook.batches for hook in runner.hooks if isinstance(hook, Seen))

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.batches.append((batch_idx, torch.as_tensor(data_batch["label"]).tolist()))


def test_contradicting_checkpoint_is_refused(tmp_path):
    def change(checkpoint):
        checkpoint["mmvmamba"]["data_position"]["iteration"] += 1

    cfg = config(tmp_path / "uninterrupted", length=2)
    cfg.custom_hooks.append(Strip(change))
    train(cfg)
    with pytest.raises(
        CheckpointError, match=r"contradicts itself: data_position is iteration 4 .* meta is iteration 3"
    ):
        train(config(tmp_path / "resumed", length=2), tmp_path / "uninterrupted/iter_3.pth")


def test_position_of_another_release_is_refused(tmp_path):
    cfg = config(tmp_path / "uninterrupted", length=2)
    cfg.custom_hooks.append(Strip(lambda checkpoint: checkpoint["mmvmamba"]["data_position"].update(odd=1)))
    train(cfg)
    with pytest.raises(CheckpointError, match="data_position has the entries"):
        train(config(tmp_path / "resumed", length=2), tmp_path / "uninterrupted/iter_3.pth")


@pytest.mark.parametrize("said", [True, False])
def test_other_number_of_processes_keeps_the_share_of_the_data(tmp_path, said):
    """Two processes wrote the checkpoint after one batch each, so this one has seen two; first ones did not say so."""

    def change(checkpoint):
        section = checkpoint["mmvmamba"]
        section["random_states"] = {name: torch.cat([part, part]) for name, part in section["random_states"].items()}
        section["world_size"] = 2
        if not said:
            section.pop("world_size")

    cfg = config(tmp_path / "uninterrupted", length=2)
    cfg.custom_hooks.append(Strip(change))
    train(cfg)
    cfg = config(tmp_path / "resumed", length=2)
    cfg.custom_hooks.append(Seen())
    assert len(Seen.by(train(cfg, tmp_path / "uninterrupted/iter_2.pth"))) == 1 + 5


@pytest.mark.parametrize(
    ("by_epoch", "batch_size", "again"), [(True, 2, 0), (False, 2, 0), (True, 8, 4), (False, 3, 0)]
)
def test_other_batch_size_goes_on_after_the_samples_that_were_seen(tmp_path, by_epoch, batch_size, again):
    """As is advised when memory runs out; of a batch that was begun, all samples are seen again."""

    def settings(name, **changes):
        cfg = config(tmp_path / name, by_epoch=by_epoch, length=2 if by_epoch else 5, val_interval=100, **changes)
        cfg.custom_hooks.append(Seen())
        return cfg

    def samples(runner):
        return [label for _, labels in Seen.by(runner) for label in labels]

    expected = samples(train(settings("uninterrupted")))[:20]
    cfg = settings("resumed", log_level="WARNING")
    cfg.train_dataloader.batch_size = batch_size
    if not by_epoch:
        cfg.train_cfg.max_iters = 100 // batch_size
    resumed = samples(train(cfg, tmp_path / "uninterrupted/iter_3.pth"))
    rest = expected[12 - again :]
    assert resumed[: len(rest)] == rest
    log = next((tmp_path / "resumed").glob("*/*.log")).read_text()
    assert f"written with batches of 4 samples per process, this training has batches of {batch_size}: " in log


class Draws(Hook):
    """Draws random numbers between the iterations."""

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        random.random(), np.random.rand(), torch.rand(3)


def test_what_is_drawn_between_iterations_leaves_no_trace(tmp_path):
    plain, drawing = (config(tmp_path / name, length=2, val_interval=9) for name in ("plain", "drawing"))
    drawing.custom_hooks.append(Draws())
    found = differences(state(train(plain)), state(train(drawing)))
    assert [name for name in found if name.startswith(("model", "optimizer", "ema", "scalar train"))] == []
