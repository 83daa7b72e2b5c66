"""The documented depthwise convolution: checks the arguments, applies autocast, picks a backend."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

import mmvmamba.ops.depthwise_conv.operator  # noqa: F401  registers the dispatcher operator
from mmvmamba.errors import nearest_spelling
from mmvmamba.ops import checks
from mmvmamba.ops.backends import choose_backend
from mmvmamba.ops.depthwise_conv.reference import ACTIVATIONS, depthwise_conv2d_reference

_OP = "depthwise_conv2d"

Activation = Literal["none", "silu"]
"""What follows the convolution."""


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation = "none",
    backend: str | None = None,
) -> Tensor:
    """Convolve every channel of a channels-last map with a kernel of its own and apply an activation, in one pass.

    The stride is 1 and the padding zero, half a kernel wide, so the map keeps its size. The compiled backend computes
    in float32 for float16 and bfloat16 maps and rounds the result alone. Autocast does what it does to PyTorch's
    convolutions: all tensors but float64 ones are cast to its dtype.

    Args:
        x: Map (b, h, w, d), float32, float64, bfloat16 or float16. Where the channels of a pixel lie beside each
            other, as in the halves that ``chunk(2, -1)`` gives, it is read in place.
        weight: Kernels (d, 1, kh, kw) with odd sides, in the dtype of ``x``; `torch.nn.Conv2d` with ``groups=d`` has
            it in this shape.
        bias: Added to every pixel (d), in the dtype of ``x``, or None.
        activation: ``"silu"`` or ``"none"``.
        backend: ``"compiled"``, ``"reference"``, or None for the best that can run. A backend asked for by name
            never falls back. Only ``"reference"`` can be differentiated twice or in forward mode.

    Returns:
        The map (b, h, w, d), contiguous when it comes from the compiled backend.

    Raises:
        OpInputError: An argument has a wrong type, rank, shape, dtype, device or activation.
        ConfigError: The backend is unknown.
        BackendError: The named backend cannot run.

    Source: the depthwise convolution before the scan of Liu et al., "VMamba" (arXiv 2401.10166), section 4.2; upstream
    computes it on channel-first maps with `torch.nn.Conv2d` and `torch.nn.SiLU`.
    """
    _check_tensors(x, weight, bias)
    code = activation_code(_OP, activation)
    chosen = choose_backend(backend, x.device, cpu_only=True)
    x, weight, bias = checks.to_autocast(x, weight, bias)
    tensors = (x, weight, bias)
    tangents = checks.carry_tangents(tensors)
    if tangents and chosen == ("compiled", True):
        checks.refuse_forward_mode(_OP, chosen.name)
    checks.check_same_dtype(_OP, "x", x, {"weight": weight, "bias": bias})
    if tangents or chosen.name == "reference":
        return depthwise_conv2d_reference(*tensors, code)
    out: Tensor = torch.ops.mmvmamba.depthwise_conv2d(*tensors, code)
    return out


def activation_code(op: str, activation: str) -> int:
    """Return the number by which the dispatcher's operators know an activation, or refuse what is none."""
    if activation not in ACTIVATIONS:
        advice = "Leave it out for none." + nearest_spelling(str(activation), ACTIVATIONS)
        checks.fail(op, "activation", f"is {activation!r}", " or ".join(map(repr, ACTIVATIONS)), advice)
    return ACTIVATIONS.index(activation)


def _check_tensors(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    tensors = {"x": x, "weight": weight} | ({} if bias is None else {"bias": bias})
    checks.check_floating(_OP, tensors)
    checks.check_rank(_OP, "x", x, "(b, h, w, d)")
    checks.check_rank(_OP, "weight", weight, "(d, 1, kh, kw)")
    d = x.shape[3]
    channels, _, kh, kw = weight.shape
    if x.shape[1] == channels != d:
        found = f"has {d} channels, shape {tuple(x.shape)}"
        advice = "Channels come last: a channel-first map needs x.permute(0, 2, 3, 1)."
        checks.fail(_OP, "x", found, f"(b, h, w, d) with d = {channels}, as weight has", advice)
    checks.check_shape(_OP, "weight", weight, "(d, 1, kh, kw)", (d, 1, kh, kw))
    if kh % 2 == 0 or kw % 2 == 0:
        advice = "A kernel with an even side has no centre; pad it with zeros to the next odd side."
        checks.fail(_OP, "weight", f"has sides {kh} and {kw}", "odd sides", advice)
    if bias is not None:
        checks.check_shape(_OP, "bias", bias, "(d)", (d,))
    checks.check_devices(_OP, tensors)
