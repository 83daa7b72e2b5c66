"""How much each position of a scan gives to another one: a scan written as the matrix that it applies.

A selective scan ``h_t = exp(delta_t A) h_(t-1) + delta_t B_t x_t``, ``y_t = <C_t, h_t>`` is, for each channel,

    y_t = sum over s <= t of  W_ts x_s
    W_ts = sum over n of  C_tn exp(A_n (delta_(s+1) + ... + delta_t)) B_sn delta_s

and the skip D x_t is added beside it. In the words of the VMamba paper (arXiv 2401.10166) with Q = C, K = B and
V = delta x, the product of the decays is w_t / w_s, so that the sum without the last factor is
(Q * w)(K / w)^T and the sum without decays is QK^T. Here the exponent is summed from s to t and nothing is divided, so
that nothing overflows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmvmamba.analysis.scan_capture import ScanCall
from mmvmamba.ops import ScanOrder, order_to_permutation
from mmvmamba.ops.ssd.heads import accumulation, per_head

KINDS = ("qk", "decayed", "weight")
"""QK^T; (Q * w)(K / w)^T; the full weight of x_s in y_t, with the step size (or VSSD's weight) of s."""

UNORDERED = "all tokens"
"""Name of the route of a sum over all tokens."""


class Weights(NamedTuple):
    """What the positions s of a route give to one step t.

    Attributes:
        qk: C_t B_s (s, 1), or (s, k) with k heads of several groups.
        decayed: With the decays from s to t (s, d), d channels or heads.
        weight: With the step size of s, too (s, d): what x_s is multiplied by.
    """

    qk: Tensor
    decayed: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Route:
    """One walk of an operator over the positions of its own map, and its weights.

    Attributes:
        name: For a title.
        reads: Positions, row by row, that the steps take their input from (l,).
        writes: Positions that the steps add their output to (l,); nearly always ``reads``.
        ordered: Whether there is an order at all: without one every step sees all others.
        weights: From a step t to the weights of steps 0 to t, or of all without an order.
    """

    name: str
    reads: Tensor
    writes: Tensor
    ordered: bool
    weights: Callable[[int], Weights]


def selective_weights(delta: Tensor, A: Tensor, B: Tensor, C: Tensor, step: int) -> Weights:
    """Return what steps 0 to ``step`` of a selective scan give to it.

    Args:
        delta: Step sizes (l, d), after bias and softplus.
        A: Decay rates (d, n).
        B: Input projections (l, n).
        C: Output projections (l, n).
        step: Which step is asked, from 0.
    """
    since = _sums_until(delta, step)
    decayed = torch.zeros_like(since)
    for n in range(A.shape[1]):  # one state at a time: all together are n times the memory of the map
        decayed += (C[step, n] * B[: step + 1, n]).unsqueeze(1) * torch.exp(since * A[:, n])
    return Weights((B[: step + 1] @ C[step]).unsqueeze(1), decayed, decayed * delta[: step + 1])


def head_weights(delta: Tensor, decay: Tensor, B: Tensor, C: Tensor, step: int) -> Weights:
    """Return what steps 0 to ``step`` of Mamba-2's scan give to it.

    Args:
        delta: Step sizes (l, k), after bias and softplus.
        decay: Decay rate of every head (k,).
        B: Input projections (l, k, n).
        C: Output projections (l, k, n).
        step: Which step is asked, from 0.
    """
    qk = (B[: step + 1] * C[step]).sum(-1)
    decayed = qk * torch.exp(_sums_until(delta, step) * decay)
    return Weights(qk, decayed, decayed * delta[: step + 1])


def _sums_until(delta: Tensor, step: int) -> Tensor:
    """Return, for s = 0 to t, the sum of ``delta`` (l, d) over the steps behind s up to t (s, d)."""
    behind = torch.cat([delta[1 : step + 1], delta.new_zeros(1, delta.shape[1])])
    return behind.flip(0).cumsum(0).flip(0)


def routes_of(call: ScanCall) -> list[Route]:
    """Return the routes of a call on the first image of its batch.

    ``ssd_state`` has none by itself: with ``ssd_read`` of the same layer it is one, see `routes_of_states`.
    ``selective_scan`` and ``ssd`` know sequences only: the steps are taken as positions in row order.
    """
    makers = {"scan2d": _scan2d, "selective_scan": selective_routes, "ssd": _ssd, "ssd_non_causal": _non_causal}
    maker = makers.get(call.operator)
    return [] if maker is None else maker(call)


def _scan2d(call: ScanCall) -> list[Route]:
    x, projections, dt_weight, dt_bias, A, _, codes, permutation, softplus, *_ = call.arguments
    accumulate = accumulation(x.dtype)
    h, w = x.shape[1:3]
    k, _, rank = dt_weight.shape
    n = A.shape[2]
    orders = [ScanOrder(code) for code in codes]
    if permutation is None:
        names = [order.name.lower().replace("_", " ") for order in orders]
        walks = [order_to_permutation(order, h, w, x.device) for order in orders]
    else:
        names = [f"route {i + 1}" for i in range(k)]
        walks = list(permutation.unbind(0))
    flat = projections[0].to(accumulate).flatten(0, 1)  # (h w, k, r + 2 n)

    def route(i: int) -> Route:
        def weights(step: int) -> Weights:
            dt, B, C = flat[walks[i], i].split([rank, n, n], dim=-1)
            raw = dt @ dt_weight[i].to(accumulate).t()
            if dt_bias is not None:
                raw = raw + dt_bias[i]
            return selective_weights(F.softplus(raw) if softplus else raw, A[i].to(accumulate), B, C, step)

        return Route(names[i], walks[i], walks[i], True, weights)

    return [route(i) for i in range(k)]


def selective_routes(call: ScanCall, row: int = 0) -> list[Route]:
    """Return a route for each group of projections, on sequence ``row`` of the batch."""
    u, delta, A, B, C, _, bias, softplus, *_ = call.arguments
    accumulate = accumulation(u.dtype)
    groups = B.shape[1]
    raw = delta[row].to(accumulate)
    if bias is not None:
        raw = raw + bias.unsqueeze(1)
    steps = (F.softplus(raw) if softplus else raw).t()  # (l, d)
    positions = torch.arange(u.shape[2], device=u.device)

    def route(i: int) -> Route:
        def weights(step: int) -> Weights:
            B_i, C_i = (value[row, i].to(accumulate).t() for value in (B, C))
            return selective_weights(steps.chunk(groups, 1)[i], A.to(accumulate).chunk(groups, 0)[i], B_i, C_i, step)

        return Route("sequence" if groups == 1 else f"group {i + 1}", positions, positions, True, weights)

    return [route(i) for i in range(groups)]


def _ssd(call: ScanCall) -> list[Route]:
    x, dt, decay, b_in, c_out, _, dt_bias, _, softplus, blocked, *_ = call.arguments
    accumulate = accumulation(x.dtype)
    raw = dt[0].to(accumulate)
    if dt_bias is not None:
        raw = raw + dt_bias
    steps = F.softplus(raw) if softplus else raw
    B, C = (per_head(value[:1].to(accumulate), x.shape[2], blocked)[0] for value in (b_in, c_out))
    positions = torch.arange(x.shape[1], device=x.device)

    def weights(step: int) -> Weights:
        return head_weights(steps, decay, B, C, step)

    return [Route("sequence", positions, positions, True, weights)]


def _non_causal(call: ScanCall) -> list[Route]:
    x, weight, b_in, c_out, _, blocked, *_ = call.arguments
    accumulate = accumulation(x.dtype)
    B, C = (per_head(value[:1].to(accumulate), x.shape[2], blocked)[0] for value in (b_in, c_out))
    return [_unordered(B, C, None if weight is None else weight[0].to(accumulate))]


def routes_of_states(state: ScanCall, read: ScanCall) -> list[Route]:
    """Return the one route of a layer that sums tokens into states, works on these, and reads them.

    Its weights are those before the work on the states: what a token gives to a state times what another reads from it.

    Args:
        state: The call of ``ssd_state``; its arguments must be as they were.
        read: The call of ``ssd_read`` that followed.
    """
    x, weight, b_in, blocked = state.arguments
    c_out = read.arguments[1]
    accumulate = accumulation(x.dtype)
    B, C = (per_head(value[:1].to(accumulate), x.shape[2], blocked)[0] for value in (b_in, c_out))
    return [_unordered(B, C, None if weight is None else weight[0].to(accumulate))]


def _unordered(B: Tensor, C: Tensor, weight: Tensor | None) -> Route:
    """Return the route of a sum over all tokens from projections (l, k, n) and weights (l, k)."""
    positions = torch.arange(B.shape[0], device=B.device)

    def weights(step: int) -> Weights:
        qk = (B * C[step]).sum(-1)
        return Weights(qk, qk, qk if weight is None else qk * weight)

    return Route(UNORDERED, positions, positions, False, weights)
