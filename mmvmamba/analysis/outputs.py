"""Where analysis tools write: a folder proved writable before long work, then JSON, CSV and figures in it."""

from __future__ import annotations

import csv
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmvmamba.errors import OutputError
from mmvmamba.optional import optional_package

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def output_folder(path: str | Path) -> Path:
    """Make a folder, prove that a file can be written to it, and return it.

    Raises:
        OutputError: If it cannot be made or written to.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(
            f"the folder {str(path)!r} cannot be written to ({error.strerror or error}), expected room and the right "
            "to. Choose another one."
        ) from error
    return folder


def write_json(path: Path, content: Mapping[str, Any] | Sequence[Any]) -> Path:
    """Write plain values and return the file; a NaN is refused, for JSON has none."""
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
    return path


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write rows that have the same keys, the keys in the first line, and return the file."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def new_figure(columns: int = 1, rows: int = 1, *, width: float = 4.0, height: float = 3.2) -> tuple[Figure, Any]:
    """Return a matplotlib figure without a window, and its axes as an array (rows, columns).

    Args:
        columns: Axes side by side.
        rows: Axes above each other.
        width: Of one of them, in inches.
        height: Of one of them, in inches.

    Raises:
        MissingPackage: If matplotlib is not installed.
    """
    optional_package("matplotlib", "analysis")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG of 130 dots per inch and return the file."""
    figure.savefig(path, dpi=130)
    return path
