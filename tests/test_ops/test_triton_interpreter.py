"""The Triton kernels in Triton's interpreter, which is chosen when triton is imported: the cases run in one process.

The cases are in `tests.test_ops.triton_cases` and `tests.test_ops.ssd_triton_cases`; this file counts them, so that
none is lost.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("cases", "least"), [("triton_cases", 90), ("ssd_triton_cases", 50)])
def test_cases_in_the_interpreter(cases: str, least: int) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("MMVMAMBA_BACKEND", "PYTEST_ADDOPTS")}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/test_ops/{cases}.py"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    summary = done.stdout.strip().splitlines()[-1]
    counts = {outcome: int(number) for number, outcome in re.findall(r"(\d+) (passed|failed|skipped|error)", summary)}
    assert counts.keys() == {"passed"} and counts["passed"] >= least, summary
