"""Names of classes, however a config gives them."""

from __future__ import annotations

from typing import Any


def bare_name(kind: Any) -> str:
    """Return the name of a class that is given as one, or as text with or without a scope; "" for anything else."""
    return kind.rpartition(".")[2] if isinstance(kind, str) else str(getattr(kind, "__name__", ""))


def class_name(part: Any) -> str:
    """Return the bare name of the class of a part that a config describes, or has built already."""
    return bare_name(part.get("type", "") if isinstance(part, dict) else type(part))
