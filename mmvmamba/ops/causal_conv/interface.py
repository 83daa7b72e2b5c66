"""The documented causal convolution: checks the arguments, applies autocast, picks a backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import mmvmamba.ops.causal_conv.operator  # noqa: F401  registers the dispatcher operator
from mmvmamba.ops import checks
from mmvmamba.ops.backends import choose_backend
from mmvmamba.ops.causal_conv.reference import causal_conv1d_reference
from mmvmamba.ops.depthwise_conv.interface import Activation, activation_code

_OP = "causal_conv1d"


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    reverse: Sequence[bool] = (False, True),
    activation: Activation = "none",
    backend: str | None = None,
) -> Tensor:
    """Convolve every channel of a channels-last sequence along k directions and apply an activation, in one pass.

    Of direction i, with ``x`` zero outside of the sequence::

        y_t = bias + sum over j of weight[i, :, j] x_(t - (width - 1) + j)      forward
        y_t = bias + sum over j of weight[i, :, j] x_(t + (width - 1) - j)      backward, where reverse[i]

    so that a backward direction is the forward one on the reversed sequence, its result put in order again. The
    compiled backend computes in float32 for float16 and bfloat16 sequences and rounds the result alone. Autocast does
    what it does to PyTorch's convolutions: all tensors but float64 ones are cast to its dtype.

    Args:
        x: Sequence (b, l, d), float32, float64, bfloat16 or float16. Where the channels of a position lie beside each
            other, as in the halves that ``chunk(2, -1)`` gives, it is read in place.
        weight: Kernels (k, d, width), in the dtype of ``x``; `torch.nn.Conv1d` with ``groups=d`` has the kernels of
            one direction as (d, 1, width).
        bias: Added to every position (k, d), in the dtype of ``x``, or None.
        reverse: For each of the k directions whether it runs backward.
        activation: ``"silu"`` or ``"none"``.
        backend: ``"compiled"``, ``"reference"``, or None for the best that can run. A backend asked for by name
            never falls back. Only ``"reference"`` can be differentiated twice or in forward mode.

    Returns:
        The results of all directions (b, l, k, d), contiguous: what `mmvmamba.ops.scan2d` takes as one map per route.

    Raises:
        OpInputError: An argument has a wrong type, rank, shape, dtype, device, direction or activation.
        ConfigError: The backend is unknown.
        BackendError: The named backend cannot run.

    Source: the convolution before the scan of Gu and Dao, "Mamba" (arXiv 2312.00752), section 3.4, on both directions
    of Zhu et al., "Vision Mamba" (arXiv 2401.09417); upstream convolves channel-first copies, one for each direction.
    """
    _check_tensors(x, weight, bias)
    directions = _check_reverse(reverse, weight.shape[0])
    code = activation_code(_OP, activation)
    chosen = choose_backend(backend, x.device, cpu_only=True)
    x, weight, bias = checks.to_autocast(x, weight, bias)
    tensors = (x, weight, bias)
    tangents = checks.carry_tangents(tensors)
    if tangents and chosen == ("compiled", True):
        checks.refuse_forward_mode(_OP, chosen.name)
    checks.check_same_dtype(_OP, "x", x, {"weight": weight, "bias": bias})
    if tangents or chosen.name == "reference":
        return causal_conv1d_reference(*tensors, directions, code)
    out: Tensor = torch.ops.mmvmamba.causal_conv1d(*tensors, directions, code)
    return out


def _check_reverse(reverse: object, k: int) -> list[int]:
    """Return the directions as the dispatcher wants them."""
    if not isinstance(reverse, Sequence) or not all(isinstance(value, bool) for value in reverse):
        checks.fail(_OP, "reverse", f"is {reverse!r}", "a sequence of True and False", "Use for example (False, True).")
    if len(reverse) != k:
        advice = "Give one for each direction of weight (k, d, width)."
        checks.fail(_OP, "reverse", f"has {len(reverse)} entries", f"k = {k} of them", advice)
    return [int(value) for value in reverse]


def _check_tensors(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    tensors = {"x": x, "weight": weight} | ({} if bias is None else {"bias": bias})
    checks.check_floating(_OP, tensors)
    checks.check_rank(_OP, "x", x, "(b, l, d)")
    checks.check_rank(_OP, "weight", weight, "(k, d, width)")
    d = x.shape[2]
    k, channels, width = weight.shape
    if k == 0 or width == 0:
        found = f"has shape {tuple(weight.shape)}"
        checks.fail(_OP, "weight", found, "k >= 1 directions and width >= 1 taps", "Check how weight is made.")
    if x.shape[1] == channels != d:
        found = f"has {d} channels, shape {tuple(x.shape)}"
        advice = "Channels come last: a channel-first sequence needs x.transpose(1, 2)."
        checks.fail(_OP, "x", found, f"(b, l, d) with d = {channels}, as weight has", advice)
    checks.check_shape(_OP, "weight", weight, "(k, d, width)", (k, d, width))
    if bias is not None:
        checks.check_shape(_OP, "bias", bias, "(k, d)", (k, d))
    checks.check_devices(_OP, tensors)
