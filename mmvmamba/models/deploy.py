"""The deployment form of a model: batch norms, residuals of convolutions and constant scales folded into the weights.

The idea is that of https://arxiv.org/abs/2101.03697 (RepVGG) with one branch. The result computes what the model in
evaluation mode does, to rounding, with fewer and cheaper steps; it cannot be trained, for what it lacks is what
training changes.
"""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmvmamba.errors import ConfigError
from mmvmamba.models.layers.conv_bn import fold_norm

_NAMES_SHOWN = 3
Model = TypeVar("Model", bound=nn.Module)


def fold_batch_norms(model: Model) -> Model:
    """Return the deployment form of a model, a copy; the model itself stays as it is.

    Folded is, inside any of our backbones and heads and whatever is around them:

    - a batch norm directly behind a convolution or linear map in an `nn.Sequential`, and in the layers and stems of
      this package (those of mmcv's ``ConvModule`` are mmengine's business: ``mmcv.cnn.fuse_conv_bn``),
    - what a layer says by a method ``fold_batch_norms``: EfficientViM's and MobileMamba's residual convolutions take up
      their residuals, MobileMamba's classification head its norm, its scans and wavelets their scales.

    Norms that have no such layer before them (out norms, layer norms) stay. Entries of the state dict have the names
    they had, without those of the norms; a convolution that had no bias gets one. To load the state dict of a
    deployment form, make one of a model of the same arguments and load it there. ``torch.compile`` and ``torch.export``
    take it as any model.

    Args:
        model: A backbone, a classifier, detector or segmentor, in evaluation mode.

    Returns:
        The copy, in evaluation mode, equal to 1e-5 in float32. Its folded weights want no gradient.

    Raises:
        ConfigError: If a batch norm is in training mode, or was replaced by one without running statistics.
    """
    training = [name for name, module in model.named_modules() if isinstance(module, _BatchNorm) and module.training]
    if training or model.training:
        names = ", ".join(map(repr, training[:_NAMES_SHOWN])) or "none of them"
        raise ConfigError(
            f"{type(model).__name__} is in training mode ({len(training)} batch norms, such as {names}), expected "
            "evaluation mode: statistics of batches cannot be folded. Call model.eval() first."
        )
    folded = copy.deepcopy(model)
    # What is inside a module comes behind it, and is folded before it.
    for module in reversed(list(folded.modules())):
        fold = getattr(module, "fold_batch_norms", None)
        if callable(fold):
            fold()
        elif isinstance(module, nn.Sequential) or getattr(module, "runs_in_order", False):
            _fold_neighbours(module)
    # What takes the place of a norm is new, and begins in training mode.
    return folded.train(False)


def _fold_neighbours(sequence: nn.Module) -> None:
    """Fold every batch norm of a module that runs its children in order into the layer right before it."""
    before: tuple[str, nn.Module] | None = None
    for name, child in list(sequence.named_children()):
        if before is not None and isinstance(child, _BatchNorm) and isinstance(before[1], nn.Conv2d | nn.Linear):
            setattr(sequence, before[0], fold_norm(before[1], child))
            setattr(sequence, name, nn.Identity())
        before = (name, child)
