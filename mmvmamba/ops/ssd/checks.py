"""What the functions of this package check alike."""

from __future__ import annotations

from torch import Tensor

from mmvmamba.errors import nearest_spelling
from mmvmamba.ops import checks
from mmvmamba.ops.ssd.heads import HEAD_GROUPS


def check_head_groups(op: str, head_groups: object) -> bool:
    """Return whether the heads of a group are a block, or refuse an unknown rule."""
    if head_groups not in HEAD_GROUPS:
        advice = "Leave it out for head j to use group j % g." + nearest_spelling(str(head_groups), HEAD_GROUPS)
        checks.fail(op, "head_groups", f"is {head_groups!r}", " or ".join(map(repr, HEAD_GROUPS)), advice)
    return head_groups == "blocked"


def check_projection(op: str, name: str, projection: Tensor, b: int, length: int, heads: int, n: int) -> None:
    """Refuse projections that are not (b, l, g, n) with g dividing the heads."""
    checks.check_rank(op, name, projection, "(b, l, g, n)")
    groups = projection.shape[2]
    if groups == 0 or heads % groups != 0:
        found = f"has {groups} groups, shape {tuple(projection.shape)}"
        checks.fail(op, name, found, f"a divisor of the {heads} heads", "Check the third axis of (b, l, g, n).")
    checks.check_shape(op, name, projection, "(b, l, g, n)", (b, length, groups, n))


def check_sizes(op: str, name: str, tensor: Tensor, heads: int, n: int) -> None:
    """Refuse a mixer without heads or without states."""
    if heads == 0 or n == 0:
        found = f"has shape {tuple(tensor.shape)}"
        checks.fail(op, name, found, "at least one head and one state", "Check the sizes the model was built with.")
