"""Two processes, or accumulated gradients, train as one process with the whole batch: the same loss curve."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mmengine")

from mmvmamba.checkpoints import read_checkpoint

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TOGETHER, UPDATES = 8, 8

#: Bits -> the largest relative difference of the loss in any of the updates: 100 units of rounding of the type (1.2e-7,
#: 2.2e-16). The sums over samples are the same in another order, which is a few roundings in each gradient, and the net
#: and momentum pass them on over eight updates; found: 25 and 22 units at most. A wrong factor (a sum in place of a
#: mean, a batch that counts twice) changes the curve by more than 1e-2.
TOLERANCE = {32: 1.2e-5, 64: 2.2e-14}


def _answers(folder: Path, name: str, launcher: list[str], cases: list[str]) -> dict[str, dict]:
    answer = folder / f"{name}.json"
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", *launcher, str(HERE / "distributed_equality.py"), str(answer), *cases],
        cwd=folder, capture_output=True, text=True, timeout=180,
        env={**environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads(answer.read_text())


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What one process and what two have found, per case."""
    folder = tmp_path_factory.mktemp("equality")
    return {
        "folder": folder,
        1: _answers(folder, "one", [], ["8,1,32", "8,1,64", "4,2,32", "4,2,64"]),
        2: _answers(folder, "two", ["-m", "mmvmamba.loopback", "--nproc-per-node", "2"],
                    ["4,1,32", "4,1,64", "2,2,64", "fsdp"]),
    }  # fmt: skip


def _per_update(answer):
    losses = np.array(answer["losses"]).reshape(UPDATES, -1).mean(1)
    samples = np.sort(np.array(answer["samples"]).reshape(UPDATES, -1), axis=1)
    return losses, samples


@pytest.mark.parametrize(
    ("processes", "case"),
    [(2, "4,1,32"), (2, "4,1,64"), (1, "4,2,32"), (1, "4,2,64"), (2, "2,2,64")],
    ids=lambda value: f"{value} processes" if isinstance(value, int) else value,
)
def test_same_loss_curve_as_one_process_with_the_whole_batch(answers, processes, case):
    bits = int(case.split(",")[2])
    whole, parts = answers[1][f"{TOGETHER},1,{bits}"], answers[processes][case]
    (expected, samples), (found, own_samples) = _per_update(whole), _per_update(parts)
    assert samples.shape == (UPDATES, TOGETHER) and np.array_equal(samples, own_samples)
    assert abs(expected[1] / expected[0] - 1) > 1e-2  # it learns: another gradient would show
    worst = np.abs(found / expected - 1).max()
    weights = max(
        np.abs(np.array(parts[name]) - np.array(whole[name])).max() / max(whole["sizes"]) for name in ("sums", "sizes")
    )
    print(f"{processes} processes, {case}: losses differ by {worst:.1e}, weights by {weights:.1e}")
    assert worst < TOLERANCE[bits] and weights < TOLERANCE[bits]


def test_sharded_training_has_the_same_curve_and_resumes(answers):
    """FSDP by ``configs/det/_base_/fsdp.py``, through what ``tools/train.py`` does."""
    sharded, copied = answers[2]["fsdp"], answers[2]["4,1,32"]
    worst = np.abs(np.array(sharded["whole"]) / np.array(copied["losses"]) - 1).max()
    print(f"FSDP and DDP: losses differ by {worst:.1e}")
    assert worst < TOLERANCE[32]
    assert sharded["resumed"] == sharded["whole"][UPDATES // 2 :]
    assert "Resuming from" in sharded["resumed notes"][0]
    assert {"NonFiniteHook", "CheckpointCheckHook", "PlainFormHook"} < set(sharded["hooks"])
    # Each block is a group of its own, the rest is another; a process holds half of everything.
    assert sharded["groups"] == ["NetWithoutBatchNorm"] + ["VSSBlock"] * sharded["blocks"]
    assert sharded["held"] == pytest.approx(copied["weights"] / 2, rel=0.01)


def test_checkpoint_of_a_sharded_training_is_an_ordinary_one(answers):
    content = read_checkpoint(answers["folder"] / "sharded" / "iter_8.pth")
    assert sum(value.numel() for value in content["state_dict"].values()) == answers[2]["4,1,32"]["weights"]
    assert not any("module" in name for name in content["state_dict"])
    assert content["meta"]["iter"] == UPDATES and "config_text" in content


def test_no_search_for_unused_parameters(answers):
    for case in ("4,1,32", "4,1,64", "2,2,64"):
        answer = answers[2][case]
        assert (answer["wrapper"], answer["unused"]) == ("MMDistributedDataParallel", False)
    for answer in answers[1].values():
        assert (answer["wrapper"], answer["unused"]) == ("NetWithoutBatchNorm", None)
