"""Our operators that are a few products or convolutions, as PyTorch's own: what every exporter knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmvmamba.ops.causal_conv.reference import causal_conv1d_reference
from mmvmamba.ops.depthwise_conv.reference import depthwise_conv2d_reference
from mmvmamba.ops.library import TWINS
from mmvmamba.ops.ssd.reference import ssd_non_causal_reference, ssd_read_reference, ssd_state_reference


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Return PyTorch's default table for ``ExportedProgram.run_decompositions`` with our operators added.

    The scans are not in it: a recurrence over a length that is not known has no form in PyTorch's operators.
    """
    table: dict[Any, Callable[..., Any]] = dict(torch.export.default_decompositions())
    ours = torch.ops.mmvmamba
    for suffix in TWINS:
        table[getattr(ours, f"ssd_state{suffix}").default] = ssd_state_reference
        table[getattr(ours, f"ssd_read{suffix}").default] = _ssd_read
        table[getattr(ours, f"ssd_non_causal{suffix}").default] = _ssd_non_causal
    table[ours.causal_conv1d.default] = causal_conv1d_reference
    table[ours.depthwise_conv2d.default] = depthwise_conv2d_reference
    return table


def _ssd_read(state: Tensor, c_out: Tensor, blocked: bool, out_dtype: torch.dtype) -> Tensor:
    return ssd_read_reference(state, c_out, blocked).to(out_dtype)


def _ssd_non_causal(
    x: Tensor, weight: Tensor | None, b_in: Tensor, c_out: Tensor, skip: Tensor | None, blocked: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, state = ssd_non_causal_reference(x, weight, b_in, c_out, skip, blocked)
    return out.to(out_dtype), state
