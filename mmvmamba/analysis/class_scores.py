"""One number per class for a picture, differentiable, of classifiers, detectors and segmentors alike.

What is meant by the score of a class c:

- classifier: its logit;
- segmentor: the mean of its logits over the cells that it wins in the untouched picture, over all if it wins none;
- two-stage detector: the sum of its logits, by the (last) box head, at the boxes of class c found in the untouched
  picture; at all found boxes if none is of class c;
- one-stage detector: its largest logit over all places and anchors.

Cells and boxes are fixed by ``fix``, so that a changed picture is asked about the same places.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from mmvmamba.errors import ConfigError, DataError

_MOST_BOXES = 20


class ClassScores(nn.Module, ABC):
    """Maps normalised pictures (b, c, h, w) to scores (b, classes)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def fix(self, image: Tensor) -> int:
        """Look at the untouched picture (1, c, h, w); return the class that the network is surest of.

        Classifier: the largest logit. Segmentor: the most cells. Detector: the surest box, or the largest logit.
        """
        with torch.no_grad():
            return self._fix(image)

    def forward(self, images: Tensor) -> Tensor:
        """Return the scores (b, classes) of pictures (b, c, h, w), each asked about the same places."""
        return torch.cat([self._scores(image) for image in images.split(1)])

    @abstractmethod
    def _fix(self, image: Tensor) -> int: ...

    @abstractmethod
    def _scores(self, image: Tensor) -> Tensor: ...


def class_scores(model: nn.Module, task: str) -> ClassScores:
    """Return the scores of a network.

    Args:
        model: A classifier of mmpretrain, a segmentor of mmseg or a detector of mmdet, in evaluation form.
        task: ``"cls"``, ``"seg"`` or ``"det"``.

    Raises:
        ConfigError: If the task is another one, or a detector of a kind that has no such scores.
    """
    if task == "cls":
        return _Classifier(model)
    if task == "seg":
        return _Segmentor(model)
    if task == "det" and hasattr(model, "roi_head"):
        return _TwoStage(model)
    if task == "det" and hasattr(getattr(model, "bbox_head", None), "cls_out_channels"):
        return _OneStage(model)
    raise ConfigError(
        f"{type(model).__name__} for task {task!r} has no scores of classes that can be differentiated here, expected "
        "a classifier, a segmentor, or a detector with a roi_head or a dense bbox_head. Name another model."
    )


class _Classifier(ClassScores):
    def _fix(self, image: Tensor) -> int:
        return int(self(image).argmax())

    def _scores(self, image: Tensor) -> Tensor:
        return _checked(self.model(image, mode="tensor"), 2, self.model)


class _Segmentor(ClassScores):
    won: Tensor

    def _fix(self, image: Tensor) -> int:
        self.won = self._logits(image).argmax(1)  # (1, h', w')
        return int(self.won.flatten().mode().values)

    def _scores(self, image: Tensor) -> Tensor:
        logits = self._logits(image)
        classes = torch.arange(logits.shape[1], device=logits.device)
        cells = (self.won.unsqueeze(1) == classes[:, None, None]).to(logits.dtype)  # (1, classes, h', w')
        cells = torch.where(cells.sum((2, 3), keepdim=True) > 0, cells, torch.ones_like(cells))
        return (logits * cells).sum((2, 3)) / cells.sum((2, 3))

    def _logits(self, image: Tensor) -> Tensor:
        return _checked(self.model(image, mode="tensor"), 4, self.model)


class _TwoStage(ClassScores):
    rois: Tensor
    labels: Tensor

    def _fix(self, image: Tensor) -> int:
        found = self.model(image, [_sample(image)], mode="predict")[0].pred_instances
        if len(found) == 0:
            raise DataError(
                "the detector finds nothing in this picture, expected at least one box to explain. Use another "
                "picture, trained weights, or a lower score_thr in the config."
            )
        found = found[found.scores.argsort(descending=True)[:_MOST_BOXES]]
        self.rois = torch.cat([found.bboxes.new_zeros(len(found), 1), found.bboxes], 1)
        self.labels = found.labels
        return int(found.labels[0])

    def _scores(self, image: Tensor) -> Tensor:
        head: Any = self.model.roi_head
        maps = self.model.extract_feat(image)  # type: ignore[operator]  # a method of mmdet's detectors
        stages = () if not isinstance(head.bbox_head, nn.ModuleList) else (len(head.bbox_head) - 1,)
        logits = head._bbox_forward(*stages, maps, self.rois)["cls_score"]
        last = head.bbox_head[-1] if stages else head.bbox_head
        logits = logits[:, : last.num_classes]  # without the background
        own = (self.labels[:, None] == torch.arange(logits.shape[1], device=logits.device)).to(logits.dtype)
        own = torch.where(own.sum(0) > 0, own, torch.ones_like(own))
        total: Tensor = (logits * own).sum(0, keepdim=True)
        return total


class _OneStage(ClassScores):
    def _fix(self, image: Tensor) -> int:
        return int(self(image).argmax())

    def _scores(self, image: Tensor) -> Tensor:
        head: Any = self.model.bbox_head
        levels = head(self.model.extract_feat(image))[0]  # type: ignore[operator]
        each = [level.unflatten(1, (-1, head.cls_out_channels)).amax((1, 3, 4)) for level in levels]
        return torch.stack(each).amax(0)[:, : head.num_classes]


def _checked(out: Any, dims: int, model: nn.Module) -> Tensor:
    if not isinstance(out, Tensor) or out.dim() != dims:
        raise ConfigError(
            f"{type(model).__name__} returns {type(out).__name__}, expected one tensor of {dims} dimensions with a "
            "score per class. Name a whole classifier or segmentor."
        )
    return out


def _sample(image: Tensor) -> Any:
    from mmdet.structures import DetDataSample

    shape = tuple(image.shape[2:])
    info = dict(img_shape=shape, ori_shape=shape, pad_shape=shape, batch_input_shape=shape, scale_factor=(1.0, 1.0))
    return DetDataSample(metainfo=dict(info, flip=False, flip_direction=None))
