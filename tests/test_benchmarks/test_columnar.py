"""The timing of the columnar mixers runs, checks everybody first, and names who is how much slower."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import columnar
from benchmarks.harness import DisagreementError


def test_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.get_num_threads()
    arguments = ["--dims", "16", "--tokens", "10", "--seconds", "0.01", "--json", str(tmp_path / "rows.json")]
    try:
        assert columnar.main(arguments) == 0
    finally:
        torch.set_num_threads(before)
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert {row["part"] for row in rows} == {"conv", "core"}
    assert {row["contestant"] for row in rows} >= {"reference", "per direction"}
    assert "per direction" in capsys.readouterr().out


def test_who_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {"conv": {"wrong": lambda leaves: columnar.conv(leaves) * 1.01}}
    monkeypatch.setattr(columnar, "contestants", lambda: wrong)
    with pytest.raises(DisagreementError, match="wrong: out differs"):
        columnar.time_shape(16, 10, 0.01)
