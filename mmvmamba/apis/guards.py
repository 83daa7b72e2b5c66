"""The hooks and loops that trainings and tests through our tools get, whatever their config says.

Each part is one function that changes the config in place, leaves alone what the user configured himself, and returns a
line for the log, or None where there is nothing to say.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.hooks import CheckpointHook as MMEngineCheckpointHook
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop

from mmvmamba.apis.class_names import class_name
from mmvmamba.engine.loops import ResumableLoop

_OURS = "mmvmamba.CheckpointHook"
_REMOTE = ("backend_args", "file_client_args")
_LOOPS = {
    name: ours
    for ours, stock in (
        ("mmvmamba.EpochBasedTrainLoop", EpochBasedTrainLoop),
        ("mmvmamba.IterBasedTrainLoop", IterBasedTrainLoop),
    )
    for name in (stock, stock.__name__)
}
_LOOPS_BY_EPOCH: dict[Any, str] = {True: "EpochBasedTrainLoop", False: "IterBasedTrainLoop"}


def guard_loading(cfg: Config) -> None:
    """Check every checkpoint that the runner loads (``load_from``, a resume, a test) against the whole model."""
    add_hook(cfg, "CheckpointCheckHook")


def guard_training(cfg: Config) -> list[str]:
    """Add to a training what keeps its checkpoints and its weights safe, in place; return lines for the log."""
    return [line for guard in _TRAINING if (line := guard(cfg)) is not None]


def use_our_checkpoint_hook(cfg: Config) -> str | None:
    """Replace MMEngine's own checkpoint hook by ours, with the same arguments.

    ``type='mmengine.CheckpointHook'``, with the scope, is left alone: that is how a config says that it wants
    MMEngine's.
    """
    if cfg.get("runner_type", "Runner") != "Runner":
        add_hook(cfg, "PlainFormHook")
        return "Checkpoints are saved by MMEngine's own hook, as the runner is another one: a crash may cost them."
    if cfg.get("default_hooks") is None:
        cfg.default_hooks = ConfigDict()
    hooks = cfg.default_hooks  # not the one assigned: the config makes a copy
    if "checkpoint" not in hooks:
        hooks["checkpoint"] = ConfigDict(type="CheckpointHook", interval=1)  # as MMEngine's runner would
    lines = []
    for hook in [*hooks.values(), *(cfg.get("custom_hooks") or [])]:
        if not isinstance(hook, dict) or not _is_mmengines(hook.get("type")):
            continue
        if any(hook.get(name) is not None for name in _REMOTE) or "://" in str(hook.get("out_dir")):
            lines.append("Checkpoints go to a remote place by MMEngine's own hook: a crash while saving may cost them.")
            continue
        for name in _REMOTE:
            hook.pop(name, None)
        hook["type"] = _OURS
        lines.append(f"Checkpoints are saved by {_OURS} in place of MMEngine's hook.")
    return " ".join(dict.fromkeys(lines)) or None


def _is_mmengines(kind: Any) -> bool:
    return kind in (MMEngineCheckpointHook, "CheckpointHook")


def use_resumable_loops(cfg: Config) -> str | None:
    """Replace MMEngine's own training loop by ours of the same name, and add the hook that keeps random states.

    ``type='mmengine.EpochBasedTrainLoop'``, with the scope, is left alone: that is how a config says that it wants
    MMEngine's loop. The hook works with our loops only and is not added then.
    """
    loop = cfg.get("train_cfg")
    if not isinstance(loop, dict) or cfg.get("runner_type", "Runner") != "Runner":
        return None
    kind = loop.get("type") or _LOOPS_BY_EPOCH.get(loop.get("by_epoch"))
    ours = _LOOPS.get(kind)
    if ours is None and not _is_resumable(kind):
        return None if kind is None else f"The training loop is {kind}: a resumed training is not bit for bit the same."
    add_hook(cfg, "RandomStateHook")
    if ours is None:
        return None
    loop.pop("by_epoch", None)
    loop["type"] = ours
    return f"The training loop is {ours} in place of MMEngine's, so that resuming is bit for bit."


def _is_resumable(kind: Any) -> bool:
    return kind in _LOOPS.values() or (isinstance(kind, type) and issubclass(kind, ResumableLoop))


def guard_failures(cfg: Config) -> None:
    """Stop at losses and gradients that are not finite, save on signals, know the batch when memory runs out."""
    for name in ("NonFiniteHook", "InterruptHook", "LastBatchHook"):
        add_hook(cfg, name)


_TRAINING: tuple[Callable[[Config], str | None], ...] = (use_our_checkpoint_hook, use_resumable_loops, guard_failures)


def add_hook(cfg: Config, name: str, **arguments: Any) -> None:
    """Add a hook of mmvmamba to ``custom_hooks`` unless the config has one.

    Args:
        cfg: The config, changed in place.
        name: The hook's class. A hook of this name is left as it is, whether given by name, with or without scope, by
            class or built.
        arguments: Its arguments.
    """
    hooks = list(cfg.get("custom_hooks") or [])
    if not any(class_name(hook) == name for hook in hooks):
        cfg.custom_hooks = [*hooks, ConfigDict(type=f"mmvmamba.{name}", **arguments)]
