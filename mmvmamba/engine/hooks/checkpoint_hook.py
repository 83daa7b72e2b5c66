"""Save checkpoints so that none is lost: whole files only, proved by manifests, the old one deleted last."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import io
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import is_main_process, master_only
from mmengine.hooks import CheckpointHook as MMEngineCheckpointHook
from mmengine.hooks import EMAHook
from mmengine.runner import Runner

from mmvmamba.checkpoints import read_checkpoint
from mmvmamba.checkpoints.atomic import remove_leftovers, sync_folder
from mmvmamba.checkpoints.manifest import manifest_path
from mmvmamba.checkpoints.writer import write_checkpoint, write_pointer
from mmvmamba.engine.checkpoint_files import backend_of
from mmvmamba.engine.hooks.prepares_save import PreparesSave, all_or_none
from mmvmamba.engine.plain_form import make_plain, restore
from mmvmamba.errors import ConfigError, nearest_spelling
from mmvmamba.registry import HOOKS

_INTERRUPTION = "interruption_ckpt"  # in the message hub: the checkpoint of save_now, until a regular one follows
_REMOTE = ("backend_args", "file_client_args")


@HOOKS.register_module()
class CheckpointHook(MMEngineCheckpointHook):
    """MMEngine's ``CheckpointHook`` with the same arguments, which loses nothing in a crash.

    - A checkpoint is written under a temporary name, brought onto the disk (fsync) and renamed, and so is its manifest
      (``<name>.json``: sha256, size, iteration, epoch, seed, versions). ``last_checkpoint`` follows, and only then
      the checkpoints that are no more needed are deleted. This holds for the best and the published ones, too.
    - What is stored is in the plain form (``mmvmamba.engine.plain_form``): it loads with ``weights_only=True``.
    - If a checkpoint cannot be written, the training stops with ``SaveError`` on all processes, and what was saved
      before is untouched.
    - Hooks that are ``PreparesSave`` are asked on all processes before each checkpoint.

    Args:
        interval: As for MMEngine's hook, like all ``options``.
        options: The other arguments of MMEngine's hook. ``max_keep_ckpts=1`` is refused: where one file is kept, a
            damage to it is the end of the training. Only local folders are served, so ``backend_args`` and
            ``file_client_args`` are, too.

    Raises:
        ConfigError: If an option is unknown or refused.
    """

    keep_ckpt_ids: deque[int]  # of MMEngine's hook

    def __init__(self, interval: int = -1, **options: Any) -> None:
        _check_options(options)
        super().__init__(interval, **{**options, "backend_args": backend_of(self)})
        self._outdated: list[Path] = []
        self._facts: dict[str, Any] = {}  # of the checkpoint that is being saved, for its manifest
        self._running_iteration: int | None = None
        self._saved_iteration: int | None = None
        self._validating = False

    def before_train(self, runner: Runner) -> None:
        """Prepare the folder; remove what a crashed training left unfinished there."""
        super().before_train(runner)
        if is_main_process():
            folder = Path(self.out_dir)
            folder.mkdir(parents=True, exist_ok=True)
            sync_folder(folder.parent)
            for path in remove_leftovers(folder) + remove_leftovers(Path(runner.work_dir)):
                runner.logger.info(f"Removed {path}, which a training that ended while saving left unfinished.")

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:  # noqa: ARG002
        """Note where the training is."""
        self._running_iteration = runner.iter

    def before_val_epoch(self, runner: Runner) -> None:  # noqa: ARG002
        """Note that a validation runs."""
        self._validating = True

    def after_val_epoch(self, runner: Runner, metrics: Mapping[str, Any]) -> None:
        """Save the checkpoint if it is the best so far."""
        self._validating = False
        super().after_val_epoch(runner, metrics)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Bring the checkpoint into the plain form, and note what its manifest will say.

        Raises:
            SaveError: If it holds an object that has no plain form.
        """
        make_plain(checkpoint)
        meta = checkpoint.get("meta", {})
        self._facts = dict(
            iteration=meta.get("iter"),
            epoch=meta.get("epoch"),
            seed=meta.get("seed"),
            world_size=runner.world_size,
            resumable="optimizer" in checkpoint,
        )

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:  # noqa: ARG002
        """Turn the plain form back into what MMEngine expects."""
        restore(checkpoint)

    def save_now(self, runner: Runner) -> str:
        """Save a checkpoint of the last finished iteration at once, and return its path.

        For a hook that is about to end the training. Call it on every process at the same time, from
        ``after_train_iter`` behind all other hooks (priority LOWEST) or from anything later but ``after_train_epoch``:
        validation included, which it leaves as it was.

        In the middle of an epoch of a training that counts epochs, the file is ``iter_<n>.pth``, and the next regular
        checkpoint replaces it. If the last regular checkpoint is of this very iteration, nothing is written.

        Raises:
            SaveError: If it could not be written; the earlier ones are as they were.
        """
        iteration = runner.iter if self._running_iteration is None else self._running_iteration + 1
        if self._saved_iteration == iteration and self.last_ckpt is not None:
            return str(self.last_ckpt)
        meta = dict(epoch=runner.epoch, iter=iteration)
        with self._outside_validation(runner), self._saving(runner):
            if self.by_epoch:
                self._save_between(runner, f"iter_{iteration}.pth", meta)
            else:
                self._save_checkpoint_with_step(runner, iteration, meta)
        return str(self.last_ckpt)

    def _save_checkpoint(self, runner: Runner) -> None:
        with self._saving(runner):
            super()._save_checkpoint(runner)

    def _save_best_checkpoint(self, runner: Runner, metrics: Mapping[str, Any]) -> None:
        if not self.save_best:
            return
        with self._saving(runner):
            super()._save_best_checkpoint(runner, metrics)
            self._delete_outdated(runner)

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict[str, Any]) -> None:
        """Save a regular checkpoint, and only then delete those that are too many."""
        if self.max_keep_ckpts > 0:
            steps = [*(kept for kept in self.keep_ckpt_ids if kept != step), step]
            too_many, kept = steps[: -self.max_keep_ckpts], steps[-self.max_keep_ckpts :]
            for old in too_many:
                self.discard_file(Path(self.out_dir, self.filename_tmpl.format(old)))
            self.keep_ckpt_ids = deque(kept, self.max_keep_ckpts)
            runner.message_hub.update_info("keep_ckpt_ids", kept)
        interruption = runner.message_hub.get_info(_INTERRUPTION)
        if interruption is not None:
            self.discard_file(Path(interruption))
            runner.message_hub.pop_info(_INTERRUPTION)
        self._save(runner, self.filename_tmpl.format(step), meta)

    def _save_between(self, runner: Runner, name: str, meta: dict[str, Any]) -> None:
        """Save a checkpoint beside the regular ones."""
        earlier = runner.message_hub.get_info(_INTERRUPTION)
        if earlier is not None:
            self.discard_file(Path(earlier))
        runner.message_hub.update_info(_INTERRUPTION, name)
        self._save(runner, name, meta)

    def _save(self, runner: Runner, name: str, meta: dict[str, Any]) -> None:
        self.last_ckpt = self.file_backend.join_path(self.out_dir, name)
        runner.message_hub.update_info("last_ckpt", self.last_ckpt)
        runner.save_checkpoint(
            self.out_dir,
            name,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
        )
        self._saved_iteration = meta["iter"]
        if is_main_process():
            write_pointer(Path(runner.work_dir, "last_checkpoint"), str(self.last_ckpt))
            self._delete_outdated(runner)

    @master_only
    def _publish_model(self, runner: Runner, ckpt_path: str) -> None:
        """Write a copy of a checkpoint that has ``published_keys`` only; eight digits of its sha256 are in its name."""
        content = read_checkpoint(ckpt_path)
        published = {key: value for key, value in content.items() if key in (self.published_keys or ())}
        buffer = io.BytesIO()
        torch.save(published, buffer)
        data = buffer.getvalue()
        path = Path(ckpt_path)
        path = path.with_name(f"{path.stem}-{hashlib.sha256(data).hexdigest()[:8]}.pth")
        write_checkpoint(path, data, source={"file": Path(ckpt_path).name}, prove=True)
        left_out = sorted(set(content) - set(published))
        runner.logger.info(f"Published {ckpt_path} as {path}, without {', '.join(left_out) or 'leaving anything out'}.")

    def write_file(self, path: Path, content: bytes) -> None:
        """Write the checkpoint that is being saved, and its manifest.

        Raises:
            SaveError: If it could not be written.
        """
        write_checkpoint(path, content, **self._facts, prove=True)
        self._outdated = [other for other in self._outdated if other.name != path.name]

    def discard_file(self, path: Path) -> None:
        """Delete a file as soon as the next checkpoint is safe."""
        if is_main_process():
            self._outdated.append(path)

    def _delete_outdated(self, runner: Runner) -> None:
        """Delete what is no more needed: the file, then its manifest."""
        for path in self._outdated:
            # By name in our own folder: a work dir that was copied still knows the paths of the first one.
            own = Path(self.out_dir, path.name)
            try:
                own.unlink(missing_ok=True)
                manifest_path(own).unlink(missing_ok=True)
            except OSError as error:
                runner.logger.warning(f"{own} is no more needed but cannot be deleted ({error}). Delete it by hand.")
        self._outdated.clear()

    @contextlib.contextmanager
    def _outside_validation(self, runner: Runner) -> Iterator[None]:
        """Take the averaged weights, which a validation uses, out of the model and put them back afterwards."""
        averages = [hook for hook in runner.hooks if isinstance(hook, EMAHook)] if self._validating else []
        for hook in averages:
            hook.after_val_epoch(runner)
        try:
            yield
        finally:
            for hook in averages:
                hook.before_val_epoch(runner)

    @contextlib.contextmanager
    def _saving(self, runner: Runner) -> Iterator[None]:
        """Let all processes prepare, and all fail if one does: none waits for another for ever."""
        hooks = [hook for hook in runner.hooks if isinstance(hook, PreparesSave)]
        try:
            with all_or_none("prepare a checkpoint"):
                for hook in hooks:
                    hook.prepare_save(runner)
            with all_or_none("save a checkpoint"):
                yield
        finally:
            for hook in hooks:
                hook.save_is_over(runner)


def _check_options(options: Mapping[str, Any]) -> None:
    known = [name for name in inspect.signature(MMEngineCheckpointHook).parameters if name != "kwargs"]
    for name, value in options.items():
        if name not in known:
            raise ConfigError(
                f"CheckpointHook: {name} is no argument, expected one of {', '.join(known)}."
                f"{nearest_spelling(name, known)}"
            )
        if name in _REMOTE and value is not None:
            raise ConfigError(
                f"CheckpointHook: {name} is {value!r}, expected None: mmvmamba.CheckpointHook writes to local folders "
                "only, where it can promise that nothing is lost. Leave it out, or use MMEngine's hook "
                "(type='mmengine.CheckpointHook')."
            )
    if "://" in str(options.get("out_dir")):
        raise ConfigError(
            f"CheckpointHook: out_dir is {options['out_dir']!r}, expected a local folder. Name one, or use MMEngine's "
            "hook (type='mmengine.CheckpointHook')."
        )
    if options.get("max_keep_ckpts") == 1:
        raise ConfigError(
            "CheckpointHook: max_keep_ckpts is 1, expected at least 2 (or -1 for all): where one file is kept, "
            "a damage to it is the end of the training. Set max_keep_ckpts=2."
        )
