"""The checks of ``tests/test_gpu`` on a CPU, so that a mistake in them does not wait for a GPU to be seen."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmvmamba.ops.extension import HAS_EXTENSION
from mmvmamba.testing import assert_close
from tests import gpu_checks
from tests.test_ops.samples import MAKERS

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs/det/digits/mask-rcnn_vmamba-nano_fpn_digits.py"
BACKENDS = ["compiled", "reference"] if HAS_EXTENSION else ["reference"]
# The sizes that plain PyTorch can be asked for.
SMALL_MAPS = ("one_pixel", "small", "two_states", "sixty_four_states", "many_entries", "many_routes", "many_channels")
SMALL_SEQUENCES = ("one_position", "many_channels", "two_states")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_random_samples(make, backend: str) -> None:
    for seed in range(8):
        gpu_checks.check_against_float64(make(seed), "cpu", backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SMALL_MAPS)
def test_maps(shape: str, backend: str) -> None:
    for dtype in gpu_checks.STREAM_DTYPES:
        gpu_checks.check_against_float64(gpu_checks.map_sample(gpu_checks.MAPS[shape], dtype), "cpu", backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SMALL_SEQUENCES)
def test_sequences(shape: str, backend: str) -> None:
    sample = gpu_checks.sequence_sample(gpu_checks.SEQUENCES[shape], torch.float32)
    gpu_checks.check_against_float64(sample, "cpu", backend)


@pytest.mark.skipif(not HAS_EXTENSION, reason="plain PyTorch takes minutes for these sizes")
@pytest.mark.parametrize("shape", sorted(set(gpu_checks.SEQUENCES) - set(SMALL_SEQUENCES)))
def test_long_sequences(shape: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        sample = gpu_checks.sequence_sample(gpu_checks.SEQUENCES[shape], dtype)
        gpu_checks.check_against_float64(sample, "cpu", "compiled")


@pytest.mark.skipif(not HAS_EXTENSION, reason="plain PyTorch takes minutes for these sizes")
@pytest.mark.parametrize("shape", sorted(set(gpu_checks.MAPS) - set(SMALL_MAPS)))
def test_large_maps(shape: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        sample = gpu_checks.map_sample(gpu_checks.MAPS[shape], dtype)
        gpu_checks.check_against_float64(sample, "cpu", "compiled")


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeats_memory_and_deterministic_mode(backend: str) -> None:
    for sample in gpu_checks.configurations(4):
        gpu_checks.check_repeats(sample, "cpu", backend, 2)
        gpu_checks.check_deterministic_mode(sample, "cpu", backend)
    gpu_checks.check_no_growth(gpu_checks.configurations(1)[0], "cpu", backend, 3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_isolation(poison: float, backend: str) -> None:
    gpu_checks.check_isolation("cpu", backend, poison)


@pytest.mark.parametrize("backend", BACKENDS)
def test_far_offsets(backend: str) -> None:
    gpu_checks.check_far_offsets("cpu", backend, (3, 6, 5, 24), torch.bfloat16)


def test_a_wrong_result_is_noticed() -> None:
    """The checks can fail: a result with one wrong element, and bits that change from run to run."""
    sample = gpu_checks.configurations(2)[0]
    operator, runs = sample.op, iter(range(1000))

    def wrong(**arguments: object) -> torch.Tensor:
        out = operator(**arguments)
        spoiled = torch.zeros_like(out)
        spoiled.view(-1)[0] = float(next(runs))
        return out + spoiled

    object.__setattr__(sample, "op", wrong)
    with pytest.raises(AssertionError, match="run 0: out"):
        gpu_checks.check_repeats(sample, "cpu", BACKENDS[0], 2)
    good = sample.op
    sample.op = lambda **arguments: operator(**arguments) if torch.float64 in {
        value.dtype for value in arguments.values() if isinstance(value, torch.Tensor)
    } else good(**arguments)  # fmt: skip
    with pytest.raises(AssertionError, match="out: relative error"):
        gpu_checks.check_against_float64(sample, "cpu", BACKENDS[0])


def test_features_and_training() -> None:
    for have, want in zip(gpu_checks.features("cpu", "reference"), gpu_checks.features("cpu", None), strict=True):
        assert_close("features", have, want, 3e-5)
    losses = gpu_checks.losses_of_training("cpu", torch.bfloat16, 6)
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0]


def test_the_workload_of_the_sanitizer() -> None:
    workload = ROOT / "tests/test_gpu/sanitizer_workload.py"
    command = [sys.executable, str(workload), "cpu", BACKENDS[0], "5"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.stdout.strip() == "ran 5 configurations", done.stderr


def test_detector_training() -> None:
    pytest.importorskip("mmdet", reason="mmdet is not installed")
    assert all(map(math.isfinite, gpu_checks.losses_of_detector_training("cpu", torch.bfloat16, 1, str(CONFIG))))


def test_one_message_where_there_is_no_gpu() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/test_gpu"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout.count("need a CUDA GPU") in (1, 2)  # the failure, and perhaps its line in the summary
    assert re.search(r"\d+ deselected, (\d+ warnings?, )?1 error", done.stdout), done.stdout
    every = subprocess.run([*command, "--collect-only"], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert every.returncode == 0, every.stdout
    collected = int(re.search(r"(\d+)(/\d+)? tests collected", every.stdout)[1])
    assert collected > 300
