"""The documented causal form: the scan of Mamba-2."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

import mmvmamba.ops.ssd.causal.operator  # noqa: F401  registers the dispatcher operator
from mmvmamba.ops import checks
from mmvmamba.ops.backends import choose_backend, operator_suffix
from mmvmamba.ops.ssd.checks import check_head_groups, check_projection, check_sizes
from mmvmamba.ops.ssd.heads import HeadGroups
from mmvmamba.ops.ssd.reference import CHUNK, ssd_chunked_reference

_OP = "ssd"
_Optional = Tensor | None


@overload
def ssd(
    x: Tensor, dt: Tensor, decay: Tensor, b_in: Tensor, c_out: Tensor, skip: Tensor | None = ..., *,
    dt_bias: Tensor | None = ..., dt_softplus: bool = ..., initial_state: Tensor | None = ...,
    return_last_state: Literal[False] = ..., chunk_size: int | None = ..., out_dtype: torch.dtype | None = ...,
    head_groups: HeadGroups = ..., backend: str | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def ssd(
    x: Tensor, dt: Tensor, decay: Tensor, b_in: Tensor, c_out: Tensor, skip: Tensor | None = ..., *,
    dt_bias: Tensor | None = ..., dt_softplus: bool = ..., initial_state: Tensor | None = ...,
    return_last_state: Literal[True], chunk_size: int | None = ..., out_dtype: torch.dtype | None = ...,
    head_groups: HeadGroups = ..., backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def ssd(
    x: Tensor,
    dt: Tensor,
    decay: Tensor,
    b_in: Tensor,
    c_out: Tensor,
    skip: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
    chunk_size: int | None = None,
    out_dtype: torch.dtype | None = None,
    head_groups: HeadGroups = "interleaved",
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run the scan of Mamba-2 along the positions: one decay per head, so that products do most of the work.

    For every head, with ``B``, ``C`` of its group and ``dt' = dt + dt_bias``, through softplus (threshold 20) if
    asked::

        h_t = exp(dt'_t decay) h_(t-1) + dt'_t B_t x_t^T        y_t = C_t h_t + skip x_t

    The state is float32 whatever the inputs are, and float64 when they all are float64. Work is done by products over
    chunks, so that a value that is not finite reaches earlier positions of its chunk too, unlike in `selective_scan`;
    finite values reach later positions alone.

    Args:
        x: Input (b, l, k, p): k heads of p channels.
        dt: Step sizes (b, l, k).
        decay: Decay rate of every head (k), negative: ``-exp(A_log)``; float32 (float64 with float64 inputs), as skip,
            dt_bias and initial_state.
        b_in: Input projections (b, l, g, n), g dividing k.
        c_out: Output projections, shaped as b_in.
        skip: Skip weights (k), or None.
        dt_bias: Added to ``dt`` before softplus (k), or None.
        dt_softplus: Apply softplus to the step sizes.
        initial_state: State before the first position (b, k, n, p), or None for zeros.
        return_last_state: Also return the state after the last position.
        chunk_size: Positions that the reference puts into one product; None for 64. The result is that of the
            recurrence whatever it is, and the kernels have a size of their own.
        out_dtype: dtype of the output; that of ``x`` if None.
        head_groups: Which group head j uses: ``"interleaved"`` j % g (VSSD), ``"blocked"`` j // (k / g) (Mamba-2).
        backend: ``"compiled"`` (on a CPU), ``"triton"`` (on a GPU), ``"reference"``, or None for the best that can
            run; without kernels that is PyTorch's own products. Only ``"reference"`` can be differentiated twice or in
            forward mode.

    Returns:
        The output (b, l, k, p), and with ``return_last_state`` also the state (b, k, n, p) in the precision of the
        scan.

    Raises:
        OpInputError: An argument has a wrong type, rank, shape, dtype or device, or head_groups is unknown.
        ConfigError: The backend is unknown.
        BackendError: The named backend cannot run.

    Source: Dao and Gu, "Transformers are SSMs" (arXiv 2405.21060), section 6; ``mamba_chunk_scan_combined`` of
    state-spaces/mamba. Differences: no gate, no sequence boundaries, states are (n, p) and not (p, n).
    """
    accumulate = _check(x, dt, decay, b_in, c_out, skip, dt_bias, initial_state)
    checks.check_flag(_OP, "dt_softplus", dt_softplus)
    if chunk_size is not None and (isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1):
        checks.fail(_OP, "chunk_size", f"is {chunk_size!r}", "a positive int or None", "Leave it out.")
    blocked = check_head_groups(_OP, head_groups)
    out_dtype = checks.check_out_dtype(_OP, out_dtype, x)
    chosen = choose_backend(backend, x.device, accumulate, cuda_kernels=False)
    tensors = (x, dt, decay, b_in, c_out, skip, dt_bias, initial_state)
    tangents = checks.carry_tangents(tensors)
    if tangents and chosen.pinned and chosen.name != "reference":
        checks.refuse_forward_mode(_OP, chosen.name)
    if tangents or chosen.name == "reference":
        out, last_state = ssd_chunked_reference(*tensors, dt_softplus, blocked, chunk_size or CHUNK)
        out = out.to(out_dtype)
    else:
        save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        operator = getattr(torch.ops.mmvmamba, _OP + operator_suffix(chosen, x.device))
        out, last_state, _ = operator(*tensors, dt_softplus, blocked, out_dtype, save)
    return (out, last_state) if return_last_state else out


def _check(
    x: Tensor, dt: Tensor, decay: Tensor, b_in: Tensor, c_out: Tensor, skip: _Optional, dt_bias: _Optional,
    initial_state: _Optional,
) -> torch.dtype:  # fmt: skip
    """Check every tensor; return the dtype of the state."""
    streams = {"x": x, "dt": dt, "b_in": b_in, "c_out": c_out}
    parameters = {"decay": decay, "skip": skip, "dt_bias": dt_bias, "initial_state": initial_state}
    tensors = streams | parameters
    for name, value in tensors.items():
        if value is not None:
            checks.check_tensor(_OP, name, value)
    checks.check_rank(_OP, "x", x, "(b, l, k, p)")
    checks.check_rank(_OP, "b_in", b_in, "(b, l, g, n)")
    b, length, k, p = x.shape
    n = b_in.shape[3]
    check_sizes(_OP, "x", x, k, 1)
    check_sizes(_OP, "b_in", b_in, 1, n)
    check_projection(_OP, "b_in", b_in, b, length, k, n)
    checks.check_shape(_OP, "c_out", c_out, "(b, l, g, n)", tuple(b_in.shape))
    checks.check_shape(_OP, "dt", dt, "(b, l, k)", (b, length, k))
    for name, vector in (("decay", decay), ("skip", skip), ("dt_bias", dt_bias)):
        if vector is not None:
            checks.check_shape(_OP, name, vector, "(k,)", (k,))
    if initial_state is not None:
        checks.check_shape(_OP, "initial_state", initial_state, "(b, k, n, p)", (b, k, n, p))
    accumulate = checks.check_dtypes(_OP, streams, parameters)
    checks.check_devices(_OP, tensors)
    return accumulate
