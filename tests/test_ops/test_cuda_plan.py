"""What the host code of the CUDA kernels decides: kernels, warps and bands, for an H200 and for smaller devices."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
# In the order of csrc/cuda/kernels.h.
PAIRS_SMALL_RANK, PAIRS, SINGLES_SMALL_RANK, SINGLES, ANY_STATES, GIVEN_STEPS = range(6)
H200 = (132, 232_448)
CONSUMER = (82, 101_376)  # shared memory of compute capability 8.6 and 8.9


LONGEST = 2**31 - 1 - 4096  # what csrc/cuda/launch.cu lets pass


class Part(NamedTuple):
    variant: int
    channel_begin: int
    tiles: int


class Plan(NamedTuple):
    parts: list[Part]
    warps: int
    bands: int
    rows: int
    shared: int
    fits: bool


Planner = Callable[..., Plan]


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Planner:
    """The planner, compiled for this machine."""
    program = tmp_path_factory.mktemp("plan") / "print_plan"
    sources = ["-x", "c++", "csrc/check/print_plan.cc", "csrc/cuda/plan.cu"]
    command = ["g++", "-std=c++20", "-O1", "-DMMVMAMBA_EMULATE_CUDA", "-Icsrc", *sources, "-o", str(program)]
    subprocess.run(command, cwd=ROOT, check=True)

    def ask(
        batch: int, d: int, length: int, n: int, r: int, backward: bool, device: tuple[int, int] = H200,
        groups: int = 1, kind: str = "map",
    ) -> Plan:  # fmt: skip
        numbers = (batch, groups, d, length, n, r, kind != "sequence", kind != "map", backward, *device)
        line = " ".join(str(int(number)) for number in numbers)
        answer = subprocess.run([str(program)], input=line, capture_output=True, text=True, check=True).stdout
        parts = [Part(*map(int, found)) for found in re.findall(r"(\d+):(\d+):(\d+) ", answer)]
        rest = re.search(r"warps (\d+) bands (\d+) rows (\d+) shared (\d+) fits (\d)", answer)
        assert rest, answer
        warps, bands, rows, shared, fits = map(int, rest.groups())
        return Plan(parts, warps, bands, rows, shared, bool(fits))

    return ask


@pytest.mark.parametrize("backward", [False, True])
def test_channels_go_to_the_kernel_for_them(plan: Planner, backward: bool) -> None:
    assert plan(128, 96, 3136, 1, 6, backward).parts == [Part(PAIRS_SMALL_RANK, 0, 1), Part(SINGLES_SMALL_RANK, 64, 1)]
    assert plan(2, 192, 15_200, 1, 12, backward).parts == [Part(PAIRS, 0, 3)]
    assert plan(2, 32, 15_200, 1, 2, backward).parts == [Part(SINGLES_SMALL_RANK, 0, 1)]
    assert plan(2, 100, 2451, 1, 7, backward).parts == [Part(ANY_STATES, 0, 4)]
    assert plan(2, 96, 2451, 16, 6, backward).parts == [Part(ANY_STATES, 0, 3)]
    assert plan(2, 96, 3136, 1, 6, backward, kind="permuted").parts == [Part(ANY_STATES, 0, 3)]
    assert plan(2, 40, 3136, 4, 0, backward, groups=2, kind="sequence").parts == [Part(GIVEN_STEPS, 0, 2)]


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("device", [H200, CONSUMER], ids=["H200", "consumer"])
@pytest.mark.parametrize("batch", [1, 2, 16, 128])
@pytest.mark.parametrize("kind", ["map", "permuted", "sequence"])
def test_every_plan_covers_its_scan(
    plan: Planner, backward: bool, device: tuple[int, int], batch: int, kind: str
) -> None:
    for length in (1, 15, 49, 196, 784, 1023, 3136, 60_800, 1 << 20, 1 << 24, LONGEST):
        for d, n, r in ((96, 1, 6), (192, 1, 12), (384, 1, 24), (768, 1, 48), (100, 1, 7), (96, 16, 6), (4, 64, 1)):
            found = plan(batch, d, length, n, 0 if kind == "sequence" else r, backward, device, kind=kind)
            assert found.fits
            assert found.shared <= device[1]
            assert (found.bands - 1) * found.rows < length <= found.bands * found.rows
            # A turn of the warps starts with a chunk of two slices.
            assert found.warps in (2, 4, 8, 16)


def test_small_maps_stay_whole_and_large_ones_fill_the_device(plan: Planner) -> None:
    for d, length, r in ((192, 784, 12), (384, 196, 24), (768, 49, 48)):  # VMamba-T at 224, stages 2 to 4
        for backward in (False, True):
            assert plan(128, d, length, 1, r, backward).bands == 1
    for batch, length in ((128, 3136), (16, 16_384), (2, 60_800), (1, 147_456)):  # stage 1
        for backward in (False, True):
            found = plan(batch, 96, length, 1, 6, backward)
            assert batch * sum(part.tiles for part in found.parts) * found.bands >= 4 * H200[0]
            assert found.shared <= H200[1] // 2  # two blocks a multiprocessor


@pytest.mark.parametrize("device", [H200, CONSUMER], ids=["H200", "consumer"])
def test_many_states(plan: Planner, device: tuple[int, int]) -> None:
    for n in (128, 256) if device is H200 else (128,):
        for length in (100, 2000, 65_536):
            for backward in (False, True):
                assert plan(1, 32, length, n, 0, backward, device, kind="sequence").fits


def test_too_many_states_are_refused(plan: Planner) -> None:
    assert not plan(1, 96, 196, 4096, 6, False).fits
