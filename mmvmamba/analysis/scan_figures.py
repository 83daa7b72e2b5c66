"""The figure of scan maps: for each layer and kind a row, with every direction and their sum over the image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mmvmamba.analysis.outputs import new_figure, save_figure
from mmvmamba.analysis.scan_maps import ScanMaps, overlay

_FORMULAS = {
    "qk": "$QK^T$\nwithout decays",
    "decayed": "$(Q\\odot w)(K/w)^T$\nwith decays",
    "weight": "with decays and step sizes:\nwhat each input is\nmultiplied by",
}


def draw_scan_maps(image: np.ndarray, maps: Sequence[ScanMaps], kinds: Sequence[str], path: Path) -> Path:
    """Draw maps over an image; brightness is the square root of the share of the largest value of that panel.

    Args:
        image: (h, w, 3) uint8 in the order RGB, of the size in which the query's pixel is counted.
        maps: Of one layer or several.
        kinds: Out of ``mmvmamba.analysis.scan_weights.KINDS``, at least one.
        path: The PNG.

    Raises:
        MissingPackage: If matplotlib is not installed.
    """
    # One direction is its own sum.
    columns = 1 + max(len(entry.directions) + (len(entry.directions) > 1) for entry in maps)
    height, width = image.shape[:2]
    figure, axes = new_figure(columns, len(maps) * len(kinds), width=2.5, height=2.5 * height / width + 0.45)
    for row, (entry, kind) in enumerate((entry, kind) for entry in maps for kind in kinds):
        for axis in axes[row]:
            axis.set_axis_off()
        rows, cells = entry.maps[kind].shape[1:]
        heading = f"{entry.layer}\n{rows} x {cells} cells\n\n{_FORMULAS[kind]}"
        axes[row, 0].text(0.5, 0.5, heading, ha="center", va="center", fontsize=9, transform=axes[row, 0].transAxes)
        panels = list(zip(entry.directions, entry.maps[kind], strict=True))
        if len(panels) > 1:
            panels.insert(0, ("sum of directions", entry.merged(kind)))
        for axis, (title, values) in zip(axes[row, 1:], panels, strict=False):
            axis.imshow(overlay(image, values, entry.pixel))
            axis.set_title(f"{title}\nlargest {float(values.max()):.2g}", fontsize=8)
    query = maps[0].pixel
    figure.suptitle(
        f"what the pixel at row {query[0]}, column {query[1]} (cross) takes from the others\n"
        "mean magnitude over channels; from 0, dark, to the largest of each panel, bright, by its square root",
        fontsize=9,
    )
    return save_figure(figure, path)
