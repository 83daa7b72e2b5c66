"""Timing on a GPU: events around each call, inputs that rotate through more than the L2 cache, memory, repeats."""

from __future__ import annotations

import gc
import itertools
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from benchmarks.floors import Rates
from benchmarks.harness import Timing

ROTATED_BYTES = 64 << 20
"""Inputs of all sets together exceed this, more than the L2 cache of any GPU at the time of writing (H200: 60 MB)."""
MOST_SETS = 64
LEAST_ROUNDS, MOST_ROUNDS = 30, 200
REPEATS = 10
COPY_BYTES = 2 << 30
_SPIN_CYCLES = 400_000
"""About 0.2 ms in which the host gets ahead, so that short calls are not timed with the host's own pace."""


class NoGpuError(RuntimeError):
    """There is no GPU to time on."""


class Accelerator(Protocol):
    """What the timing needs of a device; a test has one without a GPU."""

    type: str

    def time(self, run: Callable[[], object]) -> float:
        """Run once and return the seconds."""

    def peak(self, run: Callable[[], object]) -> int:
        """Run once and return the bytes it added at its highest moment, results included."""


class Gpu:
    """The first CUDA GPU.

    Raises:
        NoGpuError: There is none, or this PyTorch cannot use it.
    """

    type = "cuda"

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            built = torch.version.cuda
            problem = "this PyTorch is built without CUDA" if built is None else "PyTorch finds no CUDA GPU"
            raise NoGpuError(
                f"--device cuda: {problem}, expected a GPU. Run it on a machine with one, or --device cpu."
            )
        # Strict float32 for everyone, so that all contestants do the same work.
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False

    def time(self, run: Callable[[], object]) -> float:
        """Run once between two events and return the seconds of the device."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(_SPIN_CYCLES)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def peak(self, run: Callable[[], object]) -> int:
        """Run once and return the bytes it added at its highest moment, results included."""
        gc.collect()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def rates(self) -> Rates:
        """Measure the copy bandwidth, bytes read plus written; take the rest from the device's properties."""
        source = torch.empty(COPY_BYTES // 4, device="cuda").normal_()
        target = torch.empty_like(source)
        target.copy_(source)
        seconds = Timing.of([self.time(lambda: target.copy_(source)) for _ in range(10)]).median
        properties = torch.cuda.get_device_properties(0)
        return Rates(2 * COPY_BYTES / seconds, properties.multi_processor_count, properties.clock_rate * 1e3)

    def facts(self) -> dict[str, object]:
        """What a result depends on, for the JSON file."""
        properties = torch.cuda.get_device_properties(0)
        return {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "clock_khz": properties.clock_rate,
            "memory_clock_khz": properties.memory_clock_rate,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "smi": nvidia_smi(),
        }


def nvidia_smi() -> str | None:
    """Driver and clocks as nvidia-smi says them; None where it does not run. Nothing is set."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = "--query-gpu=driver_version,clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem,temperature.gpu,power.draw"
    answer = subprocess.run([program, query, "--format=csv"], capture_output=True, text=True, check=False)  # noqa: S603
    return answer.stdout.strip() or None


def sets_needed(bytes_of_one: int) -> int:
    """How many input sets exceed `ROTATED_BYTES`, two at least and `MOST_SETS` at most."""
    return max(2, min(MOST_SETS, ROTATED_BYTES // max(1, bytes_of_one) + 1))


def rotating(runs: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """Return a function whose calls go through the runs, one after the other, over and over."""
    turns = itertools.cycle(runs)
    return lambda: next(turns)()


def repeats_bitwise(run: Callable[[], Mapping[str, Tensor]], times: int = REPEATS) -> bool:
    """Return whether every run gives the same bits."""
    first = {name: tensor.clone() for name, tensor in run().items()}
    return all(_same_bits(tensor, first[name]) for _ in range(times - 1) for name, tensor in run().items())


def _same_bits(one: Tensor, other: Tensor) -> bool:
    # As integers: NaN is equal to itself, and -0 differs from 0.
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return torch.equal(one.contiguous().view(integers), other.contiguous().view(integers))
