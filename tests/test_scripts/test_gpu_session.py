"""The session on a lent GPU, as far as it runs without one."""

from __future__ import annotations

import json
import re
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
    assert [o.last_line for o in outcomes[:3]] == ["two", "why", "begin"] and outcomes[4].last_line == "42"
    assert [o["result"] for o in json.loads((tmp_path / "summary.json").read_text())] == [o.result for o in outcomes]
    log = (tmp_path / "session.log").read_text()
    assert "===== variables: ANSWER=42 python -c" in log and "one\ntwo" in log
    assert gpu_session.table(outcomes).count("\n") == 4
    assert "$ ANSWER=42 python -c" in capsys.readouterr().out


def test_a_step_ends_with_the_budget_and_none_begins_after_it(tmp_path: Path) -> None:
    now = iter([0.0, 0.0, 85.0, 85.0, 95.0, 95.0])
    steps = [Step("first", python("pass"), 50), Step("late", python("pass"), 50)]
    outcomes = gpu_session.run_all(steps, tmp_path, False, 100.0, clock=lambda: next(now))
    assert [o.result for o in outcomes] == ["ok", "no time"]
    assert outcomes[1].last_line == "5 s were left"


def test_the_whole_plan_fits_the_lease(tmp_path: Path) -> None:
    steps = gpu_session.plan(tmp_path, wheels=False)
    names = [step.name for step in steps]
    assert names[:2] == ["machine", "build"] and len(set(names)) == len(names)
    assert any(name.startswith("test_") for name in names)
    # What is most telling has its full time even if everything before it takes as long as it may.
    assert sum(step.seconds for step in steps[: names.index("bench models_bfloat16") + 1]) <= gpu_session.BUDGET
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
