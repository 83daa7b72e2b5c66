"""Time every variant of every family on a CPU: ``python -m benchmarks.families --threads 1 --json FILE``.

The list of families is `mmvmamba.models.backbones.FAMILIES`, their variants are the released ones that their converters
name. All run in one process on the same image (batch 1, float32), interleaved with two peers: Swin-T (mmdet) and VMamba
tiny-s1l8, by whose time per multiply-add that of every variant is divided. A training step is forward, mean-square loss
and backward. First the small network of every family is compared with the reference path in float64, its gradient
included, and the maps of every variant are looked at.

A round of all variants at 224 and 512 takes more than a minute; ``--seconds`` and ``--rounds`` bound their number for
each size and pass, ``--families``, ``--variants``, ``--sizes`` and ``--passes`` choose.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.backbones import FORWARD, TRAINING, forward_step, training_step
from benchmarks.harness import DisagreementError, Notes, Timing, interleave, save
from benchmarks.models import DROP_PATH, PEERS, STRIDES, Peer, check_shapes, check_vmamba, parse_size
from mmvmamba.analysis.flops import count_backbone
from mmvmamba.converters.base import load_converter
from mmvmamba.models.backbones import FAMILIES
from mmvmamba.models.backbones.base import BaseBackbone

Row = dict[str, Any]
SWIN, VMAMBA = "Swin-T", "vmamba tiny-s1l8"
"""The two that every variant is compared with."""
FOR_TESTS = "nano"
"""The variant that every family has for tests; it is timed where it is asked for by name."""
CHECK_SIZE = (64, 96)
BOUND = 1e-4
"""That of the gradients of whole models in tests/test_models/test_same_features.py; the weights here are random."""


def variants(family: str) -> tuple[str, ...]:
    """Return the released variants of a family, then the one for tests."""
    return (*load_converter(family).released, FOR_TESTS)


def build(family: str, variant: str) -> nn.Module:
    """Build a variant as a dense feature extractor, with the drop path of all."""
    cls: Callable[..., nn.Module] = FAMILIES[family]
    return cls(variant, drop_path_rate=DROP_PATH)


class Suite:
    """What one call measures; rows are printed as they come."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.notes = Notes()
        self.rows: list[Row] = []
        #: What is timed, in this order, and the family and variant it is; the peer has neither.
        self.models: dict[str, nn.Module] = {}
        self.origin: dict[str, tuple[str, str]] = {}
        problem = PEERS["swin"].problem()
        if problem is None:
            self.models[SWIN] = PEERS["swin"].build("nano" if options.nano_peers else "tiny")
        else:
            self.notes.skip(SWIN, problem)
        self.add(*VMAMBA.split())
        for family in options.families:
            for variant in variants(family):
                if variant in (options.variants or variants(family)[:-1]):
                    self.add(family, variant)

    def add(self, family: str, variant: str) -> None:
        """Build a variant, if it is not there."""
        label = f"{family} {variant}"
        if label not in self.models:
            arch = FOR_TESTS if self.options.nano_peers and label == VMAMBA else variant
            self.models[label], self.origin[label] = build(family, arch), (family, variant)

    def check(self) -> None:
        """Compare the small networks with the reference and look at the maps of all that is timed."""
        for family in dict.fromkeys(family for family, _ in self.origin.values()):
            peer = Peer(family, functools.partial(build, family), "mmvmamba")
            check_vmamba(peer, FOR_TESTS, torch.float32, BOUND)
        image = torch.randn(1, 3, *CHECK_SIZE)
        for label, model in self.models.items():
            strides = (
                [model.stage_strides[i] for i in model.out_indices] if isinstance(model, BaseBackbone) else STRIDES
            )
            check_shapes(label, self.steps(FORWARD, {label: model}, image)[label](), *CHECK_SIZE, strides)

    def steps(self, passes: str, models: Mapping[str, nn.Module], image: Tensor) -> dict[str, Callable[[], Any]]:
        """Return what is timed of every model."""
        peer = PEERS["vmamba"]  # says that nothing is set around a run
        if passes == FORWARD:
            return {label: forward_step(peer, model, image, torch.float32) for label, model in models.items()}
        return {
            label: _without_gradients(model, training_step(peer, model, image, torch.float32, optimizer=False))
            for label, model in models.items()
        }

    def run(self) -> None:
        """Time all of it."""
        for size in self.options.sizes:
            image = torch.randn(1, 3, *parse_size(size))
            flops = {label: count_backbone(model, *parse_size(size)).flops for label, model in self.models.items()}
            for passes in self.options.passes:
                begin = time.perf_counter()
                runs = self.steps(passes, self.models, image)
                timings = interleave(runs, self.options.seconds, self.options.rounds)
                self.report(size, passes, flops, timings)
                print(f"-- {size}, {passes}: {time.perf_counter() - begin:.0f} s", flush=True)

    def report(self, size: str, passes: str, flops: Mapping[str, int], timings: Mapping[str, Timing]) -> None:
        """Keep and print the rows of one size and pass."""
        swin = timings[SWIN].minimum if SWIN in timings else None
        per_flop = timings[VMAMBA].minimum / flops[VMAMBA]
        for label, timing in timings.items():
            family, variant = self.origin.get(label, (None, None))
            row: Row = {
                "case": size,
                "pass": passes,
                "dtype": "float32",
                "contestant": label,
                "family": family,
                "variant": variant,
                "flops": flops[label],
                "over_swin": None if swin is None else timing.minimum / swin,
                "per_flop": timing.minimum / flops[label] / per_flop,
                **timing.fields(),
            }
            self.rows.append(row)
            ratio = "" if swin is None else f"{row['over_swin']:7.3f} x Swin-T   "
            print(
                f"{size:8} {passes:14} {label:28} {timing.minimum:9.4f} s   {ratio}{flops[label] / 1e9:8.2f} G   "
                f"{row['per_flop']:6.3f} x VMamba-T's time per FLOP   spread {timing.spread:.0%}",
                flush=True,
            )


def _without_gradients(model: nn.Module, run: Callable[[], object]) -> Callable[[], None]:
    """Free the gradients after every step: those of all models at once are as large as all weights."""

    def step() -> None:
        run()
        model.zero_grad(set_to_none=True)

    return step


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--seconds", type=float, default=300.0, help="time for each size and pass, but three rounds")
    parser.add_argument("--rounds", type=int, default=20, help="most rounds for each size and pass")
    parser.add_argument("--json", type=Path, help="also write the raw results here")
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--variants", nargs="+", help="of the families that have them (default: all)")
    parser.add_argument("--sizes", nargs="+", default=["224", "512"], help="sides or rows x columns")
    parser.add_argument("--passes", nargs="+", choices=[FORWARD, TRAINING], default=[FORWARD, TRAINING])
    parser.add_argument("--nano-peers", action="store_true", help="small networks for the two peers, for tests")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, time, print; return the exit code."""
    options = parse(arguments)
    try:
        for size in options.sizes:
            parse_size(size)
        if options.rounds < 1:
            raise ValueError(f"--rounds is {options.rounds}, expected at least 1. Correct it.")
        offered = [name for family in options.families for name in variants(family)]
        if unknown := [name for name in options.variants or () if name not in offered]:
            raise ValueError(
                f"--variants names {', '.join(unknown)}, expected variants of {', '.join(options.families)}: "
                f"{', '.join(dict.fromkeys(offered))}. Correct it, or add the family to --families."
            )
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    suite = Suite(options)
    try:
        suite.check()
        suite.run()
    except DisagreementError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.json:
        save(options.json, "families", suite.rows, suite.notes.lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
