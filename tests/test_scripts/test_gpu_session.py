"""The session on a lent GPU, as far as it runs without one."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import gpu_session
import pytest
from gpu_session import Outcome, Step

ROOT = Path(__file__).resolve().parents[2]


def python(code: str) -> tuple[str, ...]:
    return ("python", "-c", code)


def test_steps_that_fail_or_hang_do_not_stop_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = [
        Step("good", python("print('one'); print('two')"), 20),
        Step("bad", python("print('why'); raise SystemExit(3)"), 20),
        Step("hangs", python("import time; print('begin', flush=True); time.sleep(60)"), 0.5),
        Step("absent", ("there-is-no-such-program",), 20),
        Step("variables", python("import os; print(os.environ['ANSWER'])"), 20, None, (("ANSWER", "42"),)),
    ]
    begin = time.monotonic()
    outcomes = gpu_session.run_all(steps, tmp_path, False, 100.0)
    assert time.monotonic() - begin < 30
    assert [(o.name, o.result) for o in outcomes] == [
        ("good", "ok"), ("bad", "failed"), ("hangs", "timeout"), ("absent", "failed"), ("variables", "ok"),
    ]  # fmt: skip
    assert [o.last_line for o in outcomes[:3]] == ["two", "why", "KeyboardInterrupt"] and outcomes[4].last_line == "42"
    assert [o["result"] for o in json.loads((tmp_path / "summary.json").read_text())] == [o.result for o in outcomes]
    log = (tmp_path / "session.log").read_text()
    assert "===== variables: ANSWER=42 python -c" in log and "one\ntwo" in log
    assert gpu_session.table(outcomes).count("\n") == 4
    assert "$ ANSWER=42 python -c" in capsys.readouterr().out


def test_a_step_at_its_limit_is_interrupted_before_it_is_killed(tmp_path: Path, monkeypatch) -> None:
    """Pytest prints its failures on the first; what ignores it, or started something, is killed with all of it."""
    (tmp_path / "test_it.py").write_text("import time\ndef test_a(): assert 1 == 2\ndef test_b(): time.sleep(60)\n")
    stubborn = ("import signal, subprocess, time; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
                "print(subprocess.Popen(['sleep', '60']).pid, flush=True); time.sleep(60)")  # fmt: skip
    steps = [
        Step("pytest", ("python", "-m", "pytest", "-v", "-p", "no:cacheprovider", str(tmp_path / "test_it.py")), 4),
        Step("stubborn", python(stubborn), 0.5),
    ]
    monkeypatch.setattr(gpu_session, "GRACE", 10.0)
    (first,) = gpu_session.run_all(steps[:1], tmp_path, False, 100.0)
    log = (tmp_path / "session.log").read_text()
    assert first.result == "timeout" and "assert 1 == 2" in log and "KeyboardInterrupt" in log
    monkeypatch.setattr(gpu_session, "GRACE", 0.5)
    (second,) = gpu_session.run_all(steps[1:], tmp_path, False, 100.0)
    assert second.result == "timeout" and second.seconds < 10
    child = Path(f"/proc/{int(second.last_line)}/stat")
    for _ in range(100):
        if not child.exists() or child.read_text().split()[2] in "ZX":
            break
        time.sleep(0.05)
    assert not child.exists() or child.read_text().split()[2] in "ZX"


def test_a_step_gets_what_earlier_ones_left_over(tmp_path: Path, monkeypatch) -> None:
    given: list[float] = []
    monkeypatch.setattr(
        gpu_session, "run", lambda step, command, seconds, log: given.append(seconds) or Outcome(step.name, "ok", 0, "")
    )
    steps = [Step(name, python("pass"), seconds) for name, seconds in (("a", 30), ("b", 40), ("c", 20))]
    now = iter([0.0, 0.0, 0.0, 35.0, 35.0, 95.0, 95.0])
    gpu_session.run_all(steps, tmp_path, False, 110.0, clock=lambda: next(now))
    assert given == [50.0, 55.0, 15.0]  # all but the later limits; the same; what is left
    now = iter([0.0, 0.0, 0.0])
    gpu_session.run_all(steps[:1], tmp_path, False, 110.0, clock=lambda: next(now))
    assert given[3:] == [60.0]  # twice its limit at most


def test_a_step_ends_with_the_budget_and_none_begins_after_it(tmp_path: Path) -> None:
    now = iter([0.0, 0.0, 85.0, 85.0, 95.0, 95.0])
    steps = [Step("first", python("pass"), 50), Step("late", python("pass"), 50)]
    outcomes = gpu_session.run_all(steps, tmp_path, False, 100.0, clock=lambda: next(now))
    assert [o.result for o in outcomes] == ["ok", "no time"]
    assert outcomes[1].last_line == "5 s were left"


def test_the_whole_plan_fits_the_lease(tmp_path: Path) -> None:
    steps = gpu_session.plan(tmp_path, wheels=True)
    names = [step.name for step in steps]
    assert names[:4] == ["machine", "wheels", "build", "test_operators compiled"] and len(set(names)) == len(names)
    telling = ["bench models_bfloat16", "test_sanitizer memcheck", "test_operators triton"]
    assert names[4:7] == telling
    assert sum(step.seconds for step in steps) <= gpu_session.BUDGET
    assert all(step.seconds >= gpu_session.LEAST for step in steps)
    assert [s.name for s in gpu_session.plan(tmp_path, wheels=False)] == [n for n in names if n != "wheels"]
    assert len([n for n in names if n.startswith("bench")]) + 2 <= 8  # files that come back from the machine
    (build,) = (step for step in steps if step.name == "build")
    assert dict(build.environment)["TORCH_CUDA_ARCH_LIST"] == "9.0" and build.dry is None


def test_every_gpu_test_file_has_a_step_and_operators_come_first(tmp_path: Path) -> None:
    folder = tmp_path / "test_gpu"
    folder.mkdir()
    for name in ("leaks", "other", "operators", "sanitizers", "determinism"):
        (folder / f"test_{name}.py").touch()
    (folder / "helpers.py").touch()
    found = [path.stem for path in gpu_session.test_files(tmp_path)]
    assert found == ["test_operators", "test_determinism", "test_leaks", "test_other", "test_sanitizers"]
    mark = re.compile(r"^(pytestmark = .*|@)pytest\.mark\.gpu\b", re.MULTILINE)
    marked = {path for path in (ROOT / "tests").rglob("*.py") if mark.search(path.read_text())}
    assert marked and marked <= set(gpu_session.test_files(ROOT / "tests"))
    named = {word for step in gpu_session.plan(tmp_path, wheels=False) for word in step.command}
    assert {str(path.relative_to(ROOT)) for path in marked} <= named
    assert set(gpu_session.PARTS) <= {path.stem for path in marked}


def test_the_parts_of_a_file_are_all_of_it(tmp_path: Path) -> None:
    """Each test is in one step exactly; asked of pytest, which only collects here."""
    for stem, parts in gpu_session.PARTS.items():
        (file,) = (path for path in gpu_session.test_files(ROOT / "tests") if path.stem == stem)
        command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", "-m", "gpu"]

        def collected(*arguments: str, command=command, file=file) -> list[str]:
            done = subprocess.run([*command, *arguments, str(file)], cwd=ROOT, capture_output=True, text=True)
            return [line for line in done.stdout.splitlines() if "::" in line]

        found = [name for _, selection, _ in parts for name in collected(*(["-k", selection] if selection else []))]
        assert found and sorted(found) == sorted(collected())


def test_a_dry_run_of_two_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--dry-run", "--only", "machine", "build"]
    assert gpu_session.main(arguments, {"OUT": str(tmp_path)}) == 0
    shown = capsys.readouterr().out
    assert "TORCH_CUDA_ARCH_LIST=9.0 MMVMAMBA_WITH_CUDA=1" in shown
    results = [row["result"] for row in json.loads((tmp_path / "summary.json").read_text())]
    assert results == ["ok", "printed"]


def test_sums_of_the_benchmarks_are_shown(tmp_path: Path) -> None:
    row = {"shape": None, "case": "VMamba-T core at 224", "pass": "forward", "dtype": "bfloat16", "median": 0.002,
           "contestant": "compiled", "floor_share": 0.5, "over_oflex": 5.25, "over_triton": None}  # fmt: skip
    (tmp_path / "ops_x.json").write_text(json.dumps({"rows": [row, row | {"shape": [1]}]}))
    expected = "VMamba-T core at 224, forward, bfloat16, compiled: 2.000 ms 50% of the floor oflex 5.25x"
    assert gpu_session.sums(tmp_path) == expected


def test_bad_calls_are_told(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu_session.shutil, "which", lambda name: None)
    assert gpu_session.main([], {"OUT": str(tmp_path)}) == 2
    assert gpu_session.main(["--dry-run", "--only", "nonsense"], {"OUT": str(tmp_path)}) == 2
    errors = capsys.readouterr().err
    assert "found no nvidia-smi on PATH" in errors and "--only nonsense names no step" in errors


def test_outcomes_decide_the_exit_code(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(
        gpu_session, "run_all", lambda *a: [Outcome("a", "ok", 1.0, ""), Outcome("b", "failed", 1.0, "")]
    )
    assert gpu_session.main(["--dry-run"], {"OUT": str(tmp_path)}) == 1
