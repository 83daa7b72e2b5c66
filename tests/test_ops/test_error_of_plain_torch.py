"""The compiled kernels are about as exact as plain PyTorch in the same dtype (second bound of A1)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import pytest
import torch

from mmvmamba.testing import relative_error, requires_extension
from tests.test_ops.samples import MAKERS, Sample

CONFIGURATIONS = range(3000, 3100)
MOST = 2.0


@requires_extension()
@pytest.mark.ext
@pytest.mark.slow
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_errors_are_at_most_twice_those_of_the_reference(make: Callable[[int], Sample]) -> None:
    """Root mean square over configurations, of every output and gradient by its dtype, both against float64.

    In a single configuration either may be exact by luck. float64 is left out: there the reference is the measure.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # small tensors: threads would wait for each other more than they compute
    try:
        ratios = _ratios(make)
    finally:
        torch.set_num_threads(before)
    assert len(ratios) > 10
    assert not {key: round(ratio, 2) for key, ratio in ratios.items() if not ratio <= MOST}


def _ratios(make: Callable[[int], Sample]) -> dict[tuple[str, torch.dtype], float]:
    squares: dict[tuple[str, torch.dtype], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for seed in CONFIGURATIONS:
        sample = make(seed)
        if sample.dtype == torch.float64:
            continue
        exact = _named(sample.gradients("reference", double=True))
        for which, backend in enumerate(("compiled", "reference")):
            for name, value in _named(sample.gradients(backend)).items():
                squares[name, value.dtype][which] += relative_error(value, exact[name]) ** 2
    return {key: (ours / plain) ** 0.5 for key, (ours, plain) in squares.items()}


def _named(results: tuple[torch.Tensor, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    out, grads = results
    return {"out": out} | {f"gradient of {name}": grad for name, grad in grads.items()}
