"""Keep the random state, the place in the data and accumulated gradients in checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from mmengine import dist
from mmengine.hooks import CheckpointHook as MMEngineCheckpointHook
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapperDict
from mmengine.runner import Runner
from torch import Tensor, nn

from mmvmamba.engine.data_order import DataPosition
from mmvmamba.engine.hooks.checkpoint_hook import CheckpointHook
from mmvmamba.engine.hooks.prepares_save import PreparesSave, all_or_none
from mmvmamba.engine.loops import ResumableLoop
from mmvmamba.engine.random_state import (
    RandomState,
    from_tensors,
    mix_seed,
    put_random_state,
    seed_generators,
    take_random_state,
    to_tensors,
)
from mmvmamba.errors import CheckpointError
from mmvmamba.registry import HOOKS

#: Section of a checkpoint that is ours.
SECTION = "mmvmamba"
#: Attribute of DistributedDataParallel: whether the next forward pass begins with the buffers of the first rank. It
#: does not after an iteration that only accumulated.
_SYNCHRONISES = "require_forward_param_sync"

#: Last number of the seed of what is drawn outside of iterations: when that is.
_AFTER_ITERATION, _EPOCH, _VALIDATION = 2, 3, 4


@HOOKS.register_module()
class RandomStateHook(Hook, PreparesSave):
    """Make a resumed training draw the random numbers that the interrupted one would have drawn.

    The generators of Python, NumPy and PyTorch (CPU and the current CUDA device) are noted at the end of every
    iteration and put back at the beginning of the next, so what happens in between (validation, starting workers,
    logging, saving) leaves no trace in the training. What is drawn in between, by other hooks for example, follows
    from the seed, the rank and the iteration: other numbers every time, and the same ones after resuming. Every rank's
    state is in each checkpoint, and besides:

    - the place in the data, which ``mmvmamba.EpochBasedTrainLoop`` and ``mmvmamba.IterBasedTrainLoop`` keep;
    - the gradients, where several iterations share an optimizer step and the checkpoint falls between them. MMEngine
      loses them;
    - the buffers, such as running means of batch norm, that each rank has for itself. MMEngine stores those of the
      first rank only, which shows in a validation after resuming, and where several iterations share a step.

    All of it is in ``checkpoint["mmvmamba"]`` as tensors, lists, dicts and numbers.

    With a loop that is not one of those two, the hook does nothing and says so: DataLoaders of others draw from the
    global generators, and would give the same order again in every epoch if these were put back.

    MMEngine calls the part of a hook that saves on the first rank only. With several ranks the checkpoints should
    therefore be written by ``mmvmamba.CheckpointHook``, which lets all ranks hand in their states before. Where
    another hook writes them, only the place in the data is stored, and the log says so.
    """

    priority = "HIGHEST"  # noted before other hooks draw, put back before others do

    def __init__(self) -> None:
        self._state: RandomState | None = None
        self._gradients: dict[str, Tensor] = {}
        self._buffers: dict[str, Tensor] = {}
        self._synchronises: bool | None = None
        self._prepared: dict[str, Any] | None = None
        self._said_what_is_missing = False

    def before_train(self, runner: Runner) -> None:
        """Put accumulated gradients back; note the state, so that starting the DataLoader leaves no trace."""
        if not _is_resumable(runner):
            runner.logger.warning(
                f"RandomStateHook does nothing: the training loop is {type(runner._train_loop).__name__} of "
                f"{type(runner._train_loop).__module__}, expected mmvmamba.EpochBasedTrainLoop or "
                "mmvmamba.IterBasedTrainLoop. A resumed training will not be bit for bit the same."
            )
            return
        savers = [hook for hook in runner.hooks if isinstance(hook, MMEngineCheckpointHook)]
        if dist.get_world_size() > 1 and not all(isinstance(hook, CheckpointHook) for hook in savers):
            self._say_what_is_missing(runner)
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
        _seed_between(runner, runner.iter, _AFTER_ITERATION)

    def before_train_epoch(self, runner: Runner) -> None:
        """Give what is drawn now numbers that do not depend on what was drawn before."""
        if _is_resumable(runner):
            _seed_between(runner, runner.iter, _EPOCH)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:  # noqa: ARG002 (MMEngine's signature)
        """Go on where the last iteration ended."""
        if self._state is not None:
            put_random_state(self._state)

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,  # noqa: ARG002 (MMEngine's signature)
        data_batch: Any = None,  # noqa: ARG002 (MMEngine's signature)
        outputs: Any = None,  # noqa: ARG002 (MMEngine's signature)
    ) -> None:
        """Note the state, and give what is drawn until the next iteration other numbers every time.

        A step need not draw anything from Python or NumPy: put back again and again, the same state would give a hook
        the same numbers throughout the training.
        """
        if _is_resumable(runner):
            self._state = take_random_state(with_cuda=True)
            _seed_between(runner, runner.iter + 1, _AFTER_ITERATION)

    def before_val_epoch(self, runner: Runner) -> None:
        """Give the validation numbers of its own, as it may be the first thing after resuming."""
        if _is_resumable(runner):
            _seed_between(runner, runner.iter, _VALIDATION)

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:  # noqa: ARG002 (MMEngine's signature)
        """Note that the validation is done, before others save a checkpoint with its results."""
        if isinstance(runner._train_loop, ResumableLoop):
            runner._train_loop.note_validation()

    def prepare_save(self, runner: Runner) -> None:
        """Gather the states of all ranks on the first."""
        if _is_resumable(runner):
            self._prepared = self._gathered(runner)

    def save_is_over(self, runner: Runner) -> None:  # noqa: ARG002 (of PreparesSave)
        """Forget what was gathered."""
        self._prepared = None

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Store what was gathered, and the place in the data."""
        loop = runner._train_loop
        if not isinstance(loop, ResumableLoop):
            return
        section = checkpoint.setdefault(SECTION, {})
        section["world_size"] = dist.get_world_size()
        section["data_position"] = loop.position_to_store()
        if self._prepared is not None:
            section.update(self._prepared)
        elif dist.get_world_size() == 1:
            section.update(self._gathered(runner))
        else:
            self._say_what_is_missing(runner)  # and do not ask: the other ranks are not here to answer

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Take the state of this rank from the checkpoint a training is resumed from."""
        loop = runner._train_loop
        if not runner._resume or not isinstance(loop, ResumableLoop):
            return
        section = checkpoint.get(SECTION, {})
        states = section.get("random_states")
        # The first checkpoints did not name the number of ranks.
        ranks = section.get("world_size", 1 if states is None else len(next(iter(states.values()))))
        if "data_position" in section:
            loop.resume_at(_position_from(section["data_position"]), ranks)
        if states is None:
            runner.logger.warning(
                "the checkpoint has no random state, as mmvmamba.RandomStateHook would have stored it: the training "
                "goes on with other random numbers than it would have without the interruption"
            )
            return
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

    def _gathered(self, runner: Runner) -> dict[str, Any]:
        """Return what a checkpoint stores besides the place in the data; every rank has to ask at the same time."""
        with all_or_none("take its random state"):
            state = self._state if self._state is not None else take_random_state(with_cuda=True)
            tensors = to_tensors(state)
        section: dict[str, Any] = {"random_states": {name: _gather(tensor) for name, tensor in tensors.items()}}
        gradients = _gather_gradients(runner)
        if gradients:
            section["gradients"] = gradients
        if dist.get_world_size() > 1:
            section["buffers"] = _gather_buffers(_unwrapped(runner.model))
            if hasattr(runner.model, _SYNCHRONISES):
                section["synchronises_buffers"] = bool(getattr(runner.model, _SYNCHRONISES))
        return section

    def _say_what_is_missing(self, runner: Runner) -> None:
        if not self._said_what_is_missing:
            runner.logger.warning(
                "the checkpoint hook is not mmvmamba.CheckpointHook and saves on the first of "
                f"{dist.get_world_size()} processes alone: random states, accumulated gradients and buffers of the "
                "processes are not stored, so a resumed training will not be bit for bit the same. Use "
                "default_hooks.checkpoint.type='mmvmamba.CheckpointHook'."
            )
        self._said_what_is_missing = True


def _is_resumable(runner: Runner) -> bool:
    return isinstance(runner._train_loop, ResumableLoop)


def _seed_between(runner: Runner, finished: int, occasion: int) -> None:
    """Seed the generators for what is drawn outside of iterations, of which ``finished`` are done."""
    seed = mix_seed(runner.seed, dist.get_rank(), finished, occasion)
    seed_generators(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)


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
        parts = _parts_for_the_first(torch.zeros_like(parameters[name]) if gradient is None else gradient)
        for rank, part in enumerate(parts):
            if present[rank, column]:
                gathered[rank][name] = part
    return gathered


def _gather_buffers(model: nn.Module) -> list[dict[str, Tensor]]:
    """Return what differs from the first rank's buffers, by name, one dict per rank."""
    gathered: list[dict[str, Tensor]] = [{} for _ in range(dist.get_world_size())]
    for name, buffer in model.named_buffers():
        parts = _parts_for_the_first(buffer)
        for rank, part in enumerate(parts[1:], start=1):
            if not torch.equal(part, parts[0]):
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


def _parts_for_the_first(tensor: Tensor) -> Sequence[Tensor]:
    """Return the tensors of all ranks, on the CPU; on other ranks than the first, which save nothing, an empty list."""
    parts = dist.all_gather(tensor)
    if dist.get_rank() != 0:
        return []
    # Copies: the first rank alone would otherwise store the gradient itself, and a save need not be over at once.
    return [part.detach().cpu().clone() for part in parts]


def _waiting_parameters(runner: Runner) -> list[str]:
    wrapper = runner.optim_wrapper
    wrappers = wrapper.values() if isinstance(wrapper, OptimWrapperDict) else [wrapper]
    waiting = {id(parameter) for one in wrappers if not one.should_update() for parameter in _parameters_of(one)}
    return [name for name, parameter in _unwrapped(runner.model).named_parameters() if id(parameter) in waiting]


def _parameters_of(wrapper: Any) -> Iterator[nn.Parameter]:
    for group in wrapper.optimizer.param_groups:
        yield from group["params"]
