"""Test pipelines at other sizes than a model was trained for, and the figure of accuracy against size.

What a size means is the task's own:

- A classifier sees squares of this side. A pipeline that crops from a larger resize (``ResizeEdge`` and
  ``CenterCrop``) keeps the ratio of the two; one that only resizes gets the new size; one that does neither gets a
  resize to the square.
- A detector or segmentor sees images whose shorter side has this length. The limit of the longer side grows with it, in
  the ratio that the pipeline's own resize has, or else there is none. Answers are compared with the truth at the
  image's own size, as mmdet and mmseg do by themselves. A segmentor that slides a window keeps the window: it takes
  more of them.

Source: Liu et al., "VMamba: Visual State Space Model" (arXiv 2401.10166), section 5.3: a classifier trained at 224 is
tested at sides up to 1024 without any training there.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from mmengine.config import Config

from mmvmamba.errors import ConfigError

#: Times the shorter side that a longer side may have where the pipeline names no limit.
_NO_LIMIT = 16
_RESIZES = ("Resize", "ResizeEdge", "FixScaleResize", "ResizeShortestEdge")
#: Task scope -> what the figure shows, the first that a test has: name in its metrics, label, factor.
SHOWN: Mapping[str, tuple[tuple[str, str, float], ...]] = {
    "mmpretrain": (("accuracy/top1", "top-1 accuracy, %", 1.0),),
    "mmdet": (("coco/bbox_mAP", "box mAP, %", 100.0), ("coco/segm_mAP", "mask mAP, %", 100.0)),
    "mmseg": (("mIoU", "mIoU, %", 1.0),),
}


def resized(cfg: Config, size: int) -> Config:
    """Return a config whose test shows images at a size, see the head of this module.

    Args:
        cfg: With ``test_dataloader`` and ``default_scope``; it stays as it is.
        size: The side of squares for a classifier, else the shorter side.

    Raises:
        ConfigError: If the size is less than 1, there is no test, or the pipeline does not begin with loading an image.
    """
    if size < 1:
        raise ConfigError(f"size is {size}, expected at least 1. Correct it.")
    if cfg.get("test_dataloader") is None:
        raise ConfigError("test_dataloader is missing in the config, expected a data set to test on. Add one.")
    changed = copy.deepcopy(cfg)
    dataset = changed.test_dataloader.dataset
    if dataset.get("pipeline") is None:
        raise ConfigError(
            f"test_dataloader.dataset is a {dataset.get('type')} without a pipeline of its own, expected one to resize "
            "in. Test on the data set inside it."
        )
    steps = list(dataset.pipeline)
    if not steps or not _kind(steps[0]).startswith("LoadImage"):
        raise ConfigError(
            f"the test pipeline begins with {_kind(steps[0]) if steps else 'nothing'!r}, expected LoadImageFromFile or "
            "the like. Give a config whose test loads an image first."
        )
    of_task = _for_classifier if changed.default_scope == "mmpretrain" else _for_dense_task
    dataset.pipeline = of_task(steps, size)
    return changed


def _kind(step: Mapping[str, Any]) -> str:
    """Return the type of a step without its scope."""
    kind = step["type"]
    return str(kind if isinstance(kind, str) else kind.__name__).rpartition(".")[2]


def _for_classifier(steps: Sequence[Any], size: int) -> list[Any]:
    crops = [_least(step["crop_size"]) for step in steps if _kind(step) == "CenterCrop"]
    result, resizes = [], 0
    for step in steps:
        if _kind(step) in _RESIZES:
            resizes += 1
            edge = round(_least(step["scale"]) * size / crops[0]) if crops else size
            step = {**step, "scale": edge if _kind(step) == "ResizeEdge" or crops else (size, size)}
        elif _kind(step) == "CenterCrop":
            step = {**step, "crop_size": size}
        result.append(step)
    if not resizes:
        result.insert(1, dict(type="Resize", scale=(size, size)))
    elif not crops and any(_kind(step) == "ResizeEdge" for step in steps):
        result.insert(_last_resize(result) + 1, dict(type="CenterCrop", crop_size=size))
    return result


def _last_resize(steps: Sequence[Any]) -> int:
    return max(index for index, step in enumerate(steps) if _kind(step) in _RESIZES)


def _for_dense_task(steps: Sequence[Any], size: int) -> list[Any]:
    result, resizes = [], 0
    for step in steps:
        if _kind(step) in _RESIZES:
            resizes += 1
            kept = {key: value for key, value in step.items() if key not in ("scale", "scale_factor", "keep_ratio")}
            step = dict(kept, type="Resize", scale=_bounds(step.get("scale"), size), keep_ratio=True)
        result.append(step)
    if not resizes:
        result.insert(1, dict(type="Resize", scale=_bounds(None, size), keep_ratio=True))
    return result


def _bounds(scale: Any, size: int) -> tuple[int, int]:
    """Return the limits of the longer and the shorter side."""
    if not isinstance(scale, (list, tuple)):
        return _NO_LIMIT * size, size
    longer, shorter = max(scale), min(scale)
    return (round(longer * size / shorter), size) if longer > shorter else (_NO_LIMIT * size, size)


def _least(size: Any) -> int:
    return int(min(size)) if isinstance(size, (list, tuple)) else int(size)


def figure_of(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Return a figure with a panel for each kind of metric and a line for each model.

    Args:
        rows: Each with ``model``, ``label`` of the metric, ``size`` and ``value``.

    Raises:
        MissingPackage: If matplotlib is not installed.
    """
    from mmvmamba.analysis.outputs import new_figure

    labels = list(dict.fromkeys(row["label"] for row in rows))
    figure, axes = new_figure(len(labels), 1, width=4.4, height=3.6)
    for axis, label in zip(axes[0], labels, strict=True):
        here = [row for row in rows if row["label"] == label]
        for model in dict.fromkeys(row["model"] for row in here):
            line = [row for row in here if row["model"] == model]
            axis.plot([row["size"] for row in line], [row["value"] for row in line], marker="o", label=model)
        axis.set_xlabel("side of the squares, pixels" if "top-1" in label else "shorter side, pixels")
        axis.set_title(label, fontsize=10)
        axis.set_xticks(sorted({row["size"] for row in here}))
        axis.tick_params(axis="x", labelsize=8)
        axis.set_ylim(0, 1.08 * max(1.0, *(row["value"] for row in here)))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.suptitle("Accuracy at other sizes, without finetuning", fontsize=10)
    return figure
