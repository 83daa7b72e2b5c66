"""The activations a backbone can name."""

from __future__ import annotations

from typing import Literal, get_args

from torch import nn

from mmvmamba.models.layers.checks import check_choice

Activation = Literal["silu", "gelu", "relu", "sigmoid"]
ACTIVATIONS: tuple[str, ...] = get_args(Activation)
_CLASSES: dict[str, type[nn.Module]] = {
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,
}


def build_activation(name: Activation) -> nn.Module:
    """Return the activation module called ``name``.

    Raises:
        ConfigError: If ``name`` is not one of ``ACTIVATIONS``.
    """
    check_choice("activation", name, ACTIVATIONS)
    return _CLASSES[name]()
