"""Operations by part and stage as rows of a table and as a figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmvmamba.analysis.flop_passes import PassesCost
from mmvmamba.analysis.flops import ModelCost
from mmvmamba.analysis.outputs import new_figure, save_figure

PUBLISHED, FORWARD, BACKWARD = "published tables", "PyTorch forward", "PyTorch backward"
"""Columns: multiply-adds in the convention of published tables; operations in PyTorch's, which counts 2 for each."""


def flop_rows(cost: ModelCost, passes: PassesCost) -> list[dict[str, Any]]:
    """Return a row for each part and stage: its name and its counts by column."""
    columns = {PUBLISHED: cost.by_row, FORWARD: passes.forward.by_row}
    if passes.backward is not None:
        columns[BACKWARD] = passes.backward.by_row
    return [{"part": name} | {title: by_row.get(name, 0) for title, by_row in columns.items()} for name in cost.by_row]


def save_flop_figure(rows: list[dict[str, Any]], title: str, path: Path) -> Path:
    """Draw rows of `flop_rows` as bars, a colour for each column, and return the file."""
    titles = [name for name in rows[0] if name != "part"]
    figure, axes = new_figure(width=8.0, height=1.2 + 0.22 * len(rows) * len(titles))
    axis = axes[0, 0]
    thickness = 0.8 / len(titles)
    for column, name in enumerate(titles):
        places = [row + column * thickness for row in range(len(rows))]
        axis.barh(places, [row[name] / 1e9 for row in rows], height=thickness, label=name)
    axis.set_yticks([row + 0.4 - thickness / 2 for row in range(len(rows))], [row["part"] for row in rows])
    axis.invert_yaxis()
    axis.set_xlabel("G (multiply-adds in published tables, operations in PyTorch's count)")
    axis.set_title(title)
    axis.grid(axis="x", alpha=0.3)
    axis.legend()
    return save_figure(figure, path)
