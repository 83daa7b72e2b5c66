"""Decays over the whole range of delta times A, in steps far finer than one binary exponent.

Every point is a channel; the channels of a vector are computed together, so one that goes wrong is seen, and so is what
it does to its neighbours. Kernels compute decays in two ways, according to the signs of A and to softplus.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from mmvmamba.ops import ScanOrder, scan2d, selective_scan
from tests.test_ops.test_exact import BACKENDS

LOWEST, HIGHEST, STEP = -400.0, 170.0, 0.05
# Relative. A rate of 170 has an error of 1e-5 in float32 before it is put into an exponent.
ERROR = {torch.float32: 1e-4, torch.float64: 1e-12}
# Smaller numbers are compared with zero only as far as they must not be NaN.
SMALLEST = {torch.float32: 1e-30, torch.float64: 1e-300}
LARGE_STEP = 20.5  # softplus is the identity


@dataclass(frozen=True)
class Mode:
    """How a rate delta A comes about. ``decaying``: no rate is above 0; ``growing``: some A of every block is."""

    softplus: bool
    decaying: bool
    growing: bool


MODES = {
    "softplus, A <= 0": Mode(softplus=True, decaying=True, growing=False),
    "softplus, some A > 0": Mode(softplus=True, decaying=False, growing=True),
    "plain, A <= 0": Mode(softplus=False, decaying=False, growing=False),
    "plain, some A > 0": Mode(softplus=False, decaying=False, growing=True),
}


def points(mode: Mode) -> tuple[Tensor, Tensor]:
    """Step size and rate A of every channel, (d) each, in float64; shuffled, so that blocks mix all rates."""
    rates = torch.arange(LOWEST, 0.0 if mode.decaying else HIGHEST, STEP, dtype=torch.float64)
    rates = rates[torch.randperm(len(rates), generator=torch.Generator().manual_seed(0))]
    step = torch.full_like(rates, LARGE_STEP if mode.softplus else 1.0)
    if not mode.decaying and not mode.growing:
        step = torch.where(rates > 0, -step, step)  # growth from negative step sizes
    A = rates / step
    if mode.growing:
        A[::4] = A[::4].abs().clamp(max=HIGHEST / LARGE_STEP)  # in every vector of every instruction set
    return step, A


def scan(name: str, step: Tensor, A: Tensor, first: Tensor, softplus: bool, backend: str) -> dict[str, Tensor]:
    """A state of ``first`` at position 0 that decays, or grows, by exp(step A) to position 1: (d, 2), and gradients."""
    d = len(A)
    stream = torch.stack([first, torch.zeros_like(first)], -1)
    leaves = [value.clone().requires_grad_() for value in (stream, step, A)]
    u, delta, rate = leaves
    ones = torch.ones(1, 1, 2, dtype=A.dtype)
    if name == "scan2d":
        x = u.t().reshape(1, 1, 2, d)
        projections = ones.new_ones(1, 1, 2, 1, 3)
        weight = delta.reshape(1, d, 1)
        options = {"orders": (ScanOrder.ROW,), "delta_softplus": softplus, "backend": backend}
        out = scan2d(x, projections, weight, None, rate.reshape(1, d, 1), None, **options).reshape(2, d).t()
    else:
        delta = delta[None, :, None].expand(1, d, 2)
        out = selective_scan(u[None], delta, rate[:, None], ones, ones, delta_softplus=softplus, backend=backend)[0]
    grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
    return {"out": out.detach()} | dict(zip(("du", "dstep", "dA"), grads, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["selective_scan", "scan2d"])
@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_sweep(name: str, dtype: torch.dtype, mode: Mode, backend: str) -> None:
    step, A = (value.to(dtype) for value in points(mode))
    rate = step.double() * A.double()
    # What grows starts so small that it stays in the range of float32.
    first = ((-rate).exp().clamp(1e-36, 1) / LARGE_STEP).to(dtype)
    found = scan(name, step, A, first, mode.softplus, backend)
    exact = scan(name, step.double(), A.double(), first.double(), mode.softplus, "reference")
    # Gradients of the first position pass through the decay alone, without the small state.
    representable = rate < 88 if dtype == torch.float32 else rate < HIGHEST + 1
    assert found["out"].isfinite().all()
    for key, value in found.items():
        in_range = exact[key].abs() < 0.99 * torch.finfo(dtype).max
        if key != "out":
            in_range &= representable.view(-1, *[1] * (value.dim() - 1))
        assert value[in_range].isfinite().all(), f"{key} at rates {_where(rate, in_range & ~value.isfinite())}"
    # The reference saturates there; the kernels multiply by two factors, one after the other.
    reached = representable if backend == "reference" else rate < HIGHEST + 1
    compared = (exact["out"].abs() > SMALLEST[dtype]) & reached[:, None]
    assert compared[:, 1].sum() > len(A) // 8
    error = (found["out"].double() - exact["out"]).abs() / exact["out"].abs()
    wrong = compared & ~(error < ERROR[dtype])
    assert not wrong.any(), f"rates {_where(rate, wrong)}: {error[wrong].max():.1e}"
    # What is not compared is almost nothing in both.
    assert (found["out"][~compared & reached[:, None]].abs() <= 2 * SMALLEST[dtype]).all()


def _where(rate: Tensor, wrong: Tensor) -> list[float]:
    return rate[wrong if wrong.dim() == 1 else wrong.any(-1)][:5].tolist()
