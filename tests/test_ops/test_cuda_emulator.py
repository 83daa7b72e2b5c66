"""The emulator of csrc/check that runs our CUDA kernels on the CPU: computes what a GPU would, and finds mistakes."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

CHECK = Path(__file__).parents[2] / "csrc" / "check"
SCHEDULES = ("forward", "reverse", "random:1", "random:2", "random:3")
Run = Callable[..., subprocess.CompletedProcess[bytes]]


def _compile(folder: Path, *flags: str) -> Run:
    program = folder / "check_emulator"
    command = ["g++", "-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", *flags]
    subprocess.run([*command, str(CHECK / "check_emulator.cc"), "-o", str(program), "-pthread"], check=True)

    def run(case: str, given: bytes = b"", **variables: str) -> subprocess.CompletedProcess[bytes]:
        names = {f"MMVMAMBA_EMULATED_{name.upper()}": value for name, value in variables.items()}
        environment = {key: value for key, value in os.environ.items() if not key.startswith("MMVMAMBA_")}
        return subprocess.run(
            [str(program), case], input=given, capture_output=True, env=environment | names, check=False, timeout=60
        )

    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return _compile(tmp_path_factory.mktemp("emulator"))


@pytest.fixture(scope="module", params=["own", "portable"])
def run_both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """With the switch of stacks written for x86-64 and with that of the C library."""
    flags = ["-DMMVMAMBA_PORTABLE_FIBRES"] if request.param == "portable" else []
    return _compile(tmp_path_factory.mktemp(request.param), *flags)


def numbers(done: subprocess.CompletedProcess[bytes]) -> list[float]:
    assert done.returncode == 0, done.stderr.decode()
    return [float(line) for line in done.stdout.split()]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("threads", ["1", "3"])
def test_sums_through_shared_memory(run_both: Run, schedule: str, threads: str) -> None:
    values = np.zeros(768)
    values[:700] = np.arange(700)
    found = numbers(run_both("reduction", schedule=schedule, threads=threads))
    assert found == values.reshape(6, 128).sum(1).tolist()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_shuffles(run_both: Run, schedule: str) -> None:
    found = np.array(numbers(run_both("shuffles", schedule=schedule))).reshape(3, 32, 5)
    own = np.arange(96.0).reshape(3, 32)
    lane = np.arange(32)
    np.testing.assert_array_equal(found[..., 0], np.repeat(own.sum(1, keepdims=True), 32, axis=1))
    halves = own.reshape(3, 2, 16).sum(2).repeat(16, axis=1)
    np.testing.assert_array_equal(found[..., 1], halves + np.where(lane < 16, own[:, 3:4], 0))
    np.testing.assert_array_equal(found[..., 2], own - np.where(lane % 8 >= 3, 3, 0))
    np.testing.assert_array_equal(found[..., 3], own + np.where(lane % 8 < 5, 3, 0))
    np.testing.assert_array_equal(found[..., 4], own - lane % 8 + 5.5)


def test_product_of_tiles_of_whole_numbers(run_both: Run) -> None:
    values = np.random.default_rng(0).integers(-99, 99, 192).astype(np.float32)
    found = np.array(numbers(run_both("product", values.tobytes()))).reshape(16, 8)
    np.testing.assert_array_equal(found, values[:128].reshape(16, 8) @ values[128:].reshape(8, 8) + 1)


def test_product_cuts_its_operands_to_tf32(run: Run) -> None:
    values = np.random.default_rng(1).standard_normal(192).astype(np.float32)
    printed = np.array(numbers(run("product", values.tobytes())), np.float32)
    found = printed.astype(np.float64).reshape(16, 8)
    cut = (values.view(np.uint32) & 0xFFFFE000).view(np.float32).astype(np.float64)
    exact = cut[:128].reshape(16, 8) @ cut[128:].reshape(8, 8) + 1
    # Rounded towards zero: never beyond the exact sum, and less than one unit in the last place before it.
    assert (np.abs(found) <= np.abs(exact)).all()
    np.testing.assert_allclose(found, exact, rtol=2.0**-23)
    uncut = values[:128].reshape(16, 8).astype(np.float64) @ values[128:].reshape(8, 8) + 1
    assert np.abs(found - uncut).max() > 1e-4


def all_kinds_of_floats() -> np.ndarray:
    """Every exponent with random mantissas, ties of all three formats, all numbers of float16 and bfloat16."""
    generator = np.random.default_rng(2)
    random_bits = generator.integers(0, 2**32, 50_000, dtype=np.uint64).astype(np.uint32)
    halves = np.arange(2**16, dtype=np.uint16)
    bfloats = halves.astype(np.uint32) << 16
    ties = [bfloats[::7] + offset for offset in (0x7FFF, 0x8000, 0x8001, 0x0FFF, 0x1000, 0x1001, 0x3000)]
    with np.errstate(invalid="ignore"):
        as_half = halves.view(np.float16).astype(np.float32).view(np.uint32)
    return np.concatenate([random_bits, bfloats, as_half, *ties]).view(np.float32)


def test_numbers(run: Run) -> None:
    """Conversions as PyTorch does them; approximate functions with an error of 2^-22, as ex2.approx may have."""
    x = all_kinds_of_floats()
    done = run("numbers", x.tobytes())
    assert done.returncode == 0
    half, bfloat, exp2, log2, reciprocal, tf32, *smaller = np.frombuffer(done.stdout, np.float32).reshape(-1, 8).T
    value = torch.from_numpy(x.copy())
    np.testing.assert_array_equal(half, value.half().float().numpy())
    np.testing.assert_array_equal(bfloat, value.bfloat16().float().numpy())
    normal = np.isfinite(x) & (np.abs(x) >= 2.0**-126)
    with np.errstate(all="ignore"):
        exact = x.astype(np.float64)
        rounded = np.sign(exact) * np.floor(np.abs(exact) / 2.0 ** (np.frexp(exact)[1] - 11) + 0.5)
        rounded = (rounded * 2.0 ** (np.frexp(exact)[1] - 11)).astype(np.float32)
        check_approximate(exp2, np.exp2(np.where(np.abs(x) < 2.0**-126, 0, exact)), 2.0**-22)
        check_approximate(reciprocal, 1 / np.where(np.abs(x) < 2.0**-126, np.copysign(0, exact), exact), 2.0**-22)
        between = (x >= 0.5) & (x <= 2)
        assert np.abs(log2[between] - np.log2(exact[between])).max() <= 2.0**-22
        outside = normal & (x > 0) & ~between
        np.testing.assert_allclose(log2[outside], np.log2(exact[outside]), rtol=2.0**-22)
    np.testing.assert_array_equal(tf32[normal], rounded[normal])
    for found in smaller:
        np.testing.assert_array_equal(found, np.where(np.isnan(x), np.nan, np.minimum(x, 1)))


def check_approximate(found: np.ndarray, exact: np.ndarray, error: float) -> None:
    """Relative error, subnormal results as zero; what overflows, and NaN, as float32 has it."""
    inside = (np.abs(exact) >= 2.0**-126) & (np.abs(exact) < 2.0**128 * (1 - 2.0**-22))
    np.testing.assert_allclose(found[inside], exact[inside], rtol=error)
    zero = np.abs(exact) < 2.0**-126 * (1 - 2.0**-22)
    assert (found[zero] == 0).all()
    assert np.isinf(found[np.isinf(exact)]).all()
    np.testing.assert_array_equal(np.isnan(found), np.isnan(exact))


@pytest.mark.parametrize(("correct", "missing"), [("barrier", "no_barrier"), ("syncwarp", "no_syncwarp")])
def test_a_missing_barrier_shows_as_a_result_that_depends_on_the_schedule(run: Run, correct: str, missing: str) -> None:
    fine = {run(correct, schedule=schedule).stdout for schedule in SCHEDULES}
    assert len(fine) == 1
    assert b"nan" not in fine.pop()
    found = [run(missing, schedule=schedule).stdout for schedule in SCHEDULES]
    assert len(set(found)) == len(SCHEDULES)
    # The same schedule gives the same result again, or nobody could look for the cause.
    assert found == [run(missing, schedule=schedule).stdout for schedule in SCHEDULES]


def test_shared_memory_is_nan_until_it_is_written(run: Run) -> None:
    assert run("unwritten").stdout == b"nan\n" * 64


MISTAKES = {
    "returned": "thread (37, 0, 0): has returned, but thread (63, 0, 0) waits at __syncthreads of",
    "returned_lane": "with mask 0xffffffff, but lane 5 of its warp has returned",
    "two_operations": "with mask 0xffffffff, but lane 9 of its warp waits at __shfl_up_sync of",
    "two_barriers": "thread (32, 0, 0): waits at __syncthreads of",
    "barrier_and_shuffle": "but lane 3 of its warp waits at __syncthreads of",
    "lane_out_of_range": "lane 32 of segments of 32 lanes",
    "lane_outside_mask": "reads lane 20, which takes no part",
    "overrun": "wrote to byte 256 of shared memory, which has 256",
}


@pytest.mark.parametrize("case", MISTAKES)
@pytest.mark.parametrize("schedule", ["forward", "reverse", "random:7"])
def test_a_mistake_ends_the_program_and_is_named(run: Run, case: str, schedule: str) -> None:
    done = run(case, schedule=schedule)
    said = done.stderr.decode()
    assert done.returncode != 0
    assert said.startswith("cuda_emulator: block (0, 0, 0), thread (")
    # Of two threads that do not agree, the schedule decides which one is named.
    assert MISTAKES[case] in said or (case == "two_operations" and "__shfl_up_sync" in said)


def test_a_launch_beyond_the_limits_is_refused(run: Run) -> None:
    done = run("barrier", shared_bytes="255")
    assert done.returncode != 0
    assert "launch with bytes of shared memory 256, allowed are at most 255" in done.stderr.decode()


def test_an_unknown_schedule_is_refused(run: Run) -> None:
    done = run("barrier", schedule="backward")
    assert done.returncode != 0
    assert "expected forward, reverse or random:<seed>" in done.stderr.decode()
