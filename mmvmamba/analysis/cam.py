"""Class activation maps of classifiers, detectors and segmentors, by the methods of the ``grad-cam`` package.

A map says which cells of a feature map speak for a class. `mmvmamba.analysis.class_scores` says what its score is
for each task, and this module brings any layer's output into the form (b, c, h, w) that the package wants.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmvmamba.analysis.class_scores import ClassScores, class_scores
from mmvmamba.analysis.outputs import new_figure, save_figure
from mmvmamba.analysis.scan_maps import overlay
from mmvmamba.errors import ConfigError
from mmvmamba.models.backbones.base import BaseBackbone, Block
from mmvmamba.models.layers.tokens import TokenLayout, only_patches
from mmvmamba.optional import optional_package

METHODS = (
    "GradCAM",
    "HiResCAM",
    "GradCAMElementWise",
    "GradCAMPlusPlus",
    "XGradCAM",
    "LayerCAM",
    "EigenCAM",
    "EigenGradCAM",
    "KPCA_CAM",
    "ScoreCAM",
)
"""Classes of ``pytorch_grad_cam`` that need a network, a layer and a target and nothing else."""


@dataclass(frozen=True)
class ActivationMap:
    """What speaks for a class in a picture.

    Attributes:
        method: One of ``METHODS``.
        label: Number of the class.
        score: Its score, see ``class_scores``.
        values: From 0 to 1 (h, w), in the size of the picture.
    """

    method: str
    label: int
    score: float
    values: np.ndarray


class AsMap:
    """The ``reshape_transform`` of a layer: its output as (b, c, h, w).

    Blocks of this project give channels-last maps (b, h, w, c) or tokens (b, l, c), of which those that are no patches
    are left out. Layers of other projects must give (b, c, h, w).

    Args:
        name: Of the layer, for messages.
        layer: The layer.
    """

    def __init__(self, name: str, layer: nn.Module) -> None:
        self.name, self.is_block = name, isinstance(layer, Block)
        self.layout: TokenLayout | None = None
        self.handle = layer.register_forward_pre_hook(self._look)

    def _look(self, _layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.layout = next((value for value in inputs if isinstance(value, TokenLayout)), None)

    def __call__(self, out: Any) -> Tensor:
        """Return the output of the layer, or its gradient, as (b, c, h, w)."""
        if isinstance(out, Tensor) and out.dim() == 4:
            return out.permute(0, 3, 1, 2) if self.is_block else out
        if isinstance(out, Tensor) and out.dim() == 3 and self.layout is not None:
            patches = only_patches(out, self.layout.extra)
            return patches.unflatten(1, (self.layout.rows, self.layout.columns)).permute(0, 3, 1, 2)
        found = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ConfigError(
            f"the layer {self.name!r} returns {found}, expected a map (b, c, h, w) or what a block of a backbone here "
            "gives. Name a block, such as 'layers.2.blocks.1' or, of columnar models, 'layers.10'."
        )


def activation_maps(
    model: nn.Module,
    task: str,
    image: Tensor,
    methods: Sequence[str] = ("GradCAM",),
    *,
    label: int | None = None,
    stage: int = -1,
    layer: str | None = None,
) -> list[ActivationMap]:
    """Return a map for each method.

    Args:
        model: A whole network with a ``backbone``, in evaluation form. Gradients of its parameters are None afterwards.
        task: ``"cls"``, ``"det"`` or ``"seg"``.
        image: One normalised picture (1, c, h, w).
        methods: Out of ``METHODS``.
        label: Number of the class; None for what the network is surest of, see ``ClassScores.fix``.
        stage: Which of the backbone's maps to look at, if no layer is named.
        layer: A module of the backbone by its name; of the backbones of this project, one of its blocks.

    Raises:
        ConfigError: If a method, label, stage or layer is impossible.
        DataError: If a detector finds nothing.
        MissingPackage: If the package grad-cam is not installed.
    """
    check_methods(methods)
    package = optional_package("pytorch_grad_cam", "analysis")
    scores = class_scores(model, task)
    surest = scores.fix(image)
    with torch.no_grad():
        known = scores(image)
    chosen = surest if label is None else label
    if not 0 <= chosen < known.shape[1]:
        raise ConfigError(f"label is {chosen}, expected 0 to {known.shape[1] - 1}. Name a class of the network.")
    backbone: Any = model.backbone
    target, transform, handles = _named_layer(backbone, layer) if layer else _tapped(backbone, stage)
    try:
        return [
            ActivationMap(name, chosen, float(known[0, chosen]), cam)
            for name in methods
            for cam in [_one_map(package, name, scores, target, transform, image, chosen)]
        ]
    finally:
        for handle in handles:
            handle.remove()
        model.zero_grad(set_to_none=True)


def check_methods(methods: Sequence[str]) -> None:
    """Raise a ConfigError for an unknown method."""
    for name in methods:
        if name not in METHODS:
            raise ConfigError(f"method is {name!r}, expected one of {', '.join(METHODS)}. Correct it.")


def _one_map(
    package: Any, method: str, scores: ClassScores, target: nn.Module, transform: Any, image: Tensor, label: int
) -> np.ndarray:
    wanted = package.utils.model_targets.ClassifierOutputTarget(label)
    cam = getattr(package, method)(model=scores, target_layers=[target], reshape_transform=transform)
    try:
        return np.asarray(cam(input_tensor=image, targets=[wanted])[0], dtype=np.float32)
    finally:
        cam.activations_and_grads.release()


def _tapped(backbone: nn.Module, stage: int) -> tuple[nn.Module, Any, list[Any]]:
    """Let one of the backbone's maps pass through a module that can be watched."""
    tap = nn.Identity()

    def pass_through(module: nn.Module, _inputs: Any, out: Any) -> tuple[Any, ...]:
        maps = list(out) if isinstance(out, (tuple, list)) else [out]
        if not -len(maps) <= stage < len(maps):
            raise ConfigError(
                f"stage is {stage}, expected one of the {len(maps)} maps that {type(module).__name__} returns. Choose "
                f"0 to {len(maps) - 1}, or -1 for the last."
            )
        if not isinstance(maps[stage], Tensor) or maps[stage].dim() != 4:
            raise ConfigError(
                f"{type(module).__name__} of this network returns no maps, expected one to look at. Name a layer of "
                "it, such as the last block but one ('layers.22'): behind the last, a class token is all that counts."
            )
        maps[stage] = tap(maps[stage])
        return tuple(maps)

    return tap, None, [backbone.register_forward_hook(pass_through)]


def _named_layer(backbone: nn.Module, name: str) -> tuple[nn.Module, Any, list[Any]]:
    named = dict(backbone.named_modules())
    if name not in named:
        blocks = [key for key, module in named.items() if isinstance(module, Block)] or list(named)[1:]
        raise ConfigError(
            f"layer is {name!r}, expected a module of {type(backbone).__name__}. Choose one of "
            f"{', '.join(map(repr, blocks))}."
        )
    if isinstance(backbone, BaseBackbone) and not isinstance(named[name], Block):
        # Inside of ours maps have their channels last, and a map of the wrong axes looks like any other.
        raise ConfigError(
            f"layer is {name!r}, a {type(named[name]).__name__}, expected a block of {type(backbone).__name__}. Choose "
            f"one of {', '.join(repr(key) for key, module in named.items() if isinstance(module, Block))}."
        )
    transform = AsMap(name, named[name])
    return named[name], transform, [transform.handle]


def draw_activation_maps(rows: Sequence[tuple[np.ndarray, Sequence[ActivationMap]]], path: Path) -> Path:
    """Draw pictures with their maps beside them.

    Args:
        rows: Pictures (h, w, 3) uint8, RGB, each with as many maps.
        path: The PNG.

    Raises:
        MissingPackage: If matplotlib is not installed.
    """
    columns = 1 + max(len(maps) for _, maps in rows)
    height, width = rows[0][0].shape[:2]
    figure, axes = new_figure(columns, len(rows), width=2.6, height=2.6 * height / width + 0.4)
    for row, (image, maps) in zip(axes, rows, strict=True):
        for axis in row:
            axis.set_axis_off()
        row[0].imshow(image)
        row[0].set_title("picture", fontsize=9)
        for axis, found in zip(row[1:], maps, strict=False):
            axis.imshow(overlay(image, torch.from_numpy(found.values), alpha=0.55, gamma=1.0))
            axis.set_title(f"{found.method}\nclass {found.label}, score {found.score:.2f}", fontsize=9)
    return save_figure(figure, path)
