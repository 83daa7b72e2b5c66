"""Which group of projections a head uses, and the layouts that make one product of all heads of a group."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

HeadGroups = Literal["interleaved", "blocked"]
"""Head j of k uses group ``j % g`` (interleaved, as VSSD counts) or ``j // (k / g)`` (blocked, as Mamba-2 does). With
one group they are the same."""
HEAD_GROUPS: tuple[str, ...] = get_args(HeadGroups)


def accumulation(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype a mixer computes in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def by_group(x: Tensor, groups: int, blocked: bool) -> Tensor:
    """Lay the heads of a group side by side: (b, l, k, p) -> (b, g, l, k / g p)."""
    per_group = x.shape[2] // groups
    if blocked:
        split = x.unflatten(2, (groups, per_group)).permute(0, 2, 1, 3, 4)
    else:
        split = x.unflatten(2, (per_group, groups)).permute(0, 3, 1, 2, 4)
    return split.reshape(*split.shape[:3], per_group * x.shape[3])


def from_group(y: Tensor, heads: int, blocked: bool) -> Tensor:
    """Undo `by_group`: (b, g, l, k / g p) -> (b, l, k, p)."""
    b, groups, length, width = y.shape
    per_group = heads // groups
    split = y.unflatten(3, (per_group, width // per_group))
    ordered = split.permute(0, 2, 1, 3, 4) if blocked else split.permute(0, 2, 3, 1, 4)
    return ordered.reshape(b, length, heads, width // per_group)


def per_head(projection: Tensor, heads: int, blocked: bool) -> Tensor:
    """Give every head its group's projection: (b, l, g, n) -> (b, l, k, n)."""
    b, length, groups, n = projection.shape
    if groups == heads:
        return projection
    copies = heads // groups
    if blocked:
        return projection.unsqueeze(3).expand(-1, -1, -1, copies, -1).reshape(b, length, heads, n)
    return projection.unsqueeze(2).expand(-1, -1, copies, -1, -1).reshape(b, length, heads, n)


def sum_heads(gradient: Tensor, groups: int, blocked: bool) -> Tensor:
    """Add up what `per_head` spread: (b, l, k, n) -> (b, l, g, n)."""
    copies = gradient.shape[2] // groups
    if blocked:
        return gradient.unflatten(2, (groups, copies)).sum(3)
    return gradient.unflatten(2, (copies, groups)).sum(2)
