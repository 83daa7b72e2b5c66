"""The published numbers of the families: our copies of them, and the fact sheets that the copies were made from."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
COPIES = ROOT / "tests" / "data" / "zoo"
SIZES = {"T": "tiny", "S": "small", "B": "base"}


def published() -> dict[str, Any]:
    """Return the copy of VMamba's; its ``origin`` says where every part is from."""
    return json.loads((COPIES / "vmamba_published.json").read_text())


@functools.cache
def published_models(family: str) -> dict[str, dict[str, Any]]:
    """Return what is published of another family: config -> ``metrics``, ``cost`` (M, G) and ``weights``."""
    return json.loads((COPIES / f"{family}_published.json").read_text())["models"]


def fact_sheet(family: str = "vmamba") -> Path | None:
    """Return a family's fact sheet if this checkout, or the folder of its worktrees, lies beside it, else None."""
    places = [folder / "shared" / "zoo" / f"{family}.md" for folder in ROOT.parents[:2]]
    return next((place for place in places if place.is_file()), None)


def read_sheet(text: str) -> dict[str, dict[str, Any]]:
    """Return the table "Published results" of VMamba's fact sheet by our names of the variants."""
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
