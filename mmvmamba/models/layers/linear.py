"""A linear map over the last dimension that also loads the weights of a 1x1 convolution."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mmvmamba.models.layers.onednn import linear


class Linear(nn.Linear):
    """``nn.Linear`` with the initialisation of the vision transformers and 1x1-convolution loading.

    Upstream's channel-first models use 1x1 convolutions where the channels-last ones use linear maps, with the
    same numbers; a checkpoint of either kind, (out, in) or (out, in, 1, 1), loads here.
    Weights start truncated normal with standard deviation 0.02, biases at 0.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (..., c) to (..., c'); by oneDNN where that is faster, see ``onednn.py``."""
        return linear(x, self.weight, self.bias)

    def reset_parameters(self) -> None:
        """Draw new weights."""
        nn.init.trunc_normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        key = prefix + "weight"
        weight = state_dict.get(key)
        if weight is not None and weight.ndim == 4 and weight.shape[2:] == (1, 1):
            state_dict[key] = weight.flatten(1)
        super()._load_from_state_dict(state_dict, prefix, *args)


class StepProjection(Linear):
    """The projection to the step sizes of a scan, which takes its weight and bias: the layer itself is not called.

    So what a quantiser does to a linear layer, it must not do to this one.
    """
