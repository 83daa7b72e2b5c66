"""What VMamba's published code computes, restated in plain PyTorch from its description.

This is a restatement, not upstream's code: it was written for this benchmark from the facts noted about upstream, and
materialises what upstream materialises. Four scanned copies of the map; a grouped projection of these copies to
(dt, B, C); step sizes (b, k, d, l); decay and injection for every position and state, (b, k d, l, n); then a Python
loop over the positions that indexes these tensors and leaves its gradient to autograd, whose index gradients are
full-size tensors, so that the backward grows faster than the length. The sum over the four directions is the
cross-merge. On a GPU upstream calls a CUDA kernel in the place of that loop: `ss2d_core` takes the function to call,
and copies and merges in PyTorch around it, where upstream has a Triton kernel.

Source of the description: Liu et al., "VMamba" (arXiv 2401.10166), section 4.2 and its CPU fallback.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_scan(x: Tensor) -> Tensor:
    """Copy a map (b, d, h, w) along rows, columns and their reversals: (b, 4, d, l)."""
    rows, columns = x.flatten(2), x.transpose(2, 3).flatten(2)
    there = torch.stack([rows, columns], 1)
    return torch.cat([there, there.flip(-1)], 1)


def cross_merge(y: Tensor, h: int, w: int) -> Tensor:
    """Sum the four directions (b, 4, d, l) on their pixels: (b, d, l)."""
    b, _, d, length = y.shape
    both = y[:, :2] + y[:, 2:].flip(-1)
    columns = both[:, 1].view(b, d, w, h).transpose(2, 3).reshape(b, d, length)
    return both[:, 0] + columns


def selective_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor) -> Tensor:
    """Scan step by step with softplus, everything materialised, in float32.

    Args:
        u: Input (b, d, l).
        delta: Step sizes before bias and softplus (b, d, l).
        A: Decay rates (d, n).
        B: Input projections (b, g, n, l).
        C: Output projections (b, g, n, l).
        D: Skip weights (d,).
        delta_bias: (d,).

    Returns:
        The output (b, d, l), float32.
    """
    u, delta, B, C = u.float(), delta.float(), B.float(), C.float()
    b, d, length = u.shape
    repeats = d // B.shape[1]
    B, C = B.repeat_interleave(repeats, 1), C.repeat_interleave(repeats, 1)  # (b, d, n, l)
    delta = F.softplus(delta + delta_bias[:, None])
    decay = torch.exp(torch.einsum("bdl,dn->bdln", delta, A))
    injection = torch.einsum("bdl,bdnl,bdl->bdln", delta, B, u)
    state = u.new_zeros(b, d, A.shape[1])
    outputs = []
    for position in range(length):
        state = decay[:, :, position] * state + injection[:, :, position]
        outputs.append((state * C[:, :, :, position]).sum(-1))
    return torch.stack(outputs, 2) + u * D[:, None]


def ss2d_core(
    x: Tensor,
    x_proj_weight: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A_logs: Tensor,
    Ds: Tensor,
    scan: Callable[..., Tensor] = selective_scan,
) -> Tensor:
    """Map ``x`` (b, h, w, d), channels-last as upstream's layers leave it, to the merged map (b, h, w, d).

    Args:
        x: The map.
        x_proj_weight: (4, r + 2 n, d).
        dt_weight: (4, d, r).
        dt_bias: (4, d).
        A_logs: (4 d, n).
        Ds: (4 d,).
        scan: Takes the arguments of `selective_scan`, with four groups of B and C.
    """
    b, h, w, d = x.shape
    k, _, r = dt_weight.shape
    n = A_logs.shape[1]
    length = h * w
    scanned = cross_scan(x.permute(0, 3, 1, 2).contiguous())
    weight = x_proj_weight.reshape(k * (r + 2 * n), d, 1)
    projected = F.conv1d(scanned.view(b, k * d, length), weight, groups=k).view(b, k, r + 2 * n, length)
    dt, B, C = projected.split([r, n, n], 2)
    delta = torch.einsum("bkrl,kdr->bkdl", dt, dt_weight)
    y = scan(
        scanned.view(b, k * d, length),
        delta.reshape(b, k * d, length),
        -torch.exp(A_logs.float()),
        B.contiguous(),
        C.contiguous(),
        Ds.float(),
        dt_bias.float().view(-1),
    )
    return cross_merge(y.view(b, k, d, length), h, w).view(b, d, h, w).permute(0, 2, 3, 1)
