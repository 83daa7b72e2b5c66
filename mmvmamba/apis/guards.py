"""The hooks that every training and test through our tools gets, whatever its config says.

Each part is one function that changes the config in place, leaves alone what the user configured himself, and returns a
line for the log, or None where there is nothing to say.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mmengine.config import Config, ConfigDict


def guard_loading(cfg: Config) -> str | None:
    """Check every checkpoint that the runner loads (``load_from``, a resume, a test) against the whole model."""
    add_hook(cfg, "CheckpointCheckHook")
    return None


_GUARDS: tuple[Callable[[Config], str | None], ...] = (guard_loading,)


def install_guards(cfg: Config) -> list[str]:
    """Add all of them to a config, in place; return lines for the log."""
    return [line for guard in _GUARDS if (line := guard(cfg)) is not None]


def add_hook(cfg: Config, name: str, **arguments: Any) -> None:
    """Add a hook of mmvmamba to ``custom_hooks`` unless the config has one.

    Args:
        cfg: The config, changed in place.
        name: The hook's class. A hook of this name is left as it is, whether given by name, with or without scope, by
            class or built.
        arguments: Its arguments.
    """
    hooks = list(cfg.get("custom_hooks") or [])
    if not any(_class_name(hook) == name for hook in hooks):
        cfg.custom_hooks = [*hooks, ConfigDict(type=f"mmvmamba.{name}", **arguments)]


def _class_name(hook: Any) -> str:
    kind = hook.get("type") if isinstance(hook, dict) else type(hook)
    return kind.rpartition(".")[2] if isinstance(kind, str) else getattr(kind, "__name__", "")
