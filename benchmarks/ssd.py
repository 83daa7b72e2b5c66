"""Time state space duality at the shapes of VSSD-tiny: ``python -m benchmarks.ssd --threads 1 --json FILE``.

Who takes part: our compiled kernels, our reference, and ``products``, what a layer would write without us (one product
for the state, one to read it, weights and skip beside them). In half precision ``products`` rounds the state to the
dtype of the activations, which our operators keep in float32. Everybody is compared with float64 first; the causal form
is timed for ours alone, since plain PyTorch has no other way to write it than our reference.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import GEMM, Timing, check, gemm, interleave, save
from mmvmamba.ops import available_backends, ssd, ssd_non_causal
from mmvmamba.testing import FORWARD_BOUND, PARAMETER_GRAD_BOUND, STREAM_GRAD_BOUND

STATES = CHANNELS = 64
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MOST_ROUNDS = 50
PRODUCTS_BOUND = {torch.float32: 2e-5, torch.bfloat16: 8e-2}
"""Of the contestant that rounds its state, and its sums over positions, to the dtype of the activations."""


class Shape(NamedTuple):
    """Positions l and heads k of one stage."""

    size: int
    length: int
    heads: int


SHAPES = tuple(
    Shape(size, (size // side) ** 2, heads) for size in (224, 512) for side, heads in ((4, 2), (8, 4), (16, 8))
)
"""The stages with this mixer: one image, heads of 64 channels, 64 states, one group."""

Leaves = dict[str, Tensor]
Run = Callable[[Leaves], Tensor]


def leaves_of(length: int, heads: int, dtype: torch.dtype) -> Leaves:
    """Random inputs, contiguous; weights as VSSD has them are positive."""
    values = {
        "x": torch.randn(1, length, heads, CHANNELS).to(dtype),
        "weight": torch.rand(1, length, heads).to(dtype),
        "b_in": torch.randn(1, length, 1, STATES).to(dtype),
        "c_out": torch.randn(1, length, 1, STATES).to(dtype),
        "skip": torch.randn(heads),
        "decay": -torch.rand(heads) - 1,
    }
    return {name: value.requires_grad_() for name, value in values.items()}


def products(leaves: Leaves) -> Tensor:
    """Compute the non-causal form with PyTorch's own operators in the dtype of the activations."""
    x = leaves["x"]
    weighted = (x * leaves["weight"].unsqueeze(-1)).flatten(2)
    state = leaves["b_in"].squeeze(2).transpose(1, 2) @ weighted
    out = (leaves["c_out"].squeeze(2) @ state).view(x.shape)
    return out + leaves["skip"].to(x.dtype).unsqueeze(-1) * x


def non_causal(backend: str) -> Run:
    """Return our non-causal operator with a backend."""
    return lambda v: ssd_non_causal(*(v[n] for n in ("x", "weight", "b_in", "c_out", "skip")), backend=backend)


def causal(backend: str) -> Run:
    """Return our causal operator with a backend."""
    names = ("x", "weight", "decay", "b_in", "c_out", "skip")
    return lambda v: ssd(*(v[n] for n in names), dt_softplus=True, backend=backend)


def contestants() -> dict[str, dict[str, Run]]:
    """Who is timed in which form, ours first."""
    ours = [name for name in ("compiled", "reference") if available_backends("cpu")[name].available]
    return {
        "non-causal": {name: non_causal(name) for name in ours} | {"products": products},
        "causal": {name: causal(name) for name in ours},
    }


def differentiate(run: Run, leaves: Leaves, grad: Tensor) -> dict[str, Tensor]:
    """Output and gradients by name, without those of what a form does not use."""
    out = run(leaves)
    grads = torch.autograd.grad(out, list(leaves.values()), grad.to(out.dtype), allow_unused=True)
    return {"out": out} | {name: g for name, g in zip(leaves, grads, strict=True) if g is not None}


def check_all(runs: dict[str, Run], form: str, leaves: Leaves, grad: Tensor) -> None:
    """Compare every contestant with the reference in float64.

    Raises:
        DisagreementError: One differs.
    """
    dtype = leaves["x"].dtype
    wide = {name: value.detach().double().requires_grad_() for name, value in leaves.items()}
    expected = differentiate({"causal": causal, "non-causal": non_causal}[form]("reference"), wide, grad.double())
    for name, run in runs.items():
        if name == "products":
            bounds = dict.fromkeys(expected, PRODUCTS_BOUND[dtype])
        else:
            bounds = dict.fromkeys(expected, STREAM_GRAD_BOUND[dtype]) | {"out": FORWARD_BOUND[dtype]}
            bounds |= dict.fromkeys(("skip", "decay"), PARAMETER_GRAD_BOUND[dtype])
        check(name, differentiate(run, leaves, grad), expected, bounds)


def measure(runs: dict[str, Run], leaves: Leaves, grad: Tensor, seconds: float) -> dict[str, dict[str, Timing]]:
    """Time every contestant, forward alone and with the gradients, beside the yardstick of the machine."""

    def forward(run: Run) -> Callable[[], object]:
        def call() -> Tensor:
            with torch.no_grad():
                return run(leaves)

        return call

    passes = {
        "forward": {name: forward(run) for name, run in runs.items()},
        "forward+backward": {name: lambda run=run: differentiate(run, leaves, grad) for name, run in runs.items()},
    }
    return {name: interleave(calls | {GEMM: gemm()}, seconds, MOST_ROUNDS) for name, calls in passes.items()}


def time_shape(shape: Shape, dtype: str, seconds: float) -> list[dict[str, object]]:
    """Time both forms at one shape; print and return the rows."""
    leaves = leaves_of(shape.length, shape.heads, DTYPES[dtype])
    grad = torch.randn(leaves["x"].shape).to(DTYPES[dtype])
    rows: list[dict[str, object]] = []
    for form, runs in contestants().items():
        check_all(runs, form, leaves, grad)
        for passes, timings in measure(runs, leaves, grad, seconds).items():
            best = next(iter(runs))
            for name, timing in timings.items():
                ratio = timing.minimum / timings[best].minimum
                rows.append({**shape._asdict(), "form": form, "pass": passes, "dtype": dtype, "contestant": name,
                             f"over_{best}": ratio, **timing.fields()})  # fmt: skip
                print(f"{shape.size:>4} l={shape.length:<6} k={shape.heads} {dtype:<9} {form:<11} {passes:<17} "
                      f"{name:<10} {timing.minimum * 1e3:9.3f} ms  {ratio:6.2f} of {best}", flush=True)  # fmt: skip
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 512], help="sides of images, of 224 and 512")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["float32"])
    parser.add_argument("--seconds", type=float, default=3.0, help="per form and pass of a shape")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    rows = []
    for shape in SHAPES:
        if shape.size in options.sizes:
            for dtype in options.dtype:
                torch.manual_seed(0)
                rows += time_shape(shape, dtype, options.seconds)
    if options.json is not None:
        save(options.json, "ssd", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
