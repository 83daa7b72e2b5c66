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


@pytest.mark.parametrize("name", VARIANTS)
def test_resume_from_each_of_40_iterations_is_bitwise_equal(uninterrupted, tmp_path, name):
    expected, folder = uninterrupted(name)
    assert expected["counters"][1] == ITERATIONS
    wrong = {}
    for iteration in range(1, ITERATIONS + 1):
        runner = _resumed(folder, tmp_path, iteration, **VARIANTS[name])
        if found := differences(expected, state(runner)):
            wrong[iteration] = found
    assert not wrong
