"""A training resumed from any iteration ends bit for bit where the uninterrupted one ends."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mmengine")

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
