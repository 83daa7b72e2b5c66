"""The Triton kernels compile for GPUs without one, and the hot ones keep everything in registers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]


def test_hot_kernels_have_no_spills() -> None:
    """In a process of its own: where TRITON_INTERPRET=1 is set there is nothing to compile."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    code = (
        "from scripts import check_triton as c\n"
        "reports = c.check(c.HOT)\n"
        "assert len(reports) == 2 * len(c.HOT) and all(report.hot and report.loops for report in reports)\n"
        "found = c.problems(reports)\n"
        "assert not found, found\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment | {"PYTHONPATH": str(ROOT)}, cwd=ROOT, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_spills_are_found() -> None:
    from scripts.check_triton import Report, problems

    clean = Report("forward_kernel", "bf16", 1, 6, 90, 80, 0, 0, 0, (100,))
    spilled = Report("forward_kernel", "bf16", 1, 6, 90, 255, 8, 4, 0, (100,))
    cold = Report("forward_kernel", "bf16", 16, 6, 90, 255, 8, 4, 0, (100,))
    assert problems([clean, cold]) == []
    assert len(problems([clean, spilled])) == 1


def test_loops_are_counted() -> None:
    from scripts.check_triton import loop_sizes

    lines = ["        /*0000*/ MOV R1, R2 ;", ".L_x_0:", "        /*0010*/ MUFU.EX2 R1, R2 ;",
             "        /*0020*/ @P0 BRA `(.L_x_0) ;", "        /*0030*/ EXIT ;"]  # fmt: skip
    assert loop_sizes("\n".join(lines)) == (2,)
