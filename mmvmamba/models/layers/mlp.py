"""Two-layer perceptrons applied to every pixel."""

from __future__ import annotations

from torch import Tensor, nn

from mmvmamba.models.layers.activation import Activation, build_activation
from mmvmamba.models.layers.linear import Linear


class Mlp(nn.Module):
    """Linear, activation, dropout, linear, dropout.

    Args:
        channels: Channels of input and output.
        hidden: Channels between the two linear maps.
        act: Name of the activation.
        dropout: Dropout probability after either linear map.
    """

    def __init__(self, channels: int, hidden: int, act: Activation = "gelu", dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = Linear(channels, hidden)
        self.act = build_activation(act)
        self.fc2 = Linear(hidden, channels)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (..., c) to (..., c)."""
        x = self.drop(self.act(self.fc1(x)))
        return self.drop(self.fc2(x))


class GatedMlp(nn.Module):
    """The first linear map is twice as wide; its first half is multiplied by the activated second half.

    Args:
        channels: Channels of input and output.
        hidden: Channels of either half.
        act: Name of the activation of the gate.
        dropout: Dropout probability after the last linear map.
    """

    def __init__(self, channels: int, hidden: int, act: Activation = "gelu", dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = Linear(channels, 2 * hidden)
        self.act = build_activation(act)
        self.fc2 = Linear(hidden, channels)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (..., c) to (..., c)."""
        x, z = self.fc1(x).chunk(2, dim=-1)
        return self.drop(self.fc2(x * self.act(z)))
