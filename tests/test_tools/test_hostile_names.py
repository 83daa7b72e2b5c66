"""F2: hostile names as paths and values of every Python tool; nothing of them is run. Scripts: test_launchers.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mmpretrain")

from tests.test_tools.hostile_names import CANARY, HOSTILE

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    result = subprocess.run(
        [sys.executable, "-W", "ignore", str(Path(__file__).with_name("hostile_runs.py")), str(folder)],
        cwd=folder, capture_output=True, text=True, timeout=580,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(folder), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return folder, json.loads((folder / "answers.json").read_text())


@pytest.mark.slow
def test_nothing_of_a_hostile_name_is_run(answers):
    folder, found = answers
    assert not list(folder.rglob(CANARY))
    assert not list(ROOT.glob(CANARY))
    assert len(HOSTILE) == 20 and len(found) >= 20 * 7


@pytest.mark.slow
def test_every_call_ends_as_a_command_line_should(answers):
    """With a refusal (1), the parser's complaint (2) or, for what is a valid name or asks for help, 0."""
    _, found = answers
    odd = [call for call in found if call[2] not in (0, 1, 2)]
    assert not odd, "\n".join(map(str, odd[:10]))
