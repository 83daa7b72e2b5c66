"""The fused 2D scan as a composition of gathers and the reference selective scan: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from mmvmamba.ops.selective_scan.reference import selective_scan_reference


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
        x: Map (b, h, w, d).
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
    accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
    b, h, w, d = x.shape
    k, _, r = dt_weight.shape
    n = A.shape[2]
    length = permutation.shape[1]
    pixels = permutation.reshape(-1)

    def gather(per_pixel: Tensor) -> Tensor:
        """(b, h, w, c) -> (b, k, l, c)"""
        flat = per_pixel.reshape(b, h * w, per_pixel.shape[-1])
        return flat.index_select(1, pixels).view(b, k, length, per_pixel.shape[-1])

    u = gather(x.to(accumulate))
    by_route = projections.to(accumulate).unbind(3)
    routes = permutation.unbind(0)
    scanned = torch.stack(
        [p.reshape(b, h * w, r + 2 * n).index_select(1, route) for p, route in zip(by_route, routes, strict=True)], 1
    )  # (b, k, l, r + 2 n)
    dt, B, C = scanned.split([r, n, n], -1)
    delta = torch.einsum("bklr,kdr->bkdl", dt, dt_weight.to(accumulate))
    y, _ = selective_scan_reference(
        u.transpose(2, 3).reshape(b, k * d, length),
        delta.reshape(b, k * d, length),
        A.reshape(k * d, n),
        B.transpose(2, 3),
        C.transpose(2, 3),
        None if D is None else D.reshape(-1),
        None if dt_bias is None else dt_bias.reshape(-1),
        delta_softplus,
    )
    per_visit = y.view(b, k, d, length).transpose(2, 3).reshape(b, k * length, d)
    merged = per_visit.new_zeros(b, h * w, d).index_add(1, pixels, per_visit)
    return merged.view(b, h, w, d)
