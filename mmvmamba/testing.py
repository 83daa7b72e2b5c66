"""Helpers for tests, here and in projects that build on mmvmamba: tolerances, comparison, skip marks.

Needs pytest only where a skip mark is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmvmamba.ops.extension import EXTENSION_PROBLEM, HAS_EXTENSION

if TYPE_CHECKING:
    import pytest

FORWARD_BOUND = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Largest error of an operator's output, relative to the largest value, against float64 on the same inputs."""
STREAM_GRAD_BOUND = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
"""The same for gradients of per-position tensors (u, delta, B, C, x, projections)."""
PARAMETER_GRAD_BOUND = {torch.float64: 1e-11, torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""The same for gradients summed over positions (A, D, biases, dt_weight)."""


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return max |actual - expected| / max |expected|; 0 for empty tensors, infinite where one is not finite."""
    if actual.shape != expected.shape:
        raise AssertionError(f"shapes differ: {tuple(actual.shape)} and {tuple(expected.shape)}")
    if expected.numel() == 0:
        return 0.0
    difference = (actual.double() - expected.double()).abs().max().item()
    scale = expected.double().abs().max().item()
    if difference == 0:
        return 0.0
    # NaN compares false with everything: report it as infinitely wrong.
    return difference / scale if scale > 0 and difference == difference else float("inf")


def assert_close(name: str, actual: Tensor, expected: Tensor, bound: float) -> None:
    """Fail, naming the tensor, if `relative_error` exceeds ``bound``.

    Raises:
        AssertionError: The error is larger, or the shapes differ.
    """
    error = relative_error(actual, expected)
    if not error <= bound:
        raise AssertionError(f"{name}: relative error {error:.3e} exceeds {bound:.1e}")


def requires_extension() -> pytest.MarkDecorator:
    """Return a mark that skips a test where the compiled extension is not in use, giving the reason."""
    import pytest

    return pytest.mark.skipif(not HAS_EXTENSION, reason=str(EXTENSION_PROBLEM))
