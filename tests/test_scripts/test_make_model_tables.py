"""The tables of models in configs/README.md: those of the metafiles, and complete."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path

import pytest

from mmvmamba.apis.model_index import ModelResult, find_model, list_models
from mmvmamba.errors import ConfigError

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_model_tables.py"


@pytest.fixture
def tables(monkeypatch):
    spec = importlib.util.spec_from_file_location("make_model_tables", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def readme(tables, tmp_path, monkeypatch) -> Path:
    """A copy of the README in a folder whose configs are where the real ones are."""
    copy = tmp_path / "README.md"
    copy.write_text(tables.README.read_text())
    monkeypatch.setattr(tables, "README", copy)
    monkeypatch.setattr(tables, "CONFIGS", SCRIPT.parents[1] / "configs")
    return copy


def run(tables, monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["make_model_tables.py", *arguments])
    tables.main()


def test_the_readme_has_the_tables_of_the_metafiles(tables, monkeypatch):
    run(tables, monkeypatch, "--check")


def test_every_model_has_a_row_with_its_numbers(tables):
    text = tables.model_tables()
    for entry in list_models():
        rows = [line for line in text.splitlines() if line.startswith(f"| [{entry.name}](")]
        assert rows, entry.name
        for result in entry.results:
            shown = [row for row in rows if (result.setting or "upstream |") in row]
            assert all(f"| {value} |" in row for row in shown for value in result.metrics.values()) and shown
        assert (f"({entry.weights})" in rows[0]) == (entry.weights is not None)
        if entry.weights is not None:
            assert f"[{entry.weights.rpartition('/')[2]}](" in rows[0]


def test_a_changed_number_is_found_and_repaired(tables, readme, monkeypatch):
    good = readme.read_text()
    readme.write_text(good.replace("| 82.6 |", "| 92.6 |"))
    with pytest.raises(SystemExit, match="not those of the metafiles. Run python scripts/make_model_tables.py"):
        run(tables, monkeypatch, "--check")
    assert "92.6" in readme.read_text()
    run(tables, monkeypatch)
    assert readme.read_text() == good


def test_a_lost_marker_is_named(tables, readme, monkeypatch):
    readme.write_text(readme.read_text().replace(tables.END, ""))
    with pytest.raises(ConfigError, match="found no line .*: end -->', expected both"):
        run(tables, monkeypatch, "--check")


def test_our_own_results_get_their_own_row(tables, monkeypatch):
    entry = find_model("vmamba-tiny-s1l8_8xb128_in1k")
    ours = ModelResult("Image Classification", "ImageNet-1k", {"Top 1 Accuracy": 82.5}, "measured by us")
    entry = dataclasses.replace(entry, results=(*entry.results, ours), converted_weights="https://example.org/x.pth")
    monkeypatch.setattr(tables, "list_models", lambda task: (entry,) if task == "cls" else list_models(task))
    rows = [line for line in tables.model_tables().splitlines() if line.startswith(f"| [{entry.name}](")]
    assert ["| 82.6 | upstream |" in row for row in rows] == [True, False]
    assert ["| 82.5 | us |" in row for row in rows] == [False, True]
    assert all("[x.pth](https://example.org/x.pth) (converted)" in row for row in rows)


def test_counts_far_from_the_published_ones_are_explained(tables):
    notes = [line for line in tables.model_tables().splitlines() if line.startswith("FLOPs of ")]
    assert not [note for note in notes if "we do not know why" in note]
    (vmamba,) = [note for note in notes if "_vmamba-" in note]
    assert "published 384 G, counted 348.9 G" in vmamba and vmamba.count("_vmamba-small-s2l15_fpn") == 2
