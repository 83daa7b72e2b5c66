"""The causal convolution in PyTorch's own operators: the specification."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mmvmamba.ops.checks import LOW_PRECISION
from mmvmamba.ops.depthwise_conv.reference import ACTIVATIONS


def causal_conv1d_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, reverse: Sequence[int], activation: int
) -> Tensor:
    """Convolve every channel of a sequence with kernels of its own, one for each direction.

    Args:
        x: Sequence (b, l, d).
        weight: Kernels (k, d, width); the last tap meets the position itself, the others those before it.
        bias: Added to every position (k, d), or None.
        reverse: For every direction whether it runs against the order of the positions.
        activation: Position in `ACTIVATIONS`.

    Returns:
        The results of all directions (b, l, k, d), contiguous, in the dtype of ``x``. On a CPU the computation is
        float32 for float16 and bfloat16, since PyTorch's CPU kernels add up gradients in those.
    """
    if x.device.type == "cpu" and x.dtype in LOW_PRECISION:
        with torch.autocast("cpu", enabled=False):  # it would cast back
            out = causal_conv1d_reference(
                x.float(), weight.float(), None if bias is None else bias.float(), reverse, activation
            )
        return out.to(x.dtype)
    (b, length, d), (k, _, width) = x.shape, weight.shape
    if x.numel() == 0:
        # PyTorch refuses sequences without positions or channels; the products connect the output with its inputs.
        nothing = x[:, :, None] * weight.sum() + (0 if bias is None else bias.sum())
        return nothing.expand(b, length, k, d).contiguous()
    sequence = x.transpose(1, 2)
    outs = []
    for i, backwards in enumerate(reverse):
        padded = F.pad(sequence, (0, width - 1) if backwards else (width - 1, 0))
        kernel = weight[i].flip(-1) if backwards else weight[i]
        outs.append(F.conv1d(padded, kernel[:, None], None if bias is None else bias[i], groups=d))
    out = torch.stack(outs, 1).permute(0, 3, 1, 2)  # (b, k, d, l) -> (b, l, k, d)
    if ACTIVATIONS[activation] == "silu":
        out = F.silu(out)
    return out.contiguous()
