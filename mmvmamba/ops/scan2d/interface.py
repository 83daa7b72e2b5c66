"""The documented 2D scan: checks the arguments, applies the dtype policy, picks a backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmvmamba.ops import checks
from mmvmamba.ops.backends import choose_backend, operator_suffix, runs_reference
from mmvmamba.ops.scan2d.operator import routes_as_permutation
from mmvmamba.ops.scan2d.orders import CROSS_SCAN, ScanOrder, pixel_range
from mmvmamba.ops.scan2d.reference import scan2d_reference

_OP = "scan2d"


def scan2d(
    x: Tensor,
    projections: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None = None,
    *,
    orders: Sequence[ScanOrder] | Tensor = CROSS_SCAN,
    delta_softplus: bool = True,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """Scan a channels-last map along k routes and sum the results on each pixel: VMamba's SS2D core in one operator.

    For every route and channel, with ``(dt, B, C)`` the route's projections of the pixel visited at step t and
    ``delta_t = softplus(dt_weight dt + dt_bias)``::

        h_t = exp(delta_t A) h_(t-1) + delta_t B_t x_t        y_t = <C_t, h_t> + D x_t

    and y_t is added to the pixel it came from. The state is float32 whatever the inputs are, and float64 when x and
    the projections are float64.

    Args:
        x: Map (b, h, w, d), which all routes read, or a map for every route (b, h, w, k, d): route i scans
            ``x[..., i, :]``.
        projections: Per pixel and route (b, h, w, k, r + 2 n): r step-size features, then n of B, then n of C.
        dt_weight: Step sizes from their r features (k, d, r).
        dt_bias: Added before softplus (k, d), or None.
        A: Decay rates (k, d, n), usually negative; float32 (float64 with a float64 map), as dt_bias and D.
        D: Skip weights (k, d), or None.
        orders: The k routes, as `ScanOrder` values or as a permutation (k, l), int64, of pixel indices h * W + w.
            A permutation may visit only a part of the map; pixels no route visits are zero in the output.
        delta_softplus: Apply softplus to the step sizes.
        out_dtype: dtype of the output; that of ``x`` if None, and under CUDA autocast float32 for float16 and bfloat16
            for bfloat16. float32 keeps the precision of the sum under AMP.
        backend: ``"compiled"``, ``"triton"``, ``"reference"``, or None for the best that can run. A backend asked for
            by name never falls back. Only ``"reference"`` can be differentiated twice or in forward mode.

    Returns:
        The merged map (b, h, w, d).

    Raises:
        OpInputError: An argument has a wrong type, rank, shape, dtype, device or scan order.
        ConfigError: The backend is unknown.
        BackendError: The named backend cannot run.

    Source: Liu et al., "VMamba" (arXiv 2401.10166); upstream classification/models/vmamba.py. Differences: the
    projection to (dt, B, C) is outside, once per pixel; channels are last; any route, not four fixed ones. With a map
    for every route: both directions of Vim (arXiv 2401.09417) at once, whose inputs are convolved each by itself.
    """
    accumulate = _check_tensors(x, projections, dt_weight, dt_bias, A, D)
    checks.check_flag(_OP, "delta_softplus", delta_softplus)
    out_dtype = checks.check_out_dtype(_OP, out_dtype, x)
    codes, permutation = _check_orders(orders, x, A.shape[0])
    chosen = choose_backend(backend, x.device, accumulate)
    tensors = (x, projections, dt_weight, dt_bias, A, D)
    tangents = checks.carry_tangents(tensors)
    if tangents and chosen.pinned and chosen.name != "reference":
        checks.refuse_forward_mode(_OP, chosen.name)
    if tangents or runs_reference(chosen, x.device):
        pixels = routes_as_permutation(x, codes, permutation)
        return scan2d_reference(*tensors, pixels, delta_softplus).to(out_dtype)
    save_carries = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    operator = getattr(torch.ops.mmvmamba, _OP + operator_suffix(chosen, x.device))
    out, _ = operator(
        x, projections, dt_weight.to(accumulate), *tensors[3:], codes, permutation, delta_softplus, out_dtype,
        save_carries,
    )  # fmt: skip
    merged: Tensor = out
    return merged


def _check_tensors(
    x: Tensor, projections: Tensor, dt_weight: Tensor, dt_bias: Tensor | None, A: Tensor, D: Tensor | None
) -> torch.dtype:
    """Check every tensor but the orders; return the dtype of the state."""
    streams = {"x": x, "projections": projections}
    parameters = {"dt_bias": dt_bias, "A": A, "D": D}
    tensors = streams | {"dt_weight": dt_weight} | parameters
    for name, value in tensors.items():
        if value is not None:
            checks.check_tensor(_OP, name, value)
    per_route = x.dim() == 5
    checks.check_rank(_OP, "x", x, "(b, h, w, k, d)" if per_route else "(b, h, w, d)")
    checks.check_rank(_OP, "A", A, "(k, d, n)")
    checks.check_rank(_OP, "dt_weight", dt_weight, "(k, d, r)")
    b, h, w = x.shape[:3]
    d = x.shape[-1]
    k, _, n = A.shape
    r = dt_weight.shape[2]
    if k == 0 or n == 0:
        checks.fail(_OP, "A", f"has shape {tuple(A.shape)}", "k >= 1 routes and n >= 1 states", "Check how A is made.")
    if A.shape[1] == dt_weight.shape[1] != d:
        found = f"has {d} channels, shape {tuple(x.shape)}"
        advice = "Channels come last: a channel-first map needs x.permute(0, 2, 3, 1)."
        layout = "(b, h, w, k, d)" if per_route else "(b, h, w, d)"
        checks.fail(_OP, "x", found, f"{layout} with d = {A.shape[1]}, as A and dt_weight have", advice)
    if per_route:
        checks.check_shape(_OP, "x", x, "(b, h, w, k, d)", (b, h, w, k, d))
    checks.check_shape(_OP, "A", A, "(k, d, n)", (k, d, n))
    checks.check_shape(_OP, "dt_weight", dt_weight, "(k, d, r)", (k, d, r))
    checks.check_shape(_OP, "projections", projections, "(b, h, w, k, r + 2 n)", (b, h, w, k, r + 2 * n))
    for name, value in (("dt_bias", dt_bias), ("D", D)):
        if value is not None:
            checks.check_shape(_OP, name, value, "(k, d)", (k, d))
    accumulate = checks.check_dtypes(_OP, streams, parameters)
    if not dt_weight.is_floating_point():
        checks.fail(_OP, "dt_weight", f"has dtype {dt_weight.dtype}", "a floating-point dtype", "Cast it with .to().")
    checks.check_devices(_OP, tensors)
    return accumulate


def _check_orders(orders: object, x: Tensor, k: int) -> tuple[list[int], Tensor | None]:
    """Return (codes, None) for named routes and ([], permutation) for explicit ones."""
    if isinstance(orders, Tensor):
        return [], _check_permutation(orders, x, k)
    if not isinstance(orders, Sequence):
        checks.fail(_OP, "orders", f"is {orders!r}", "a sequence of ScanOrder values or an int64 tensor (k, l)",
                    "Use for example orders=CROSS_SCAN.")  # fmt: skip
    codes = list(orders)
    if len(codes) != k:
        advice = "Give one order for each route of A."
        checks.fail(_OP, "orders", f"has {len(codes)} entries", f"k = {k} of them", advice)
    for order in codes:
        if not isinstance(order, ScanOrder):
            checks.fail(_OP, "orders", f"holds {order!r}", "ScanOrder values or an int64 tensor (k, l)",
                        f"Use one of {', '.join(str(o) for o in ScanOrder)}.")  # fmt: skip
    return [int(order) for order in codes], None


def _check_permutation(permutation: Tensor, x: Tensor, k: int) -> Tensor:
    if permutation.dtype != torch.int64:
        checks.fail(
            _OP, "orders", f"has dtype {permutation.dtype}", "torch.int64 pixel indices", "Cast it with .long()."
        )
    checks.check_rank(_OP, "orders", permutation, "(k, l)")
    if permutation.shape[0] != k:
        advice = "Give one row of pixel indices for each route of A."
        checks.fail(_OP, "orders", f"has {permutation.shape[0]} rows", f"k = {k} of them", advice)
    checks.check_devices(_OP, {"x": x, "orders": permutation})
    found = pixel_range(permutation)
    pixels = x.shape[1] * x.shape[2]
    if found is not None and (found[0] < 0 or found[1] >= pixels):
        checks.fail(_OP, "orders", f"holds pixel indices from {found[0]} to {found[1]}",
                    f"0 to h * w - 1 = {pixels - 1}", "Build it for the size of this map.")  # fmt: skip
    return permutation
