"""Mamba in both directions over a sequence of tokens, with one projection in and one out.

Paper: Vision Mamba (https://arxiv.org/abs/2401.09417). Upstream: hustvl/Vim, mamba-1p1p1/mamba_ssm/modules/
mamba_simple.py (``Mamba`` with ``bimamba_type="v2"``). Differences: tokens are (b, l, d) throughout, the sequence is
never flipped (the second direction convolves and scans backwards in place), and both scans are summed by the operator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmvmamba.errors import ConfigError
from mmvmamba.models.layers.linear import Linear, StepProjection
from mmvmamba.models.layers.observers import is_unobserved
from mmvmamba.models.layers.onednn import is_traced, linear
from mmvmamba.models.layers.ssm_init import init_dt_bias_
from mmvmamba.ops import ScanOrder, causal_conv1d, scan2d
from mmvmamba.ops.ssd.heads import accumulation

_DIRECTIONS = (ScanOrder.ROW, ScanOrder.ROW_REVERSED)


class BidirectionalMamba(nn.Module):
    """Project, then for each direction convolve causally and scan; gate the sum, project back.

    Parameters have upstream's names; those of the second direction end in ``_b``, but for ``A_b_log``.

    Args:
        channels: Channels of input and output.
        d_state: Size n of the state of one channel.
        expansion: Inner channels e as a multiple of ``channels``.
        dt_rank: Rank r of the time-step projection; None means ceil(channels / 16).
        conv_kernel: Tokens that the causal convolution sees.
        halve: Whether the sum of the directions is divided by 2 (upstream's ``if_divide_out``).
        layer_scale: Initial value of a factor per channel of the output, or None for no such factor.

    Raises:
        ConfigError: If a size is impossible.
    """

    def __init__(
        self,
        channels: int,
        *,
        d_state: int = 16,
        expansion: float = 2,
        dt_rank: int | None = None,
        conv_kernel: int = 4,
        halve: bool = True,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        inner = int(expansion * channels)
        rank = math.ceil(channels / 16) if dt_rank is None else dt_rank
        _check_sizes(inner=inner, d_state=d_state, dt_rank=rank, conv_kernel=conv_kernel)
        self.inner, self.d_state, self.dt_rank, self.halve = inner, d_state, rank, halve

        self.gamma = None if layer_scale is None else nn.Parameter(torch.full((channels,), float(layer_scale)))
        self.A_log = nn.Parameter(torch.empty(inner, d_state))
        self.D = nn.Parameter(torch.ones(inner))
        self.A_b_log = nn.Parameter(torch.empty(inner, d_state))
        self.D_b = nn.Parameter(torch.ones(inner))
        self.in_proj = Linear(channels, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, conv_kernel, groups=inner, padding=conv_kernel - 1)
        self.x_proj = Linear(inner, rank + 2 * d_state, bias=False)
        self.dt_proj = StepProjection(rank, inner)
        self.conv1d_b = nn.Conv1d(inner, inner, conv_kernel, groups=inner, padding=conv_kernel - 1)
        self.x_proj_b = Linear(inner, rank + 2 * d_state, bias=False)
        self.dt_proj_b = StepProjection(rank, inner)
        self.out_proj = Linear(inner, channels, bias=False)
        self._init_weights()

    @torch.no_grad()
    def _init_weights(self) -> None:
        """Draw weights as upstream does; it gives the second time step no special bias, nor do we."""
        for layer in (self.in_proj, self.x_proj, self.x_proj_b, self.out_proj):
            nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5))
        bound = self.dt_rank**-0.5
        for layer in (self.dt_proj, self.dt_proj_b):
            nn.init.uniform_(layer.weight, -bound, bound)
        init_dt_bias_(self.dt_proj.bias)
        n = torch.arange(1, self.d_state + 1, dtype=torch.float32)
        for logs in (self.A_log, self.A_b_log):
            logs.copy_(n.log().expand_as(logs))

    def no_weight_decay(self) -> set[str]:
        """Return the parameters of its own that a recipe must not pull towards zero: A, D and the biases of the step.

        Upstream decays ``A_log`` and ``A_b_log``: it marks them, but its optimiser does not read the marks.
        """
        names = {"A_log", "D", "A_b_log", "D_b", "dt_proj.bias", "dt_proj_b.bias"}
        return names if self.gamma is None else names | {"gamma"}

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens ``x`` (b, l, c) to (b, l, c)."""
        u, z = self._project_in(x)
        y = self._gated(self.scan(u), z)
        out: Tensor = self.out_proj(y)
        return out if self.gamma is None else out * self.gamma

    def _project_in(self, x: Tensor) -> Sequence[Tensor]:
        """Return what is scanned and the gate (b, l, e) of tokens ``x`` (b, l, c)."""
        plain = type(self.in_proj) is Linear and is_unobserved(self.in_proj)
        if plain and not is_traced() and torch.is_grad_enabled():
            # One product each: the backward pass of a split would copy the gradient of the whole wide map.
            return [linear(x, weight) for weight in self.in_proj.weight.chunk(2)]
        return self.in_proj(x).chunk(2, dim=-1)

    def _gated(self, y: Tensor, z: Tensor) -> Tensor:
        """Return the sum of the scans ``y`` times the gate ``z`` (b, l, e), halved if so set."""
        gate = F.silu(z)
        if torch.is_grad_enabled() or is_traced():
            y = y * gate
            return y / 2 if self.halve else y
        y = gate.mul_(y)
        return y.div_(2) if self.halve else y

    def scan(self, u: Tensor) -> Tensor:
        """Convolve and scan ``u`` (b, l, e), half of a wider map, in both directions; the sum (b, l, e)."""
        convs, dt_projs = (self.conv1d, self.conv1d_b), (self.dt_proj, self.dt_proj_b)
        weight = torch.stack([conv.weight.squeeze(1) for conv in convs])
        bias = torch.stack([cast("Tensor", conv.bias) for conv in convs])
        maps = causal_conv1d(u, weight, bias, reverse=(False, True), activation="silu")  # (b, l, 2, e)
        x_projs = (self.x_proj, self.x_proj_b)
        projections = torch.stack([proj(x) for proj, x in zip(x_projs, maps.unbind(2), strict=True)], dim=2)
        accumulate = accumulation(maps.dtype)
        decay = -torch.exp(torch.stack((self.A_log, self.A_b_log)).to(accumulate))
        return scan2d(
            maps.unsqueeze(1),
            projections.unsqueeze(1),
            torch.stack([proj.weight for proj in dt_projs]),
            torch.stack([proj.bias for proj in dt_projs]).to(accumulate),
            decay,
            torch.stack((self.D, self.D_b)).to(accumulate),
            orders=_DIRECTIONS,
        ).squeeze(1)


def _check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        if not isinstance(value, int) or value < 1:
            raise ConfigError(
                f"BidirectionalMamba: {name} is {value!r}, expected an integer of at least 1. Use a larger value."
            )
