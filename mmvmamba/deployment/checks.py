"""An exported network beside the one it was made from: the same numbers at random sizes, and how long either takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmvmamba.deployment.programs import Sizes, flat_tensors
from mmvmamba.errors import ConfigError

TOLERANCE = 1e-4
"""Largest difference that is allowed, relative to the largest value of an output."""
#: Random sides lie between the smallest possible side (at least this) and the largest one here.
_SMALLEST, _LARGEST, _LARGEST_BATCH = 32, 384, 3


@dataclass(frozen=True)
class Run:
    """One image batch in both.

    Attributes:
        shape: That of the batch (b, 3, h, w).
        error: The largest difference of any output, relative to the largest value of that output; infinite where
            shapes differ or one alone has a value that is not finite.
        pytorch_ms: Fastest time of the network in milliseconds; None where no time was taken.
        exported_ms: The same of the exported one.
    """

    shape: tuple[int, ...]
    error: float
    pytorch_ms: float | None
    exported_ms: float | None


def random_images(
    sizes: Sizes, shape: Sequence[int], count: int, *, seed: int = 0, largest: int = _LARGEST
) -> Iterator[Tensor]:
    """Yield ``count`` image batches of normal random values and random sizes that a program is good for.

    Args:
        sizes: Of the free dimensions.
        shape: The batch (b, 3, h, w) whose sizes the other dimensions have.
        count: How many.
        seed: Of sizes and values.
        largest: Longest side, where the program has no smaller bound; raised where its smallest is larger.
    """
    generator = torch.Generator().manual_seed(seed)
    ends = {"batch": (1, _LARGEST_BATCH), "height": (_SMALLEST, largest), "width": (_SMALLEST, largest)}
    for _ in range(count):
        drawn = list(shape)
        for axis, name in ((0, "batch"), (2, "height"), (3, "width")):
            if name in sizes:
                low, high = sizes[name]
                start = max(low, ends[name][0])
                stop = max(start, ends[name][1] if high is None else min(high, ends[name][1]))
                drawn[axis] = int(torch.randint(start, stop + 1, (), generator=generator))
        yield torch.randn(drawn, generator=generator)


def compare(
    network: Callable[[Tensor], Any],
    exported: Callable[[Tensor], Any],
    images: Iterator[Tensor] | Sequence[Tensor],
    *,
    repeats: int = 0,
) -> list[Run]:
    """Run both on the same images.

    Args:
        network: What was exported.
        exported: What came of it.
        images: Batches (b, 3, h, w).
        repeats: How often to measure, the two in turn; 0 takes no times.
    """
    runs = []
    for image in images:
        with torch.no_grad():
            expected = flat_tensors(network(image))
            found = flat_tensors(exported(image))
        times = _times((network, exported), image, repeats) if repeats else [None, None]
        runs.append(Run(tuple(image.shape), largest_error(found, expected), *times))
    return runs


def require_equal(runs: Sequence[Run], tolerance: float = TOLERANCE) -> None:
    """Raise a ConfigError unless every run agrees to ``tolerance``."""
    wrong = [run for run in runs if not run.error <= tolerance]
    if wrong:
        worst = max(wrong, key=lambda run: run.error)
        raise ConfigError(
            f"the exported network differs from PyTorch's at {len(wrong)} of {len(runs)} sizes, by {worst.error:.1e} "
            f"at {worst.shape}, expected at most {tolerance:.0e}. Do not use the file, and report this."
        )


def largest_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest difference of any tensor, relative to its largest expected value; infinite as in ``Run``."""
    if [value.shape for value in found] != [value.shape for value in expected]:
        return float("inf")
    return max(map(_difference, found, expected), default=0.0)


def _difference(found: Tensor, expected: Tensor) -> float:
    if not expected.numel() or torch.equal(found, expected):
        return 0.0
    difference = (found.double() - expected.double()).abs().max().item()
    scale = expected.double().abs().max().item()
    # A NaN is equal to nothing, itself included.
    return difference / scale if scale > 0 and difference == difference else float("inf")


def _times(calls: Sequence[Callable[[Tensor], Any]], image: Tensor, repeats: int) -> list[float]:
    """Return the fastest time of each in milliseconds, in turn, so that what disturbs one disturbs the other."""
    fastest = [float("inf")] * len(calls)
    for _ in range(repeats):
        for i, call in enumerate(calls):
            started = time.perf_counter()
            with torch.no_grad():
                call(image)
            fastest[i] = min(fastest[i], (time.perf_counter() - started) * 1000)
    return fastest
