"""How cost grows with the side of the image: operations, throughput and memory, as in VMamba's input-scaling figure.

A model that is linear in the number of pixels has the slope 1 in a log-log plot over pixels, a global attention one
that nears 2. Slopes are least-squares ones over all sides that the model could take.

Source: Liu et al., "VMamba: Visual State Space Model" (arXiv 2401.10166), section 5.3, which measures classifiers on a
GPU; upstream ``analyze/get_flops.py`` and ``analyze/get_loss.py``.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mmvmamba.analysis.flops import count_backbone
from mmvmamba.analysis.throughput import REFUSALS, Measurement, Settings, Subject, measure, refusal
from mmvmamba.errors import ConfigError

SIDES = (224, 384, 512, 768, 1024, 1280, 1536)


@dataclasses.dataclass(frozen=True)
class Point:
    """One model at one side.

    Attributes:
        model: Its name.
        side: Height and width of the image.
        flops: Multiply-adds of one image, as `mmvmamba.analysis.flops` counts; None if they could not be counted.
        images_per_second: By the median of the calls; None if there is none.
        step_bytes: What a call adds to the memory at its highest moment; None if unknown.
        measurement: All else that was measured.
        problem: Why a number is missing, else an empty string.
    """

    model: str
    side: int
    flops: int | None
    images_per_second: float | None
    step_bytes: int | None
    measurement: Measurement
    problem: str = ""

    def row(self) -> dict[str, Any]:
        """The fields, for a table."""
        measured = self.measurement.row()
        keys = ("dtype", "batch", "step", "rounds", "minimum", "median", "weights_bytes")
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: own[name] for name in own if name != "measurement"} | {key: measured[key] for key in keys}


def slope(sides: Sequence[int], values: Sequence[float]) -> float:
    """Least-squares slope of the logarithm of a value over that of the number of pixels, for at least two sides."""
    return statistics.linear_regression([2 * math.log(side) for side in sides], [math.log(v) for v in values]).slope


def scale(
    subjects: Sequence[Subject],
    sides: Sequence[int],
    settings: Settings,
    *,
    batch: int = 1,
    train: bool = False,
    done: Callable[[], None] = lambda: None,
) -> list[Point]:
    """Count and measure every subject at every side.

    Args:
        subjects: Whose ``run`` is their module: it takes images and nothing else.
        sides: Heights, which are the widths, too, in rising order.
        settings: How to measure.
        batch: Images of one call.
        train: Whether to measure training steps.
        done: Called after each side.

    Returns:
        One point for every side and subject, by side. What a subject cannot take is said in ``problem``.

    Raises:
        ConfigError: If ``sides`` are not rising, or ``batch`` is less than 1.
    """
    check_sides(sides, batch)
    points = []
    for side in sides:
        images = torch.randn(batch, 3, side, side, device=settings.device)
        for subject, measured in zip(subjects, measure(subjects, images, settings, train=train), strict=True):
            flops, problem = _flops(subject, side)
            problem = measured.problem or problem
            points.append(
                Point(subject.name, side, flops, measured.images_per_second, measured.step_bytes, measured, problem)
            )
        done()
    return points


def check_sides(sides: Sequence[int], batch: int = 1) -> None:
    """Raise a ConfigError unless sides are rising and there is an image."""
    if not sides or list(sides) != sorted(set(sides)) or sides[0] < 1 or batch < 1:
        raise ConfigError(
            f"sides are {list(sides)} and batch is {batch}, expected sides of at least 1 in rising order and at least "
            "one image. Correct them."
        )


def _flops(subject: Subject, side: int) -> tuple[int | None, str]:
    try:
        return count_backbone(subject.module, side, side).flops, ""
    except REFUSALS as error:
        return None, f"not counted: {refusal(error)}"


#: Attribute of a point -> title, factor to the unit shown, power that makes it a cost.
_QUANTITIES = {
    "flops": ("multiply-adds of an image, G", 1e-9, 1),
    "images_per_second": ("images per second", 1.0, -1),
    "step_bytes": ("memory that a call adds, MiB", 2.0**-20, 1),
}


def slopes(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Return for every model the slopes of operations, time and memory over pixels; None where fewer than two sides."""
    rows = []
    for model in dict.fromkeys(point.model for point in points):
        row: dict[str, Any] = {"model": model}
        for attribute, name in (("flops", "flops"), ("images_per_second", "time"), ("step_bytes", "memory")):
            _, _, power = _QUANTITIES[attribute]
            known = [
                (point.side, getattr(point, attribute) ** power)
                for point in points
                # What a call adds can be less than a page; its logarithm says nothing then.
                if point.model == model and (getattr(point, attribute) or 0) > 0
            ]
            row[name] = slope(*zip(*known, strict=True)) if len(known) > 1 else None
        rows.append(row)
    return rows


def figure_of(points: Sequence[Point], title: str) -> Any:
    """Return a figure of three log-log panels over the side, a line for each model, its slope in the legend.

    Raises:
        MissingPackage: If matplotlib is not installed.
    """
    from mmvmamba.analysis.outputs import new_figure

    figure, axes = new_figure(3, 1, width=4.6, height=4.0)
    from matplotlib.ticker import LogLocator

    by_model = {row["model"]: row for row in slopes(points)}
    sides = sorted({point.side for point in points})
    names = dict(zip(_QUANTITIES, ("flops", "time", "memory"), strict=True))
    for axis, (attribute, (label, factor, power)) in zip(axes[0], _QUANTITIES.items(), strict=True):
        for model, row in by_model.items():
            known = [p for p in points if p.model == model and (getattr(p, attribute) or 0) > 0]
            found = row[names[attribute]]
            text = model if found is None else f"{model} ({power * found:+.2f})"
            values = [factor * getattr(p, attribute) for p in known]
            axis.plot([p.side for p in known], values, marker="o", markersize=4, label=text)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(sides, [str(side) for side in sides], fontsize=8, rotation=45)
        axis.minorticks_off()
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set_xlabel("side of the image, pixels")
        axis.set_title(label, fontsize=10)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, title="(slope over pixels)", title_fontsize=7)
    figure.suptitle(title, fontsize=10)
    return figure
