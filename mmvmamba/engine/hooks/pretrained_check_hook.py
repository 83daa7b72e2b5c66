"""Stop a training whose ``init_cfg=dict(type='Pretrained')`` did not really load."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import CheckpointLoader, Runner
from torch import Tensor, nn

from mmvmamba.checkpoints.matching import Match, check, check_entries, covers, differing
from mmvmamba.errors import CheckpointMismatch
from mmvmamba.models.backbones.base import BaseBackbone
from mmvmamba.models.pretrained import cut, split_init_cfg
from mmvmamba.registry import HOOKS

_NAMES_SHOWN = 10


@HOOKS.register_module()
class PretrainedCheckHook(Hook):
    """Compare every module that has a ``Pretrained`` init_cfg with its checkpoint before the first iteration.

    MMEngine loads such a checkpoint with ``strict`` off: names that do not match are one line in the log, and the
    training starts from random weights. This hook raises instead. Our own backbones load strictly by themselves;
    for them it confirms that nothing has overwritten the weights since. A resumed training, or one with
    ``load_from``, has other weights on purpose and is not checked here (``CheckpointCheckHook`` does that).

    Args:
        allow_missing: Names of a module's parameters, or their beginnings in whole dotted parts, that need not be in
            the checkpoint; if it lacks one that an entry covers, none of them is taken from it. A classifier has no
            output norms of the earlier stages, hence the default.

    Raises:
        ConfigError: If ``allow_missing`` is no sequence of names.
    """

    priority = "VERY_HIGH"

    def __init__(self, allow_missing: Sequence[str] = ("outnorm*",)) -> None:
        self.allow_missing = check_entries(allow_missing)

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
                runner.logger.info(self._check(name or "model", module, **entry).line())

    def _check(
        self, name: str, module: nn.Module, checkpoint: str, prefix: str | None = None, map_location: Any = "cpu"
    ) -> Match:
        what = f"{name} ({type(module).__name__})"
        if isinstance(module, BaseBackbone):
            match = module.read_pretrained(checkpoint, prefix, map_location)
            unnamed = [key for key in match.skipped if not any(covers(entry, key) for entry in self.allow_missing)]
            if unnamed:
                raise CheckpointMismatch(
                    f"checkpoint {match.source} does not fit {what}: {len(unnamed)} of {match.total} entries missing "
                    f"{unnamed[:_NAMES_SHOWN]}. Name in PretrainedCheckHook's allow_missing what may start anew."
                )
        else:
            match = self._check_other(what, module, checkpoint, prefix, map_location)
        changed = differing(module, match)
        if changed:
            raise CheckpointMismatch(
                f"{what} was to start from {match.source}, but {len(changed)} of {match.total} tensors differ from the "
                f"checkpoint: {changed[:_NAMES_SHOWN]}. Something loaded or initialised them afterwards, or "
                "init_weights was never called: correct init_cfg."
            )
        return match

    def _check_other(
        self, what: str, module: nn.Module, checkpoint: str, prefix: str | None, map_location: Any
    ) -> Match:
        """Check a module that is none of ours, and that MMEngine has loaded."""
        content = CheckpointLoader.load_checkpoint(checkpoint, map_location)
        state: dict[str, Tensor] = {
            k: v for k, v in content.get("state_dict", content).items() if isinstance(v, Tensor)
        }
        own: Mapping[str, Tensor] = module.state_dict()
        if prefix:
            state = cut(state, prefix, checkpoint)
        # Without a prefix, a whole network is often given to its backbone: only what the backbone has is meant.
        taken = state if prefix else {key: value for key, value in state.items() if key in own}
        names = {*own, *taken}
        match = check(
            module,
            taken,
            allow_missing=[entry for entry in self.allow_missing if any(covers(entry, name) for name in names)],
            what=what,
            source=f"{checkpoint!r} (prefix={prefix!r})",
            advice="Train the checkpoint with the same arch, or correct init_cfg.",
        )
        return dataclasses.replace(match, unused=(*match.unused, *(key for key in state if key not in taken)))
