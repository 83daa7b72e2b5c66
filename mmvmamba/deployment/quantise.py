"""Linear maps in 8-bit integers, weights and activations, through torchao.

Weights are rounded once, with a scale for every output channel, activations when they come, with a scale for every
pixel. Everything else stays as it is: the scans, whose states and step sizes would lose what they remember,
convolutions, norms, and the projections to step sizes, whose weights the scans take as they are.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mmvmamba.errors import ConfigError
from mmvmamba.models.layers.linear import StepProjection
from mmvmamba.optional import optional_package

EXTRA = "export"


@dataclass(frozen=True)
class Quantised:
    """A quantised network.

    Attributes:
        module: A copy, in evaluation form.
        layers: Names of the linear maps that multiply integers.
        share: Part of all parameters that they hold, 0 to 1.
    """

    module: nn.Module
    layers: tuple[str, ...]
    share: float


def quantise_linears(module: nn.Module) -> Quantised:
    """Return a copy of a network whose linear layers multiply 8-bit integers.

    Args:
        module: In evaluation mode, in float32.

    Raises:
        MissingPackage: If torchao is not installed.
        ConfigError: If the network is in training mode or has no linear layer.
    """
    torchao: Any = optional_package("torchao.quantization", EXTRA)
    if any(part.training for part in module.modules()):
        raise ConfigError(
            f"{type(module).__name__} is in training mode, expected evaluation mode. Call module.eval() first."
        )
    layers = {
        name: part
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear) and not isinstance(part, StepProjection)
    }
    if not layers:
        raise ConfigError(
            f"{type(module).__name__} has no linear layer, expected one to quantise. Export it without --int8."
        )
    total = sum(parameter.numel() for parameter in module.parameters())
    held = sum(part.weight.numel() for part in layers.values())
    quantised = copy.deepcopy(module)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", module="torchao")
        torchao.quantize_(
            quantised, torchao.Int8DynamicActivationInt8WeightConfig(), filter_fn=lambda _, name: name in layers
        )
    return Quantised(quantised, tuple(layers), held / total)
