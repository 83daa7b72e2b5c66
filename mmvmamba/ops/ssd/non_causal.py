"""The documented functions of the non-causal form: every position reads the same state, the sum over all of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import mmvmamba.ops.ssd.operator  # noqa: F401  registers the dispatcher operators
from mmvmamba.ops import checks
from mmvmamba.ops.backends import choose_backend, operator_suffix
from mmvmamba.ops.ssd.checks import check_head_groups, check_projection, check_sizes
from mmvmamba.ops.ssd.heads import HeadGroups
from mmvmamba.ops.ssd.reference import ssd_non_causal_reference, ssd_read_reference, ssd_state_reference


def ssd_non_causal(
    x: Tensor,
    weight: Tensor | None,
    b_in: Tensor,
    c_out: Tensor,
    skip: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    head_groups: HeadGroups = "interleaved",
    backend: str | None = None,
) -> Tensor:
    """Mix positions through one state per head that is the sum over all of them.

    For every head, with ``B``, ``C`` of its group::

        S = sum over l of  B_l (weight_l x_l)^T         y_l = C_l S + skip x_l

    Sums are float32 whatever the inputs are, and float64 when they all are float64. Nothing is divided by the number
    of positions.

    Args:
        x: Input (b, l, k, p): k heads of p channels. Where the heads of a position lie beside each other, as in a part
            of a wider projection, the kernels read it in place; the same holds for b_in and c_out.
        weight: Weight of every position and head (b, l, k), of either sign, or None for ones. VSSD has
            ``dt * exp(A_log)``.
        b_in: Input projections (b, l, g, n), g dividing k.
        c_out: Output projections, shaped as b_in.
        skip: Skip weights (k), float32 (float64 with float64 inputs), or None.
        out_dtype: dtype of the output; that of ``x`` if None.
        head_groups: Which group head j uses: ``"interleaved"`` j % g (VSSD), ``"blocked"`` j // (k / g) (Mamba-2).
        backend: ``"compiled"`` (on a CPU), ``"triton"`` (on a GPU), ``"reference"``, or None for the best that can
            run; without kernels that is PyTorch's own products. Only ``"reference"`` can be differentiated twice or in
            forward mode.

    Returns:
        The output (b, l, k, p).

    Raises:
        OpInputError: An argument has a wrong type, rank, shape, dtype or device, or head_groups is unknown.
        ConfigError: The backend is unknown.
        BackendError: The named backend cannot run.

    Source: Shi et al., "VSSD: Vision Mamba with Non-Causal State Space Duality" (arXiv 2407.18559), section 3.2.
    Difference from upstream (``Mamba2`` with ``linear_attn_duality`` in YuHengsss/VSSD): the state stays float32.
    """
    op = "ssd_non_causal"
    streams = {"x": x} | ({} if weight is None else {"weight": weight}) | {"b_in": b_in, "c_out": c_out}
    _check_tensors(op, streams, skip)
    checks.check_rank(op, "x", x, "(b, l, k, p)")
    checks.check_rank(op, "b_in", b_in, "(b, l, g, n)")
    k = x.shape[2]
    _check_inputs(op, x, weight, b_in)
    checks.check_shape(op, "c_out", c_out, "(b, l, g, n)", tuple(b_in.shape))
    if skip is not None:
        checks.check_shape(op, "skip", skip, "(k,)", (k,))
    accumulate = checks.check_dtypes(op, streams, {"skip": skip})
    blocked = check_head_groups(op, head_groups)
    out_dtype = checks.check_out_dtype(op, out_dtype, x)
    tensors = (x, weight, b_in, c_out, skip)
    operator = _operator(op, backend, x.device, accumulate, tensors)
    if operator is None:
        return ssd_non_causal_reference(*tensors, blocked)[0].to(out_dtype)
    out: Tensor = operator(*tensors, blocked, out_dtype)[0]
    return out


def ssd_state(
    x: Tensor,
    weight: Tensor | None,
    b_in: Tensor,
    *,
    head_groups: HeadGroups = "interleaved",
    backend: str | None = None,
) -> Tensor:
    """Compute the state of `ssd_non_causal`, for mixers that work on it before it is read.

    Args:
        x: Input (b, l, k, p).
        weight: Weight of every position and head (b, l, k), or None for ones.
        b_in: Input projections (b, l, g, n), g dividing k.
        head_groups: Which group a head uses, as in `ssd_non_causal`.
        backend: As in `ssd_non_causal`.

    Returns:
        The state (b, k, n, p), float64 if ``x`` is float64, else float32.

    Raises:
        OpInputError: An argument has a wrong type, rank, shape, dtype or device, or head_groups is unknown.
        ConfigError: The backend is unknown.
        BackendError: The named backend cannot run.
    """
    op = "ssd_state"
    streams = {"x": x} | ({} if weight is None else {"weight": weight}) | {"b_in": b_in}
    _check_tensors(op, streams, None)
    checks.check_rank(op, "x", x, "(b, l, k, p)")
    checks.check_rank(op, "b_in", b_in, "(b, l, g, n)")
    _check_inputs(op, x, weight, b_in)
    accumulate = checks.check_dtypes(op, streams, {})
    blocked = check_head_groups(op, head_groups)
    tensors = (x, weight, b_in)
    operator = _operator(op, backend, x.device, accumulate, tensors)
    if operator is None:
        return ssd_state_reference(*tensors, blocked)
    state: Tensor = operator(*tensors, blocked)
    return state


def ssd_read(
    state: Tensor,
    c_out: Tensor,
    *,
    out_dtype: torch.dtype | None = None,
    head_groups: HeadGroups = "interleaved",
    backend: str | None = None,
) -> Tensor:
    """Read a state at every position: the second half of `ssd_non_causal`, ``y_l = C_l S``.

    Args:
        state: State (b, k, n, p).
        c_out: Output projections (b, l, g, n), g dividing k.
        out_dtype: dtype of the output; that of ``c_out`` if None.
        head_groups: Which group a head uses, as in `ssd_non_causal`.
        backend: As in `ssd_non_causal`.

    Returns:
        The output (b, l, k, p).

    Raises:
        OpInputError: An argument has a wrong type, rank, shape, dtype or device, or head_groups is unknown.
        ConfigError: The backend is unknown.
        BackendError: The named backend cannot run.
    """
    op = "ssd_read"
    streams = {"state": state, "c_out": c_out}
    _check_tensors(op, streams, None)
    checks.check_rank(op, "state", state, "(b, k, n, p)")
    checks.check_rank(op, "c_out", c_out, "(b, l, g, n)")
    b, k, n, _ = state.shape
    check_sizes(op, "state", state, k, n)
    check_projection(op, "c_out", c_out, b, c_out.shape[1], k, n)
    accumulate = checks.check_dtypes(op, streams, {})
    blocked = check_head_groups(op, head_groups)
    out_dtype = checks.check_out_dtype(op, out_dtype, c_out)
    operator = _operator(op, backend, state.device, accumulate, (state, c_out))
    if operator is None:
        return ssd_read_reference(state, c_out, blocked).to(out_dtype)
    out: Tensor = operator(state, c_out, blocked, out_dtype)
    return out


def _check_tensors(op: str, streams: dict[str, Tensor], skip: Tensor | None) -> None:
    tensors = streams | ({} if skip is None else {"skip": skip})
    for name, value in tensors.items():
        checks.check_tensor(op, name, value)
    checks.check_devices(op, tensors)


def _check_inputs(op: str, x: Tensor, weight: Tensor | None, b_in: Tensor) -> None:
    b, length, k, _ = x.shape
    check_sizes(op, "x", x, k, 1)
    check_sizes(op, "b_in", b_in, 1, b_in.shape[3])
    check_projection(op, "b_in", b_in, b, length, k, b_in.shape[3])
    if weight is not None:
        checks.check_shape(op, "weight", weight, "(b, l, k)", (b, length, k))


def _operator(
    op: str, backend: str | None, device: torch.device, dtype: torch.dtype, tensors: tuple[Tensor | None, ...]
) -> Any:
    """Return the operator of the dispatcher that runs a call; None if PyTorch's own products do."""
    chosen = choose_backend(backend, device, dtype, cuda_kernels=False)
    tangents = checks.carry_tangents(tensors)
    if tangents and chosen.pinned and chosen.name != "reference":
        checks.refuse_forward_mode(op, chosen.name)
    if tangents or chosen.name == "reference":
        return None
    return getattr(torch.ops.mmvmamba, op + operator_suffix(chosen, device))
