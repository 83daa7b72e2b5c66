"""Everything that waits for a GPU, in one command that ends within nine minutes: ``python3 scripts/gpu_session.py``.

For a bare machine that is lent for a short time and has no network: Python with PyTorch (CUDA), Triton, pytest and
setuptools, and nvcc. It builds the extension for GPUs of generation 9.0 (H100, H200; another ``TORCH_CUDA_ARCH_LIST``
in the environment is used instead), runs the tests marked ``gpu`` and the benchmarks, the most
telling first: the CUDA kernels, then Triton's, then the rest. Every step has a time limit, to which it may add what
earlier ones left over; one at its limit is interrupted first, so that pytest still prints what failed, and killed after
that. One that fails does not stop the rest. Logs and results go to the folder ``$OUT`` (at most eight files; without it
build/gpu_session), a short table is printed last, and the exit code is 0 only if every step was run and passed.

The models need mmengine. Where the machine has none, fetch wheels for Python 3.12 on x86-64 beforehand with
``--fetch-wheels`` (they go to .whl) and take them along; they are unpacked to a temporary folder, not installed.

``--dry-run`` prints the commands and runs what shows something without a GPU: the tests are collected, the benchmarks
run on the CPU with tiny shapes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WHEELS = ROOT / ".whl"
BUDGET = 540.0
"""Seconds for everything; what lends the machine ends a command after ten minutes."""
LEAST = 10.0
"""A step is not begun with less time than this."""
GRACE = 15.0
"""Seconds for a step to end after it was interrupted."""
STRETCH = 2.0
"""A step gets at most so many times its limit where earlier ones left time over."""
TAIL = 12
FIRST_TESTS = ("operator", "determin", "isolat", "bad_input", "graph", "autocast", "train", "model", "leak", "sanitiz")
"""Words in the names of test files, the most telling first; files with none of them come last but one."""
PARTS = {
    "test_operators": (("compiled", "compiled or every_backend", 75.0), ("triton", "triton", 45.0),
                       ("rest", "not compiled and not triton and not every_backend", 30.0)),
    "test_sanitizer": (("memcheck", "memcheck and compiled", 40.0), ("rest", "not (memcheck and compiled)", 20.0)),
    "test_models": (("all", "", 40.0),),
    "test_measurements": (("all", "", 10.0),),
    # These two need the mm* packages, which the lent machine lacks: there they only say so, in seconds.
    "test_configs": (("all", "", 10.0),),
    "test_segmentors": (("all", "", 10.0),),
}  # fmt: skip
"""Steps of the test files: name, what pytest selects by (nothing: all), time limit."""
MMENGINE = ("onedl-mmengine==0.10.12", "addict==2.4.0", "termcolor==3.3.0", "yapf==0.43.0", "platformdirs==4.14.5")
"""What the image of the lent machine lacks of the needs of mmvmamba.models."""


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: As printed.
        command: Arguments; ``python`` stands for this interpreter.
        seconds: Its time limit.
        dry: What runs in its place without a GPU; None: it is only printed.
        environment: Variables on top of those of this process.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    dry: tuple[str, ...] | None = None
    environment: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What became of a step: ``ok``, ``failed``, ``timeout``, ``no time`` or ``printed``; and its last line."""

    name: str
    result: str
    seconds: float
    last_line: str


def test_files(folder: Path) -> list[Path]:
    """Return the files with tests for a GPU, the most telling first."""
    files = sorted(folder.glob("test_gpu/test_*.py")) + sorted(folder.glob("test_gpu*.py"))

    def rank(path: Path) -> int:
        words = [index for index, word in enumerate(FIRST_TESTS) if word in path.stem]
        return words[0] if words else len(FIRST_TESTS) - 1

    return sorted(files, key=rank)


def _bench(name: str, seconds: float, out: Path, *arguments: str) -> Step:
    common = ("python", "-m", "benchmarks.ops", "--json")
    results, tried = str(out / f"ops_{name}.json"), str(out / f"dry_{name}.json")
    tiny = ("--shapes", "smoke", "--seconds", "0.01", "--threads", "1", "--passes", "forward")
    real, dry = (*common, results, "--device", "cuda", *arguments), (*common, tried, *tiny)
    return Step(f"bench {name}", real, seconds, dry)


def plan(out: Path, wheels: bool) -> list[Step]:
    """Return the steps in the order of their value.

    Args:
        out: Where results go.
        wheels: Whether there are wheels to unpack.
    """
    python = ("python", "-m")
    build = (
        ("TORCH_CUDA_ARCH_LIST", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip() or "9.0"),
        ("MMVMAMBA_WITH_CUDA", "1"),
        ("MAX_JOBS", str(os.cpu_count() or 1)),
    )
    steps = [Step("machine", ("nvidia-smi",), 10, ("python", "--version"))]
    if wheels:
        options = ("-q", "--no-index", "--no-deps", "--no-compile", "--upgrade", "--target", str(site_folder()))
        unpack = (*python, "pip", "install", *options, *(str(path) for path in sorted(WHEELS.glob("*.whl"))))
        steps.append(Step("wheels", unpack, 20, unpack))
    steps.append(Step("build", ("python", "setup.py", "build_ext", "--inplace"), 110, None, build))
    tests = {step.name: step for path in test_files(ROOT / "tests") for step in _tests(path)}
    first, second, third = (tests.pop(f"test_{name}") for name in ("operators compiled", "sanitizer memcheck",
                                                                   "operators triton"))  # fmt: skip
    models = ("--shapes", "224", "512", "800x1216", "--seconds", "0.3")
    core = ("--dtype", "bfloat16", "--boundaries", "core")
    rest = ("1536", "odd", "states", "sequence")
    return [
        *steps,
        first,
        _bench("models_bfloat16", 60, out, *models, *core),
        second,
        third,
        *(tests.pop(name) for name in list(tests) if "sanitizer" not in name),
        _bench("scan_bfloat16", 20, out, *models, "--dtype", "bfloat16", "--boundaries", "scan"),
        _bench("rest_bfloat16", 20, out, "--shapes", *rest, "--seconds", "0.3", "--dtype", "bfloat16"),
        _bench("models_float16_float32", 20, out, *models, "--dtype", "float16", "float32", "--boundaries", "core"),
        *tests.values(),
    ]


def _tests(path: Path) -> list[Step]:
    """Return the steps of a test file."""
    pytest = ("python", "-m", "pytest")
    steps = []
    for part, selection, limit in PARTS.get(path.stem, (("all", "", 30.0),)):
        chosen = ("-m", "gpu", *(("-k", selection) if selection else ()), str(path.relative_to(ROOT)))
        # One line per test as it ends, so that the log says how far a step came that was killed.
        real = (*pytest, "-v", "--tb=short", "-p", "no:cacheprovider", "--maxfail=25", *chosen)
        steps.append(Step(f"{path.stem} {part}", real, limit, (*pytest, "-q", "--collect-only", *chosen)))
    return steps


def site_folder() -> Path:
    """Where wheels are unpacked."""
    return Path(tempfile.gettempdir()) / "mmvmamba_site"


def environment(step: Step) -> dict[str, str]:
    """Return the variables a step runs with."""
    path = [str(ROOT), str(site_folder()), os.environ.get("PYTHONPATH", "")]
    shared = {"PYTHONPATH": os.pathsep.join(filter(None, path)), "PYTHONUNBUFFERED": "1"}
    return dict(os.environ) | shared | dict(step.environment)


def written(step: Step, command: Sequence[str]) -> str:
    """Return a command as one would type it."""
    variables = " ".join(f"{name}={shlex.quote(value)}" for name, value in step.environment)
    return f"{variables} {shlex.join(command)}".strip()


def run(step: Step, command: Sequence[str], seconds: float, log: Path) -> Outcome:
    """Run one command with a time limit; its output goes to the end of the log, the last lines also to the screen."""
    real = [sys.executable if part == "python" else part for part in command]
    begin = time.monotonic()
    with log.open("a") as file:
        file.write(f"\n===== {step.name}: {written(step, command)}\n")
        file.flush()
        start = file.tell()
        try:
            process = subprocess.Popen(
                real, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment(step), start_new_session=True
            )
        except OSError as error:
            file.write(f"{error}\n")
            return Outcome(step.name, "failed", 0.0, str(error))
        try:
            code = process.wait(seconds)
            result = "ok" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            result = "timeout"
            end(process)
    text = log.read_bytes()[start:].decode(errors="replace")
    lines = [line for line in text.splitlines() if line.strip()]
    print("\n".join(lines[-TAIL:]), flush=True)
    return Outcome(step.name, result, time.monotonic() - begin, lines[-1] if lines else "")


def end(process: subprocess.Popen[bytes]) -> None:
    """Interrupt a process and the group it leads (compilers and workers), and kill what is left after `GRACE`."""
    for number in (signal.SIGINT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)


def run_all(
    steps: Sequence[Step], out: Path, dry: bool, budget: float, clock: Callable[[], float] = time.monotonic
) -> list[Outcome]:
    """Run the steps while time remains; return what became of each."""
    begin, outcomes = clock(), []
    for index, step in enumerate(steps):
        command = step.dry if dry else step.command
        print(f"\n===== {step.name} (at {clock() - begin:.0f} s, limit {step.seconds:.0f} s)", flush=True)
        print(f"$ {written(step, step.command)}", flush=True)
        left = budget - (clock() - begin)
        if command is None:
            outcomes.append(Outcome(step.name, "printed", 0.0, "needs a GPU"))
        elif left < LEAST:
            outcomes.append(Outcome(step.name, "no time", 0.0, f"{max(0.0, left):.0f} s were left"))
        else:
            if command != step.command:
                print(f"without a GPU: $ {written(step, command)}", flush=True)
            spare = left - sum(later.seconds for later in steps[index + 1 :])
            seconds = min(left, max(step.seconds, min(spare, STRETCH * step.seconds)))
            outcomes.append(run(step, command, seconds, out / "session.log"))
        (out / "summary.json").write_text(json.dumps([asdict(one) for one in outcomes], indent=1) + "\n")
    return outcomes


def table(outcomes: Sequence[Outcome]) -> str:
    """Return the short table."""
    width = max(len(one.name) for one in outcomes)
    return "\n".join(
        f"{one.name:{width}}  {one.result:8} {one.seconds:6.1f} s  {one.last_line[:100]}" for one in outcomes
    )


def sums(out: Path) -> str:
    """Return the sums over the blocks of VMamba-T that the benchmarks wrote, one line each."""
    lines = []
    for path in sorted(out.glob("ops_*.json")):
        for row in json.loads(path.read_text())["rows"]:
            if row["shape"] is None:
                ratios = [f"{field[5:]} {row[field]:.2f}x" for field in row if field[:5] == "over_" and row[field]]
                share = f"{row['floor_share']:.0%} of the floor" if "floor_share" in row else ""
                label = f"{row['case']}, {row['pass']}, {row['dtype']}, {row['contestant']}"
                lines.append(f"{label}: {row['median'] * 1e3:.3f} ms {share} {' '.join(ratios)}")
    return "\n".join(lines)


def fetch_wheels() -> int:
    """Fetch what the models need for Python 3.12 on Linux; return pip's exit code."""
    platforms = [f"--platform={name}_x86_64" for name in ("manylinux_2_28", "manylinux_2_17", "manylinux2014")]
    options = ["--no-deps", "--only-binary=:all:", "--python-version=3.12", "--implementation=cp", *platforms]
    command = [sys.executable, "-m", "pip", "download", "-q", *options, "-d", str(WHEELS), *MMENGINE]
    return subprocess.run(command, check=False).returncode


def main(arguments: Sequence[str] | None = None, variables: Mapping[str, str] = os.environ) -> int:
    """Run everything, print the table; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run what needs no GPU")
    parser.add_argument("--fetch-wheels", action="store_true", help="only fetch mmengine and its needs to .whl")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="steps with one of these words in their name")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for everything")
    options = parser.parse_args(arguments)
    if options.fetch_wheels:
        return fetch_wheels()
    # Where this was started in the background SIGINT is ignored, and so it would be in the steps.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    out = Path(variables.get("OUT") or ROOT / "build" / "gpu_session")
    out.mkdir(parents=True, exist_ok=True)
    if not options.dry_run and shutil.which("nvidia-smi") is None:
        print("gpu_session: found no nvidia-smi on PATH, expected one with a GPU. Run it there, or use --dry-run.",
              file=sys.stderr)  # fmt: skip
        return 2
    steps = plan(out, wheels=any(WHEELS.glob("*.whl")))
    if options.only:
        steps = [step for step in steps if any(word in step.name for word in options.only)]
    if not steps:
        print(f"gpu_session: --only {' '.join(options.only)} names no step. See --dry-run.", file=sys.stderr)
        return 2
    outcomes = run_all(steps, out, options.dry_run, options.budget)
    print(f"\n{sums(out)}\n\n{table(outcomes)}\nlogs and results: {out}")
    return 0 if all(one.result in ("ok", "printed") for one in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
