"""Extreme step sizes, decay rates and inputs (reliability matrix A7): finite wherever float64 is finite and in range.

A point of the grid is a channel with inputs of its own (of B and C too, in groups of one channel), so that one that
overflows hides no other.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmvmamba.ops import ScanOrder, scan2d, selective_scan
from tests.test_ops.test_exact import BACKENDS

DELTAS = (-1e4, -200.0, -88.0, -20.0, -1e-3, 0.0, 1e-3, 19.9, 20.1, 88.0, 200.0, 1e4)
RATES = (-1e4, -100.0, -1.0, -1e-3, 0.0, 1e-3, 1.0, 100.0)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
POINTS = len(DELTAS) * len(RATES)  # times dtypes times softplus on and off: 576
LENGTH = 6
# Elementwise, for sums of a few terms that may cancel: finds a wrong number, not a rounding error.
ERROR = 2e-3
HUGE = {torch.float32: 1e30, torch.bfloat16: 1e30, torch.float16: 3e4}

Inputs = dict[str, Tensor]


def grid() -> tuple[Tensor, Tensor]:
    """Step size and rate of every point, (points) each."""
    pairs = torch.tensor([(delta, rate) for delta in DELTAS for rate in RATES])
    return pairs[:, 0], pairs[:, 1]


def scan_inputs(dtype: torch.dtype) -> Inputs:
    delta, rate = grid()
    draws = [torch.randn(1, POINTS, LENGTH) for _ in range(3)]
    return {
        "u": draws[0].to(dtype),
        "delta": delta[None, :, None].expand(1, POINTS, LENGTH).to(dtype),
        "A": rate[:, None],
        "B": draws[1].unsqueeze(2).to(dtype),
        "C": draws[2].unsqueeze(2).to(dtype),
        "D": torch.randn(POINTS),
        "delta_bias": torch.zeros(POINTS),
    }


def map_inputs(dtype: torch.dtype) -> Inputs:
    delta, rate = grid()
    projections = torch.randn(1, 1, LENGTH, 1, 3)
    projections[..., 0] = 1
    return {
        "x": torch.randn(1, 1, LENGTH, POINTS).to(dtype),
        "projections": projections.to(dtype),
        "dt_weight": delta[None, :, None],
        "dt_bias": torch.zeros(1, POINTS),
        "A": rate[None, :, None],
        "D": torch.randn(1, POINTS),
    }


# Gradients of projections are sums over channels: of points of which some overflow.
OPERATORS = {"selective_scan": (scan_inputs, ()), "scan2d": (map_inputs, ("projections",))}


def results(name: str, inputs: Inputs, softplus: bool, backend: str) -> dict[str, Tensor]:
    """The output and all gradients for a gradient of ones."""
    leaves = {key: value.detach().clone().requires_grad_() for key, value in inputs.items()}
    if name == "scan2d":
        out = scan2d(**leaves, orders=(ScanOrder.ROW,), delta_softplus=softplus, backend=backend)
    else:
        out = selective_scan(**leaves, delta_softplus=softplus, backend=backend)
    grads = torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out))
    return {"out": out.detach()} | {f"gradient of {key}": grad for key, grad in zip(leaves, grads, strict=True)}


def check(name: str, inputs: Inputs, softplus: bool, backend: str, skipped: tuple[str, ...] = ()) -> int:
    """Compare with float64 on the same rounded inputs; returns how many elements had to be finite."""
    found = results(name, inputs, softplus, backend)
    exact = results(name, {key: value.double() for key, value in inputs.items()}, softplus, "reference")
    wanted = 0
    for key, value in found.items():
        if key.removeprefix("gradient of ") in skipped:
            continue
        in_range = exact[key].abs() < 0.99 * torch.finfo(value.dtype).max  # false for NaN
        wrong = int((in_range & ~value.isfinite()).sum())
        assert wrong == 0, f"{key}: {wrong} elements are not finite, the first at {_first(in_range, value)}"
        wanted += int(in_range.sum())
        if value.dtype == torch.float32:
            # A decay below 2^-126, about 1e-38, may be 0; gradients are up to 1e4, a step size or a rate, times it.
            compared = in_range & (exact[key].abs() > 1e-34)
            error = (value.double() - exact[key])[compared].abs() / exact[key][compared].abs()
            largest = float(error.max()) if error.numel() else 0.0
            assert largest < ERROR, f"{key}: relative error {largest:.1e}"
    # Beyond the range of the type the output overflows; a NaN would be a false one.
    assert not found["out"][exact["out"].isfinite()].isnan().any()
    return wanted


def _first(in_range: Tensor, value: Tensor) -> list[int]:
    return (in_range & ~value.isfinite()).nonzero()[0].tolist()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softplus", [True, False], ids=["softplus", "plain"])
def test_grid_of_step_sizes_and_rates(name: str, dtype: torch.dtype, softplus: bool, backend: str) -> None:
    make, skipped = OPERATORS[name]
    assert check(name, make(dtype), softplus, backend, skipped) > POINTS * LENGTH


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("softplus", [True, False], ids=["softplus", "plain"])
def test_a_state_that_is_zero_stays_so_under_any_growth(name: str, softplus: bool, backend: str) -> None:
    """exp(delta A) overflows, but what it multiplies is zero until the last position: an image with a black border."""
    inputs = OPERATORS[name][0](torch.float32)
    stream = "x" if name == "scan2d" else "u"
    if name == "scan2d":
        inputs[stream][:, :, :-1] = 0
    else:
        inputs[stream][..., :-1] = 0
    options = {"orders": (ScanOrder.ROW,)} if name == "scan2d" else {}
    out = (scan2d if name == "scan2d" else selective_scan)(
        **inputs, **options, delta_softplus=softplus, backend=backend
    )
    assert out.isfinite().all()
    before = out[:, :, :-1] if name == "scan2d" else out[..., :-1]
    assert not before.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tensor", ["u", "B", "C", "D", "delta"])
def test_huge_inputs(tensor: str, dtype: torch.dtype, backend: str) -> None:
    """Every element of one tensor is huge; with the others near one, all results are in range (of float32)."""
    d, length = 5, 40  # more than a chunk of the kernels
    inputs = {
        "u": torch.randn(1, d, length).to(dtype),
        "delta": torch.rand(1, d, length).to(dtype),
        "A": -torch.rand(d, 1),
        "B": torch.randn(1, d, 1, length).to(dtype),
        "C": torch.randn(1, d, 1, length).to(dtype),
        "D": torch.randn(d),
        "delta_bias": torch.zeros(d),
    }
    # Of one sign: sums that cancel would have no digit right in float32, and this is about overflow.
    inputs[tensor] = torch.full_like(inputs[tensor], HUGE[dtype])
    for softplus in (True, False):
        assert check("selective_scan", inputs, softplus, backend) > d * length


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_without_a_skip_an_infinite_input_gives_infinity(name: str, dtype: torch.dtype, backend: str) -> None:
    """Not NaN, which it would be if a missing D were a D of zero; and nothing in other channels."""
    d, length, at, channel = 20, 6, 2, 3
    stream = torch.rand(1, d, length)
    stream[0, channel, at] = float("inf")
    parameter = torch.float64 if dtype == torch.float64 else torch.float32
    rates = -torch.ones(d, 1, dtype=parameter)
    if name == "scan2d":
        x = stream.transpose(1, 2).unsqueeze(1).to(dtype)
        weight = torch.ones(1, d, 1, dtype=parameter)
        projections = torch.ones(1, 1, length, 1, 3, dtype=dtype)
        out = scan2d(x, projections, weight, None, rates[None], None, orders=(ScanOrder.ROW,), backend=backend)
        out = out[:, 0].transpose(1, 2)
    else:
        ones = torch.ones(1, 1, length, dtype=dtype)
        out = selective_scan(
            stream.to(dtype), torch.ones(1, d, length, dtype=dtype), rates, ones, ones, backend=backend
        )
    expected = torch.zeros(1, d, length, dtype=torch.bool)
    expected[0, channel, at:] = True
    assert torch.equal(out == float("inf"), expected)
    assert out[~expected].isfinite().all()
