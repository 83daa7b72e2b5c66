"""The kinds of findings and their table in the docs."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from mmvmamba.datasets.checks import KINDS, Report

ROOT = Path(__file__).parents[2]


def test_the_docs_have_the_table_of_kinds():
    rows = {}
    for line in (ROOT / "docs/data.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `") and len(cells) == 4:
            rows[cells[0].strip("`")] = tuple(cells[1:])
    assert rows == {name: (kind.level.value, kind.meaning, kind.cure) for name, kind in KINDS.items()}


def test_every_kind_is_used_and_planted():
    """A kind that no check reports, or no test provokes, is dead."""
    for folder in ("mmvmamba", "tests"):
        texts = set()
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.name not in ("kinds.py", Path(__file__).name):
                nodes = ast.walk(ast.parse(path.read_text()))
                texts |= {
                    node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)
                }
        assert set(KINDS) <= texts, sorted(set(KINDS) - texts)


def test_an_unknown_kind_is_a_mistake_of_ours():
    with pytest.raises(KeyError, match="no-such-kind"):
        Report().add("no-such-kind", "file", "", "text")
