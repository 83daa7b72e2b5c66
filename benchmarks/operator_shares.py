"""Where a forward of some variants spends its time: ``python -m benchmarks.operator_shares vmamba tiny-s1l8``.

One thread, batch 1, float32, after a warm-up; of every operator the smallest self time of several profiled runs, as a
share of the sum of these. It says why a variant takes longer per multiply-add than another: what is not a product or a
scan counts (almost) none.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
from torch import nn

from benchmarks.families import build, variants
from mmvmamba.models.backbones import FAMILIES


def shares(model: nn.Module, side: int, runs: int) -> list[tuple[str, int, float]]:
    """Return operator, calls and share of the time of a forward, the largest first."""
    model.eval()
    image = torch.randn(1, 3, side, side)
    best: dict[str, tuple[float, int]] = {}
    with torch.no_grad():
        for _ in range(2):
            model(image)
        for _ in range(runs):
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                model(image)
            for event in profile.key_averages():
                time = float(event.self_cpu_time_total)
                best[event.key] = min(best.get(event.key, (time, 0))[0], time), event.count
    total = sum(time for time, _ in best.values())
    return sorted(((name, count, time / total) for name, (time, count) in best.items()), key=lambda row: -row[2])


def main(arguments: Sequence[str] | None = None) -> int:
    """Profile and print; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=list(FAMILIES))
    parser.add_argument("variants", nargs="+", help="of this family")
    parser.add_argument("--side", type=int, default=224, help="of the square image")
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--top", type=int, default=6, help="operators to print")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.variants if name not in variants(options.family)]:
        print(
            f"{options.family} has no {', '.join(unknown)}, expected variants among "
            f"{', '.join(variants(options.family))}. Correct it.",
            file=sys.stderr,
        )
        return 2
    torch.set_num_threads(1)
    for variant in options.variants:
        for name, calls, share in shares(build(options.family, variant), options.side, options.runs)[: options.top]:
            print(f"{options.family} {variant:14} {name:32} {calls:4} calls {share:6.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
