"""Stochastic layer-wise shuffle: tokens change places at random inside a layer while a model is trained.

Paper: "Stochastic Layer-Wise Shuffle for Improving Vision Mamba Training" (https://arxiv.org/abs/2408.17081).
Upstream: huangzizheng01/ShuffleMamba, models_shuffle.py. Difference: with rate 0 no random number is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mmvmamba.errors import ConfigError


class LayerShuffle(nn.Module):
    """Draws, layer by layer, whether its tokens are shuffled and how; it has no parameters.

    The probability rises linearly from 0 in the first layer to ``rate`` in the last. In training mode one uniform
    number per layer comes from the CPU's generator, for the whole batch, and where it is below the probability a
    permutation from the generator of the tokens' device. In evaluation mode, and with rate 0, nothing is drawn.

    Args:
        rate: Probability of the last layer, in [0, 1].
        depth: Layers.

    Raises:
        ConfigError: If the rate is none.
    """

    def __init__(self, rate: float, depth: int) -> None:
        super().__init__()
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0.0 <= rate <= 1.0:
            raise ConfigError(f"shuffle_rate is {rate!r}, expected a number in [0, 1]. Choose a rate in that range.")
        self.rate = rate
        self.rates = tuple(rate * i / max(depth - 1, 1) for i in range(depth))

    def draw(self, layer: int, tokens: Tensor) -> Tensor | None:
        """Return a permutation (l,), int64, of the ``tokens`` (b, l, d) of a layer, or None for their own order."""
        if not self.training or self.rate == 0.0:
            return None
        if torch.rand(1, device="cpu").item() >= self.rates[layer]:
            return None
        return torch.randperm(tokens.shape[1], device=tokens.device)

    def extra_repr(self) -> str:
        """Show the rate in ``print(model)``."""
        return f"rate={self.rate:g}"


def in_order(function: Callable[[Tensor], Tensor], x: Tensor, permutation: Tensor | None) -> Tensor:
    """Return ``function`` of the tokens ``x`` (b, l, d) in another order, its result (b, l, d) put back.

    Args:
        function: Called once.
        x: Tokens in their own order.
        permutation: (l,), int64: token i of what the function gets is token ``permutation[i]``; None for their own.
    """
    if permutation is None:
        return function(x)
    return function(x.index_select(1, permutation)).index_select(1, permutation.argsort())


class GivenShuffle(LayerShuffle):
    """Shuffles every layer of a training step by a given permutation, to repeat a step that was recorded elsewhere.

    To be put in the place of a backbone's ``shuffle``. Nothing is drawn; in evaluation mode nothing is shuffled.

    Args:
        permutations: One per layer, of all its tokens; None leaves a layer's in their order.

    Raises:
        ConfigError: If one is no permutation; when called, if there are more or fewer tokens.
    """

    def __init__(self, permutations: Sequence[Sequence[int] | None]) -> None:
        super().__init__(0.0, len(permutations))
        self._layers = len(permutations)
        for layer, permutation in enumerate(permutations):
            if permutation is not None and sorted(permutation) != list(range(len(permutation))):
                raise ConfigError(
                    f"permutations[{layer}] is {list(permutation)!r}, expected every number from 0 to "
                    f"{len(permutation) - 1} once. Correct it."
                )
            value = None if permutation is None else torch.tensor(permutation, dtype=torch.int64)
            self.register_buffer(f"layer{layer}", value, persistent=False)

    def draw(self, layer: int, tokens: Tensor) -> Tensor | None:
        """Return the permutation (l,), int64, given for a layer with ``tokens`` (b, l, d), or None for their order."""
        permutation: Tensor | None = getattr(self, f"layer{layer}") if self.training and layer < self._layers else None
        if permutation is not None and len(permutation) != tokens.shape[1]:
            raise ConfigError(
                f"permutations[{layer}] is of {len(permutation)} tokens, expected {tokens.shape[1]}, as many as enter "
                "the layer. Give it an image of the recorded size."
            )
        return permutation

    def extra_repr(self) -> str:
        """Show that nothing is drawn in ``print(model)``."""
        return f"given for {self._layers} layers"
