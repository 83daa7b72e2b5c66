"""The published numbers of VMamba: our copy of them, and the fact sheet that the copy was made from."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
COPY = ROOT / "tests" / "data" / "zoo" / "vmamba_published.json"
SIZES = {"T": "tiny", "S": "small", "B": "base"}


def published() -> dict[str, Any]:
    """Return the copy; its ``origin`` says where every part is from."""
    return json.loads(COPY.read_text())


def fact_sheet() -> Path | None:
    """Return the fact sheet where this checkout lies beside it (or in a worktree one level deeper), else None."""
    places = [folder / "shared" / "zoo" / "vmamba.md" for folder in ROOT.parents[:2]]
    return next((place for place in places if place.is_file()), None)


def read_sheet(text: str) -> dict[str, dict[str, Any]]:
    """Return the table "Published results" of the fact sheet by our names of the variants."""
    table = text.split("## Published results", 1)[1].split("\nPeers in the same tables", 1)[0]
    rows = {}
    for line in table.splitlines()[3:]:
        name, top1, parameters, flops, speed, training_speed, once, thrice, det, miou, seg = (
            cell.strip() for cell in line.strip("|").split("|")
        )
        size, variant = re.fullmatch(r"(?:vanilla )?([TSB])(?:\[(\w+)\])?", name).groups()
        arch = f"vanilla-{SIZES[size]}" if variant is None else f"{SIZES[size]}-{variant}"
        rows[arch] = {
            "top-1": float(top1),
            "cost": _numbers(f"{parameters}/{flops}"),
            "images/s": [int(speed), int(training_speed)],
            "1x": _numbers(once.split(" (")[0]),
            "1x, batch 8": _numbers(once.split("bs8 ")[1].rstrip(")")) if "bs8" in once else None,
            "3x": _numbers(thrice),
            "det cost": _numbers(det),
            "mIoU": _numbers(miou),
            "seg cost": _numbers(seg),
        }
    return rows


def _numbers(cell: str) -> list[float] | None:
    return None if cell == "-" else [float(part.rstrip("MG")) for part in cell.split("/")]


def names_of_files(text: str) -> list[str]:
    """Return the file names of the released checkpoints in the fact sheet; ``...`` stands for what it leaves out."""
    part = text.split("## Released checkpoints", 1)[1].split("\nDetector/segmentor checkpoints", 1)[0]
    return re.findall(r"[\w.+-]+\.pth", part)
