"""Time scan2d with every backend that can run here: ``python -m benchmarks.ops [--threads 1] [--json FILE]``.

The shapes are the four stages of VMamba-T (s1l8) at 224x224, batch 1. Results are checked against the reference in
float64 before anything is timed. A matrix product of fixed size runs in the same rounds as a yardstick of the machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness import as_fields, interleave, save
from mmvmamba.ops import available_backends, scan2d
from mmvmamba.testing import FORWARD_BOUND, assert_close

STAGES = {"stage 1": (56, 96), "stage 2": (28, 192), "stage 3": (14, 384), "stage 4": (7, 768)}
"""Side of the map and channels."""
ROUTES, STATES = 4, 1


def arguments(side: int, d: int) -> list[Tensor]:
    """Random arguments of scan2d, all requiring gradients."""
    r = d // 16
    tensors = [
        torch.randn(1, side, side, d),
        torch.randn(1, side, side, ROUTES, r + 2 * STATES),
        torch.randn(ROUTES, d, r) * r**-0.5,
        torch.randn(ROUTES, d) - 3,
        -torch.rand(ROUTES, d, STATES) - 0.5,
        torch.ones(ROUTES, d),
    ]
    return [tensor.requires_grad_() for tensor in tensors]


def forward(tensors: list[Tensor], backend: str) -> Callable[[], object]:
    """One forward without gradients."""

    def run() -> object:
        with torch.no_grad():
            return scan2d(*tensors, backend=backend)

    return run


def forward_backward(tensors: list[Tensor], backend: str) -> Callable[[], object]:
    """One forward and backward."""

    def run() -> object:
        out = scan2d(*tensors, backend=backend)
        return torch.autograd.grad(out, tensors, torch.ones_like(out))

    return run


def main() -> None:
    """Parse the command line, check, time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--seconds", type=float, default=8.0, help="time for each shape and pass")
    parser.add_argument("--json", type=Path, help="also write the raw results here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    backends = [name for name, status in available_backends().items() if status.available]
    square = torch.randn(512, 512)
    rows: list[dict[str, object]] = []
    columns = f"{'min ms':>9} {'median ms':>10} {'reference / this':>17} {'GEMM / this':>12}"
    print(f"{'shape':8} {'pass':16} {'backend':10} {columns}")
    for stage, (side, d) in STAGES.items():
        tensors = arguments(side, d)
        exact = scan2d(*(tensor.detach().double() for tensor in tensors), backend="reference")
        for backend in backends:
            assert_close(f"{stage} {backend}", scan2d(*tensors, backend=backend), exact, FORWARD_BOUND[torch.float32])
        for kind, make in (("forward", forward), ("forward+backward", forward_backward)):
            contestants = {backend: make(tensors, backend) for backend in backends}
            timings = interleave(contestants | {"GEMM": lambda: square @ square}, options.seconds, most_rounds=50)
            for backend in backends:
                this = timings[backend].minimum
                ratio, gemm = timings["reference"].minimum / this, timings["GEMM"].minimum / this
                print(f"{stage:8} {kind:16} {backend:10} {this * 1e3:9.2f} {timings[backend].median * 1e3:10.2f} "
                      f"{ratio:17.1f} {gemm:12.3f}", flush=True)  # fmt: skip
                rows.append({"shape": [1, side, side, d], "pass": kind, "backend": backend,
                             "over_reference": ratio, "over_gemm": gemm} | as_fields(timings[backend]))  # fmt: skip
    if options.json:
        save(options.json, rows)


if __name__ == "__main__":
    main()
