"""Time the operators with everyone who can run here: ``python -m benchmarks.ops --threads 1 --json FILE``.

Shapes, boundaries and dtypes are those of `benchmarks.cases`; who takes part, and where a contestant has a declared
limit, stands in `benchmarks.contestants`. Every contestant is compared with the reference in float64 before it is
timed; one that disagrees ends the run. A matrix product of fixed size runs in the same rounds as a yardstick of the
machine. Where the four stages of VMamba-T were all timed, a row with the sum over its blocks follows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import (
    BACKWARD,
    BOUNDARIES,
    CORE,
    DTYPES,
    PASSES,
    Case,
    Problem,
    build_problem,
    choose_cases,
    expect,
    sampled,
    sampled_grad,
)
from benchmarks.contestants import Contestant, contestants
from benchmarks.harness import GEMM, DisagreementError, Notes, check, gemm, interleave, save

Row = dict[str, Any]
MOST_ROUNDS = 50


def runner(contestant: Contestant, problem: Problem, passes: str, grad_out: Tensor) -> Callable[[], dict[str, Tensor]]:
    """Return a function that runs one contestant once and names its output and gradients."""
    half = problem.dtype != torch.float32

    def forward() -> Tensor:
        with torch.autocast("cpu", problem.dtype, enabled=half and problem.boundary == CORE):
            return contestant.forward(problem)

    def run() -> dict[str, Tensor]:
        if passes != BACKWARD:
            with torch.no_grad():
                return {"out": forward()}
        out = forward()
        gradients = torch.autograd.grad(out, list(problem.leaves.values()), grad_out.to(out.dtype))
        return {"out": out.detach()} | dict(zip(problem.leaves, gradients, strict=True))

    return run


def check_all(group: Sequence[Contestant], problem: Problem, passes: str) -> None:
    """Compare every contestant with the reference in float64.

    Raises:
        DisagreementError: One computes something else.
    """
    expected = expect(problem, passes)
    for contestant in group:
        found = runner(contestant, problem, passes, sampled_grad(problem))()
        what = f"{problem.case.name}, {problem.boundary}, {passes}, {problem.dtype}: {contestant.name}"
        check(what, sampled(problem, found), expected, problem.bounds)


def time_problem(
    everyone: Sequence[Contestant], problem: Problem, passes: str, seconds: float, notes: Notes
) -> list[Row]:
    """Check and time everyone who can take part; one row each."""
    case, boundary = problem.case, problem.boundary
    group = []
    for contestant in everyone:
        reason = contestant.why_not(case, boundary, passes)
        if reason is None:
            group.append(contestant)
        else:
            notes.skip(contestant.name + contestant.where(case, boundary, passes), reason)
    if not group:
        return []
    check_all(group, problem, passes)
    runs: dict[str, Callable[[], object]] = {c.name: runner(c, problem, passes, problem.grad_out) for c in group}
    fewer = {c.name: rounds for c in group if (rounds := c.rounds(passes)) is not None}
    timings = interleave(runs | {GEMM: gemm()}, seconds, MOST_ROUNDS, fewer)
    row = {"case": case.name, "group": case.group, "shape": case.shape, "states": case.n, "boundary": boundary,
           "pass": passes, "dtype": str(problem.dtype).removeprefix("torch.")}  # fmt: skip
    rows = [row | {"contestant": c.name, "blocks": case.blocks} | timings[c.name].fields() for c in group]
    return add_ratios(rows, timings[GEMM].minimum)


def add_ratios(rows: list[Row], gemm_seconds: float | None) -> list[Row]:
    """Add how often faster than the others of the same run each row is (of minima)."""
    minima = {row["contestant"]: row["minimum"] for row in rows}
    for row in rows:
        for other, field in (("reference", "over_reference"), ("upstream path", "over_upstream")):
            row[field] = minima[other] / row["minimum"] if other in minima else None
        row["over_gemm"] = gemm_seconds / row["minimum"] if gemm_seconds is not None else None
    return rows


def model_rows(rows: Sequence[Row], cases: Sequence[Case]) -> list[Row]:
    """Sum the stages of each model, weighted with their blocks, for contestants that ran in all of them."""
    sums: list[Row] = []
    stages: dict[str, set[str]] = {}
    for case in cases:
        if case.blocks:
            stages.setdefault(case.group, set()).add(case.name)
    kinds = dict.fromkeys((r["group"], r["boundary"], r["pass"], r["dtype"]) for r in rows if r["blocks"])
    for group, boundary, passes, dtype in kinds:
        same = [
            r for r in rows if (r["group"], r["boundary"], r["pass"], r["dtype"]) == (group, boundary, passes, dtype)
        ]
        total = []
        for name in dict.fromkeys(r["contestant"] for r in same):
            parts = [r for r in same if r["contestant"] == name]
            if {r["case"] for r in parts} != stages[group]:
                continue
            seconds = {key: sum(r["blocks"] * r[key] for r in parts) for key in ("minimum", "median")}
            total.append({"case": f"VMamba-T {boundary} at {group}", "group": group, "shape": None, "states": 1,
                          "boundary": boundary, "pass": passes, "dtype": dtype, "contestant": name, "blocks": 0,
                          "spread": max(r["spread"] for r in parts), "rounds": min(r["rounds"] for r in parts)}
                         | seconds)  # fmt: skip
        sums += add_ratios(total, None)
    return sums


def print_row(row: Row) -> None:
    """Print one row of the running table."""
    figures = [f"{row['minimum'] * 1e3:10.2f} {row['median'] * 1e3:10.2f} {row['spread'] * 100:5.0f}%"]
    ratios = [row[field] for field in ("over_reference", "over_upstream", "over_gemm")]
    figures += [f"{'-':>9}" if ratio is None else f"{ratio:9.2f}" for ratio in ratios]
    label = f"{row['case']:24} {row['boundary']:8} {row['pass']:16} {row['dtype']:8} {row['contestant']:13}"
    print(label, *figures, flush=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--seconds", type=float, default=6.0, help="time for each case, boundary, pass and dtype")
    parser.add_argument("--json", type=Path, help="also write the raw results here")
    parser.add_argument("--shapes", nargs="+", metavar="NAME", help="names or groups of benchmarks/cases.py")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32"])
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES))
    parser.add_argument("--boundaries", nargs="+", choices=BOUNDARIES, default=list(BOUNDARIES))
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, time, print; return the exit code."""
    options = parse(arguments)
    try:
        cases = choose_cases(options.shapes)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    notes, everyone, rows = Notes(), contestants(), []
    columns = f"{'min ms':>10} {'median ms':>10} {'spread':>6} {'ref/this':>9} {'upstr/this':>10} {'GEMM/this':>9}"
    print(f"{'case':24} {'boundary':8} {'pass':16} {'dtype':8} {'contestant':13} {columns}")
    try:
        for dtype in options.dtype:
            for case in cases:
                for boundary in (b for b in case.boundaries if b in options.boundaries):
                    for passes in options.passes:
                        problem = build_problem(case, boundary, DTYPES[dtype])
                        new = time_problem(everyone, problem, passes, options.seconds, notes)
                        for row in new:
                            print_row(row)
                        rows += new
    except DisagreementError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    sums = model_rows(rows, cases)
    for row in sums:
        print_row(row)
    if options.json:
        save(options.json, "ops", rows + sums, notes.lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
