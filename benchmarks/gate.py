"""The performance gate: ``python -m benchmarks.gate`` fails if an operator lost speed, ``--update`` records it.

Everything is measured on one thread in one run, interleaved with a matrix product of fixed size and with the reference
path; only ratios are compared (`benchmarks.gate_logic` has the rules), with those recorded in ``gate.json`` for the
same instruction set, CPU model and release of PyTorch. A machine that is not in the file is held to a floor alone, and
that is said: twice the worst ours / reference recorded for its instruction set, or beating the reference where there is
none. A new operator joins by one entry in `CASES`.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import BACKWARD, FORWARD, SCAN, SEQUENCE, Case, build_problem
from benchmarks.contestants import contestants
from benchmarks.gate_logic import (
    ATTEMPTS,
    FLOOR,
    GEMM,
    MOST_NOISE,
    OURS,
    REFERENCE,
    YARDSTICKS,
    Rounds,
    decide,
    failure_message,
    floors,
    key_of,
    updated,
)
from benchmarks.harness import DisagreementError, cpu_facts, gemm, instruction_set
from benchmarks.ops import check_all, runner
from mmvmamba.ops import causal_conv1d, depthwise_conv2d
from mmvmamba.testing import assert_close

FILE = Path(__file__).with_name("gate.json")
REPEATS = 4
"""Runs of ours and the GEMM for each round: they are short, and the quickest counts."""
RECORD_ATTEMPTS = 2 * ATTEMPTS
RECORD_NOISE = 3 * MOST_NOISE  # what a shared virtual machine reaches at its quietest

Runs = Mapping[str, Callable[[], object]]


@dataclass(frozen=True)
class GateCase:
    """A name and how to build, and check, the three functions `OURS`, `GEMM` and `REFERENCE`."""

    name: str
    build: Callable[[], Runs]


def _operator(case: Case, boundary: str, passes: str) -> GateCase:
    def build() -> Runs:
        torch.manual_seed(0)
        problem = build_problem(case, boundary, torch.float32)
        group = {c.name: c for c in contestants() if c.name in ("compiled", "reference")}
        check_all(list(group.values()), problem, passes)
        runs = {name: runner(contestant, problem, passes, problem.grad_out) for name, contestant in group.items()}
        return {OURS: runs["compiled"], REFERENCE: runs["reference"], GEMM: gemm()}

    return GateCase(f"{case.name}, {passes}", build)


_SHAPES = (
    (Case("scan2d 28x28x192", "gate", 1, 28, 28, 192), SCAN),
    (Case("scan2d 56x56x96", "gate", 1, 56, 56, 96), SCAN),
    (Case("selective_scan 192x1024 n=1", "gate", 1, 1, 1024, 192, boundaries=(SEQUENCE,)), SEQUENCE),
    (Case("selective_scan 192x1024 n=16", "gate", 1, 1, 1024, 192, n=16, boundaries=(SEQUENCE,)), SEQUENCE),
)


def _convolution(
    name: str, operator: Callable[..., Tensor], shapes: Sequence[tuple[int, ...]], passes: str
) -> GateCase:
    """Return a case of a convolution; ``shapes`` are those of its three tensors and of its output."""

    def build() -> Runs:
        torch.manual_seed(0)
        *tensors, grad_out = (torch.randn(shape) for shape in shapes)
        leaves = [tensor.requires_grad_(passes == BACKWARD) for tensor in tensors]

        def run(backend: str) -> Callable[[], object]:
            def call() -> object:
                out = operator(*leaves, activation="silu", backend=backend)
                return torch.autograd.grad(out, leaves, grad_out) if passes == BACKWARD else (out,)

            return call

        runs = {OURS: run("compiled"), REFERENCE: run("reference"), GEMM: gemm()}
        for ours, reference in zip(runs[OURS](), runs[REFERENCE](), strict=True):  # type: ignore[call-overload]
            assert_close(operator.__name__, ours, reference.double(), 1e-5)
        return runs

    return GateCase(f"{name}, {passes}", build)


_CONVOLUTIONS = (
    ("depthwise_conv2d 28x28x192", depthwise_conv2d, ((1, 28, 28, 192), (192, 1, 3, 3), (192,), (1, 28, 28, 192))),
    ("causal_conv1d 197x384", causal_conv1d, ((1, 197, 384), (2, 384, 4), (2, 384), (1, 197, 2, 384))),
)
CASES: tuple[GateCase, ...] = (
    *(_operator(case, boundary, passes) for case, boundary in _SHAPES for passes in (FORWARD, BACKWARD)),
    *(_convolution(*case, passes) for case in _CONVOLUTIONS for passes in (FORWARD, BACKWARD)),
)
"""An operator of another kind adds ``GateCase(name, build)``; ``build`` checks, then returns the three functions."""


def measure(runs: Runs, rounds: int, clock: Callable[[], float] = time.perf_counter) -> Rounds:
    """Time interleaved rounds; within a round the quickest of `REPEATS` runs counts, the slow reference runs once.

    Args:
        runs: By contestant.
        rounds: How many.
        clock: Seconds since some moment.
    """
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            quickest = float("inf")
            for _ in range(1 if name == REFERENCE else REPEATS):
                start = clock()
                run()
                quickest = min(quickest, clock() - start)
            seconds[name].append(quickest)
    return Rounds(seconds)


def this_machine() -> dict[str, Any]:
    """What recorded ratios depend on."""
    facts = cpu_facts()
    cpu = "-".join(facts.get(key, "?") for key in ("vendor_id", "cpu family", "model"))
    return {
        "instruction_set": instruction_set(),
        "cpu": cpu,
        "torch": ".".join(torch.__version__.split(".")[:2]),
        "device": facts.get("model name", "unknown"),
    }


def load(path: Path) -> list[dict[str, Any]]:
    """Read the recorded machines.

    Raises:
        ValueError: The file is not what ``--update`` writes.
    """
    try:
        machines = json.loads(path.read_text())["machines"]
        for machine in machines:
            key_of(machine)
            for ratios in machine["ratios"].values():
                if not all(ratios[yardstick] > 0 for yardstick in YARDSTICKS):
                    raise ValueError(f"a ratio of {machine['cpu']} is not positive")
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error!r}, expected a file written by --update. Restore it from git.") from error
    return list(machines)


def expectation(
    machines: Sequence[Mapping[str, Any]], machine: Mapping[str, Any]
) -> dict[str, dict[str, float]] | None:
    """The recorded ratios of a machine by case and yardstick, or None."""
    return next((dict(m["ratios"]) for m in machines if key_of(m) == key_of(machine)), None)


def gate(
    cases: Sequence[GateCase],
    recorded: Mapping[str, Mapping[str, float]] | None,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
    floors: Mapping[str, float] | None = None,
) -> list[str]:
    """Judge every case; return the messages of those that fail. ``floors``: by case, else `FLOOR`."""
    problems = []
    for case in cases:
        expected = None if recorded is None else recorded.get(case.name)
        if recorded is not None and expected is None:
            print(f"     {case.name}: not recorded for this machine, only the floor counts; record it with --update")
        runs = case.build()
        floor = (floors or {}).get(case.name, FLOOR)
        verdict = decide(case.name, functools.partial(measure, runs, rounds, clock), expected, floor=floor)
        print(verdict.line(), flush=True)
        if not verdict.passed:
            problems.append(failure_message(verdict))
    return problems


def record(
    cases: Sequence[GateCase], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, dict[str, float]]:
    """Measure every case, longer than the gate does, and return its ratios.

    Raises:
        ValueError: A case misses the floor, which no file can excuse, or the machine is too noisy: a yardstick that was
            held up all the time would make the ratio look better than it is, and fail every later run.
    """
    ratios = {}
    for case in cases:
        runs = case.build()
        result = measure(runs, rounds, clock)
        for attempt in range(1, RECORD_ATTEMPTS):
            if attempt >= ATTEMPTS and _noise(result) <= MOST_NOISE:
                break
            result = result.joined(measure(runs, rounds, clock))
        ratios[case.name] = {yardstick: float(f"{result.ratio(yardstick):.4g}") for yardstick in YARDSTICKS}
        print(f"{case.name}: {ratios[case.name]}, noise {_noise(result):.1%}", flush=True)
        if ratios[case.name][REFERENCE] >= FLOOR:
            raise ValueError(
                f"{case.name}: ours/{REFERENCE} is {ratios[case.name][REFERENCE]}, expected below {FLOOR:g}; nothing "
                "is recorded. Repair the kernel."
            )
        if _noise(result) > RECORD_NOISE:
            raise ValueError(
                f"{case.name}: the quickest rounds vary by {_noise(result):.0%}, expected at most {RECORD_NOISE:.0%}; "
                "nothing is recorded. Run where nothing else runs."
            )
    return ratios


def _noise(rounds: Rounds) -> float:
    return max(rounds.noise(yardstick) for yardstick in YARDSTICKS)


def main(
    arguments: Sequence[str] | None = None,
    cases: Sequence[GateCase] = CASES,
    clock: Callable[[], float] = time.perf_counter,
) -> int:
    """Run the gate; return the exit code: 1 for a loss, 2 for an error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="record what is found for this machine")
    parser.add_argument("--rounds", type=int, default=12, help="interleaved rounds for each measurement")
    parser.add_argument("--file", type=Path, default=FILE, help="the recorded ratios")
    options = parser.parse_args(arguments)
    if instruction_set() is None:
        print("error: found no compiled extension, expected one. Run `make install`.", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    try:
        machines = load(options.file)
        machine = this_machine()
        if options.update:
            machine["ratios"] = record(cases, options.rounds, clock)
            text = json.dumps({"machines": updated(machines, machine)}, indent=1)
            options.file.write_text(text + "\n")
            print(f"recorded in {options.file}")
            return 0
        recorded = expectation(machines, machine)
        if recorded is None:
            known = ", ".join(" ".join(key_of(m)) for m in machines) or "nothing"
            print(f"This machine ({' '.join(key_of(machine))}) is not in {options.file.name}, which has {known}: only "
                  "a floor counts. --update records it.")  # fmt: skip
        limits = floors(machines, machine["instruction_set"]) if recorded is None else None
        problems = gate(cases, recorded, options.rounds, clock, limits)
    except (OSError, ValueError, DisagreementError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
