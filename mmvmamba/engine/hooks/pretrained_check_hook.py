"""Stop a training whose ``init_cfg=dict(type='Pretrained')`` did not really load."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor, nn

from mmvmamba.errors import CheckpointMismatch
from mmvmamba.models.backbones.base import BaseBackbone
from mmvmamba.models.pretrained import read_weights, split_init_cfg
from mmvmamba.registry import HOOKS


@HOOKS.register_module()
class PretrainedCheckHook(Hook):
    """Compare every module that has a ``Pretrained`` init_cfg with its checkpoint before the first iteration.

    MMEngine loads such a checkpoint with ``strict=False``: names that do not match are one line in the log, and the
    training starts from random weights. This hook raises instead. Our own backbones load strictly by themselves;
    for them it confirms that nothing has overwritten the weights since. A resumed training, or one with
    ``load_from``, has other weights on purpose and is not checked.

    Args:
        allow_missing: Beginnings of parameter names that the checkpoint may lack; if it lacks one of them, none is
            taken from it. A classifier has no output norms of the earlier stages, hence the default.
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
            pretrained, _ = split_init_cfg(getattr(module, "init_cfg", None))
            for entry in pretrained:
                runner.logger.info(self._check(name or "model", module, entry["checkpoint"], entry.get("prefix")))

    def _check(self, name: str, module: nn.Module, path: str, prefix: str | None) -> str:
        stored = (
            module.read_pretrained(path, prefix) if isinstance(module, BaseBackbone) else read_weights(path, prefix)
        )
        problems: list[str] = []
        own = module.state_dict()
        optional = [key for key in own if key.startswith(self.allow_missing)]
        fresh = [] if all(key in stored for key in optional) else optional
        loaded = 0
        for key, tensor in own.items():
            if key in fresh:
                continue
            if key not in stored:
                problems.append(f"{key} is not in the checkpoint")
            elif (value := _as_linear(stored[key], tensor)).shape != tensor.shape:
                problems.append(f"{key} is {tuple(value.shape)} there, {tuple(tensor.shape)} here")
            elif not torch.equal(value.to(tensor), tensor):
                problems.append(f"{key} differs from the checkpoint")
            else:
                loaded += 1
        if prefix:
            unused = [key for key in stored if key not in own and not key.startswith(self.allow_missing)]
            problems += [f"{key} is not in the model" for key in unused]
        if problems:
            listed = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
            raise CheckpointMismatch(
                f"{name} was to start from {path} (prefix {prefix!r}), but {len(problems)} tensors do not "
                f"match: {listed}. Train the checkpoint with the same arch, or correct init_cfg"
            )
        return f"{name}: {loaded} tensors loaded from {path}, {len(fresh)} start fresh"


def _as_linear(stored: Tensor, own: Tensor) -> Tensor:
    """Return the weight of a 1x1 convolution as that of the linear map it is loaded into."""
    return stored.flatten(1) if stored.ndim == 4 and own.ndim == 2 and stored.shape[2:] == (1, 1) else stored
