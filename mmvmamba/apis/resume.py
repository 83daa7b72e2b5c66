"""Where a training starts: from the beginning in an empty work dir, or from a checkpoint that is proved whole."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any, NamedTuple

from mmengine.config import Config

from mmvmamba.checkpoints.manifest import read_manifest
from mmvmamba.checkpoints.resume import TrainingState, newest_complete, training_state
from mmvmamba.checkpoints.writer import program_versions
from mmvmamba.errors import CheckpointError, ConfigError

#: Values of ``--resume`` that name no file.
AUTO, AUTO_OR_START = "auto", "auto-or-start"
_NAMES = ("epoch_{}.pth", "iter_{}.pth", "best_{}.pth")
_SHOWN = 5


class Note(NamedTuple):
    """A line for the log, and its level there."""

    text: str
    level: int = logging.INFO


def choose_start(cfg: Config, resume: str | None) -> list[Note]:
    """Decide from what a training starts and write it into ``cfg``; return lines for the log.

    Args:
        cfg: From ``load_config``.
        resume: A checkpoint file; ``"auto"`` for the newest complete one of the work dir; ``"auto-or-start"`` likewise,
            but an empty work dir is no error; None for a training from the beginning (or what ``resume`` and
            ``load_from`` of the config itself say).

    Raises:
        CheckpointError: If there is nothing to go on from, the given file is not whole or older than one in the work
            dir, or a training from the beginning would overwrite checkpoints.
        ConfigError: If the config has another seed than the checkpoint.
    """
    if resume is None and cfg.get("resume"):
        resume = cfg.get("load_from") or AUTO
    if cfg.get("runner_type", "Runner") != "Runner":
        return _leave_to_the_runner(cfg, resume)
    folder = checkpoint_folder(cfg)
    if resume is None or (resume == AUTO_OR_START and not checkpoints_in(folder, cfg)):
        _refuse_to_overwrite(folder, cfg)
        return []
    passed_over: list[Note] = []
    if resume in (AUTO, AUTO_OR_START):
        path, passed_over = _newest(folder)
        state = training_state(path)
    else:
        path = Path(resume)
        state = training_state(path)
        _refuse_to_overwrite_newer(folder, path, state)
    _take_seed(cfg, path, state)
    cfg.resume = True
    cfg.load_from = str(path)
    where = f"{state.iteration} iterations, {state.epoch} epochs finished"
    return [
        *passed_over,
        Note(f"Resuming from {path} ({where}).", logging.WARNING if passed_over else logging.INFO),
        *_nothing_left(cfg, state),
        *_changed_versions(state),
    ]


def _leave_to_the_runner(cfg: Config, resume: str | None) -> list[Note]:
    """Pass the choice on: other runners have checkpoints of their own, such as the folders of DeepSpeed."""
    if resume is None:
        return []
    cfg.resume = True
    if resume in (AUTO, AUTO_OR_START):
        cfg.load_from = None  # the runner looks for last_checkpoint, and starts from the beginning if there is none
        text = f"Resuming is left to {cfg.runner_type}: it takes what last_checkpoint names, which is not verified."
        return [Note(text, logging.WARNING)]
    cfg.load_from = resume
    return [Note(f"Resuming from {resume}, which is left to {cfg.runner_type} and not verified.", logging.WARNING)]


def checkpoint_folder(cfg: Config) -> Path:
    """Return the folder that the checkpoint hook of a config saves to: the work dir, or a folder in its ``out_dir``."""
    hook = (cfg.get("default_hooks") or {}).get("checkpoint") or {}
    out_dir = hook.get("out_dir")
    if out_dir is None or out_dir == cfg.work_dir:
        return Path(cfg.work_dir)
    return Path(out_dir, Path(cfg.work_dir).name)


def checkpoints_in(folder: Path, cfg: Config) -> list[Path]:
    """Return the files of a folder that a training of this config might overwrite or delete."""
    hook = (cfg.get("default_hooks") or {}).get("checkpoint") or {}
    templates = [*_NAMES, hook.get("filename_tmpl") or _NAMES[0]]
    patterns = [".*".join(re.escape(part) for part in template.split("{}")) for template in templates]
    named = re.compile("|".join(patterns))
    return [
        path for path in sorted(folder.glob("*")) if path.is_file() and (named.fullmatch(path.name) or _is_ours(path))
    ]


def _is_ours(path: Path) -> bool:
    try:
        manifest = read_manifest(path)
    except CheckpointError:
        return False
    return manifest is not None and manifest.iteration is not None


def _refuse_to_overwrite(folder: Path, cfg: Config) -> None:
    found = checkpoints_in(folder, cfg)
    if found:
        names = ", ".join(path.name for path in found[:_SHOWN]) + (", ..." if len(found) > _SHOWN else "")
        raise CheckpointError(
            f"work dir {str(folder)!r} holds {len(found)} checkpoints ({names}), expected none: a training from the "
            "beginning would overwrite them. Go on from them with --resume, or name another folder with --work-dir."
        )


def _newest(folder: Path) -> tuple[Path, list[Note]]:
    path, passed_over = newest_complete(folder)
    if path is not None:
        return path, [Note(f"Passed over {old.name}: {why}", logging.WARNING) for old, why in passed_over]
    if passed_over:
        raise CheckpointError(
            f"--resume: a training can go on from none of the {len(passed_over)} checkpoints in {str(folder)!r}, "
            "expected one that is whole. Put one back from a copy, or start again in another folder (--work-dir). What "
            "is wrong with each:" + "".join(f"\n  {old.name}: {why}" for old, why in passed_over)
        )
    raise CheckpointError(
        f"--resume: found no checkpoint in {str(folder)!r}, expected one to go on from. Give its path, drop "
        f"--resume to start from the beginning, or use --resume {AUTO_OR_START}."
    )


def _nothing_left(cfg: Config, state: TrainingState) -> list[Note]:
    loop = cfg.get("train_cfg") or {}
    for limit, done in (("max_iters", state.iteration), ("max_epochs", state.epoch)):
        if isinstance(loop.get(limit), int) and done >= loop[limit]:
            text = f"It has finished: train_cfg.{limit} is {loop[limit]}. To train on, set a higher one."
            return [Note(text, logging.WARNING)]
    return []


def _refuse_to_overwrite_newer(folder: Path, path: Path, state: TrainingState) -> None:
    newest = newest_complete(folder).path
    if newest is None or newest.resolve() == path.resolve():
        return
    found = training_state(newest)
    if (found.iteration, found.epoch) > (state.iteration, state.epoch):
        raise CheckpointError(
            f"--resume: {str(path)!r} has {state.iteration} iterations, but the work dir {str(folder)!r} holds "
            f"{newest.name} with {found.iteration}, expected none that is newer: it would be overwritten, or taken by "
            "the next --resume. Name another folder with --work-dir, or move the newer ones away."
        )


def _take_seed(cfg: Config, path: Path, state: TrainingState) -> None:
    """Give the runner the checkpoint's seed from the start: it makes the sampler before it reads the checkpoint."""
    wanted: Any = (cfg.get("randomness") or {}).get("seed")
    if state.seed is None or wanted == state.seed:
        return
    if wanted is not None:
        raise ConfigError(
            f"randomness.seed is {wanted}, expected {state.seed}, with which {str(path)!r} was trained: another seed "
            "would change the order of the data in mid-training. Remove it from the config, or start a new training "
            "from the weights alone (load_from)."
        )
    cfg.merge_from_dict({"randomness.seed": state.seed})


def _changed_versions(state: TrainingState) -> list[Note]:
    now = program_versions()
    changed = [f"{name} {then} -> {now.get(name)}" for name, then in state.versions.items() if now.get(name) != then]
    if not changed:
        return []
    text = f"Other versions than before ({', '.join(changed)}): the training goes on, but not bit for bit the same."
    return [Note(text, logging.WARNING)]
