"""The timing of state space duality runs, checks everybody first, and names who is how much slower."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import ssd
from benchmarks.harness import DisagreementError


def test_the_shapes_are_those_of_the_stages() -> None:
    assert [(s.length, s.heads) for s in ssd.SHAPES] == [
        (3136, 2), (784, 4), (196, 8), (16384, 2), (4096, 4), (1024, 8)
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", ssd.DTYPES)
def test_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(ssd, "SHAPES", (ssd.Shape(224, 20, 2),))
    before = torch.get_num_threads()
    try:
        assert ssd.main(["--seconds", "0.01", "--dtype", dtype, "--json", str(tmp_path / "rows.json")]) == 0
    finally:
        torch.set_num_threads(before)
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert {row["form"] for row in rows} == {"causal", "non-causal"}
    assert {row["contestant"] for row in rows} >= {"reference", "products"}
    assert "products" in capsys.readouterr().out


def test_who_is_wrong_is_not_timed() -> None:
    leaves = ssd.leaves_of(20, 2, torch.float32)
    wrong = {"wrong": lambda given: ssd.products(given) * 1.01}
    with pytest.raises(DisagreementError, match="wrong: out differs"):
        ssd.check_all(wrong, "non-causal", leaves, torch.randn(leaves["x"].shape))
