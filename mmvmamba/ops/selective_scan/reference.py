"""The selective scan as a loop over time: the specification that every other backend is tested against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def selective_scan_reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """Compute the selective scan step by step, in float64 if ``u`` is float64, else in float32.

    With ``delta' = delta + delta_bias`` (through softplus if asked), for every channel::

        h_t = exp(delta'_t A) h_(t-1) + delta'_t B_t u_t        y_t = <C_t, h_t> + D u_t

    Args:
        u: Input (b, d, l).
        delta: Step sizes (b, d, l).
        A: Decay rates (d, n).
        B: Input projections (b, g, n, l), g dividing d.
        C: Output projections (b, g, n, l).
        D: Skip weights (d,) or None.
        delta_bias: Added to ``delta`` (d,) or None.
        delta_softplus: Whether softplus (threshold 20) follows.

    Returns:
        The output (b, d, l) and the last state (b, d, n), both in the precision of the computation.

    Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", algorithm 2.
    """
    accumulate = torch.float64 if u.dtype == torch.float64 else torch.float32
    b, d, length = u.shape
    n = A.shape[1]
    u = u.to(accumulate)
    delta = delta.to(accumulate)
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    if delta_softplus:
        delta = F.softplus(delta)
    # Time comes first, so that every step below is a contiguous slice.
    delta_t = delta.permute(2, 0, 1).unsqueeze(-1)  # (l, b, d, 1)
    B_t = _per_channel(B.to(accumulate), d)  # (l, b, d, n)
    C_t = _per_channel(C.to(accumulate), d)
    decay = torch.exp(delta_t * A)
    injection = delta_t * u.permute(2, 0, 1).unsqueeze(-1) * B_t

    state = u.new_zeros(b, d, n)
    outputs = []
    # unbind, not indexing: the gradient of an index is a full-size tensor of zeros per step.
    for decay_now, injection_now, C_now in zip(decay.unbind(0), injection.unbind(0), C_t.unbind(0), strict=True):
        state = decay_now * state + injection_now
        outputs.append((state * C_now).sum(-1))
    y = torch.stack(outputs, -1) if length else u * 1.0
    if D is not None:
        y = y + D[:, None] * u
    return y, state


def _per_channel(projection: Tensor, d: int) -> Tensor:
    """Spread a grouped projection (b, g, n, l) over its channels: (l, b, d, n)."""
    groups = projection.shape[1]
    per_group = projection.permute(3, 0, 1, 2).unsqueeze(3)  # (l, b, g, 1, n)
    spread = per_group.expand(-1, -1, -1, d // groups if groups else 0, -1)
    return spread.flatten(2, 3)
