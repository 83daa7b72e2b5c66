"""SS2D: selective scans over a 2-D map along several orders, merged per pixel.

Paper: VMamba (https://arxiv.org/abs/2401.10166). Upstream: MzeroMiko/VMamba, classification/models/vmamba.py.
Differences: options are named arguments instead of suffixes of a string, the map stays channels-last, and scan,
projection of the time step and merge are one operator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from mmvmamba.errors import ConfigError
from mmvmamba.models.layers.activation import Activation, build_activation
from mmvmamba.models.layers.checks import check_choice
from mmvmamba.models.layers.conv import ChannelsLastConv2d
from mmvmamba.models.layers.depthwise import convolve_depthwise
from mmvmamba.models.layers.linear import Linear
from mmvmamba.models.layers.norm import LayerNorm
from mmvmamba.models.layers.onednn import linear
from mmvmamba.models.layers.ssm_init import SSMInit, init_ssm_
from mmvmamba.ops import CROSS_SCAN, ScanOrder, scan2d

OutNorm = Literal["layer_norm", "none", "depthwise_conv", "norm_depthwise_conv", "softmax", "sigmoid"]
OUT_NORMS: tuple[str, ...] = get_args(OutNorm)


class SS2D(nn.Module):
    """The 2-D selective scan as a layer: project, convolve, scan along several orders, norm, gate, project back.

    Args:
        channels: Channels of input and output.
        d_state: Size n of the state of one channel.
        ssm_ratio: Inner channels as a multiple of ``channels``.
        dt_rank: Rank r of the time-step projection; None means ceil(channels / 16).
        gated: Whether the result is multiplied by a second projection of the input.
        gate_act: Whether the gate passes through ``act`` first.
        conv_kernel: Side of the depthwise convolution before the scan, odd; 1 or less means none.
        conv_bias: Whether that convolution has a bias.
        act: Activation after the convolution (and of the gate).
        out_norm: What is done to the merged map; ``"softmax"`` is over the pixels of each channel.
        out_act: Whether a GELU follows ``out_norm``.
        scan_orders: One order per direction k.
        ssm_init: Initial values, see ``ssm_init.init_ssm_``.
        dropout: Dropout probability of the output.

    Raises:
        ConfigError: If an option is unknown or a size impossible.
    """

    def __init__(
        self,
        channels: int,
        *,
        d_state: int = 16,
        ssm_ratio: float = 2.0,
        dt_rank: int | None = None,
        gated: bool = True,
        gate_act: bool = True,
        conv_kernel: int = 3,
        conv_bias: bool = True,
        act: Activation = "silu",
        out_norm: OutNorm = "layer_norm",
        out_act: bool = False,
        scan_orders: Sequence[ScanOrder] = CROSS_SCAN,
        ssm_init: SSMInit = "mamba",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        inner = int(ssm_ratio * channels)
        rank = math.ceil(channels / 16) if dt_rank is None else dt_rank
        _check_sizes(inner=inner, d_state=d_state, dt_rank=rank)
        if conv_kernel > 1 and conv_kernel % 2 == 0:
            raise ConfigError(
                f"conv_kernel is {conv_kernel}, expected an odd number (an even one changes the size of the map), "
                "or 1 for no convolution. Choose 3."
            )
        k = len(scan_orders)
        self.scan_orders = tuple(scan_orders)
        self.gated, self.gate_act = gated, gate_act
        self.inner, self.d_state, self.dt_rank = inner, d_state, rank

        self.in_proj = Linear(channels, 2 * inner if gated else inner, bias=False)
        self.act = build_activation(act)
        self.conv2d: nn.Module = nn.Identity()
        if conv_kernel > 1:
            self.conv2d = ChannelsLastConv2d(
                inner, inner, conv_kernel, padding=conv_kernel // 2, groups=inner, bias=conv_bias
            )
        self.x_proj_weight = nn.Parameter(torch.empty(k, rank + 2 * d_state, inner))
        self.dt_projs_weight = nn.Parameter(torch.empty(k, inner, rank))
        self.dt_projs_bias = nn.Parameter(torch.empty(k, inner))
        self.A_logs = nn.Parameter(torch.empty(k * inner, d_state))
        self.Ds = nn.Parameter(torch.empty(k * inner))
        self.out_norm = build_out_norm(out_norm, inner)
        self.out_act = nn.GELU() if out_act else nn.Identity()
        self.out_proj = Linear(inner, channels, bias=False)
        self.dropout = nn.Dropout(dropout)

        # The default of nn.Linear for one direction: uniform in +-fan_in^-0.5.
        nn.init.uniform_(self.x_proj_weight, -(inner**-0.5), inner**-0.5)
        init_ssm_(ssm_init, self.dt_projs_weight, self.dt_projs_bias, self.A_logs, self.Ds)

    def no_weight_decay(self) -> set[str]:
        """Return the parameters of its own that a recipe must not pull towards zero: A, D and the bias of the step."""
        return {"A_logs", "Ds", "dt_projs_bias"}

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (b, h, w, c) to (b, h, w, c)."""
        return self.project(*self.mix(x))

    def mix(self, x: Tensor) -> tuple[Tensor, Tensor | None, torch.dtype]:
        """Do everything that looks beyond a pixel: project ``x`` (b, h, w, c), convolve, scan.

        Returns:
            The merged map (b, h, w, d) in the accumulation type, the gate (b, h, w, d) if there is one, and the type
            of the activations.
        """
        x = self.in_proj(x)
        z = None
        if self.gated:
            x, z = x.chunk(2, dim=-1)
            z = self.gate(z)
        return self.convolve_and_scan(x), z, x.dtype

    def gate(self, z: Tensor) -> Tensor:
        """Return what multiplies the normed scans from its projection ``z`` (b, h, w, d), half of a wider map."""
        return self.act(z) if self.gate_act else z

    def project(self, y: Tensor, z: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Norm the merged map ``y`` (b, h, w, d), gate it with ``z`` and project it back in ``dtype``; (b, h, w, c)."""
        # The merged map stays float32 up to and including the norm: narrowing it earlier is what makes
        # half-precision training diverge.
        y = self.out_act(self.out_norm(y).to(dtype))
        if z is not None:
            y = y * z
        return self.dropout(self.out_proj(y))

    def convolve_and_scan(self, x: Tensor) -> Tensor:
        """Return the merged scans of ``x`` (b, h, w, d), perhaps half of a wider map; same shape."""
        return self.scan(self._convolve(x))

    def _convolve(self, x: Tensor) -> Tensor:
        """Convolve ``x`` (b, h, w, d), perhaps half of a wider map, depthwise and apply the activation."""
        return convolve_depthwise(self.conv2d, x, self.act)

    def scan(self, x: Tensor) -> Tensor:
        """Scan ``x`` (b, h, w, d) along every order and sum per pixel; (b, h, w, d) in the accumulation type."""
        b, h, w, _ = x.shape
        k, width, _ = self.x_proj_weight.shape
        weight, bias, decay, skip = self.scan_parameters(x.dtype)
        projections = linear(x, self.x_proj_weight.flatten(0, 1)).view(b, h, w, k, width)
        return scan2d(
            x,
            projections,
            weight,
            bias,
            decay,
            skip,
            orders=self.routes(x),
            out_dtype=bias.dtype,
        )

    def routes(self, x: Tensor) -> Sequence[ScanOrder] | Tensor:  # noqa: ARG002 (subclasses need the size of the map)
        """Return the k orders for a map ``x`` (b, h, w, d), as names or as a permutation (k, l) of pixel indices."""
        return self.scan_orders

    def scan_parameters(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return dt weight (k, d, r), dt bias (k, d), A (k, d, n) and D (k, d) as the operators want them.

        Args:
            dtype: Type of the activations; the three last are float64 for float64 and float32 otherwise.
        """
        accumulate = torch.float64 if dtype == torch.float64 else torch.float32
        k, d, _ = self.dt_projs_weight.shape
        decay = -torch.exp(self.A_logs.to(accumulate)).view(k, d, self.d_state)
        skip = self.Ds.to(accumulate).view(k, d)
        return self.dt_projs_weight, self.dt_projs_bias.to(accumulate), decay, skip


class SpatialSoftmax(nn.Module):
    """Softmax over the pixels of each channel of a map (b, h, w, c)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return weights of the shape of ``x`` that sum to one over the pixels."""
        return x.flatten(1, 2).softmax(dim=1).view_as(x)


def build_out_norm(kind: OutNorm, channels: int) -> nn.Module:
    """Return what follows the merge of the scans; child indices are those of the official checkpoints.

    Raises:
        ConfigError: If ``kind`` is not one of ``OUT_NORMS``.
    """
    check_choice("out_norm", kind, OUT_NORMS)
    if kind == "layer_norm":
        return LayerNorm(channels)
    if kind == "none":
        return nn.Identity()
    if kind == "softmax":
        return SpatialSoftmax()
    if kind == "sigmoid":
        return nn.Sigmoid()
    conv = ChannelsLastConv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
    if kind == "depthwise_conv":
        return nn.Sequential(nn.Identity(), conv)
    return nn.Sequential(LayerNorm(channels), nn.Identity(), conv)


def _check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"SS2D: {name} is {value!r}, expected an integer of at least 1. Use a larger value.")
