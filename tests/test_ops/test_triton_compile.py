"""The Triton kernels compile for GPUs without one, and the hot ones keep everything in registers."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]


def _run(code: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: where TRITON_INTERPRET=1 is set there is nothing to compile."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment | {"PYTHONPATH": str(ROOT)}, cwd=ROOT, capture_output=True,
        text=True, check=False,
    )  # fmt: skip


def test_hot_kernels_have_no_spills() -> None:
    code = (
        "from scripts import check_triton as c\n"
        "reports = c.check((c.Case('bf16', 1, 6), c.Case('fp32', 1, 6, 8)), (90,))\n"
        "assert {report.kernel for report in reports if report.hot} == c.LARGEST_SPILL.keys()\n"
        "assert all(report.loops for report in reports if report.hot)\n"
        "found = c.problems(reports)\n"
        "assert not found, found\n"
    )
    done = _run(code)
    assert done.returncode == 0, done.stdout + done.stderr


def test_spills_are_found() -> None:
    from scripts.check_triton import LARGEST_SPILL, Case, Report, problems

    hot, other = Case("bf16", 1, 6), Case("bf16", 16, 6)
    clean = Report("tile_forward_kernel", hot, "", 90, 80, 0, 0, 0, (100,), 32)
    spilled = Report("tile_forward_kernel", hot, "", 90, 255, 8, 4, 0, (100,), 32)
    cold = Report("forward_kernel", other, "", 90, 255, 8, 4, 0, (100,), 1)
    backward = Report("tile_backward_kernel", hot, "", 90, 255, LARGEST_SPILL["tile_backward_kernel"], 4, 0, (9,), 16)
    assert problems([clean, cold, backward]) == []
    worse = dataclasses.replace(backward, spills=backward.spills + 8)
    assert len(problems([clean, spilled, worse])) == 2


def test_other_variants_compile() -> None:
    """One small case of every kind; `python scripts/check_triton.py` compiles all of them."""
    code = (
        "from scripts import check_triton as c\n"
        "cases = (c.Case('fp16', 16, 6), c.Case('bf16', 16, 0), c.Case('bf16', 1, 6, 16, routes='list'))\n"
        "names = {report.kernel for report in c.check(cases, (80,))}\n"
        "expected = {'forward_kernel', 'adjoint_kernel', 'backward_kernel', 'carry_kernel', 'merge_kernel'}\n"
        "assert names >= expected, names\n"
    )
    done = _run(code)
    assert done.returncode == 0, done.stdout + done.stderr


def test_state_space_duality_has_no_spills() -> None:
    code = (
        "from scripts import check_triton as c\n"
        "reports = c.check((c.SSD[0],), (80,))\n"
        "expected = {'state_kernel', 'read_kernel', 'input_gradient_kernel', 'projection_gradient_kernel'}\n"
        "assert {report.kernel for report in reports} == expected\n"
        "assert all(report.hot and report.spills == 0 for report in reports)\n"
    )
    done = _run(code)
    assert done.returncode == 0, done.stdout + done.stderr


def test_loops_are_counted() -> None:
    from scripts.check_triton import loop_sizes

    lines = ["        /*0000*/ MOV R1, R2 ;", ".L_x_0:", "        /*0010*/ MUFU.EX2 R1, R2 ;",
             "        /*0020*/ @P0 BRA `(.L_x_0) ;", "        /*0030*/ EXIT ;"]  # fmt: skip
    assert loop_sizes("\n".join(lines)) == (2,)
