"""Norms over the channels of channels-last maps, (..., c).

A channel-first model of another repository gives the same numbers with the same weights: its ``LayerNorm2d``
is ``LayerNorm`` here, its ``BatchNorm2d`` is ``BatchNorm``.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmvmamba.models.layers.checks import check_choice

Norm = Literal["layer_norm", "batch_norm"]
NORMS: tuple[str, ...] = get_args(Norm)


class LayerNorm(nn.LayerNorm):
    """Layer norm over the last dimension that accepts a float32 input in a half-precision model.

    The scan hands on its float32 accumulation; in a model cast by ``.half()`` the weights are narrower than
    that, which PyTorch's layer norm refuses.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised ``x`` (..., c)."""
        weight: Tensor = self.weight
        bias: Tensor = self.bias
        if x.dtype == torch.float32 and weight.dtype != torch.float32:
            weight, bias = weight.float(), bias.float()
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm over the last dimension that computes in float32 in a half-precision model.

    The result has the type of the input; see ``LayerNorm`` for why that may be wider than the weight.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised ``x`` (..., c)."""
        accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
        weight = self.weight.to(accumulate)
        return F.rms_norm(x.to(accumulate), self.normalized_shape, weight, self.eps).to(x.dtype)


class BatchNorm(nn.BatchNorm2d):
    """Batch norm of a channels-last map (b, h, w, c).

    The pixels become the batch, (b*h*w, c, 1, 1): the statistics are those of ``BatchNorm2d`` on the permuted
    map, no copy is made, and the wrong eval-mode gradient of PyTorch 2.11 on channels-last CPU tensors with
    batch size 1 is out of reach.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised ``x`` (b, h, w, c)."""
        b, h, w, c = x.shape
        return super().forward(x.reshape(b * h * w, c, 1, 1)).reshape(b, h, w, c)


def build_norm(kind: Norm, channels: int) -> nn.Module:
    """Return the norm called ``kind`` over ``channels`` channels of a channels-last map.

    Raises:
        ConfigError: If ``kind`` is not one of ``NORMS``.
    """
    check_choice("norm", kind, NORMS)
    return LayerNorm(channels) if kind == "layer_norm" else BatchNorm(channels)
