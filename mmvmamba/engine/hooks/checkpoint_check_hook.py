"""Refuse a checkpoint that does not fit before MMEngine loads the part of it that does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.hooks import EMAHook, Hook
from mmengine.optim import BaseOptimWrapper, OptimWrapperDict
from mmengine.registry import MODELS
from mmengine.runner import Runner
from torch import Tensor, nn

from mmvmamba.checkpoints.matching import check, check_entries, filled, is_sharded, renamed
from mmvmamba.checkpoints.official import adapt, recognise
from mmvmamba.errors import CheckpointMismatch
from mmvmamba.models.pretrained import innermost
from mmvmamba.registry import HOOKS

#: What a training needs to go on, beside its weights.
_STATE_OF_A_TRAINING = ("meta", "message_hub", "optimizer")
#: What an average has beside weights.
_COUNTERS = ("steps",)


@HOOKS.register_module()
class CheckpointCheckHook(Hook):
    """Check what ``load_from``, a resume or a test loads against the whole model, and report the share in one line.

    MMEngine loads with ``strict`` off: what does not fit is a warning in the log, and the run goes on from random
    weights. This hook sees the checkpoint first. If it does not fit, nothing of it is loaded.

    Args:
        allow_missing: Names of parameters, or their beginnings in whole dotted parts (``"roi_head.bbox_head.fc_cls"``),
            that ``load_from`` may lack or have in another shape, such as the head for another number of classes. What
            one entry covers is taken whole or starts anew whole. A resume needs everything.

    Raises:
        ConfigError: If ``allow_missing`` is no sequence of names.
    """

    # Before EMAHook, which copies the weights it is given.
    priority = "VERY_HIGH"

    def __init__(self, allow_missing: Sequence[str] = ()) -> None:
        self.allow_missing = check_entries(allow_missing)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Check ``checkpoint`` and leave in it what shall be loaded, under the names of the model.

        Raises:
            ConfigError: If an entry of ``allow_missing`` is the beginning of no name.
            CheckpointMismatch: If a tensor is missing, unexpected, of another shape or dtype, or not finite; on a
                resume also if the checkpoint is not that of a training like this one.
        """
        source, sharded = repr(str(runner._load_from or "given to the runner")), is_sharded(runner.model)
        model = _whole_twin(runner) if sharded else innermost(runner.model)
        stored = adapt(_without_wrapper(checkpoint.get("state_dict", checkpoint), source), source)
        if runner._resume:
            _check_state_of_training(runner, checkpoint, source)
            _check_optimizers(runner, checkpoint["optimizer"], source)
            match = check(
                model, stored, source=source, advice="Resume with the config that the training was started with."
            )
            if "ema_state_dict" in checkpoint:
                averaged = _check_average(model, checkpoint["ema_state_dict"], source)
                checkpoint["ema_state_dict"] = averaged
        else:
            match = check(model, stored, allow_missing=self.allow_missing, source=source, advice=_advice(stored, model))
        if "state_dict" not in checkpoint:
            checkpoint.clear()
        # With the model's own values for what may be missing: MMEngine then has nothing to warn of. FSDP leaves them as
        # they are, and no process has all of them.
        checkpoint["state_dict"] = dict(match.taken) if sharded else filled(model, match)
        runner.logger.info(match.line())


def _whole_twin(runner: Runner) -> nn.Module:
    """Return the model of a sharded training as it is without FSDP, without values: its own tensors are but shares."""
    with torch.device("meta"):
        return MODELS.build(runner.cfg.model)


def _without_wrapper(state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Return the entries without the prefix of a distributed model, as MMEngine will load them."""
    return renamed(state, lambda name: name.removeprefix("module."), source)


def _check_state_of_training(runner: Runner, checkpoint: Mapping[str, Any], source: str) -> None:
    wanted = [*_STATE_OF_A_TRAINING, *(["param_schedulers"] if runner.param_schedulers else [])]
    missing = [name for name in wanted if name not in checkpoint]
    if missing:
        raise CheckpointMismatch(
            f"checkpoint {source} has no {', '.join(missing)}, expected the state of a training to resume. To start a "
            "training from its weights, use load_from without --resume."
        )
    averages = any(isinstance(hook, EMAHook) for hook in runner.hooks)
    if "ema_state_dict" in checkpoint and not averages:
        raise CheckpointMismatch(
            f"checkpoint {source} is of a training with averaged weights (EMA), expected one without: its state_dict "
            "holds the average, not the weights to go on from. Put its EMAHook into custom_hooks."
        )
    if averages and "ema_state_dict" not in checkpoint:
        raise CheckpointMismatch(
            f"checkpoint {source} has no ema_state_dict, expected the averaged weights of the EMAHook in the config: "
            "an average begun anew would be another training. Remove the EMAHook, or start from these weights with "
            "load_from."
        )


def _check_optimizers(runner: Runner, stored: Any, source: str) -> None:
    """Raise unless the stored state is of optimizers as the runner has them; those not built yet are not asked."""
    wrapper = runner.optim_wrapper
    if isinstance(wrapper, OptimWrapperDict):
        own = dict(wrapper.items())
        if not isinstance(stored, Mapping) or own.keys() - stored.keys():
            raise CheckpointMismatch(
                f"checkpoint {source} has the state of the optimizers {_listed(stored)}, expected {_listed(own)}. "
                "Resume with the config that the training was started with."
            )
        for name, part in own.items():
            _check_optimizer(part.optimizer, stored[name], f"{source} (optimizer {name!r})")
    elif isinstance(wrapper, BaseOptimWrapper):
        _check_optimizer(wrapper.optimizer, stored, source)


def _check_optimizer(optimizer: torch.optim.Optimizer, stored: Any, source: str) -> None:
    """PyTorch compares the numbers of parameters only; settings that are absent end in a ``KeyError`` of a step."""
    groups = stored.get("param_groups") if isinstance(stored, Mapping) else None
    own = optimizer.param_groups
    name = type(optimizer).__name__
    if not isinstance(groups, Sequence) or not all(isinstance(group, Mapping) for group in groups):
        problem = f"{_listed(stored)}, expected a state and param_groups"
    elif [len(group.get("params", ())) for group in groups] != [len(group["params"]) for group in own]:
        problem = (
            f"{len(groups)} groups of {sum(len(group.get('params', ())) for group in groups)} parameters, expected "
            f"{len(own)} of {sum(len(group['params']) for group in own)}"
        )
    else:
        # Switches came with later releases of PyTorch, which fills them in by itself.
        wanted = [key for key, value in optimizer.defaults.items() if not isinstance(value, (bool, type(None)))]
        missing = sorted({key for group in groups for key in wanted if key not in group})
        if not missing:
            return
        problem = f"{_listed(groups[0])}, expected {', '.join(missing)} as well"
    raise CheckpointMismatch(
        f"checkpoint {source} does not fit the optimizer {name}: found {problem}. Resume with the config that the "
        "training was started with, or start from its weights with load_from."
    )


def _listed(entries: Any) -> str:
    return ", ".join(map(str, entries)) if isinstance(entries, Mapping) else f"a {type(entries).__name__}"


def _check_average(model: nn.Module, average: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the averaged weights under the names of the model, all checked."""
    source = f"{source} (ema_state_dict)"
    weights = renamed(average, lambda name: None if name in _COUNTERS else name.removeprefix("module."), source)
    match = check(
        model,
        weights,
        source=source,
        advice="Resume with the config the training was started with.",
    )
    averaged: dict[str, Any] = renamed(filled(model, match), lambda name: f"module.{name}", source)
    averaged.update((name, average[name]) for name in _COUNTERS if name in average)
    return averaged


def _advice(stored: Mapping[str, Tensor], model: nn.Module) -> str:
    found, wanted = recognise(stored), recognise(model.state_dict())
    if found and wanted and found.form in ("classifier", "backbone") and wanted.form != found.form:
        return (
            "Weights of a backbone alone belong into model.backbone.init_cfg=dict(type='Pretrained', checkpoint=...), "
            "not into load_from."
        )
    return (
        "Give the config the checkpoint was trained with; heads that shall start anew are named in "
        "custom_hooks=[dict(type='mmvmamba.CheckpointCheckHook', allow_missing=[...])]."
    )
