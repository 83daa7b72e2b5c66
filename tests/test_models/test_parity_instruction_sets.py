"""The parity cases of all families with the kernels of every instruction set (tests/test_models/test_parity.py)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmvmamba.testing import requires_extension
from tests.instruction_sets import CAPABILITIES, passed_with

DATA = Path(__file__).parents[1] / "data" / "parity"


@requires_extension()
@pytest.mark.ext
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_instruction_set_computes_what_upstream_does(capability: str) -> None:
    cases = sorted(DATA.glob("*/*.npz"))
    if any(json.loads(case.with_suffix(".json").read_text())["form"].endswith("classifier") for case in cases):
        pytest.importorskip("mmpretrain", reason="classifiers are MMPretrain models")
    tests = "test_case and compiled"
    assert passed_with(capability, "tests/test_models/test_parity.py", "-k", tests) == len(cases) >= 15
