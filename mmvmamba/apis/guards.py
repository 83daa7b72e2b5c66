"""The hooks that every training and test through our tools gets, whatever its config says.

Each part is one function that changes the config in place, leaves alone what the user configured himself, and returns a
line for the log, or None where there is nothing to say.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.hooks import CheckpointHook as MMEngineCheckpointHook
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop

from mmvmamba.engine import RandomStateHook

_OURS = "mmvmamba.CheckpointHook"
_REMOTE = ("backend_args", "file_client_args")


def use_our_checkpoint_hook(cfg: Config) -> str | None:
    """Replace MMEngine's own checkpoint hook by ours, with the same arguments."""
    if cfg.get("runner_type", "Runner") != "Runner":
        return "Checkpoints are saved by MMEngine's own hook, as the runner is another one: a crash may cost them."
    hooks = cfg.get("default_hooks")
    if hooks is None:
        cfg.default_hooks = hooks = ConfigDict()
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


def use_resumable_loops(cfg: Config) -> str | None:
    """Replace MMEngine's own training loop by ours of the same name, and add the hook that keeps random states.

    ``type='mmengine.EpochBasedTrainLoop'``, with the scope, is left alone: that is how a config says that it wants
    MMEngine's loop.
    """
    loop = cfg.get("train_cfg")
    if not isinstance(loop, dict) or cfg.get("runner_type", "Runner") != "Runner":
        return None
    hooks = cfg.get("custom_hooks") or []
    if not any(isinstance(hook, dict) and hook.get("type") in _RANDOM_STATE for hook in hooks):
        cfg.custom_hooks = [*hooks, dict(type=_RANDOM_STATE[0])]
    kind = loop.get("type") or _LOOPS_BY_EPOCH.get(loop.get("by_epoch"))
    ours = _LOOPS.get(kind)
    if ours is None:
        known = kind is None or (isinstance(kind, str) and kind.startswith("mmvmamba."))
        return None if known else f"The training loop is {kind}: a resumed training may not be bit for bit the same."
    loop.pop("by_epoch", None)
    loop["type"] = ours
    return f"The training loop is {ours} in place of MMEngine's, so that resuming is bit for bit."


_RANDOM_STATE = ("mmvmamba.RandomStateHook", RandomStateHook)
_LOOPS = {
    name: ours
    for ours, stock in (
        ("mmvmamba.EpochBasedTrainLoop", EpochBasedTrainLoop),
        ("mmvmamba.IterBasedTrainLoop", IterBasedTrainLoop),
    )
    for name in (stock, stock.__name__)
}
_LOOPS_BY_EPOCH: dict[Any, str] = {True: "EpochBasedTrainLoop", False: "IterBasedTrainLoop"}

_GUARDS: tuple[Callable[[Config], str | None], ...] = (use_our_checkpoint_hook, use_resumable_loops)


def install_guards(cfg: Config) -> list[str]:
    """Add all of them to a config, in place; return lines for the log."""
    return [line for guard in _GUARDS if (line := guard(cfg)) is not None]
