"""The documented selective scan: checks the arguments, applies the dtype policy, picks a backend."""

from __future__ import annotations

from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from mmvmamba.ops import checks
from mmvmamba.ops.backends import choose_backend, operator_suffix, runs_reference
from mmvmamba.ops.selective_scan import operator as _registered  # noqa: F401  (registers the operator)
from mmvmamba.ops.selective_scan.reference import selective_scan_reference

_OP = "selective_scan"


@overload
def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = ..., delta_bias: Tensor | None = ...,
    delta_softplus: bool = ..., z: Tensor | None = ..., out_dtype: torch.dtype | None = ...,
    return_last_state: Literal[False] = ..., backend: str | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = ..., delta_bias: Tensor | None = ...,
    delta_softplus: bool = ..., z: Tensor | None = ..., out_dtype: torch.dtype | None = ..., *,
    return_last_state: Literal[True], backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    z: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    return_last_state: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run the selective scan (S6) of Mamba along the last axis.

    For every channel, with ``delta' = delta + delta_bias``, through softplus (threshold 20) if asked::

        h_t = exp(delta'_t A) h_(t-1) + delta'_t B_t u_t        y_t = <C_t, h_t> + D u_t

    and ``y * silu(z)`` where z is given. The state is float32 whatever the inputs are, and float64 when they all
    are float64. Non-contiguous and expanded tensors are accepted; the compiled backend copies them.

    Args:
        u: Input (b, d, l).
        delta: Step sizes (b, d, l).
        A: Decay rates (d, n), usually negative; float32 (float64 with float64 inputs), as D and delta_bias.
        B: Input projections (b, n, l), or grouped (b, g, n, l) with g dividing d: channel i uses group i // (d / g).
        C: Output projections, shaped as B.
        D: Skip weights (d,).
        delta_bias: Added to ``delta`` before softplus (d,).
        delta_softplus: Apply softplus to the step sizes.
        z: Gate (b, d, l).
        out_dtype: dtype of the output; that of ``u`` if None, and under CUDA autocast float32 for float16 and bfloat16
            for bfloat16.
        return_last_state: Also return the state after the last position.
        backend: ``"compiled"``, ``"triton"``, ``"reference"``, or None for the best that can run. A backend asked for
            by name never falls back. Only ``"reference"`` can be differentiated twice or in forward mode.

    Returns:
        The output (b, d, l), and with ``return_last_state`` also the state (b, d, n) in the precision of the scan.

    Raises:
        OpInputError: An argument has a wrong type, rank, shape, dtype or device.
        ConfigError: The backend is unknown.
        BackendError: The named backend cannot run.

    Source: Gu and Dao, "Mamba" (arXiv 2312.00752); ``selective_scan_fn`` of state-spaces/mamba. Differences: no
    complex A, no B or C without a time axis, ``out_dtype``, grouped projections on every backend.
    """
    accumulate = _check(u, delta, A, B, C, D, delta_bias, z)
    checks.check_flag(_OP, "delta_softplus", delta_softplus)
    B, C = (p if p.dim() == 4 else p.unsqueeze(1) for p in (B, C))
    out_dtype = checks.check_out_dtype(_OP, out_dtype, u)
    # A gate is applied to the full-precision output.
    scan_dtype = out_dtype if z is None else accumulate
    chosen = choose_backend(backend, u.device, accumulate)
    tensors = (u, delta, A, B, C, D, delta_bias)
    tangents = checks.carry_tangents(tensors)
    if tangents and chosen.pinned and chosen.name != "reference":
        checks.refuse_forward_mode(_OP, chosen.name)
    if tangents or runs_reference(chosen, u.device):
        out, last_state = selective_scan_reference(*tensors, delta_softplus)
        out = out.to(scan_dtype)
    else:
        save_carries = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        operator = getattr(torch.ops.mmvmamba, _OP + operator_suffix(chosen, u.device))
        out, last_state, _ = operator(*tensors, delta_softplus, scan_dtype, save_carries)
    if z is not None:
        out = (out * F.silu(z.to(accumulate))).to(out_dtype)
    return (out, last_state) if return_last_state else out


def _check(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None,
    z: Tensor | None,
) -> torch.dtype:  # fmt: skip
    """Check every argument; return the dtype of the state."""
    streams = {"u": u, "delta": delta, "B": B, "C": C} | ({} if z is None else {"z": z})
    parameters = {"A": A, "D": D, "delta_bias": delta_bias}
    tensors = streams | parameters
    for name, value in tensors.items():
        if value is not None:
            checks.check_tensor(_OP, name, value)
    checks.check_rank(_OP, "u", u, "(b, d, l)")
    checks.check_rank(_OP, "A", A, "(d, n)")
    b, d, length = u.shape
    n = A.shape[1]
    checks.check_shape(_OP, "A", A, "(d, n)", (d, n))
    if n == 0:
        checks.fail(_OP, "A", f"has shape {tuple(A.shape)}", "n >= 1 states", "Give A at least one column.")
    checks.check_shape(_OP, "delta", delta, "(b, d, l)", (b, d, length))
    _check_projections(B, C, (b, d, n, length))
    for name, vector in (("D", D), ("delta_bias", delta_bias)):
        if vector is not None:
            checks.check_shape(_OP, name, vector, "(d,)", (d,))
    if z is not None:
        checks.check_shape(_OP, "z", z, "(b, d, l)", (b, d, length))
    accumulate = checks.check_dtypes(_OP, streams, parameters)
    checks.check_devices(_OP, tensors)
    return accumulate


def _check_projections(B: Tensor, C: Tensor, sizes: tuple[int, int, int, int]) -> None:
    """Check B and C, plain or grouped."""
    b, d, n, length = sizes
    if B.dim() not in (3, 4):
        found = f"has {B.dim()} dimensions, shape {tuple(B.shape)}"
        checks.fail(_OP, "B", found, "(b, n, l) or grouped (b, g, n, l)", "Reshape it to one of these layouts.")
    names = "(b, n, l)"
    expected: tuple[int, ...] = (b, n, length)
    if B.dim() == 4:
        groups = B.shape[1]
        if groups == 0 or d % groups != 0:
            advice = "Use a number of groups that divides the channels."
            checks.fail(_OP, "B", f"has {groups} groups", f"a divisor of d = {d}", advice)
        names, expected = "(b, g, n, l)", (b, groups, n, length)
    for name, projection in (("B", B), ("C", C)):
        checks.check_shape(_OP, name, projection, names, expected)
