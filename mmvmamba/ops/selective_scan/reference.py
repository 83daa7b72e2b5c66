"""The selective scan as a loop over time: the specification that every other backend is tested against."""

from __future__ import annotations

import contextlib
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def full_precision(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Switch autocast off: it would run the products of a float32 scan in half precision."""
    return contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


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
    scan = _prepare(u, delta, A, B, C, delta_bias, delta_softplus)
    state = scan.u.new_zeros(u.shape[0], u.shape[1], A.shape[1])
    outputs = []
    # unbind, not indexing: the gradient of an index is a full-size tensor of zeros per step.
    for decay, injection, C_now in zip(scan.decay.unbind(0), scan.injection.unbind(0), scan.C.unbind(0), strict=True):
        state = decay * state + injection
        outputs.append((state * C_now).sum(-1))
    if not outputs:
        # Empty, but connected to every input, so that the gradients are zeros and not missing.
        nothing = _zero_connected_to(u, delta, A, B, C, D, delta_bias).to(scan.u.dtype)
        return u.to(scan.u.dtype) + nothing, state + nothing
    y = torch.stack(outputs, -1)
    if D is not None:
        y = y + D[:, None] * u
    return y, state


def selective_scan_backward_reference(
    grad_out: Tensor,
    grad_last_state: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Compute the gradients of `selective_scan_reference` by hand, for where autograd cannot record.

    With q_t the gradient of the state after step t: ``q_t = C_t dy_t + exp(delta_(t+1) A) q_(t+1)``.

    Args:
        grad_out: Gradient of the output (b, d, l).
        grad_last_state: Gradient of the last state (b, d, n) or None.
        u, delta, A, B, C, D, delta_bias, delta_softplus: As given to the forward.

    Returns:
        The gradients of u, delta, A, B, C, D, delta_bias in the precision of the computation; None where the
        argument is None.
    """
    scan = _prepare(u, delta, A, B, C, delta_bias, delta_softplus)
    accumulate = scan.u.dtype
    dy = grad_out.to(accumulate).permute(2, 0, 1).unsqueeze(-1)  # (l, b, d, 1)
    state = scan.u.new_zeros(u.shape[0], u.shape[1], A.shape[1])
    before, after = [], []
    for decay, injection in zip(scan.decay.unbind(0), scan.injection.unbind(0), strict=True):
        before.append(state)
        state = decay * state + injection
        after.append(state)
    q = torch.zeros_like(state) if grad_last_state is None else grad_last_state.to(accumulate)
    adjoint = []
    for decay, through_output in zip(scan.decay.flip(0).unbind(0), (scan.C * dy).flip(0).unbind(0), strict=True):
        q = q + through_output
        adjoint.append(q)
        q = decay * q

    def stack(steps: list[Tensor]) -> Tensor:
        return torch.stack(steps) if steps else torch.zeros_like(scan.decay)

    q_t, before_t, after_t = stack(adjoint[::-1]), stack(before), stack(after)
    grad_rate = q_t * before_t * scan.decay  # of delta A
    grad_delta = (grad_rate * A + q_t * scan.u * scan.B).sum(-1)
    if delta_softplus:
        # softplus is the identity beyond its threshold
        grad_delta = torch.where(scan.raw_delta > 20, grad_delta, grad_delta * torch.sigmoid(scan.raw_delta))
    grad_u = (q_t * scan.delta * scan.B).sum(-1)
    if D is not None:
        grad_u = grad_u + D * dy.squeeze(-1)
    return (
        grad_u.permute(1, 2, 0),
        grad_delta.permute(1, 2, 0),
        (grad_rate * scan.delta).sum((0, 1)),
        _per_group(q_t * scan.delta * scan.u, B.shape[1]),
        _per_group(after_t * dy, C.shape[1]),
        None if D is None else (dy * scan.u).sum((0, 1, 3)),
        None if delta_bias is None else grad_delta.sum((0, 1)),
    )


class _Scan(NamedTuple):
    """The quantities of a scan with time first, so that every step is a contiguous slice."""

    u: Tensor  # (l, b, d, 1)
    raw_delta: Tensor  # (l, b, d), before softplus
    delta: Tensor  # (l, b, d, 1)
    B: Tensor  # (l, b, d, n)
    C: Tensor  # (l, b, d, n)
    decay: Tensor  # (l, b, d, n)
    injection: Tensor  # (l, b, d, n)


def _prepare(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, delta_bias: Tensor | None, delta_softplus: bool
) -> _Scan:
    accumulate = torch.float64 if u.dtype == torch.float64 else torch.float32
    d = u.shape[1]
    raw_delta = delta.to(accumulate).permute(2, 0, 1)
    if delta_bias is not None:
        raw_delta = raw_delta + delta_bias
    step = (F.softplus(raw_delta) if delta_softplus else raw_delta).unsqueeze(-1)
    u_t = u.to(accumulate).permute(2, 0, 1).unsqueeze(-1)
    B_t, C_t = _per_channel(B.to(accumulate), d), _per_channel(C.to(accumulate), d)
    rate = step * A
    if accumulate == torch.float32:
        # Saturated below infinity: a decay beyond the type times a state of zero is zero, not NaN. float64 is left
        # alone: nothing that matters is beyond e^709, and a saturated exponent has no gradient.
        rate = rate.clamp(max=math.log(torch.finfo(torch.float32).max) - 1e-3)
    return _Scan(u_t, raw_delta, step, B_t, C_t, torch.exp(rate), step * u_t * B_t)


def _zero_connected_to(*tensors: Tensor | None) -> Tensor:
    """Return a scalar 0 whose gradient reaches every tensor as zeros; their values, NaN or not, do not matter."""
    return sum((value.reshape(-1)[:0].sum() for value in tensors if value is not None), start=torch.zeros(()))


def _per_channel(projection: Tensor, d: int) -> Tensor:
    """Spread a grouped projection (b, g, n, l) over its channels: (l, b, d, n)."""
    groups = projection.shape[1]
    per_group = projection.permute(3, 0, 1, 2).unsqueeze(3)  # (l, b, g, 1, n)
    return per_group.expand(-1, -1, -1, d // groups, -1).flatten(2, 3)


def _per_group(per_channel: Tensor, groups: int) -> Tensor:
    """Sum (l, b, d, n) over the channels of each group: (b, g, n, l)."""
    return per_channel.unflatten(2, (groups, -1)).sum(3).permute(1, 2, 3, 0)
