"""Stop a training whose ``init_cfg=dict(type='Pretrained')`` did not really load."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmengine.runner.checkpoint import _load_checkpoint
from torch import Tensor, nn

from mmvmamba.errors import CheckpointMismatch
from mmvmamba.registry import HOOKS


@HOOKS.register_module()
class PretrainedCheckHook(Hook):
    """Compare every module that has a ``Pretrained`` init_cfg with its checkpoint before the first iteration.

    MMEngine loads such a checkpoint with ``strict=False``: names that do not match are one line in the log, and the
    training starts from random weights. This hook raises instead. A resumed training, or one with ``load_from``, has
    other weights on purpose and is not checked.

    Args:
        allow_missing: Beginnings of parameter names that the checkpoint may lack. A classifier has no output norms
            of the earlier stages, hence the default.
    """

    priority = "VERY_HIGH"

    def __init__(self, allow_missing: Sequence[str] = ("outnorm",)) -> None:
        if isinstance(allow_missing, str):
            raise TypeError(f"allow_missing is the string {allow_missing!r}, expected a sequence: ({allow_missing!r},)")
        self.allow_missing = tuple(allow_missing)

    def before_train(self, runner: Runner) -> None:
        """Check all modules of the model.

        Raises:
            CheckpointMismatch: a tensor is absent, has another shape or another value than in the checkpoint, or the
                checkpoint has one with the same prefix that the module lacks.
        """
        if runner._resume or runner._load_from:
            return
        for name, module in runner.model.named_modules():
            init_cfg = getattr(module, "init_cfg", None)
            if isinstance(init_cfg, dict) and init_cfg.get("type") == "Pretrained":
                runner.logger.info(self._check(name or "model", module, init_cfg))

    def _check(self, name: str, module: nn.Module, init_cfg: dict) -> str:
        path, prefix = init_cfg["checkpoint"], init_cfg.get("prefix")
        stored = checkpoint_tensors(path, prefix)
        problems: list[str] = []
        fresh: list[str] = []
        loaded = 0
        own = module.state_dict()
        for key, tensor in own.items():
            if key not in stored:
                (fresh if key.startswith(self.allow_missing) else problems).append(f"{key} is not in the checkpoint")
            elif stored[key].shape != tensor.shape:
                problems.append(f"{key} is {tuple(stored[key].shape)} there, {tuple(tensor.shape)} here")
            elif not torch.equal(stored[key].to(tensor), tensor):
                problems.append(f"{key} differs from the checkpoint")
            else:
                loaded += 1
        if prefix:
            problems += [f"{key} is not in the model" for key in stored if key not in own]
        if problems:
            listed = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
            raise CheckpointMismatch(
                f"{name} was to start from {path} (prefix {prefix!r}), but {len(problems)} tensors do not "
                f"match: {listed}. Train the checkpoint with the same arch, or correct init_cfg"
            )
        return f"{name}: {loaded} tensors loaded from {path}, {len(fresh)} start fresh"


def checkpoint_tensors(path: str, prefix: str | None) -> dict[str, Tensor]:
    """The tensors of a checkpoint under ``prefix`` (a module name, with or without the dot), without that prefix."""
    content = _load_checkpoint(path, map_location="cpu")
    state = content.get("state_dict", content.get("model", content))
    if not prefix:
        return dict(state)
    start = prefix if prefix.endswith(".") else f"{prefix}."
    return {key[len(start) :]: value for key, value in state.items() if key.startswith(start)}
