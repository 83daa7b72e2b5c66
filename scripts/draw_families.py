"""Draw how every family walks over a map, and its block: ``python scripts/draw_families.py``.

One SVG for each family goes to ``docs/images/families/`` and the table of all models to ``docs/families.md``. The walks
are those of the package, on a small map; blocks are told in words in `scripts/family_drawings.py`. With ``--check``
nothing is written; the exit status is 1 if a file is not what would be written.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the package of this checkout, whether or not one is installed

from family_drawings import DRAWINGS, Branch, Drawing, Panel  # noqa: E402

from mmvmamba.apis.model_index import ModelEntry, list_models  # noqa: E402
from mmvmamba.converters.base import load_converter  # noqa: E402
from mmvmamba.errors import ConfigError, MMVMambaError  # noqa: E402
from mmvmamba.models.backbones import FAMILIES  # noqa: E402

PAGE = ROOT / "docs" / "families.md"
IMAGES = ROOT / "docs" / "images" / "families"
RESULTS = ROOT / "benchmarks" / "results"
SPEED = "_families_cpu_1-thread.json"
BEGIN, END = (
    "<!-- written by scripts/draw_families.py: begin -->",
    "<!-- written by scripts/draw_families.py: end -->",
)
CELL, GAP, MARGIN, LINE = 26, 34, 12, 16
BOX = 30
COLORS = ("#1f6feb", "#bf3989", "#1a7f37", "#bc4c00")
INK, PALE = "#24292f", "#afb8c1"
FONT = 'font-family="Helvetica, Arial, sans-serif"'


# ---------------------------------------------------------------- drawings


def picture(drawing: Drawing) -> str:
    """Return the SVG of a family: its walks above, its block below."""
    parts: list[str] = []
    x, bottom = float(MARGIN), 0.0
    for panel in drawing.panels:
        size = panel.columns * CELL, panel.rows * CELL
        parts += _panel(panel, x, MARGIN + 2 * LINE)
        title_width = 6.2 * max(len(line) for line in panel.title.split("\n"))
        x += max(size[0], title_width) + GAP
        bottom = max(bottom, MARGIN + 2 * LINE + size[1])
    right: float = x - GAP
    top = bottom + LINE
    for label, steps in drawing.block:
        parts.append(_text(MARGIN, top + LINE, label, size=12, weight="bold"))
        drawn, end, depth = _chain(steps, MARGIN, top + 2.6 * LINE)
        parts += drawn
        right, top = max(right, end), top + 2.6 * LINE + depth + LINE
    width, height = right + MARGIN, top + MARGIN / 2
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(drawing.title)}: scan and block">'
    )
    marks = "".join(
        f'<marker id="a{n}" markerWidth="8" markerHeight="8" refX="5" refY="3" orient="auto">'
        f'<path d="M0,0 L6,3 L0,6 z" fill="{color}"/></marker>'
        for n, color in enumerate((*COLORS, INK))
    )
    ground = f'<rect width="{width:.0f}" height="{height:.0f}" fill="#ffffff"/>'
    return "\n".join([head, f"<defs>{marks}</defs>", ground, *parts, "</svg>", ""])


def _panel(panel: Panel, x: float, y: float) -> Iterator[str]:
    """Draw a map and the walks over it."""
    for n, line in enumerate(panel.title.split("\n")):
        yield _text(x, y - (1.5 - n) * LINE + 4, line, size=12)
    for row in range(panel.rows):
        for column in range(panel.columns):
            fill = "#ddf4ff" if row * panel.columns + column in panel.shaded else "#f6f8fa"
            left, upper = x + column * CELL, y + row * CELL
            yield f'<rect x="{left:.1f}" y="{upper:.1f}" width="{CELL}" height="{CELL}" fill="{fill}" stroke="{PALE}"/>'
    if panel.to_all:
        yield from _state(panel, x, y)
    for n, walk in enumerate(panel.walks):
        # Side by side, so that walks over the same cells can be told apart.
        shift = (n - (len(panel.walks) - 1) / 2) * min(6.0, 0.7 * CELL / len(panel.walks))
        yield from _walk(panel, walk, x + shift, y + shift, n % len(COLORS))


def _walk(panel: Panel, walk: Sequence[int], x: float, y: float, color: int) -> Iterator[str]:
    """Draw a line through the middles of the cells; a dot begins it, an arrow ends it."""
    middles = [(x + (pixel % panel.columns + 0.5) * CELL, y + (pixel // panel.columns + 0.5) * CELL) for pixel in walk]
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in middles)
    yield (
        f'<polyline points="{points}" fill="none" stroke="{COLORS[color]}" stroke-width="1.6" '
        f'stroke-linejoin="round" marker-end="url(#a{color})"/>'
    )
    a, b = middles[0]
    yield f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3.2" fill="{COLORS[color]}"/>'


def _state(panel: Panel, x: float, y: float) -> Iterator[str]:
    """Draw that every cell gives to one state and reads from it, without an order."""
    a, b = x + panel.columns * CELL / 2, y + panel.rows * CELL / 2
    for row in range(panel.rows):
        for column in range(panel.columns):
            left, upper = x + (column + 0.5) * CELL, y + (row + 0.5) * CELL
            yield (
                f'<line x1="{left:.1f}" y1="{upper:.1f}" x2="{a:.1f}" y2="{b:.1f}" stroke="{COLORS[0]}" '
                'stroke-width="0.9"/>'
            )
    yield f'<circle cx="{a:.1f}" cy="{b:.1f}" r="8" fill="{COLORS[0]}"/>'
    yield _text(a, b + 4, "S", size=11, anchor="middle", fill="#ffffff")


def _chain(steps: Sequence[str | Branch], x: float, y: float) -> tuple[list[str], float, float]:
    """Draw steps from left to right; return the drawing, its right end and its height."""
    parts: list[str] = []
    depth = float(BOX)
    start = x
    x += 14
    for step in steps:
        if isinstance(step, Branch):
            drawn, x, height = _branch(step, x, y)
            parts += drawn
            depth = max(depth, height)
        else:
            drawn, x = _box(step, x, y)
            parts += drawn
    parts.append(_arrow(x, y + BOX / 2, x + 16, y + BOX / 2))
    return [_arrow(start, y + BOX / 2, start + 14, y + BOX / 2), *parts], x + 18, depth


def _branch(branch: Branch, x: float, y: float) -> tuple[list[str], float, float]:
    """Draw steps with a way around them; below each other if there are several such ways side by side."""
    parts, rights = [], []
    for n, way in enumerate(branch.ways):
        upper = y + n * (BOX + 8)
        right = x + 16
        for step in way:
            drawn, right = _box(step, right, upper)
            parts += drawn
        rights.append(right)
    right = max(rights) + 6
    for n, end in enumerate(rights):
        upper = y + n * (BOX + 8) + BOX / 2
        parts.append(_line(end, upper, right, upper))
        if n:
            parts += [_line(x + 4, y + BOX / 2, x + 4, upper), _line(x + 4, upper, x + 16, upper)]
            parts.append(_line(right, upper, right, y + BOX / 2))
    parts.append(_line(x, y + BOX / 2, x + 16, y + BOX / 2))
    if branch.residual:
        parts.append(
            f'<path d="M{x + 4:.1f},{y + BOX / 2:.1f} V{y - 9:.1f} H{right + 9:.1f} V{y + BOX / 2 - 8:.1f}" '
            f'fill="none" stroke="{INK}"/>'
        )
    parts.append(f'<circle cx="{right + 9:.1f}" cy="{y + BOX / 2:.1f}" r="8" fill="#ffffff" stroke="{INK}"/>')
    parts.append(_text(right + 9, y + BOX / 2 + 4.5, branch.join, size=13, anchor="middle"))
    return parts, right + 17, BOX + (len(branch.ways) - 1) * (BOX + 8)


def _box(text: str, x: float, y: float) -> tuple[list[str], float]:
    """Draw a step, with the line that leads to it."""
    width = 6.6 * len(text) + 14
    return [
        _line(x, y + BOX / 2, x + 8, y + BOX / 2),
        f'<rect x="{x + 8:.1f}" y="{y:.1f}" width="{width:.1f}" height="{BOX}" rx="4" fill="#f6f8fa" stroke="{INK}"/>',
        _text(x + 8 + width / 2, y + BOX / 2 + 4, text, size=12, anchor="middle"),
    ], x + 8 + width


def _text(x: float, y: float, text: str, size: int, anchor: str = "start", fill: str = INK, weight: str = "") -> str:
    bold = f' font-weight="{weight}"' if weight else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{fill}"{bold} {FONT}>'
        f"{escape(text)}</text>"
    )


def _line(x: float, y: float, to_x: float, to_y: float) -> str:
    return f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{to_x:.1f}" y2="{to_y:.1f}" stroke="{INK}"/>'


def _arrow(x: float, y: float, to_x: float, to_y: float) -> str:
    return _line(x, y, to_x, to_y).replace("/>", f' marker-end="url(#a{len(COLORS)})"/>')


# ---------------------------------------------------------------- the table


def table() -> str:
    """Return the rows of all released variants: size, published accuracy, measured time.

    Raises:
        ConfigError: If there is no result of the benchmark of families.
    """
    results = sorted(RESULTS.glob(f"*{SPEED}"))
    if not results:
        raise ConfigError(
            f"{RESULTS}: found no file ending in {SPEED}, expected one. Run python -m benchmarks.families."
        )
    # A later file may hold some of the families only.
    rows = [row for path in results for row in json.loads(path.read_text())["rows"]]
    times = {(row["family"], row["variant"], row["case"], row["pass"]): row for row in rows}
    lines = [
        _row(
            [
                "family",
                "variant",
                "parameters",
                "FLOPs",
                "top-1",
                "box AP",
                "mask AP",
                "mIoU",
                "224",
                "512",
                "224 training",
                "512 training",
            ]
        ),
        _row(["---"] * 12),
    ]
    entries = list_models()
    for family, cls in FAMILIES.items():
        for variant in load_converter(family).released:
            mine = [entry for entry in entries if _is_of(entry, family, variant)]
            lines.append(_row([cls.__name__, f"`{variant}`", *_cells(mine), *_times(times, family, variant)]))
    names = ", ".join(f"`benchmarks/results/{path.name}`" for path in results)
    lines.append(f"\nTimes: {names}, the later one where both have a row.")
    return "\n".join(lines)


def _is_of(entry: ModelEntry, family: str, variant: str) -> bool:
    return entry.config.parent.name == family and f"{family}-{variant}_" in entry.name


def _cells(entries: Sequence[ModelEntry]) -> list[str]:
    """Return size and published results of a variant."""
    cls = next((entry for entry in entries if entry.task == "cls"), None)
    size = ["-", "-"]
    if cls is not None:
        image = str(cls.metadata["Input Size"]).split("x")[0]
        size = [f"{cls.metadata['Parameters'] / 1e6:.1f} M", f"{cls.metadata['FLOPs'] / 1e9:.2f} G at {image}"]
    found: dict[str, Any] = {}
    # Mask R-CNN and UPerNet first; what stands for another detector or segmentor says so.
    for entry in sorted(entries, key=lambda entry: (_maker(entry) != "", -_best(entry))):
        plain = {
            name: value for result in entry.results if not result.setting for name, value in result.metrics.items()
        }
        if not set(plain) & set(found):
            found |= {name: f"{value}{_maker(entry)}" for name, value in plain.items()}
    names = ("Top 1 Accuracy", "box AP", "mask AP", "mIoU")
    return [*size, *(str(found.get(name, "-")) for name in names)]


def _best(entry: ModelEntry) -> float:
    """Return the largest published number of a config, 0 without any."""
    return max((value for result in entry.results for value in result.metrics.values()), default=0.0)


def _maker(entry: ModelEntry) -> str:
    """Return what a result has in brackets: the detector or segmentor, unless it is the usual one."""
    if entry.task == "cls" or entry.name.startswith("mask-rcnn_") or "_upernet_" in entry.name:
        return ""
    name = entry.name.split("_")[0] if entry.task == "det" else entry.name.split("_")[1]
    return f" ({name})"


def _times(times: Mapping[tuple[str, str, str, str], Any], family: str, variant: str) -> list[str]:
    """Return what share of Swin-T's time a variant takes, by size and pass."""
    rows = [
        times.get((family, variant, size, what)) for what in ("forward", "training step") for size in ("224", "512")
    ]
    return [f"{row['over_swin']:.2f}" if row and row["over_swin"] else "-" for row in rows]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def with_table(text: str) -> str:
    """Return the page with the table between its markers renewed.

    Raises:
        ConfigError: If a marker is missing.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ConfigError(f"{PAGE}: found no line {(BEGIN if not begin else END)!r}, expected both. Put it back.")
    return f"{before}{begin}\n\n{table()}\n\n{end}{after}"


def files() -> dict[Path, str]:
    """Return what every file shall hold.

    Raises:
        ConfigError: If a family has no drawing, or there is one of no family.
    """
    if set(DRAWINGS) != set(FAMILIES):
        raise ConfigError(
            f"scripts/family_drawings.py draws {sorted(DRAWINGS)}, expected {sorted(FAMILIES)}. Add or remove entries."
        )
    wanted = {IMAGES / f"{family}.svg": picture(drawing) for family, drawing in DRAWINGS.items()}
    wanted[PAGE] = with_table(PAGE.read_text(encoding="utf-8"))
    return wanted


def main() -> None:
    """Write or check."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--check", action="store_true", help="write nothing, fail if a file is out of date")
    args = parser.parse_args()
    for path, text in files().items():
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        if args.check:
            sys.exit(f"error: {path}: out of date. Run python scripts/draw_families.py.")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except MMVMambaError as error:
        sys.exit(f"error: {error}")
