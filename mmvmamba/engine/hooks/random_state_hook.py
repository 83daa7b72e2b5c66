"""Keep the random state, the place in the data and accumulated gradients in checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from mmengine import dist
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapperDict
from mmengine.runner import Runner
from torch import Tensor, nn

from mmvmamba.engine.data_order import DataPosition
from mmvmamba.engine.hooks.prepares_save import PreparesSave
from mmvmamba.engine.loops import ResumableLoop
from mmvmamba.engine.random_state import RandomState, from_tensors, put_random_state, take_random_state, to_tensors
from mmvmamba.errors import CheckpointError, ConfigError
from mmvmamba.registry import HOOKS

#: Section of a checkpoint that is ours.
SECTION = "mmvmamba"
#: Attribute of DistributedDataParallel: whether the next forward pass begins with the buffers of the first rank. It
#: does not after an iteration that only accumulated.
_SYNCHRONISES = "require_forward_param_sync"


@HOOKS.register_module()
class RandomStateHook(Hook, PreparesSave):
    """Make a resumed training draw the random numbers that the interrupted one would have drawn.

    The generators of Python, NumPy and PyTorch (CPU and the current CUDA device) are noted at the end of every
    iteration and put back at the beginning of the next, so what happens in between (validation, starting workers,
    logging, saving) leaves no trace in the training. Every rank's state is in each checkpoint, and besides:

    - the place in the data, which ``mmvmamba.EpochBasedTrainLoop`` and ``mmvmamba.IterBasedTrainLoop`` keep;
    - the gradients, where several iterations share an optimizer step and the checkpoint falls between them. MMEngine
      loses them;
    - the buffers, such as running means of batch norm, that each rank has for itself. MMEngine stores those of the
      first rank only, which shows in a validation after resuming, and where several iterations share a step.

    All of it is in ``checkpoint["mmvmamba"]`` as tensors, lists, dicts and numbers.

    MMEngine calls the part of a hook that saves on the first rank only. With several ranks the checkpoints must
    therefore be written by ``mmvmamba.CheckpointHook``, which lets all ranks hand in their states before.
    """

    priority = "HIGHEST"  # noted before other hooks draw, put back before others do

    def __init__(self) -> None:
        self._state: RandomState | None = None
        self._gradients: dict[str, Tensor] = {}
        self._buffers: dict[str, Tensor] = {}
        self._synchronises: bool | None = None
        self._prepared: dict[str, Any] | None = None

    def before_train(self, runner: Runner) -> None:
        """Put accumulated gradients back; note the state, so that starting the DataLoader leaves no trace."""
        model = _unwrapped(runner.model)
        parameters = _found(self._gradients, dict(model.named_parameters()), "accumulated gradient")
        for name, gradient in self._gradients.items():
            parameters[name].grad = gradient.to(parameters[name])
        if self._gradients:
            runner.logger.info(f"{len(self._gradients)} accumulated gradients are restored: none is lost")
        buffers = _found(self._buffers, dict(model.named_buffers()), "buffer")
        for name, value in self._buffers.items():
            buffers[name].copy_(value)
        if self._synchronises is not None and hasattr(runner.model, _SYNCHRONISES):
            setattr(runner.model, _SYNCHRONISES, self._synchronises)
        self._gradients, self._buffers, self._synchronises = {}, {}, None
        if self._state is None:
            self._state = take_random_state(with_cuda=True)
        # Also for a validation that comes before the next iteration.
        put_random_state(self._state)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:  # noqa: ARG002 (MMEngine's signature)
        """Go on where the last iteration ended."""
        if self._state is not None:
            put_random_state(self._state)

    def after_train_iter(
        self,
        runner: Runner,  # noqa: ARG002 (MMEngine's signature)
        batch_idx: int,  # noqa: ARG002 (MMEngine's signature)
        data_batch: Any = None,  # noqa: ARG002 (MMEngine's signature)
        outputs: Any = None,  # noqa: ARG002 (MMEngine's signature)
    ) -> None:
        """Note the state."""
        self._state = take_random_state(with_cuda=True)

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:  # noqa: ARG002 (MMEngine's signature)
        """Note that the validation is done, before others save a checkpoint with its results."""
        if isinstance(runner._train_loop, ResumableLoop):
            runner._train_loop.note_validation()

    def prepare_save(self, runner: Runner) -> None:
        """Gather the states of all ranks on the first."""
        state = self._state if self._state is not None else take_random_state(with_cuda=True)
        section: dict[str, Any] = {
            "random_states": {name: _gather(tensor) for name, tensor in to_tensors(state).items()},
        }
        gradients = _gather_gradients(runner)
        if gradients:
            section["gradients"] = gradients
        if dist.get_world_size() > 1:
            section["buffers"] = _gather_buffers(_unwrapped(runner.model))
            if hasattr(runner.model, _SYNCHRONISES):
                section["synchronises_buffers"] = bool(getattr(runner.model, _SYNCHRONISES))
        self._prepared = section

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Store what was gathered.

        Raises:
            ConfigError: If there are several ranks and they were not asked for their states.
        """
        if self._prepared is None:
            if dist.get_world_size() > 1:
                raise ConfigError(
                    "default_hooks.checkpoint is one that saves without asking all ranks for their random states, "
                    "expected type='mmvmamba.CheckpointHook'. Use that, or remove RandomStateHook from custom_hooks."
                )
            self.prepare_save(runner)
        section = checkpoint.setdefault(SECTION, {})
        section.update(self._prepared)
        self._prepared = None
        if isinstance(runner._train_loop, ResumableLoop):
            section["data_position"] = runner._train_loop.position_to_store()

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Take the state of this rank from the checkpoint a training is resumed from."""
        if not runner._resume:
            return
        section = checkpoint.get(SECTION, {})
        states = section.get("random_states")
        if states is None:
            runner.logger.warning(
                "the checkpoint has no random state, as mmvmamba.RandomStateHook would have stored it: the training "
                "goes on with other random numbers than it would have without the interruption"
            )
            return
        ranks = len(next(iter(states.values())))
        loop = runner._train_loop
        if isinstance(loop, ResumableLoop) and "data_position" in section:
            loop.resume_at(_position_from(section["data_position"]), ranks)
        if ranks != dist.get_world_size():
            runner.logger.warning(
                f"the checkpoint was written by {ranks} processes, this training has {dist.get_world_size()}: the "
                "batches, the order of the data and all random numbers differ from those of the interrupted training"
            )
            return
        rank = dist.get_rank()
        self._state = from_tensors({name: tensor[rank] for name, tensor in states.items()})
        self._gradients = dict(section["gradients"][rank]) if "gradients" in section else {}
        self._buffers = dict(section["buffers"][rank]) if "buffers" in section else {}
        self._synchronises = section.get("synchronises_buffers")


def _position_from(stored: dict[str, Any]) -> DataPosition:
    try:
        return DataPosition(**stored)
    except TypeError as error:
        raise CheckpointError(
            f"the checkpoint's data_position has the entries {sorted(stored)}, expected those of DataPosition "
            f"({error}). Resume with the release of mmvmamba that wrote it."
        ) from error


def _unwrapped(model: nn.Module) -> nn.Module:
    inner: Any = model.module if is_model_wrapper(model) else model
    return cast("nn.Module", inner)


def _gather(tensor: Tensor) -> Tensor:
    """Return the tensors of all ranks, stacked, on the CPU."""
    return torch.stack([part.cpu() for part in dist.all_gather(tensor)])


def _gather_gradients(runner: Runner) -> list[dict[str, Tensor]]:
    """Return the gradients that wait for an optimizer step, by name, one dict per rank; an empty list if none do."""
    names = _waiting_parameters(runner)
    if not names:
        return []
    parameters = dict(_unwrapped(runner.model).named_parameters())
    present = _gather(torch.tensor([parameters[name].grad is not None for name in names], dtype=torch.uint8))
    gathered: list[dict[str, Tensor]] = [{} for _ in range(len(present))]
    for column, name in enumerate(names):
        gradient = parameters[name].grad
        parts = _all_parts(torch.zeros_like(parameters[name]) if gradient is None else gradient)
        for rank, part in enumerate(parts):
            if present[rank, column]:
                gathered[rank][name] = part
    return gathered


def _gather_buffers(model: nn.Module) -> list[dict[str, Tensor]]:
    """Return what differs from the first rank's buffers, by name, one dict per rank."""
    gathered: list[dict[str, Tensor]] = [{} for _ in range(dist.get_world_size())]
    for name, buffer in model.named_buffers():
        first, *others = _all_parts(buffer)
        for rank, part in enumerate(others, start=1):
            if not torch.equal(part, first):
                gathered[rank][name] = part
    return gathered


def _found(stored: Mapping[str, Tensor], own: Mapping[str, Tensor], what: str) -> Mapping[str, Tensor]:
    for name, tensor in stored.items():
        if name not in own or own[name].shape != tensor.shape:
            raise CheckpointError(
                f"the checkpoint has a {what} {name!r} of shape {tuple(tensor.shape)}, expected one of the model's. "
                "Resume with the config that the checkpoint was written with."
            )
    return own


def _all_parts(tensor: Tensor) -> Sequence[Tensor]:
    # A copy: the first rank alone would otherwise store the gradient itself, and a save need not be over at once.
    return [part.detach().cpu().clone() for part in dist.all_gather(tensor)]


def _waiting_parameters(runner: Runner) -> list[str]:
    wrapper = runner.optim_wrapper
    wrappers = wrapper.values() if isinstance(wrapper, OptimWrapperDict) else [wrapper]
    waiting = {id(parameter) for one in wrappers if not one.should_update() for parameter in _parameters_of(one)}
    return [name for name, parameter in _unwrapped(runner.model).named_parameters() if id(parameter) in waiting]


def _parameters_of(wrapper: Any) -> Iterator[nn.Parameter]:
    for group in wrapper.optimizer.param_groups:
        yield from group["params"]
