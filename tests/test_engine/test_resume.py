"""A training resumed from any iteration ends bit for bit where the uninterrupted one ends."""

import dataclasses

import pytest
import torch

pytest.importorskip("mmengine")

from mmengine.hooks import Hook

from mmvmamba.engine import RandomStateHook
from mmvmamba.errors import CheckpointError
from tests.test_engine.random_training import config, differences, state, train

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
        ("iterations", ALL),
        ("bfloat16", SOME),
        ("accumulation", range(19, 26)),
        ("one worker", SOME),
        ("two workers", SOME),
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
