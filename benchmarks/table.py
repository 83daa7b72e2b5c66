"""Print result files as Markdown: ``python -m benchmarks.table FILE...``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Column = tuple[str, str, Callable[[Any], str]]


def _milliseconds(value: float) -> str:
    return f"{value * 1e3:.1f}" if value < 10 else f"{value * 1e3:.0f}"


def _times(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _percent(value: float) -> str:
    return f"{value * 100:.1f} %"


def _mib(value: float) -> str:
    return f"{value / 2**20:.0f}"


COLUMNS: tuple[Column, ...] = (
    ("case", "case", str),
    ("boundary", "boundary", str),
    ("pass", "pass", str),
    ("dtype", "dtype", str),
    ("contestant", "contestant", str),
    ("minimum", "min ms", _milliseconds),
    ("median", "median ms", _milliseconds),
    ("spread", "IQR / median", _percent),
    ("rounds", "rounds", str),
    ("over_reference", "reference / this", _times),
    ("over_upstream", "upstream path / this", _times),
    ("over_compiled", "compiled / this", _times),
    ("over_triton", "triton / this", _times),
    ("over_oflex", "oflex / this", _times),
    ("over_mamba_ssm", "mamba_ssm / this", _times),
    ("floor", "floor ms", lambda value: f"{value * 1e3:.3f}"),
    ("floor_limit", "limit", str),
    ("floor_share", "share of floor", _percent),
    ("gpu_peak_bytes", "peak MiB", _mib),
    ("repeats_bitwise", "same bits", lambda same: "yes" if same else "NO"),
    ("over_gemm", "GEMM / this", "{:.3g}".format),
    ("over_swin", "this / Swin", "{:.3f}".format),
    ("form", "form", str),
    ("over_trained", "this / as trained", "{:.2f}".format),
    ("over MobileNetV3-Large", "this / MobileNetV3-Large, deployed", "{:.2f}".format),
    ("over EfficientNet-B0", "this / EfficientNet-B0, deployed", "{:.2f}".format),
    ("flops", "G multiply-adds", lambda value: f"{value / 1e9:.2f}"),
    ("per_flop", "time per multiply-add / VMamba-T's", "{:.2f}".format),
    ("scan_share", "scan2d share", _percent),
    ("slope", "slope", "{:.3f}".format),
    ("step_bytes", "step MiB", _mib),
    ("peak_bytes", "peak MiB", _mib),
)
"""Field of a row, heading, how to write it; a column without values is left out."""
FIGURES = ("minimum", "scan_share", "slope", "step_bytes")
"""A row has one of these; each kind makes a table of its own."""


class ResultFileError(ValueError):
    """A file is no result of a benchmark."""


def read(path: Path) -> dict[str, Any]:
    """Read one result file.

    Raises:
        ResultFileError: It is missing, no JSON, or not written by `benchmarks.harness.save`.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ResultFileError(f"{path}: {error}. Give a file written with --json.") from error
    fields = ("benchmark", "environment", "rows")
    missing = [f for f in fields if not isinstance(content, dict) or f not in content]
    if missing:
        raise ResultFileError(
            f"{path}: found no {', '.join(missing)}, expected a file written with --json. Measure anew."
        )
    return dict(content)


def table(rows: Sequence[Row]) -> str:
    """Return one Markdown table of rows that share a kind of figure."""
    columns = [column for column in COLUMNS if any(row.get(column[0]) is not None for row in rows)]
    lines = ["| " + " | ".join(heading for _, heading, _ in columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [write(row[field]) if row.get(field) is not None else "-" for field, _, write in columns]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def render(content: dict[str, Any]) -> str:
    """Return everything in one result file as Markdown."""
    environment = content["environment"]
    facts = [f"{name} {environment[name]}" for name in ("torch", "instruction_set", "threads", "commit", "date")
             if environment.get(name) is not None]  # fmt: skip
    parts = [f"**{content['benchmark']}**, {environment.get('device', 'unknown device')}, {', '.join(facts)}"]
    for figure in FIGURES:
        rows = [row for row in content["rows"] if row.get(figure) is not None]
        if rows:
            parts.append(table(rows))
    notes = content.get("notes") or []
    if notes:
        parts.append("\n".join(f"* {note}" for note in notes))
    return "\n\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    try:
        texts = [render(read(path)) for path in parser.parse_args(arguments).files]
    except ResultFileError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n\n".join(texts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
