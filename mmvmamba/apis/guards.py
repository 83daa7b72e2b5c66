"""The hooks that every training and test through our tools gets, whatever its config says.

Each part is one function that changes the config in place, leaves alone what the user configured himself, and returns a
line for the log, or None where there is nothing to say.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.hooks import CheckpointHook as MMEngineCheckpointHook

_OURS = "mmvmamba.CheckpointHook"
_REMOTE = ("backend_args", "file_client_args")


def use_our_checkpoint_hook(cfg: Config) -> str | None:
    """Replace MMEngine's own checkpoint hook by ours, with the same arguments."""
    if cfg.get("runner_type", "Runner") != "Runner":
        return "Checkpoints are saved by MMEngine's own hook, as the runner is another one: a crash may cost them."
    if cfg.get("default_hooks") is None:
        cfg.default_hooks = ConfigDict()
    hooks = cfg.default_hooks  # not the one assigned: the config makes a copy
    if "checkpoint" not in hooks:
        hooks["checkpoint"] = ConfigDict(type="CheckpointHook", interval=1)  # as MMEngine's runner would
    replaced = []
    for hook in [*hooks.values(), *cfg.get("custom_hooks", [])]:
        if not isinstance(hook, dict) or not _is_mmengines(hook.get("type")):
            continue
        if any(hook.get(name) is not None for name in _REMOTE) or "://" in str(hook.get("out_dir")):
            return "Checkpoints go to a remote place by MMEngine's own hook: a crash while saving may cost them."
        for name in _REMOTE:
            hook.pop(name, None)
        hook["type"] = _OURS
        replaced.append(hook)
    return f"Checkpoints are saved by {_OURS} in place of MMEngine's hook." if replaced else None


def _is_mmengines(kind: Any) -> bool:
    return kind is MMEngineCheckpointHook or kind in ("CheckpointHook", "mmengine.CheckpointHook")


_GUARDS: tuple[Callable[[Config], str | None], ...] = (use_our_checkpoint_hook,)


def install_guards(cfg: Config) -> list[str]:
    """Add all of them to a config, in place; return lines for the log."""
    return [line for guard in _GUARDS if (line := guard(cfg)) is not None]
