"""Time the operators with everyone who can run here: ``python -m benchmarks.ops --threads 1 --json FILE``.

Shapes, boundaries and dtypes are those of `benchmarks.cases`; who takes part, and where a contestant has a declared
limit, stands in `benchmarks.contestants`. Every contestant is compared with the reference in float64 before it is
timed; one that disagrees ends the run. A matrix product of fixed size runs in the same rounds as a yardstick of the
machine. Where the four stages of VMamba-T were all timed, a row with the sum over its blocks follows.

``--device cuda`` times on a GPU instead, with events and inputs that rotate through more than its L2 cache: medians of
at least 30 rounds, their ratios, the share of the floor of `benchmarks.floors`, peak memory, and whether ten runs gave
the same bits.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import accelerator
from benchmarks.accelerator import Accelerator, Gpu, NoGpuError, repeats_bitwise, rotating, sets_needed
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
from benchmarks.floors import Rates, work
from benchmarks.harness import GEMM, DisagreementError, Notes, check, gemm, interleave, save

Row = dict[str, Any]
MOST_ROUNDS = 50
OVER = {"reference": "over_reference", "upstream path": "over_upstream"}
OVER_ON_GPU = OVER | {
    "compiled": "over_compiled",
    "triton": "over_triton",
    "selective_scan_cuda_oflex": "over_oflex",
    "mamba_ssm": "over_mamba_ssm",
}
"""Contestant: field with how often faster than it a row is."""


def runner(contestant: Contestant, problem: Problem, passes: str, grad_out: Tensor) -> Callable[[], dict[str, Tensor]]:
    """Return a function that runs one contestant once and names its output and gradients."""
    half = problem.dtype != torch.float32

    def forward() -> Tensor:
        with torch.autocast(problem.device.type, problem.dtype, enabled=half and problem.boundary == CORE):
            return contestant.forward(problem)

    def run() -> dict[str, Tensor]:
        if passes != BACKWARD:
            with torch.no_grad():
                return {"out": forward()}
        out = forward()
        gradients = torch.autograd.grad(out, list(problem.leaves.values()), grad_out.to(out.dtype))
        return {"out": out.detach()} | dict(zip(problem.leaves, gradients, strict=True))

    return run


def check_all(
    group: Sequence[Contestant], problem: Problem, passes: str, notes: Notes | None = None
) -> list[Contestant]:
    """Compare every contestant with the reference in float64; return those that agree.

    Raises:
        DisagreementError: One of ours computes something else, or any where there are no ``notes`` to name it in.
    """
    expected = expect(problem, passes)
    agree = []
    for contestant in group:
        found = runner(contestant, problem, passes, sampled_grad(problem))()
        what = f"{problem.case.name}, {problem.boundary}, {passes}, {problem.dtype}: {contestant.name}"
        try:
            check(what, sampled(problem, found), expected, problem.bounds)
        except DisagreementError as error:
            if notes is None or not contestant.foreign:
                raise
            notes.skip(what, str(error).removeprefix(f"{what}: "))
        else:
            agree.append(contestant)
    return agree


def who_can(everyone: Sequence[Contestant], problem: Problem, passes: str, notes: Notes) -> list[Contestant]:
    """Return who takes part in a problem, and note who does not and why."""
    group = []
    for contestant in everyone:
        reason = contestant.why_not(problem.case, problem.boundary, passes)
        if reason is None:
            group.append(contestant)
        else:
            notes.skip(contestant.name + contestant.where(problem.case, problem.boundary, passes), reason)
    return group


def row_of(problem: Problem, passes: str) -> Row:
    """The fields all rows of a problem share."""
    case = problem.case
    return {
        "case": case.name,
        "group": case.group,
        "shape": case.shape,
        "states": case.n,
        "boundary": problem.boundary,
        "pass": passes,
        "dtype": str(problem.dtype).removeprefix("torch."),
    }


def time_problem(
    everyone: Sequence[Contestant], problem: Problem, passes: str, seconds: float, notes: Notes
) -> list[Row]:
    """Check and time everyone who can take part; one row each."""
    group = who_can(everyone, problem, passes, notes)
    if not group:
        return []
    check_all(group, problem, passes)
    runs: dict[str, Callable[[], object]] = {c.name: runner(c, problem, passes, problem.grad_out) for c in group}
    fewer = {c.name: rounds for c in group if (rounds := c.rounds(passes)) is not None}
    timings = interleave(runs | {GEMM: gemm()}, seconds, MOST_ROUNDS, fewer)
    rows = [
        row_of(problem, passes) | {"contestant": c.name, "blocks": problem.case.blocks} | timings[c.name].fields()
        for c in group
    ]
    return add_ratios(rows, timings[GEMM].minimum)


def time_on_gpu(
    everyone: Sequence[Contestant],
    problem: Problem,
    passes: str,
    seconds: float,
    notes: Notes,
    gpu: Accelerator,
    rates: Rates,
) -> list[Row]:
    """Check and time everyone who can take part on a GPU; one row each."""
    group = who_can(everyone, problem, passes, notes)
    group = check_all(group, problem, passes, notes) if group else []
    if not group:
        return []
    problems = [problem]
    problems += [problem.another() for _ in range(sets_needed(problem.stream_bytes()) - 1)]
    runs = {c.name: [runner(c, one, passes, one.grad_out) for one in problems] for c in group}
    timings = interleave(
        {name: rotating(sets) for name, sets in runs.items()}, seconds, accelerator.MOST_ROUNDS,
        {c.name: rounds for c in group if (rounds := c.rounds(passes)) is not None},
        measure=gpu.time, turn_seconds=0.0, least_rounds=accelerator.LEAST_ROUNDS,
    )  # fmt: skip
    needed = work(problem.case, problem.boundary, passes, problem.dtype)
    floor, limit = needed.floor(rates)
    rows = []
    for contestant in group:
        name, run = contestant.name, runs[contestant.name][0]
        facts = {"contestant": name, "blocks": problem.case.blocks, "input_sets": len(problems)}
        facts |= {"floor": floor, "floor_limit": limit, "floor_share": floor / timings[name].median}
        facts |= {"floor_bytes": needed.bytes, "floor_special": needed.special, "floor_issue": needed.instructions}
        # What walks over the positions is plain PyTorch and slow: ten more runs of it would show nothing of ours.
        repeats = None if contestant.loop_length is not None else repeats_bitwise(run)
        facts |= {"gpu_peak_bytes": gpu.peak(run), "repeats_bitwise": repeats}
        rows.append(row_of(problem, passes) | facts | timings[name].fields())
    return add_ratios(rows, None, "median", OVER_ON_GPU)


def add_ratios(
    rows: list[Row], gemm_seconds: float | None, figure: str = "minimum", over: Mapping[str, str] = OVER
) -> list[Row]:
    """Add how often faster than the others of the same run each row is, by its minimum or another figure."""
    figures = {row["contestant"]: row[figure] for row in rows}
    for row in rows:
        for other, field in over.items():
            row[field] = figures[other] / row[figure] if other in figures else None
        row["over_gemm"] = gemm_seconds / row[figure] if gemm_seconds is not None else None
    return rows


def model_rows(
    rows: Sequence[Row], cases: Sequence[Case], figure: str = "minimum", over: Mapping[str, str] = OVER
) -> list[Row]:
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
            if "floor" in parts[0]:
                seconds["floor"] = sum(r["blocks"] * r["floor"] for r in parts)
                seconds["floor_share"] = seconds["floor"] / seconds["median"]
            total.append({"case": f"VMamba-T {boundary} at {group}", "group": group, "shape": None, "states": 1,
                          "boundary": boundary, "pass": passes, "dtype": dtype, "contestant": name, "blocks": 0,
                          "spread": max(r["spread"] for r in parts), "rounds": min(r["rounds"] for r in parts)}
                         | seconds)  # fmt: skip
        sums += add_ratios(total, None, figure, over)
    return sums


def print_row(row: Row) -> None:
    """Print one row of the running table."""
    figures = [f"{row['minimum'] * 1e3:10.2f} {row['median'] * 1e3:10.2f} {row['spread'] * 100:5.0f}%"]
    ratios = [row[field] for field in ("over_reference", "over_upstream", "over_gemm")]
    figures += [f"{'-':>9}" if ratio is None else f"{ratio:9.2f}" for ratio in ratios]
    label = f"{row['case']:24} {row['boundary']:8} {row['pass']:16} {row['dtype']:8} {row['contestant']:13}"
    print(label, *figures, flush=True)


def print_gpu_row(row: Row) -> None:
    """Print one row of the running table of a GPU."""
    label = f"{row['case']:24} {row['boundary']:8} {row['pass']:16} {row['dtype']:8} {row['contestant']:25}"
    figures = [f"{row['median'] * 1e3:9.3f} {row['spread'] * 100:4.0f}% {row['floor'] * 1e3:9.3f}"]
    figures += [f"{row.get('floor_limit', 'sum'):>7} {row['floor_share'] * 100:5.1f}%"]
    peak, repeats = row.get("gpu_peak_bytes"), row.get("repeats_bitwise")
    figures += [f"{'-' if peak is None else peak >> 20:>8} {'-' if repeats is None else 'yes' if repeats else 'NO':>5}"]
    figures += [
        f"{'-' if (value := row[field]) is None else format(value, '.2f'):>8}" for field in OVER_ON_GPU.values()
    ]
    print(label, *figures, flush=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--seconds", type=float, help="time for each case, boundary, pass and dtype (6, on a GPU 0.5)")
    parser.add_argument("--json", type=Path, help="also write the raw results here")
    parser.add_argument("--shapes", nargs="+", metavar="NAME", help="names or groups of benchmarks/cases.py")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32"])
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES))
    parser.add_argument("--boundaries", nargs="+", choices=BOUNDARIES, default=list(BOUNDARIES))
    return parser.parse_args(arguments)


def problems_of(options: argparse.Namespace, cases: Sequence[Case]) -> Iterator[tuple[Problem, str]]:
    """Build every problem that is asked for, with its pass."""
    for dtype in options.dtype:
        for case in cases:
            for boundary in (b for b in case.boundaries if b in options.boundaries):
                for passes in options.passes:
                    yield build_problem(case, boundary, DTYPES[dtype], options.device), passes


def run_on_cpu(options: argparse.Namespace, cases: Sequence[Case]) -> None:
    """Time everything on the CPU."""
    notes, everyone, rows = Notes(), contestants(), []
    columns = f"{'min ms':>10} {'median ms':>10} {'spread':>6} {'ref/this':>9} {'upstr/this':>10} {'GEMM/this':>9}"
    print(f"{'case':24} {'boundary':8} {'pass':16} {'dtype':8} {'contestant':13} {columns}")
    for problem, passes in problems_of(options, cases):
        new = time_problem(everyone, problem, passes, options.seconds or 6.0, notes)
        for row in new:
            print_row(row)
        rows += new
    sums = model_rows(rows, cases)
    for row in sums:
        print_row(row)
    if options.json:
        save(options.json, "ops", rows + sums, notes.lines)


def print_assumptions(options: argparse.Namespace, cases: Sequence[Case]) -> None:
    """Print what each floor is made of."""
    for dtype in options.dtype:
        for case in cases:
            for boundary in (b for b in case.boundaries if b in options.boundaries):
                for passes in options.passes:
                    need = work(case, boundary, passes, DTYPES[dtype])
                    counts = f"{need.bytes / 1e6:.1f} MB, {need.special / 1e6:.1f} M special functions"
                    instructions = f"{need.instructions / 1e6:.0f} M instructions"
                    print(f"assumed for {case.name}, {boundary}, {passes}, {dtype}: {counts}, {instructions}")


def run_on_gpu(options: argparse.Namespace, cases: Sequence[Case], gpu: Gpu) -> None:
    """Time everything on a GPU; the file is written after each problem, so that a run cut short leaves what it has."""
    rates, facts = gpu.rates(), gpu.facts()
    notes, everyone, rows = Notes(), contestants(options.device), []
    facts |= {"copy_bytes_per_second": rates.bytes_per_second, "special_per_second": rates.special,
              "instructions_per_second": rates.issue}  # fmt: skip
    print(f"{facts['gpu']}: copy {rates.bytes_per_second / 1e12:.2f} TB/s, {rates.multiprocessors} multiprocessors at "
          f"{rates.clock / 1e9:.2f} GHz: {rates.special / 1e12:.2f} T special functions/s, {rates.issue / 1e12:.1f} T "
          "instructions/s")  # fmt: skip
    print_assumptions(options, cases)
    over = " ".join(f"{name + '/me':>8}" for name in ("ref", "upstr", "comp", "trit", "oflex", "mamba"))
    print(f"{'case':24} {'boundary':8} {'pass':16} {'dtype':8} {'contestant':25} {'median ms':>9} {'iqr':>5} "
          f"{'floor ms':>9} {'limit':>7} {'share':>6} {'peak MiB':>8} {'same':>5} {over}")  # fmt: skip
    for problem, passes in problems_of(options, cases):
        new = time_on_gpu(everyone, problem, passes, options.seconds or 0.5, notes, gpu, rates)
        for row in new:
            print_gpu_row(row)
        rows += new
        if options.json:
            save(options.json, "ops", rows, notes.lines, facts)
    sums = model_rows(rows, cases, "median", OVER_ON_GPU)
    for row in sums:
        print_gpu_row(row)
    if options.json:
        save(options.json, "ops", rows + sums, notes.lines, facts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, time, print; return the exit code."""
    options = parse(arguments)
    try:
        cases = choose_cases(options.shapes, options.device)
        gpu = Gpu() if options.device == "cuda" else None
    except (ValueError, NoGpuError) as error:
        print(error, file=sys.stderr)
        return 2
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    try:
        if gpu is None:
            run_on_cpu(options, cases)
        else:
            run_on_gpu(options, cases, gpu)
    except DisagreementError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
