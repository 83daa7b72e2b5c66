"""Stochastic depth (https://arxiv.org/abs/1603.09382)."""

from __future__ import annotations

from torch import Tensor, nn

from mmvmamba.errors import ConfigError


class DropPath(nn.Module):
    """Drop the residual branch of whole samples while training and rescale those that are kept.

    Args:
        rate: Probability with which a sample is dropped, in [0, 1).
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        _check_rate(rate)
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` (b, ...) with samples zeroed at random in training, unchanged in evaluation."""
        if self.rate == 0.0 or not self.training:
            return x
        keep = 1.0 - self.rate
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
        return x * (mask / keep)

    def extra_repr(self) -> str:
        """Show the rate in ``print(model)``."""
        return f"rate={self.rate:g}"


def _check_rate(rate: float) -> None:
    if not isinstance(rate, int | float) or not 0.0 <= rate < 1.0:
        raise ConfigError(f"drop path rate is {rate!r}, expected a number in [0, 1). Choose a rate in that range.")


def drop_path_schedule(rate: float, depths: tuple[int, ...]) -> list[list[float]]:
    """Return one rate per block and stage, rising linearly from 0 to ``rate`` over all blocks in order."""
    _check_rate(rate)
    total = sum(depths)
    rates = [rate * i / max(total - 1, 1) for i in range(total)]
    starts = [sum(depths[:i]) for i in range(len(depths))]
    return [rates[start : start + depth] for start, depth in zip(starts, depths, strict=True)]
