"""Randomly damaged COCO files in a process of their own: no crash, no other exception; sound files are not refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def _fuzz(folder, first, number):
    pytest.importorskip("mmdet")
    program = str(Path(__file__).with_name("fuzzed_coco.py"))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", program, str(folder), str(first), str(number)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=3600,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, f"after seed {(folder / 'seed').read_text()}: {done.stderr[-3000:]}"
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts.pop("memory in KiB") < 2 << 20  # mmdet's imports are a third of it
    assert sum(counts.values()) == number
    assert counts["passed, sound"] == number // 5
    # The damage is of a kind that reaches every way out.
    for name in ("refused as a whole", "refused", "passed", "repaired"):
        assert counts[name] > number // 100, counts


def test_2000_damaged_files(tmp_path):
    _fuzz(tmp_path, 0, 2000)


@pytest.mark.soak
def test_20000_damaged_files(tmp_path):
    _fuzz(tmp_path, 10_000, 20_000)
