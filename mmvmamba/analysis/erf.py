"""Effective receptive fields: which pixels of the image matter for the middle of a feature map, measured by gradients.

Luo et al., "Understanding the effective receptive field" (arXiv 1701.04128), by the recipe of RepLKNet (arXiv
2203.06717) that VMamba (arXiv 2401.10166) follows. For every image, y is the sum over channels of the positive part of
the middle cell of a map; the field is the sum over colours of |dy / dx|, averaged over images. The positive part
matters: behind a layer norm whose weights are still equal the channels of a cell sum to zero whatever the image is, and
the gradient of that sum is nothing but rounding errors. Differences from RepLKNet's recipe: magnitudes of gradients are
taken, not their positive part, and the squares of the table lie around the middle of the field and not of the image,
because a cell looks at the pixels around its first one where convolutions of stride 2 have a kernel of 3, and around
its middle where patches do not overlap.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmvmamba.analysis.outputs import new_figure, save_figure
from mmvmamba.errors import ConfigError, DataError
from mmvmamba.optional import optional_package

SHARES = (0.2, 0.3, 0.5, 0.99)
"""How much of the field the squares of the table hold, as in RepLKNet's table."""


@dataclass(frozen=True)
class Field:
    """An effective receptive field.

    Attributes:
        values: Mean contribution of every pixel (h, w), float64 on the CPU.
        centre: Row and column with half of the field on either side.
        map_size: Rows and columns of the map.
        images: How many were averaged.
    """

    values: Tensor
    centre: tuple[int, int]
    map_size: tuple[int, int]
    images: int


@dataclass(frozen=True)
class Area:
    """The smallest square around the centre that holds a share of a field.

    Attributes:
        share: What was asked for.
        side: Of the square in pixels, odd; it may reach beyond the image.
        area_ratio: Part of the image that lies in it.
    """

    share: float
    side: int
    area_ratio: float


def effective_receptive_field(backbone: nn.Module, images: Iterable[Tensor], stage: int = -1) -> Field:
    """Return the field of the middle cell of a map.

    Args:
        backbone: Takes images (b, c, h, w), returns a map (b, c', h', w') or several of them; in evaluation form, or
            the images of a batch would look at each other.
        images: Batches of images of one size, as the backbone was trained to see them.
        stage: Which of its maps, counted from 0 or, negative, from the last.

    Raises:
        ConfigError: If the backbone gives no maps, or not so many.
        DataError: If there is no image, or sizes differ.
    """
    total: Tensor | None = None
    count, map_size = 0, (0, 0)
    for batch in images:
        pixels = batch.detach().clone().requires_grad_(True)
        with torch.enable_grad():
            chosen = feature_map(backbone, pixels, stage)
            map_size = (chosen.shape[2], chosen.shape[3])
            middle = chosen[:, :, map_size[0] // 2, map_size[1] // 2].relu().sum()
            (gradient,) = torch.autograd.grad(middle, pixels)
        field = gradient.abs().double().sum((0, 1)).cpu()
        if total is not None and total.shape != field.shape:
            raise DataError(
                f"images of {tuple(total.shape)} and {tuple(field.shape)} pixels, expected one size. Resize them."
            )
        total = field if total is None else total + field
        count += batch.shape[0]
    if total is None:
        raise DataError("images is empty, expected at least one. Name a folder with images.")
    return Field(total / count, (_median(total.sum(1)), _median(total.sum(0))), map_size, count)


def feature_map(backbone: nn.Module, images: Tensor, stage: int) -> Tensor:
    """Return one of the maps (b, c, h, w) of a backbone.

    Raises:
        ConfigError: If it gives none, or not so many.
    """
    out = backbone(images)
    maps = [out] if isinstance(out, Tensor) else list(out) if isinstance(out, (tuple, list)) else []
    if not maps or not all(isinstance(value, Tensor) and value.dim() == 4 for value in maps):
        found = [tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__ for value in maps]
        raise ConfigError(
            f"{type(backbone).__name__} returns {found or type(out).__name__}, expected maps (b, c, h, w). Name "
            "the config of a detector or segmentor with this backbone: there it gives maps."
        )
    if not -len(maps) <= stage < len(maps):
        raise ConfigError(
            f"stage is {stage}, expected one of the {len(maps)} maps that {type(backbone).__name__} returns. Choose 0 "
            f"to {len(maps) - 1}, or -1 for the last; a config with other out_indices has others."
        )
    return maps[stage]


def check_stage(backbone: nn.Module, stage: int, size: tuple[int, int]) -> None:
    """Raise what ``feature_map`` raises for images of ``size``, before there is any long work."""
    parameter = next(backbone.parameters(), torch.zeros(()))
    with torch.no_grad():
        feature_map(backbone, torch.zeros(1, 3, *size, dtype=parameter.dtype, device=parameter.device), stage)


def _median(parts: Tensor) -> int:
    """Return the entry of ``parts`` (l,) before and behind which there is at most half of their sum."""
    sums = parts.cumsum(0)
    return int((sums >= sums[-1] / 2 * (1 - 1e-12)).nonzero()[0]) if bool(sums[-1] > 0) else len(parts) // 2


def contribution_areas(field: Field, shares: Sequence[float] = SHARES) -> list[Area]:
    """Return the smallest centred squares that hold given shares of a field.

    Args:
        field: What was measured.
        shares: Each above 0 and at most 1.

    Raises:
        ConfigError: If a share is impossible.
        DataError: If the field is zero everywhere or not finite.
    """
    for share in shares:
        if not 0 < share <= 1:
            raise ConfigError(f"share is {share}, expected above 0 and at most 1. Correct it.")
    held = held_by_squares(field)
    h, w = field.values.shape
    areas = []
    for share in shares:
        # Sums of the same numbers in another order: 1 may be missed by a rounding.
        radius = int((held >= share * (1 - 1e-12)).nonzero()[0])
        rows, columns = (_inside(at, side, radius) for at, side in zip(field.centre, (h, w), strict=True))
        areas.append(Area(share, 2 * radius + 1, rows * columns / (h * w)))
    return areas


def held_by_squares(field: Field) -> Tensor:
    """Return the share of a field that lies in the centred squares of side 1, 3, 5 and so on up to the whole image.

    Raises:
        DataError: If the field is zero everywhere or not finite.
    """
    values = field.values
    total = float(values.sum())
    if not math.isfinite(total) or total <= 0:
        raise DataError(
            f"the field sums to {total}, expected a positive number: the map does not depend on the image, or "
            "overflows. Check the weights."
        )
    h, w = values.shape
    row, column = field.centre
    radii = torch.maximum((torch.arange(h) - row).abs()[:, None], (torch.arange(w) - column).abs()[None, :])
    rings = torch.zeros(int(radii.max()) + 1, dtype=torch.float64).index_add_(0, radii.flatten(), values.flatten())
    return rings.cumsum(0) / total


def _inside(at: int, side: int, radius: int) -> int:
    return min(at + radius, side - 1) - max(at - radius, 0) + 1


def draw_fields(fields: Sequence[tuple[str, Field]], path: Path) -> Path:
    """Draw fields side by side, each relative to its own largest value on one logarithmic scale, and how they add up.

    Args:
        fields: Titles and fields.
        path: The PNG.

    Raises:
        MissingPackage: If matplotlib is not installed.
    """
    optional_package("matplotlib", "analysis")
    from matplotlib.colors import LogNorm

    panels = len(fields) + 1
    columns = min(panels, 4)
    rows = -(-panels // columns)
    figure, axes = new_figure(columns, rows, width=3.4, height=3.5)
    flat = list(axes.flatten())
    norm = LogNorm(1e-4, 1.0)
    image: Any = None
    for number, (axis, (title, field)) in enumerate(zip(flat, fields, strict=False), start=1):
        relative = field.values / field.values.max()
        image = axis.imshow(relative.clamp(min=1e-4).numpy(), norm=norm, cmap="viridis")
        axis.set_title(_wrapped(f"{number}: {title}"), fontsize=8)
        axis.set_xlabel("pixel", fontsize=8)
        axis.tick_params(labelsize=8)
    if image is not None:
        bar = figure.colorbar(image, ax=flat[: len(fields)], location="bottom", shrink=0.6, aspect=40)
        bar.set_label("mean |gradient| relative to the largest; 0.0001 and less are dark", fontsize=8)
        bar.ax.tick_params(labelsize=8)
    curves = flat[len(fields)]
    for number, (_, field) in enumerate(fields, start=1):
        held = held_by_squares(field)
        sides = (2 * torch.arange(len(held)) + 1).numpy()
        curves.plot(sides, 100 * held.numpy(), label=str(number))
    curves.set_title("contribution of a centred square", fontsize=9)
    curves.set_xlabel("side of the square (pixels)", fontsize=8)
    curves.set_ylabel("% of the field", fontsize=8)
    curves.set_ylim(0, 102)
    curves.set_box_aspect(1)
    curves.tick_params(labelsize=8)
    curves.grid(alpha=0.3)
    curves.legend(fontsize=8, loc="lower right", title="panel", title_fontsize=8)
    for axis in flat[panels:]:
        axis.set_axis_off()
    return save_figure(figure, path)


def _wrapped(title: str) -> str:
    """Break the lines of a title behind underscores and hyphens where they are longer than a panel is wide."""
    lines = (textwrap.wrap(line.replace("_", "_ "), 34) for line in title.split("\n"))
    return "\n".join(part.replace("_ ", "_") for wrapped in lines for part in wrapped)
