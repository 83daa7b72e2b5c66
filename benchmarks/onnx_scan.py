"""Time scan2d written as ONNX in onnxruntime beside our kernels: ``python -m benchmarks.onnx_scan --threads 1``.

One image, four routes of 192 channels, as in the middle of VMamba-T, at 196, 3136 and 16384 positions with one state
per channel and with 16. Both are compared with float64 first. Times are of the processor, which other programs on the
machine disturb least; with more threads than one they are sums over the threads.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import DisagreementError
from mmvmamba.deployment.onnx.operators import translations
from mmvmamba.ops import scan2d
from mmvmamba.optional import optional_package
from mmvmamba.testing import relative_error

CHANNELS, ROUTES, RANK = 192, 4, 6
SIDES = (14, 56, 128)
STATES = (1, 16)
BOUND = 5e-6


class Scan(nn.Module):
    """The operator as a network."""

    def forward(self, *tensors: Tensor) -> Tensor:
        """Take the arguments of `scan2d`, return the merged map (b, h, w, d)."""
        return scan2d(*tensors)


def arguments(side: int, states: int, batch: int = 1) -> list[Tensor]:
    """Random arguments of `scan2d` on a square map."""
    torch.manual_seed(side)
    maps = [
        torch.randn(batch, side, side, CHANNELS),
        torch.randn(batch, side, side, ROUTES, RANK + 2 * states),
    ]
    decay, skip = -4 * torch.rand(ROUTES, CHANNELS, states), torch.randn(ROUTES, CHANNELS)
    return [*maps, torch.randn(ROUTES, CHANNELS, RANK), torch.randn(ROUTES, CHANNELS), decay, skip]


def session(states: int, threads: int) -> Any:
    """Return the operator in onnxruntime, for any size of map."""
    free = dict.fromkeys((0, 1, 2), torch.export.Dim.DYNAMIC)
    program = torch.export.export(Scan(), tuple(arguments(5, states, 2)), dynamic_shapes=((free, free, *[None] * 4),))
    written = torch.onnx.export(program, custom_translation_table=translations(), verbose=False)
    onnxruntime = optional_package("onnxruntime", "export")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "scan.onnx"
        if written is not None:
            written.save(str(file))
        return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def milliseconds(runs: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Return the least processor time of each, run in turn."""
    least = [float("inf")] * len(runs)
    for _ in range(rounds):
        for i, run in enumerate(runs):
            started = time.process_time()
            run()
            least[i] = min(least[i], 1000 * (time.process_time() - started))
    return least


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sides", type=int, nargs="+", default=list(SIDES))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print("states positions  onnxruntime ms  ours ms  ratio  error")
    for states in STATES:
        opened = session(states, args.threads)
        names = [value.name for value in opened.get_inputs()]
        for side in args.sides:
            tensors = arguments(side, states)
            feed = {name: value.numpy() for name, value in zip(names, tensors, strict=True)}
            exact = scan2d(*[value.double() for value in tensors])
            error = relative_error(torch.from_numpy(opened.run(None, feed)[0]), exact)
            if not error < BOUND:
                raise DisagreementError(f"{states} states, side {side}: error {error:.1e}, expected below {BOUND}")
            theirs, ours = milliseconds([partial(opened.run, None, feed), partial(scan2d, *tensors)], args.rounds)
            print(f"{states:6} {side**2:9}  {theirs:14.1f}  {ours:7.1f}  {theirs / ours:5.1f}  {error:.1e}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
