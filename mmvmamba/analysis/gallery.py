"""Picture grids: image, truth and prediction side by side, for a trained detector, segmentor or classifier."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from mmengine.config import Config

from mmvmamba.errors import DataError

Array = np.ndarray

# BGR; class k has colour k of the list, round and round.
PALETTE = np.array(
    [
        (75, 25, 230),
        (75, 180, 60),
        (25, 225, 255),
        (200, 130, 0),
        (48, 130, 245),
        (180, 30, 145),
        (240, 240, 70),
        (230, 50, 240),
        (60, 245, 210),
        (190, 150, 250),
        (128, 128, 0),
    ],
    dtype=np.uint8,
)
_PANEL = 384  # least width of a panel
_ZOOM = 2  # scenes of 128 to 192 pixels are too small to look at otherwise


def collect_predictions(cfg: Config, checkpoint: Path, count: int) -> list[Any]:
    """Run the checkpoint on ``count`` test samples spread over the data set and return their data samples.

    Args:
        cfg: A config of mmdet, mmseg or mmpretrain.
        checkpoint: What the training saved.
        count: How many samples, at most the size of the data set.
    """
    import torch
    from mmengine.dataset import pseudo_collate
    from mmengine.registry import DATASETS, MODELS, init_default_scope
    from mmengine.runner import load_checkpoint

    init_default_scope(cfg.default_scope)
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    model = MODELS.build(cfg.model)
    load_checkpoint(model, str(checkpoint), map_location="cpu", strict=True)
    model.eval()
    chosen = np.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().astype(int)
    with torch.no_grad():
        return [model.test_step(pseudo_collate([dataset[int(index)]]))[0] for index in chosen]


def save_gallery(task: str, samples: Sequence[Any], classes: Sequence[str], out: Path) -> None:
    """Draw predictions beside the truth into a PNG, for ``task`` det, seg or cls.

    Raises:
        DataError: the task is another one.
    """
    draw = {"det": _detection_tile, "seg": _segmentation_tile, "cls": _classification_tile}.get(task)
    if draw is None:
        raise DataError(f"save_gallery: task is {task!r}, expected 'det', 'seg' or 'cls'")
    tiles = [draw(sample, classes) for sample in samples]
    out.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(out), _grid(tiles, columns=8 if task == "cls" else 2)):
        raise DataError(f"could not write {out}; is the disk full or the folder read-only?")


def _detection_tile(sample: Any, classes: Sequence[str], score: float = 0.5) -> Array:
    """Image, true objects, and predicted objects of at least ``score``."""
    image = _read(sample.img_path)
    truth = _paint_instances(image, sample.gt_instances.numpy(), classes)
    found = sample.pred_instances.numpy()
    prediction = _paint_instances(image, found[found.scores >= score], classes)
    return _side_by_side(_zoom(image), truth, prediction, ("image", "truth", f"prediction (score >= {score})"))


def _segmentation_tile(sample: Any, classes: Sequence[str]) -> Array:
    """Image, true labels (hatched where not labelled) and predicted labels."""
    del classes  # the colours are those of the detection pictures; digits explain themselves
    image = _read(sample.img_path)
    truth = _paint_labels(image, sample.gt_sem_seg.numpy().data[0])
    prediction = _paint_labels(image, sample.pred_sem_seg.numpy().data[0])
    return _side_by_side(_zoom(image), truth, prediction, ("image", "truth", "prediction"))


def _classification_tile(sample: Any, classes: Sequence[str]) -> Array:
    """One crop with its true and predicted class; the frame is green where they agree and red where not."""
    image = _zoom(_read(sample.img_path))
    truth, found = int(sample.gt_label[0]), int(sample.pred_label[0])
    colour = (60, 180, 75) if truth == found else (40, 40, 220)
    image = cv2.copyMakeBorder(image, 20, 4, 4, 4, cv2.BORDER_CONSTANT, value=colour)
    text = f"is {classes[truth]}, found {classes[found]}"
    cv2.putText(image, text, (6, 14), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (255, 255, 255), 1, cv2.LINE_AA)
    return image


def _paint_instances(image: Array, instances: Any, classes: Sequence[str]) -> Array:
    """Blend masks and draw boxes with class names (and scores where there are any) on an enlarged copy."""
    canvas = _zoom(image)
    boxes = np.asarray(getattr(instances.bboxes, "tensor", instances.bboxes)).reshape(-1, 4)
    masks = _mask_array(instances.masks)
    scores = instances.scores if "scores" in instances else [None] * len(boxes)
    for mask, label in zip(masks, instances.labels, strict=True):
        covered = _zoom(mask.astype(np.uint8), cv2.INTER_NEAREST).astype(bool)
        canvas[covered] = (0.45 * canvas[covered] + 0.55 * PALETTE[label]).astype(np.uint8)
    for box, label, value in zip(boxes, instances.labels, scores, strict=True):
        colour = tuple(int(v) for v in PALETTE[label])
        left, top, right, bottom = (round(float(v) * _ZOOM) for v in box)
        cv2.rectangle(canvas, (left, top), (right, bottom), colour, 1)
        text = classes[label] if value is None else f"{classes[label]} {value:.2f}"
        _label(canvas, text, (left, max(top, 12)), colour)
    return canvas


def _mask_array(masks: Any) -> Array:
    """Masks (n, h, w) from mmdet's BitmapMasks, a boolean tensor or an array."""
    if hasattr(masks, "to_ndarray"):
        return masks.to_ndarray().astype(bool)
    return np.asarray(masks).astype(bool)


def _paint_labels(image: Array, labels: Array) -> Array:
    """Blend label colours (h, w): class 0 is the background and stays plain, 255 is not labelled and hatched."""
    colours = PALETTE[(labels.astype(int) - 1) % len(PALETTE)].astype(float)
    painted = 0.25 * image + 0.75 * colours
    painted = np.where((labels == 0)[:, :, None], 0.5 * image, painted)
    rows, columns = np.indices(labels.shape)
    hatch = ((rows + columns) % 4 < 2)[:, :, None] * 255
    painted = np.where((labels == 255)[:, :, None], hatch, painted)
    return _zoom(painted.astype(np.uint8), cv2.INTER_NEAREST)


def _side_by_side(first: Array, second: Array, third: Array, captions: tuple[str, str, str]) -> Array:
    panels = []
    for panel, caption in zip((first, second, third), captions, strict=True):
        spare = max(0, _PANEL - panel.shape[1])  # panels of one width stand in columns
        framed = cv2.copyMakeBorder(panel, 18, 4, 3, 3 + spare, cv2.BORDER_CONSTANT, value=(255, 255, 255))
        cv2.putText(framed, caption, (4, 13), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (0, 0, 0), 1, cv2.LINE_AA)
        panels.append(framed)
    return np.hstack(panels)


def _label(canvas: Array, text: str, corner: tuple[int, int], colour: tuple[int, ...]) -> None:
    (width, height), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, 0.4, 1)
    left, bottom = min(corner[0], canvas.shape[1] - width - 2), corner[1]
    cv2.rectangle(canvas, (left, bottom - height - 3), (left + width + 2, bottom), colour, -1)
    ink = (0, 0, 0) if sum(colour) > 380 else (255, 255, 255)
    cv2.putText(canvas, text, (left + 1, bottom - 2), cv2.FONT_HERSHEY_SIMPLEX, 0.4, ink, 1, cv2.LINE_AA)


def _grid(tiles: Sequence[Array], columns: int) -> Array:
    """Tiles of different sizes in rows, on white."""
    height, width = max(tile.shape[0] for tile in tiles), max(tile.shape[1] for tile in tiles)
    rows = -(-len(tiles) // columns)
    sheet = np.full((rows * height, min(columns, len(tiles)) * width, 3), 255, dtype=np.uint8)
    for index, tile in enumerate(tiles):
        top, left = index // columns * height, index % columns * width
        sheet[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
    return sheet


def _read(path: str) -> Array:
    image = cv2.imread(path)
    if image is None:
        raise DataError(f"could not read the picture {path}")
    return image


def _zoom(image: Array, interpolation: int = cv2.INTER_CUBIC) -> Array:
    return cv2.resize(image, None, fx=_ZOOM, fy=_ZOOM, interpolation=interpolation)
