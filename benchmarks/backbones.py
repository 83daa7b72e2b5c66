"""Time VMamba against Swin and ConvNeXt on a CPU: ``python -m benchmarks.backbones --threads 1 --train --json FILE``.

All models run in one process, interleaved, on the same image (batch 1) and in the same precision. VMamba is compared
with the reference path in float64 first, the others by the shapes of their maps. A training step is forward,
mean-square loss and backward; ``--optimizer`` includes AdamW. ``--memory`` measures one training step of each model in
a fresh process, weights excluded, gradients included.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import memory
from benchmarks.harness import GEMM, DisagreementError, Notes, Timing, gemm, interleave, save
from benchmarks.models import PEERS, VARIANTS, Peer, check_shapes, check_vmamba, parse_size
from mmvmamba.analysis.scaling import slope
from mmvmamba.analysis.throughput import MeanSquare

Row = dict[str, Any]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SLOPE_SIDES = (224, 384, 512, 768, 1024, 1280, 1536)
MOST_ROUNDS = 50
FORWARD, TRAINING, TRAINING_ADAMW = "forward", "training step", "training step with AdamW"


def forward_step(peer: Peer, model: nn.Module, image: Tensor, dtype: torch.dtype) -> Callable[[], Sequence[Tensor]]:
    """Return a function that infers once, with autocast unless ``dtype`` is float32."""
    model.train(False)

    def run() -> Sequence[Tensor]:
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
        with peer.setting(), torch.no_grad(), autocast:
            outputs: Sequence[Tensor] = model(image)
        return outputs

    return run


def training_step(
    peer: Peer, model: nn.Module, image: Tensor, dtype: torch.dtype, optimizer: bool
) -> Callable[[], Tensor]:
    """Return a function that takes one training step: forward, mean-square loss, backward and, if asked, AdamW."""
    model.train(True)
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05) if optimizer else None
    loss_of = MeanSquare()

    def run() -> Tensor:
        model.zero_grad(set_to_none=True)
        with peer.setting():
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss = loss_of(model(image))
            loss.backward()
        if adamw is not None:
            adamw.step()
        return loss.detach()

    return run


def memory_case(peer: str, variant: str, size: str, dtype: str, threads: int) -> Callable[[], Tensor]:
    """Build one training step; called in a fresh process by `benchmarks.memory`."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    # What the first step of any model loads and keeps (lazy imports, libraries) is no part of this one.
    chosen = PEERS[peer]
    training_step(chosen, chosen.build("nano"), torch.randn(1, 3, 64, 64), DTYPES[dtype], optimizer=False)()
    model = chosen.build(variant)
    return training_step(chosen, model, torch.randn(1, 3, *parse_size(size)), DTYPES[dtype], optimizer=False)


def scan_share(run: Callable[[], object], repeats: int = 3) -> float:
    """Share of ``mmvmamba::scan2d`` in the self time of all operators of a forward."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(repeats):
            run()
    events = profile.key_averages()
    scan = sum(event.self_cpu_time_total for event in events if event.key == "mmvmamba::scan2d")
    return float(scan / sum(event.self_cpu_time_total for event in events))


class Suite:
    """What one call measures; rows are printed as they come."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.dtype = DTYPES[options.dtype]
        self.notes = Notes()
        self.rows: list[Row] = []
        self.peers: dict[str, Peer] = {}
        for key in options.models:
            problem = PEERS[key].problem()
            if problem is None:
                self.peers[key] = PEERS[key]
            else:
                self.notes.skip(PEERS[key].label(options.variant), problem)
        self.models = {key: peer.build(options.variant) for key, peer in self.peers.items()}

    def label(self, key: str) -> str:
        """Name of a model in rows."""
        return self.peers[key].label(self.options.variant)

    def add(self, **fields: Any) -> None:
        """Keep and print a row."""
        row = {"variant": self.options.variant, "dtype": self.options.dtype} | fields
        self.rows.append(row)
        shown = {"minimum": "{:.4f} s", "spread": "spread {:.0%}", "over_swin": "{:.3f} x Swin",
                 "scan_share": "scan2d {:.1%} of the forward", "slope": "slope {:.3f}",
                 "step_bytes": "{:.3e} bytes"}  # fmt: skip
        figures = [text.format(row[key]) for key, text in shown.items() if row.get(key) is not None]
        print(
            f"{row['case']:10} {row['pass']:26} {row['dtype']:9} {row['contestant']:26} {'   '.join(figures)}",
            flush=True,
        )

    def check(self, image: Tensor) -> None:
        """Check all models at this size before they are timed."""
        height, width = image.shape[2:]
        for key, model in self.models.items():
            outputs = forward_step(self.peers[key], model, image, self.dtype)()
            check_shapes(self.label(key), outputs, height, width)

    def time(self, case: str, passes: str, runs: dict[str, Callable[[], object]]) -> dict[str, Timing]:
        """Time all models and add their rows."""
        timings = interleave(runs | {GEMM: gemm()}, self.options.seconds, MOST_ROUNDS)
        swin = timings["swin"].minimum if "swin" in timings else None
        for key in runs:
            this = timings[key]
            ratio = this.minimum / swin if swin is not None else None
            over_gemm = timings[GEMM].minimum / this.minimum
            self.add(case=case, **{"pass": passes}, contestant=self.label(key), over_swin=ratio, over_gemm=over_gemm,
                     **this.fields())  # fmt: skip
        return timings

    def sizes(self) -> None:
        """Forward and, if asked, training step at every size."""
        for size in self.options.sizes:
            image = torch.randn(1, 3, *parse_size(size))
            self.check(image)
            forwards: dict[str, Callable[[], object]] = {
                key: forward_step(self.peers[key], model, image, self.dtype) for key, model in self.models.items()
            }
            self.time(size, FORWARD, forwards)
            for key in (key for key in forwards if PEERS[key].name == "VMamba"):
                share = scan_share(forwards[key])
                self.add(case=size, **{"pass": FORWARD}, contestant=self.label(key), scan_share=share)
            if self.options.train:
                steps: dict[str, Callable[[], object]] = {
                    key: training_step(self.peers[key], model, image, self.dtype, self.options.optimizer)
                    for key, model in self.models.items()
                }
                self.time(size, TRAINING_ADAMW if self.options.optimizer else TRAINING, steps)
                for model in self.models.values():
                    model.zero_grad(set_to_none=True)

    def slopes(self) -> None:
        """Forward over a range of sides, and the slope."""
        seconds: dict[str, list[float]] = {key: [] for key in self.models}
        for side in self.options.slope_sides:
            image = torch.randn(1, 3, side, side)
            self.check(image)
            timings = self.time(str(side), FORWARD, {
                key: forward_step(self.peers[key], model, image, self.dtype) for key, model in self.models.items()
            })  # fmt: skip
            for key in seconds:
                seconds[key].append(timings[key].minimum)
        sides = self.options.slope_sides
        for key, values in seconds.items():
            self.add(case=f"{sides[0]}-{sides[-1]}", **{"pass": FORWARD}, contestant=self.label(key),
                     slope=slope(sides, values))  # fmt: skip

    def memory(self) -> None:
        """Peak memory of one training step, each in fresh processes."""
        for key in self.models:
            arguments = {"peer": key, "variant": self.options.variant, "size": self.options.memory_size,
                         "dtype": self.options.dtype, "threads": self.options.threads}  # fmt: skip
            peak = memory.measure("benchmarks.backbones", "memory_case", arguments, self.options.memory_repeats)
            self.add(case=self.options.memory_size, **{"pass": TRAINING}, contestant=self.label(key),
                     method=peak.method, step_bytes=peak.step, peak_bytes=peak.peak)  # fmt: skip


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--seconds", type=float, default=20.0, help="time for each size and pass")
    parser.add_argument("--json", type=Path, help="also write the raw results here")
    parser.add_argument("--sizes", nargs="*", default=["224", "512", "800x1216"], help="sides or rows x columns")
    parser.add_argument("--variant", choices=VARIANTS, default="tiny", help="nano is for tests")
    parser.add_argument("--models", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="bfloat16: autocast, for all models")
    parser.add_argument("--train", action="store_true", help="also time a training step")
    parser.add_argument("--optimizer", action="store_true", help="with --train: AdamW belongs to the step")
    parser.add_argument("--slope", action="store_true", help="also time a range of sides and print the slope")
    parser.add_argument("--slope-sides", nargs="+", type=int, default=list(SLOPE_SIDES))
    parser.add_argument("--memory", action="store_true", help="also measure the peak memory of a training step")
    parser.add_argument("--memory-size", default="512")
    parser.add_argument(
        "--memory-repeats", type=int, default=3, help="fresh processes for each model; the median counts"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, time, print; return the exit code."""
    options = parse(arguments)
    try:
        for size in [*options.sizes, options.memory_size]:
            parse_size(size)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    suite = Suite(options)
    try:
        for peer in (peer for peer in suite.peers.values() if peer.name == "VMamba"):
            check_vmamba(peer, options.variant, suite.dtype)
        suite.sizes()
        if options.slope:
            suite.slopes()
    except DisagreementError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.memory:
        suite.memory()
    if options.json:
        save(options.json, "backbones", suite.rows, suite.notes.lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
