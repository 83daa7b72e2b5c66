"""Time what lies between the projections of a mixer of Vim: ``python -m benchmarks.columnar --threads 1 --json FILE``.

Two parts: ``conv`` is `causal_conv1d` of both directions with its SiLU, ``core`` goes from it to the sum of both scans,
the projections to (dt, B, C) included. Who takes part: ``compiled`` and ``reference`` are our backends; ``per
direction`` is how upstream arranges the same: for each direction a channel-first copy, turned round for the second,
PyTorch's convolution, and the fastest 1D scan that this machine has, our `selective_scan`. Everybody is compared with
float64 first.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import GEMM, check, gemm, interleave, save
from mmvmamba.ops import ScanOrder, available_backends, causal_conv1d, scan2d, selective_scan, use_backend

STATES, TAPS, DIRECTIONS = 16, 4, 2
MOST_ROUNDS = 200
BOUND = 5e-5
"""Of float32 after a convolution, three projections and a scan, relative to the largest value."""

Leaves = dict[str, Tensor]
Run = Callable[[Leaves], Tensor]


def leaves_of(dim: int, tokens: int) -> Leaves:
    """Random inputs and parameters of a mixer of width ``dim``, whose inner width is twice that."""
    d, r, k = 2 * dim, math.ceil(dim / 16), DIRECTIONS
    values = {
        "xz": torch.randn(1, tokens, 2 * d),
        "conv_weight": torch.randn(k, d, TAPS) * TAPS**-0.5,
        "conv_bias": torch.randn(k, d),
        "x_proj": torch.randn(k, r + 2 * STATES, d) * d**-0.5,
        "dt_weight": torch.randn(k, d, r) * r**-0.5,
        "dt_bias": torch.randn(k, d) - 3,
        "A": -torch.arange(1.0, STATES + 1).expand(k, d, STATES).contiguous(),
        "D": torch.ones(k, d),
    }
    return {name: value.requires_grad_() for name, value in values.items()}


def conv(leaves: Leaves) -> Tensor:
    """Convolve in both directions with our operator: (b, l, 2, d)."""
    return causal_conv1d(leaves["xz"].chunk(2, -1)[0], leaves["conv_weight"], leaves["conv_bias"], activation="silu")


def core(leaves: Leaves) -> Tensor:
    """Convolve, project and scan in both directions with our operators: (b, 1, l, d)."""
    maps = conv(leaves)
    projections = [F.linear(u, weight) for u, weight in zip(maps.unbind(2), leaves["x_proj"], strict=True)]
    return scan2d(
        maps.unsqueeze(1), torch.stack(projections, 2).unsqueeze(1),
        *(leaves[name] for name in ("dt_weight", "dt_bias", "A", "D")), orders=(ScanOrder.ROW, ScanOrder.ROW_REVERSED),
    )  # fmt: skip


def conv_by_direction(leaves: Leaves) -> list[Tensor]:
    """For each direction a channel-first convolution (b, d, l), the second of the sequence turned round."""
    x = leaves["xz"].chunk(2, -1)[0].transpose(1, 2)
    weights = zip(leaves["conv_weight"], leaves["conv_bias"], strict=True)
    return [
        F.silu(F.conv1d(u.contiguous(), weight[:, None], bias, padding=TAPS - 1, groups=x.shape[1])[..., : x.shape[2]])
        for u, (weight, bias) in zip((x, x.flip(2)), weights, strict=True)
    ]


def conv_per_direction(leaves: Leaves) -> Tensor:
    """Put the convolutions together as `conv` does."""
    forward, backward = conv_by_direction(leaves)
    return torch.stack((forward, backward.flip(2)), 1).permute(0, 3, 1, 2)


def core_per_direction(leaves: Leaves) -> Tensor:
    """Scan each direction by itself, as upstream does, and sum: (b, 1, l, d)."""
    outs = []
    for i, u in enumerate(conv_by_direction(leaves)):
        r = leaves["dt_weight"].shape[2]
        dt, B, C = F.linear(u.transpose(1, 2), leaves["x_proj"][i]).split([r, STATES, STATES], -1)
        delta = F.linear(dt, leaves["dt_weight"][i]).transpose(1, 2)
        outs.append(selective_scan(u, delta, leaves["A"][i], B.transpose(1, 2), C.transpose(1, 2), leaves["D"][i],
                                   leaves["dt_bias"][i], delta_softplus=True))  # fmt: skip
    return (outs[0] + outs[1].flip(2)).transpose(1, 2).unsqueeze(1)


def with_backend(run: Run, backend: str) -> Run:
    """Return a contestant that runs with one of our backends."""

    def call(leaves: Leaves) -> Tensor:
        with use_backend(backend):
            return run(leaves)

    return call


def contestants() -> dict[str, dict[str, Run]]:
    """Who is timed at which part, ours first."""
    backends = [name for name in ("compiled", "reference") if available_backends("cpu")[name].available]
    return {
        "conv": {name: with_backend(conv, name) for name in backends} | {"per direction": conv_per_direction},
        "core": {name: with_backend(core, name) for name in backends} | {"per direction": core_per_direction},
    }


def differentiate(run: Run, leaves: Leaves, grad: Tensor) -> dict[str, Tensor]:
    """Output and gradients by name, without those of what a part does not use."""
    out = run(leaves)
    grads = torch.autograd.grad(out, list(leaves.values()), grad.to(out.dtype), allow_unused=True)
    return {"out": out} | {name: g for name, g in zip(leaves, grads, strict=True) if g is not None}


def time_shape(dim: int, tokens: int, seconds: float) -> list[dict[str, object]]:
    """Check and time both parts at one shape, forward alone and with the gradients; print and return the rows."""
    leaves = leaves_of(dim, tokens)
    rows: list[dict[str, object]] = []
    for part, runs in contestants().items():
        wide = {name: value.detach().double().requires_grad_() for name, value in leaves.items()}
        exact = {"conv": conv_per_direction, "core": core_per_direction}[part]
        grad = torch.randn(exact(wide).shape)
        expected = differentiate(exact, wide, grad.double())
        for name, run in runs.items():
            check(name, differentiate(run, leaves, grad), expected, dict.fromkeys(expected, BOUND))

        def forward(run: Run) -> Tensor:
            with torch.no_grad():
                return run(leaves)

        passes = {
            "forward": {name: lambda run=run: forward(run) for name, run in runs.items()},
            "forward+backward": {
                name: lambda run=run, grad=grad: differentiate(run, leaves, grad) for name, run in runs.items()
            },
        }
        best = next(iter(runs))
        for name_of_pass, calls in passes.items():
            timings = interleave(calls | {GEMM: gemm()}, seconds, MOST_ROUNDS)
            for name, timing in timings.items():
                ratio = timing.minimum / timings[best].minimum
                rows.append({"dim": dim, "tokens": tokens, "part": part, "pass": name_of_pass, "contestant": name,
                             f"over_{best}": ratio, **timing.fields()})  # fmt: skip
                print(f"dim {dim} l={tokens:<5} {part:<5} {name_of_pass:<17} {name:<14} "
                      f"{timing.minimum * 1e3:9.3f} ms  {ratio:6.2f} of {best}", flush=True)  # fmt: skip
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dims", type=int, nargs="+", default=[192, 384], help="widths: of Vim-tiny and Vim-small")
    parser.add_argument("--tokens", type=int, nargs="+", default=[197, 1024], help="224 and 512 pixels a side")
    parser.add_argument("--seconds", type=float, default=3.0, help="per part and pass of a shape")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    rows = []
    for dim in options.dims:
        for tokens in options.tokens:
            torch.manual_seed(0)
            rows += time_shape(dim, tokens, options.seconds)
    if options.json is not None:
        save(options.json, "columnar", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
