"""Numbers as text in columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_ENDING = "_classwise"


def class_table(metrics: Mapping[str, Any], prefix: str, classes: Sequence[str]) -> str | None:
    """Return what a test says of each class, a line per class, as mmdet and mmseg print it by themselves.

    Args:
        metrics: What ``Runner.test`` returns; mmpretrain's ``SingleLabelMetric(average=None)`` puts lists into it, a
            number for each class.
        prefix: That metric's prefix.
        classes: The names.

    Returns:
        The table, or None if there are no such numbers.
    """
    columns = {
        name.removeprefix(f"{prefix}/").removesuffix(_ENDING): values
        for name, values in metrics.items()
        if name.startswith(f"{prefix}/") and name.endswith(_ENDING)
    }
    if not columns:
        return None
    width = max(len("class"), *map(len, classes))
    lines = ["  ".join([f"{'class':<{width}}", *(f"{name:>9}" for name in columns)])]
    for name, *values in zip(classes, *columns.values(), strict=True):
        numbers = [f"{value:>9}" if isinstance(value, int) else f"{value:>9.2f}" for value in values]
        lines.append("  ".join([f"{name:<{width}}", *numbers]))
    return "\n".join(lines)
