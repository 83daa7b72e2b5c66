"""State space duality in plain PyTorch: the recurrence that says what is meant, and the products that compute it.

Source: Dao and Gu, "Transformers are SSMs" (arXiv 2405.21060), section 6 (the causal form and its chunks); Shi et al.,
"VSSD" (arXiv 2407.18559), section 3.2 (the non-causal form).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mmvmamba.ops.selective_scan.reference import full_precision
from mmvmamba.ops.ssd.heads import accumulation, by_group, from_group, per_head

CHUNK = 64
"""Positions of a chunk where the caller does not choose."""


def ssd_state_reference(x: Tensor, weight: Tensor | None, b_in: Tensor, blocked: bool) -> Tensor:
    """Sum the outer products of projections and inputs over all positions.

    Args:
        x: Input (b, l, k, p).
        weight: Weight of every position and head (b, l, k), or None for ones.
        b_in: Input projections (b, l, g, n).
        blocked: Whether head j uses group j // (k / g), not j % g.

    Returns:
        The state (b, k, n, p), float64 if ``x`` is float64, else float32.
    """
    accumulate = accumulation(x.dtype)
    with full_precision(x.device):
        inputs = x.to(accumulate)
        if weight is not None:
            inputs = inputs * weight.to(accumulate).unsqueeze(-1)
        products = b_in.to(accumulate).permute(0, 2, 3, 1) @ by_group(inputs, b_in.shape[2], blocked)
        return from_group(products, x.shape[2], blocked).transpose(1, 2)


def ssd_read_reference(state: Tensor, c_out: Tensor, blocked: bool) -> Tensor:
    """Read a state at every position.

    Args:
        state: State (b, k, n, p).
        c_out: Output projections (b, l, g, n).
        blocked: Whether head j uses group j // (k / g), not j % g.

    Returns:
        The output (b, l, k, p), float64 if ``state`` is float64, else float32.
    """
    accumulate = accumulation(state.dtype)
    with full_precision(state.device):
        grouped = by_group(state.to(accumulate).transpose(1, 2), c_out.shape[2], blocked)
        return from_group(c_out.to(accumulate).transpose(1, 2) @ grouped, state.shape[1], blocked)


def ssd_non_causal_reference(
    x: Tensor, weight: Tensor | None, b_in: Tensor, c_out: Tensor, skip: Tensor | None, blocked: bool
) -> tuple[Tensor, Tensor]:
    """Read the sum over all positions at every position; see `mmvmamba.ops.ssd_non_causal`.

    Returns:
        The output (b, l, k, p) and the state (b, k, n, p) in the precision of the computation.
    """
    state = ssd_state_reference(x, weight, b_in, blocked)
    out = ssd_read_reference(state, c_out, blocked)
    return (out if skip is None else out + skip.unsqueeze(-1) * x.to(out.dtype)), state


def step_sizes(dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, accumulate: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the step sizes before and after softplus (threshold 20), (b, l, k)."""
    raw = dt.to(accumulate)
    if dt_bias is not None:
        raw = raw + dt_bias
    return raw, F.softplus(raw) if dt_softplus else raw


def log_decays(step: Tensor, decay: Tensor) -> Tensor:
    """Return the logarithm of every position's decay, saturated below infinity in float32: 0 times it is 0."""
    rate = step * decay
    if rate.dtype == torch.float32:
        rate = rate.clamp(max=math.log(torch.finfo(torch.float32).max) - 1e-3)
    return rate


def ssd_recurrence(
    x: Tensor,
    dt: Tensor,
    decay: Tensor,
    b_in: Tensor,
    c_out: Tensor,
    skip: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    dt_softplus: bool,
    blocked: bool,
) -> tuple[Tensor, Tensor]:
    """Walk over the positions one by one: the specification, slow; arguments as of `ssd_chunked_reference`."""
    accumulate = accumulation(x.dtype)
    b, length, k, p = x.shape
    _, step = step_sizes(dt, dt_bias, dt_softplus, accumulate)
    keep = torch.exp(log_decays(step, decay))
    inputs = x.to(accumulate) * step.unsqueeze(-1)
    B, C = (per_head(value.to(accumulate), k, blocked) for value in (b_in, c_out))
    state = x.new_zeros(b, k, b_in.shape[3], p, dtype=accumulate)
    if initial_state is not None:
        state = state + initial_state.to(accumulate)
    outputs = []
    for t in range(length):
        state = keep[:, t, :, None, None] * state + B[:, t].unsqueeze(-1) * inputs[:, t].unsqueeze(-2)
        outputs.append((C[:, t].unsqueeze(-1) * state).sum(-2))
    out = torch.stack(outputs, 1) if outputs else x.to(accumulate)
    return (out if skip is None else out + skip.unsqueeze(-1) * x.to(accumulate)), state


def ssd_chunked_reference(
    x: Tensor,
    dt: Tensor,
    decay: Tensor,
    b_in: Tensor,
    c_out: Tensor,
    skip: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    dt_softplus: bool,
    blocked: bool,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """Compute the recurrence by products inside chunks and a scan over the states between them.

    Args:
        x: Input (b, l, k, p).
        dt: Step sizes (b, l, k).
        decay: Decay rate of every head (k).
        b_in: Input projections (b, l, g, n).
        c_out: Output projections (b, l, g, n).
        skip: Skip weights (k) or None.
        dt_bias: Added to ``dt`` (k) or None.
        initial_state: State before the first position (b, k, n, p) or None for zeros.
        dt_softplus: Whether softplus (threshold 20) follows.
        blocked: Whether head j uses group j // (k / g), not j % g.
        chunk: Positions of a chunk.

    Returns:
        The output (b, l, k, p) and the last state (b, k, n, p), float64 if ``x`` is float64, else float32.
    """
    with full_precision(x.device):
        return _chunked(
            x,
            dt,
            decay,
            b_in,
            c_out,
            skip,
            dt_bias,
            initial_state,
            dt_softplus,
            blocked,
            max(1, min(chunk, x.shape[1])),
        )


def _chunked(
    x: Tensor, dt: Tensor, decay: Tensor, b_in: Tensor, c_out: Tensor, skip: Tensor | None, dt_bias: Tensor | None,
    initial_state: Tensor | None, dt_softplus: bool, blocked: bool, chunk: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    accumulate = accumulation(x.dtype)
    b, length, k, p = x.shape
    n = b_in.shape[3]
    _, step = step_sizes(dt, dt_bias, dt_softplus, accumulate)
    # Positions of padding have a step size of zero: they keep the state and add nothing.
    rate = into_chunks(log_decays(step, decay), chunk).transpose(2, 3)  # (b, m, k, q)
    inputs = into_chunks(x.to(accumulate) * step.unsqueeze(-1), chunk).transpose(2, 3)  # (b, m, k, q, p)
    B, C = (into_chunks(value.to(accumulate), chunk) for value in (b_in, c_out))  # (b, m, q, g, n)
    scores = C.transpose(2, 3) @ B.permute(0, 1, 3, 4, 2)  # (b, m, g, q, q)
    B, C = (per_head(v.flatten(0, 1), k, blocked).unflatten(0, v.shape[:2]).transpose(2, 3) for v in (B, C))
    by_head = per_head(scores.flatten(0, 1).transpose(1, 2), k, blocked).unflatten(0, scores.shape[:2]).transpose(2, 3)
    within = decays_within(rate)  # (b, m, k, q, q)
    out = (by_head * within) @ inputs
    added = (B * within[..., -1, :].unsqueeze(-1)).transpose(-1, -2) @ inputs  # (b, m, k, n, p)
    state = x.new_zeros(b, k, n, p, dtype=accumulate)
    if initial_state is not None:
        state = state + initial_state.to(accumulate)
    from_start = torch.exp(rate.cumsum(-1))
    before = []
    for keep, more in zip(from_start[..., -1, None, None].unbind(1), added.unbind(1), strict=True):
        before.append(state)
        state = keep * state + more
    if before:
        out = out + (C * from_start.unsqueeze(-1)) @ torch.stack(before, 1)
    out = out.transpose(2, 3).reshape(b, out.shape[1] * chunk, k, p)[:, :length]
    return (out if skip is None else out + skip.unsqueeze(-1) * x.to(accumulate)), state


def into_chunks(value: Tensor, chunk: int) -> Tensor:
    """Cut axis 1 into chunks, the last padded with zeros: (b, l, ...) -> (b, m, q, ...)."""
    missing = -value.shape[1] % chunk
    if missing:
        padding = value.new_zeros(value.shape[0], missing, *value.shape[2:])
        value = torch.cat([value, padding], 1)
    return value.reshape(value.shape[0], value.shape[1] // chunk, chunk, *value.shape[2:])


def decays_within(rate: Tensor) -> Tensor:
    """Return how much of position s is left at position t of the same chunk: (..., q) -> (..., q, q), 0 for s > t.

    Sums of rates are taken from s on. A difference of sums from the start would cancel: after one strong decay nothing
    is left of the precision of the weak ones behind it.
    """
    q = rate.shape[-1]
    ones = torch.ones(q, q, dtype=torch.bool, device=rate.device)
    later = rate.unsqueeze(-1).expand(*rate.shape, q).masked_fill(~ones.tril(-1), 0.0)
    return torch.exp(later.cumsum(-2).masked_fill(~ones.tril(), float("-inf")))
