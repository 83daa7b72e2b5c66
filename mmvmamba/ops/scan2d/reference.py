"""The fused 2D scan as a composition of gathers and the reference selective scan: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from mmvmamba.ops.selective_scan.reference import (
    full_precision,
    selective_scan_backward_reference,
    selective_scan_reference,
)


def scan2d_reference(
    x: Tensor,
    projections: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    permutation: Tensor,
    delta_softplus: bool,
) -> Tensor:
    """Scan a map along every route and sum what the routes leave on each pixel.

    Args:
        x: Map (b, h, w, d), or one for every route (b, h, w, k, d).
        projections: Per-pixel (b, h, w, k, r + 2 n), in order step size, B, C.
        dt_weight: From rank r to channels (k, d, r).
        dt_bias: (k, d) or None.
        A: Decay rates (k, d, n).
        D: Skip weights (k, d) or None.
        permutation: Pixels h * W + w visited by each route (k, l), int64.
        delta_softplus: Whether softplus follows the bias.

    Returns:
        The merged map (b, h, w, d), float64 if ``x`` is float64, else float32. Pixels no route visits are zero.

    Source: Liu et al., "VMamba: Visual State Space Model" (arXiv 2401.10166), section 4.2; upstream
    classification/models/vmamba.py, ``forward_corev2``. Upstream projects the scanned copies; a projection is
    pointwise, so here it happens once per pixel, before the operator.
    """
    b, h, w = x.shape[:3]
    d = x.shape[-1]
    k, length = permutation.shape
    scan_inputs, _ = _gather(x, projections, dt_weight, dt_bias, A, D, permutation)
    y, _ = selective_scan_reference(*scan_inputs, delta_softplus)
    per_visit = y.view(b, k, d, length).transpose(2, 3)
    return _scatter(per_visit, permutation, h * w).view(b, h, w, d)


def scan2d_backward_reference(
    grad_out: Tensor,
    x: Tensor,
    projections: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    permutation: Tensor,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor | None]:
    """Compute the gradients of `scan2d_reference` by hand, for where autograd cannot record.

    Args:
        grad_out: Gradient of the merged map (b, h, w, d).
        x, projections, dt_weight, dt_bias, A, D, permutation, delta_softplus: As given to the forward.

    Returns:
        The gradients of x, projections, dt_weight, dt_bias, A, D in the precision of the computation; None where
        the argument is None.
    """
    b, h, w = x.shape[:3]
    d = x.shape[-1]
    k, length = permutation.shape
    scan_inputs, dt = _gather(x, projections, dt_weight, dt_bias, A, D, permutation)
    dy = _visit(grad_out.to(dt.dtype), permutation).transpose(2, 3).reshape(b, k * d, length)
    du, ddelta, dA, dB, dC, dD, dbias = selective_scan_backward_reference(dy, None, *scan_inputs, delta_softplus)
    ddelta = ddelta.reshape(b, k, d, length)
    with full_precision(x.device):
        ddt = torch.einsum("bkdl,kdr->bklr", ddelta, dt_weight.to(dt.dtype))
        ddt_weight = torch.einsum("bkdl,bklr->kdr", ddelta, dt)
    dscanned = torch.cat([ddt, dB.transpose(2, 3), dC.transpose(2, 3)], -1)
    dprojections = _scatter_apart(dscanned, permutation, h * w)
    scatter = _scatter_apart if x.dim() == 5 else _scatter
    dx = scatter(du.reshape(b, k, d, length).transpose(2, 3), permutation, h * w)
    return (
        dx.view(x.shape),
        dprojections.view(projections.shape),
        ddt_weight,
        None if dbias is None else dbias.view(k, d),
        dA.view(A.shape),
        None if dD is None else dD.view(k, d),
    )


def _gather(
    x: Tensor, projections: Tensor, dt_weight: Tensor, dt_bias: Tensor | None, A: Tensor, D: Tensor | None,
    permutation: Tensor,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None], Tensor]:  # fmt: skip
    """Return the arguments of the 1D scan over all routes, and the step-size features (b, k, l, r)."""
    accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
    b = x.shape[0]
    k, d, r = dt_weight.shape
    n = A.shape[2]
    length = permutation.shape[1]
    u = (_visit_apart if x.dim() == 5 else _visit)(x.to(accumulate), permutation)
    dt, B, C = _visit_apart(projections.to(accumulate), permutation).split([r, n, n], -1)  # (b, k, l, .)
    with full_precision(x.device):
        delta = torch.einsum("bklr,kdr->bkdl", dt, dt_weight.to(accumulate))
    scan_inputs = (
        u.transpose(2, 3).reshape(b, k * d, length),
        delta.reshape(b, k * d, length),
        A.reshape(k * d, n),
        B.transpose(2, 3),
        C.transpose(2, 3),
        None if D is None else D.reshape(-1),
        None if dt_bias is None else dt_bias.reshape(-1),
    )
    return scan_inputs, dt


def _visit(per_pixel: Tensor, permutation: Tensor) -> Tensor:
    """Read a map (b, h, w, c) along every route: (b, k, l, c)."""
    b, h, w, c = per_pixel.shape
    return per_pixel.reshape(b, h * w, c).index_select(1, permutation.reshape(-1)).view(b, *permutation.shape, c)


def _visit_apart(per_route: Tensor, permutation: Tensor) -> Tensor:
    """Read maps (b, h, w, k, c), one for each route, along their routes: (b, k, l, c)."""
    b, h, w, k, c = per_route.shape
    maps = per_route.reshape(b, h * w, k, c).unbind(2)
    return torch.stack([m.index_select(1, route) for m, route in zip(maps, permutation.unbind(0), strict=True)], 1)


def _scatter_apart(per_visit: Tensor, permutation: Tensor, pixels: int) -> Tensor:
    """Add the visits (b, k, l, c) to the pixels of their own route's map: (b, h w, k, c)."""
    routes = range(permutation.shape[0])
    return torch.stack([_scatter(per_visit[:, i : i + 1], permutation[i : i + 1], pixels) for i in routes], 2)


def _scatter(per_visit: Tensor, permutation: Tensor, pixels: int) -> Tensor:
    """Add the visits of all routes (b, k, l, c) to their pixels: (b, h w, c)."""
    b, k, length, c = per_visit.shape
    visits = per_visit.reshape(b, k * length, c)
    return visits.new_zeros(b, pixels, c).index_add(1, permutation.reshape(-1), visits)
