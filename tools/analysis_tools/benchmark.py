"""Throughput, latency and memory of models side by side: ``python tools/analysis_tools/benchmark.py MODEL...``.

All models take turns in one process, at one precision, on the same random images. Latency is that of a call with the
whole batch: its median (50th percentile), 90th and 99th percentile; throughput is images over the median. Memory is
what a call adds to the weights at its highest moment. ``--train`` measures training steps (forward, mean-square
distance to random outputs, backward, AdamW), too. Writes benchmark.png, benchmark.csv and benchmark.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from mmvmamba.analysis.environment import device_facts
from mmvmamba.analysis.memory import how_measured
from mmvmamba.analysis.outputs import new_figure, output_folder, save_figure, write_csv, write_json
from mmvmamba.analysis.throughput import DTYPES, Measurement, Settings, figure_of, measure
from mmvmamba.apis import run_command
from mmvmamba.apis.measured import BACKBONE, PARTS, measured_parts, measuring_device
from mmvmamba.apis.networks import add_network_arguments, networks_from
from mmvmamba.apis.progress import progress_of
from mmvmamba.errors import ConfigError


def parse_args() -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_network_arguments(parser)
    parser.add_argument("--part", choices=PARTS, default=BACKBONE, help=f"what is measured (default: {BACKBONE})")
    parser.add_argument(
        "--shape", type=int, nargs=2, default=[224, 224], metavar=("HEIGHT", "WIDTH"), help="of the images (224 224)"
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1], metavar="N", help="images of a call (1)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="for all models; autocast if not float32")
    parser.add_argument("--train", action="store_true", help="measure training steps, too")
    parser.add_argument("--seconds", type=float, default=20.0, help="time for each case, all models together (20)")
    parser.add_argument("--threads", type=int, help="of the CPU (default: PyTorch's choice)")
    parser.add_argument("--quick", action="store_true", help="5 seconds for each case")
    parser.add_argument("--out-dir", default="work_dirs/benchmark", help="work_dirs/benchmark")
    return parser.parse_args()


def print_table(measurements: Sequence[Measurement]) -> None:
    """Print a line for each measurement."""
    width = max(len(m.model) for m in measurements)
    print(
        f"{'model':<{width}}  {'step':<14}{'batch':>6}{'images/s':>11}{'p50 ms':>10}{'p90 ms':>10}{'p99 ms':>10}"
        f"{'least ms':>10}{'calls':>7}{'weights MiB':>13}{'added MiB':>11}"
    )
    for m in measurements:
        start = f"{m.model:<{width}}  {m.step:<14}{m.batch:>6}"
        if m.problem:
            print(f"{start}  {m.problem}")
            continue
        times = "".join(f"{1e3 * (value or 0):>10.1f}" for value in (m.median, m.p90, m.p99, m.minimum))
        added = "unknown" if m.step_bytes is None else f"{m.step_bytes / 2**20:.0f}"
        print(
            f"{start}{m.images_per_second:>11.2f}{times}{m.rounds:>7}{(m.weights_bytes or 0) / 2**20:>13.1f}{added:>11}"
        )


def main() -> None:
    """Measure."""
    args = parse_args()
    device = measuring_device(args.device)
    settings = Settings(args.dtype, device, 5.0 if args.quick else args.seconds)
    if min(*args.batch, *args.shape) < 1 or (args.threads is not None and args.threads < 1):
        raise ConfigError(
            f"batch is {args.batch}, shape {args.shape} and threads {args.threads}, expected at least 1 everywhere. "
            "Correct them."
        )
    new_figure()
    folder = output_folder(args.out_dir)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    subjects = measured_parts(networks_from(args), args.part, train=args.train)
    cases = [(batch, train) for batch in args.batch for train in ((False, True) if args.train else (False,))]
    measurements: list[Measurement] = []
    torch.manual_seed(0)
    with progress_of("cases", len(cases)) as advance:
        for batch, train in cases:
            images = torch.randn(batch, 3, *args.shape, device=device)
            measurements += measure(subjects, images, settings, train=train)
            advance()
    facts = device_facts(device)
    print_table(measurements)
    print(f"memory: {how_measured(device)}")
    rows = [m.row() for m in measurements]
    write_csv(folder / "benchmark.csv", rows)
    write_json(
        folder / "benchmark.json",
        {"part": args.part, "environment": facts, "memory": how_measured(device), "measurements": rows},
    )
    if any(not m.problem for m in measurements):
        save_figure(figure_of(measurements, f"{facts['device']}, {args.part}"), folder / "benchmark.png")
    print(f"written to {folder}: benchmark.png, benchmark.csv, benchmark.json")


if __name__ == "__main__":
    run_command(main)
