"""Equal inputs give equal bits: over repeats, numbers of threads and other work in between (reliability matrix A9)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from mmvmamba.testing import requires_extension
from tests.test_ops.samples import MAKERS, Sample

RUNS = 50
THREADS = (1, 2, 3, 4)
CONFIGURATIONS = 10  # of each operator


@pytest.fixture(autouse=True)
def _restore_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def results(sample: Sample) -> list[Tensor]:
    out, grads = sample.gradients("compiled")
    return [out, *grads.values()]


def differing(first: list[Tensor], second: list[Tensor]) -> list[int]:
    """Which results differ in a bit; NaN is equal to the same NaN."""
    views = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    pairs = zip(first, second, strict=True)
    return [
        i
        for i, (a, b) in enumerate(pairs)
        if not torch.equal(a.contiguous().view(views[a.itemsize]), b.contiguous().view(views[b.itemsize]))
    ]


@requires_extension()
@pytest.mark.ext
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("seed", range(CONFIGURATIONS))
def test_repeats_on_any_number_of_threads(make: Callable[[int], Sample], seed: int) -> None:
    sample = make(1000 + seed)
    torch.set_num_threads(1)
    first = results(sample)
    for run in range(RUNS):
        torch.set_num_threads(THREADS[run % len(THREADS)])
        # Fresh memory at other addresses, with other contents, for every run.
        scrap = [torch.full((1 + 997 * (run % 7),), float(run)) for _ in range(run % 3)]
        assert differing(first, results(sample)) == [], f"run {run} on {torch.get_num_threads()} threads"
        del scrap


@requires_extension()
@pytest.mark.ext
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_values_that_are_not_finite_are_repeated_too(make: Callable[[int], Sample]) -> None:
    for seed in range(CONFIGURATIONS):
        sample = make(2000 + seed)
        for name in sample.streams:
            value = sample.tensors[name]
            if value is not None:
                poisoned = value.clone(memory_format=torch.contiguous_format)
                poisoned.view(-1)[seed % poisoned.numel()] = float("nan") if seed % 2 else float("inf")
                sample.tensors[name] = poisoned
        torch.set_num_threads(1)
        first = results(sample)
        for threads in THREADS[1:]:
            torch.set_num_threads(threads)
            assert differing(first, results(sample)) == []
