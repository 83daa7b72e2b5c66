"""Loss and metric curves from the scalars that MMEngine writes to ``vis_data/scalars.json``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from mmvmamba.errors import DataError

Points = list[tuple[int, float]]


def read_scalars(path: Path) -> dict[str, Points]:
    """Read ``scalars.json`` (one JSON object per line) into one list of (step, value) per name.

    Raises:
        DataError: the file is absent, or a line is not a JSON object.
    """
    if not path.is_file():
        raise DataError(f"no scalars at {path}; expected what a training writes to its vis_data folder")
    series: dict[str, Points] = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: {error}; delete the file and train again") from error
        step = record.get("step", record.get("iter"))
        for name, value in record.items():
            if name not in ("step", "iter", "epoch") and isinstance(value, (int, float)) and step is not None:
                series.setdefault(name, []).append((int(step), float(value)))
    return series


def plot_curves(scalars: Path, out: Path, metrics: Sequence[str], title: str) -> None:
    """Draw losses (left) and the named validation metrics (right) over the iterations into a PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    series = read_scalars(scalars)
    losses = sorted(name for name in series if name.split(".")[-1].startswith("loss"))
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for name in losses:
        width = 2.0 if name == "loss" else 1.0
        left.plot(*zip(*series[name], strict=True), label=name, linewidth=width)
    for name in metrics:
        if name in series:
            right.plot(*zip(*series[name], strict=True), marker="o", label=name)
    for axes, what in ((left, "training loss"), (right, "validation metric")):
        axes.set_xlabel("iteration")
        axes.set_title(f"{title}: {what}")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)
    left.set_ylim(bottom=0)
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    plt.close(figure)
