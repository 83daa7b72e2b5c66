"""Triton backend of `scan2d`: the routes read the map by index arithmetic, and their results are summed in fixed order.

Source of the algorithm: Liu et al., "VMamba: Visual State Space Model" (arXiv 2401.10166), section 4.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmvmamba.ops.library import chunk_count
from mmvmamba.ops.scan2d.orders import ScanOrder, order_to_permutation
from mmvmamba.ops.triton_launch import LARGEST_CODED, Problem, Routes, merge_visits, scan_backward, scan_forward

_Optional = Tensor | None


def forward(
    x: Tensor, projections: Tensor, dt_weight: Tensor, dt_bias: _Optional, A: Tensor, D: _Optional,
    orders: list[int], permutation: _Optional, delta_softplus: bool, out_dtype: torch.dtype, save_carries: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Scan a map (b, h, w, d), or one for every route (b, h, w, k, d), along k routes; see `mmvmamba.ops.scan2d`.

    Returns:
        The merged map (b, h, w, d) and the carries (b, k, chunks, n, d) float32, (0,) if not saved.
    """
    b, h, w = x.shape[:3]
    k, d, n = A.shape
    merged_shape = (b, h, w, d)
    problem = _problem(x, projections, dt_weight, dt_bias, A, D, orders, permutation, delta_softplus)
    shape = (b, k, chunk_count(problem.length), n, d) if save_carries else (0,)
    carries = torch.empty(shape, dtype=torch.float32, device=x.device)
    if 0 in (b, k, d, problem.length):
        return x.new_zeros(merged_shape, dtype=out_dtype), carries
    listed = problem.routes.pixels is not None
    y = carries.new_empty((b, k, problem.length if listed else h * w, d))
    scan_forward(problem, y, carries if save_carries else None, None)
    return _merged(y, problem.routes, out_dtype).view(merged_shape), carries


def backward(
    grad_out: Tensor, x: Tensor, projections: Tensor, dt_weight: Tensor, dt_bias: _Optional, A: Tensor, D: _Optional,
    orders: list[int], permutation: _Optional, delta_softplus: bool, carries: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of x, projections, dt_weight, dt_bias, A and D; ``A.new_empty(0)`` for an absent one."""
    inputs = (x, projections, dt_weight, dt_bias, A, D)
    b, h, w = x.shape[:3]
    k, d, n = A.shape
    r = dt_weight.shape[2]
    problem = _problem(*inputs, orders, permutation, delta_softplus)
    if 0 in (b, k, d, problem.length):
        return tuple(A.new_empty(0) if v is None else v.new_zeros(v.shape) for v in inputs)
    routes = problem.routes
    places = h * w if routes.pixels is None else problem.length
    apart = x.dim() == 5
    if apart and routes.pixels is None:  # every number is written once: where it belongs
        dx = torch.empty((b, places, k, d), dtype=x.dtype, device=x.device).transpose(1, 2)
    else:
        dx = torch.empty((b, k, places, d), dtype=torch.float32, device=x.device)
    grad_map = grad_out.contiguous().view(b, 1, h * w, d).expand(b, k, h * w, d)
    parts, params = scan_backward(problem, grad_map, None, carries, dx, None)
    if routes.pixels is None:
        dprojections = parts.transpose(1, 2).to(projections.dtype)
    else:
        dprojections = projections.new_empty((b, h * w, k, r + 2 * n))
        merge_visits(parts, routes, k, dprojections)
    dA, dD, dbias, dweight = params.split([n, 1, 1, r], 1)
    dx = (_apart if apart else _merged)(dx, routes, x.dtype)
    grads = (dx, dprojections, dweight.transpose(1, 2), dbias.squeeze(1), dA.transpose(1, 2), dD.squeeze(1))
    return tuple(
        A.new_empty(0) if value is None else grad.to(value.dtype).contiguous().view(value.shape)
        for grad, value in zip(grads, inputs, strict=True)
    )


def _merged(visits: Tensor, routes: Routes, dtype: torch.dtype) -> Tensor:
    """Sum (b, k, places, d) over routes: (b, pixels, d)."""
    if routes.pixels is None:
        return visits.sum(1).to(dtype)
    out = visits.new_empty((visits.shape[0], routes.h * routes.w, visits.shape[3]), dtype=dtype)
    merge_visits(visits, routes, 1, out)
    return out


def _apart(visits: Tensor, routes: Routes, dtype: torch.dtype) -> Tensor:
    """Put (b, k, places, d) on the maps of their routes: (b, pixels, k, d)."""
    if routes.pixels is None:
        return visits.transpose(1, 2)
    b, k, _, d = visits.shape
    out = visits.new_empty((b, routes.h * routes.w, k, d), dtype=dtype)
    merge_visits(visits, routes, k, out)
    return out


def _routes(x: Tensor, orders: list[int], permutation: _Optional) -> Routes:
    h, w = x.shape[1:3]
    if permutation is None and len(orders) > LARGEST_CODED:
        # Built on the device, from shapes alone
        permutation = torch.stack([order_to_permutation(ScanOrder(order), h, w, x.device) for order in orders])
    if permutation is not None:
        return Routes(2, 0, permutation.contiguous(), h, w)
    return Routes(1, sum(int(order) << (2 * i) for i, order in enumerate(orders)), None, h, w)


def _problem(
    x: Tensor, projections: Tensor, dt_weight: Tensor, dt_bias: _Optional, A: Tensor, D: _Optional,
    orders: list[int], permutation: _Optional, delta_softplus: bool,
) -> Problem:  # fmt: skip
    b, h, w = x.shape[:3]
    k, d, n = A.shape
    r = dt_weight.shape[2]
    routes = _routes(x, orders, permutation)
    per_route = projections.contiguous().view(b, h * w, k, r + 2 * n).transpose(1, 2)
    step, B, C = per_route.split([r, n, n], -1)
    return Problem(
        x=(
            x.contiguous().view(b, h * w, k, d).transpose(1, 2)
            if x.dim() == 5
            else x.contiguous().view(b, 1, h * w, d).expand(b, k, h * w, d)
        ),
        step=step, B=B, C=C,
        weight=dt_weight.float().transpose(1, 2).contiguous(),
        bias=None if dt_bias is None else dt_bias.float().contiguous(),
        A=A.float().transpose(1, 2).contiguous(),
        D=None if D is None else D.float().contiguous(),
        routes=routes,
        length=h * w if routes.pixels is None else routes.pixels.shape[1],
        softplus=delta_softplus,
    )  # fmt: skip
