"""Squeeze and excitation (https://arxiv.org/abs/1709.01507): every channel scaled by what the whole map looks like."""

from __future__ import annotations

from torch import Tensor, nn

from mmvmamba.errors import ConfigError
from mmvmamba.models.layers.linear import Linear


class SqueezeExcite(nn.Module):
    """Mean over the pixels, linear, ReLU, linear, sigmoid; the map is multiplied by the result.

    Args:
        channels: Channels of the map.
        reduction: How many times narrower the layer between the two linear maps is.

    Raises:
        ConfigError: If that layer would have no channel.
    """

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        hidden = channels // reduction
        if hidden < 1:
            raise ConfigError(
                f"SqueezeExcite: reduction is {reduction} of {channels} channels, expected at most as many as there "
                "are channels. Widen the map or switch the squeeze and excitation off."
            )
        self.fc = nn.Sequential(
            Linear(channels, hidden, bias=False), nn.ReLU(), Linear(hidden, channels, bias=False), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        """Scale the channels of ``x`` (b, h, w, c); same shape."""
        return x * self.scale(x)

    def scale(self, x: Tensor) -> Tensor:
        """Return what the channels of ``x`` (b, h, w, c) are multiplied by (b, 1, 1, c)."""
        scale: Tensor = self.fc(x.mean((1, 2), keepdim=True))
        return scale
