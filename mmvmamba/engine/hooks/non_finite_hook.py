"""Stop before a loss or gradient that is NaN or infinite reaches the weights."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

import torch
from mmengine import dist
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.optim import BaseOptimWrapper, OptimWrapper, OptimWrapperDict
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.utils.hooks import RemovableHandle

from mmvmamba.engine.batches import image_names, non_finite_images
from mmvmamba.engine.hooks import non_finite_report as report
from mmvmamba.errors import ConfigError, NonFiniteLossError
from mmvmamba.registry import HOOKS


@HOOKS.register_module()
class NonFiniteHook(Hook):
    """Check losses and gradients before every optimizer step, and stop with a report or leave the step out.

    The check stands between the backward pass and the step (before gradients are clipped, which would spread one NaN
    over all of them), so the weights are those of the last good step, bit for bit. Buffers, such as the running
    statistics of batch norm, are written by the forward pass already; they are put back to what they were before it.
    All processes of a distributed training decide together and raise the same report.

    With a ``GradScaler``, gradients that are not finite are its own business: it leaves the step out and lowers its
    scale. That is an error only after ``max_scaler_skips`` steps in a row. A loss that is not finite is none of its
    business, since no scale has touched it yet.

    The price is one norm over all gradients, a copy of the buffers and, on a GPU, waiting for it once per step.
    With several optimizers (``OptimWrapperDict``) each step is checked when
    its turn comes, so an earlier optimizer of the same iteration may have made its step.

    Differences from ``mmdet.CheckInvalidLossHook``: that one looks every 50 iterations, after the step, at the total
    loss alone, with an assert that has no message.

    Args:
        max_skipped: How many steps in a row may be left out; one more is an error. 0: the first is. A step that is
            left out changes no weight, no buffer and no state of the optimizer; the iteration counts, schedules and
            an EMA go on. The total is in the log.
        max_scaler_skips: How many steps in a row a ``GradScaler`` may leave out; the last of them is an error.

    Raises:
        ConfigError: If one of the numbers is none or too small.
    """

    # Before EMAHook and CheckpointHook, which must not see an iteration that failed.
    priority = "VERY_HIGH"

    def __init__(self, max_skipped: int = 0, max_scaler_skips: int = 20) -> None:
        for name, value, least in (("max_skipped", max_skipped, 0), ("max_scaler_skips", max_scaler_skips, 1)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(
                    f"NonFiniteHook: {name} is {value!r}, expected a whole number from {least} on. Correct the entry "
                    "in custom_hooks."
                )
        self.max_skipped = max_skipped
        self.max_scaler_skips = max_scaler_skips
        self._handles: list[RemovableHandle] = []
        self._clipping: list[OptimWrapper] = []
        self._clearing: list[OptimWrapper] = []
        self._gradients: list[str] = []
        self._passes: list[report.Pass] = []
        self._batch: Any = None
        self._model: nn.Module | None = None
        self._buffers: dict[str, tuple[Tensor, Tensor]] = {}
        self._parameters: dict[int, dict[str, Tensor]] = {}
        self._counts: dict[int, int] = {}
        self._checked: set[int] = set()
        self._stepped: set[int] = set()
        self._skipped_in_row = self._skipped = self._scaler_skips = 0

    def before_train(self, runner: Runner) -> None:
        """Watch the model's losses and the optimizers' steps."""
        self._release()
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        wrappers = []
        for candidate in _optim_wrappers(runner):
            if _is_checkable(candidate):
                wrappers.append(candidate)
                continue
            runner.logger.warning(
                f"NonFiniteHook: {type(candidate).__name__} around {type(candidate.optimizer).__name__} is no "
                "mmengine.OptimWrapper around a torch.optim.Optimizer, its steps are not checked for NaN and infinite "
                "values"
            )
        if not wrappers:
            return  # DeepSpeed's model, for one, is no module that could be watched
        self._model = model
        self._handles.append(runner.model.register_forward_hook(self._keep_losses))
        for wrapper in wrappers:
            self._parameters[id(wrapper)] = _named_parameters(model, wrapper.optimizer)
            hook = functools.partial(self._before_step, runner, wrapper)
            self._handles.append(wrapper.optimizer.register_step_pre_hook(hook))
            if _scaler(wrapper) is not None:
                wrapper.zero_grad = functools.partial(self._before_clearing, wrapper, wrapper.zero_grad)
                self._clearing.append(wrapper)
            if wrapper.clip_grad_kwargs:
                wrapper.clip_func = functools.partial(self._before_clipping, runner, wrapper, wrapper.clip_func)
                self._clipping.append(wrapper)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:  # noqa: ARG002
        """Note the batch; where gradients start from nothing, the buffers too."""
        if self._model is None:
            return
        if not self._passes:
            self._copy_buffers(self._model)
        self._passes.append(report.Pass(runner.iter + 1))
        self._batch = data_batch
        self._counts = {id(wrapper): wrapper.inner_count for wrapper in self._wrappers(runner)}

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None  # noqa: ARG002
    ) -> None:  # fmt: skip
        """Count the steps that a ``GradScaler`` has left out; forget what the step has used up.

        Raises:
            NonFiniteLossError: the scaler has left out too many, or one because of the loss.
        """
        wrappers = self._wrappers(runner)
        if not all(wrapper.should_update() for wrapper in wrappers):
            self._name_images()  # gradients are accumulated: the names are kept, the batch itself is not
            return
        for wrapper in wrappers:
            ran = wrapper.inner_count != self._counts[id(wrapper)]  # a model may leave an optimizer alone for a while
            if ran and _scaler(wrapper) is not None:
                if id(wrapper) in self._stepped:
                    self._scaler_skips = 0
                else:
                    self._judge_scaler_skip(runner, wrapper)
        self._forget_passes()

    def after_train(self, runner: Runner) -> None:  # noqa: ARG002
        """Leave model and optimizer as they were found."""
        self._release()

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        for wrapper in self._clipping:
            wrapper.clip_func = wrapper.clip_func.args[-1]
        for wrapper in self._clearing:
            del wrapper.zero_grad  # the method of its class shows again
        self._handles, self._clipping, self._clearing, self._buffers, self._parameters = [], [], [], {}, {}
        self._model = None
        self._forget_passes()

    def _wrappers(self, runner: Runner) -> list[OptimWrapper]:
        return [wrapper for wrapper in _optim_wrappers(runner) if id(wrapper) in self._parameters]

    @torch.no_grad()
    def _copy_buffers(self, model: nn.Module) -> None:
        """Copy the buffers as they are now: hooks (MMEngine's PreciseBNHook) put other tensors in their places."""
        old, self._buffers = self._buffers, {}
        for name, buffer in model.named_buffers():
            copy = old[name][1] if name in old else None
            if copy is None or (copy.shape, copy.dtype, copy.device) != (buffer.shape, buffer.dtype, buffer.device):
                copy = torch.empty_like(buffer)
            self._buffers[name] = (buffer, copy.copy_(buffer))

    @torch.no_grad()
    def _restore_buffers(self, model: nn.Module) -> None:
        for name, (buffer, copy) in self._buffers.items():
            module, _, own_name = name.rpartition(".")
            setattr(model.get_submodule(module), own_name, buffer.copy_(copy))  # the forward pass may have put another

    def _forget_passes(self) -> None:
        self._passes, self._gradients, self._batch = [], [], None
        self._checked.clear()
        self._stepped.clear()

    def _keep_losses(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:  # noqa: ARG002
        if self._passes and module.training and torch.is_grad_enabled() and isinstance(output, Mapping):
            losses = self._passes[-1].losses
            for name, value in _loss_terms(output):
                losses[name if name not in losses else f"{name} (forward pass {len(losses)})"] = value

    def _before_clipping(self, runner: Runner, wrapper: OptimWrapper, clip: Any, *args: Any, **kwargs: Any) -> Any:
        if _scaler(wrapper) is None:
            self._judge(runner, wrapper, gradients=True)
            self._checked.add(id(wrapper))
        return clip(*args, **kwargs)

    def _before_step(
        self, runner: Runner, wrapper: OptimWrapper, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any  # noqa: ARG002
    ) -> None:  # fmt: skip
        found = getattr(optimizer, "found_inf", None)
        if found is not None and found.item():
            return  # a fused optimizer under a GradScaler leaves the step out inside its kernel
        self._stepped.add(id(wrapper))
        if id(wrapper) not in self._checked:
            # A GradScaler calls step only with gradients it has found finite.
            self._judge(runner, wrapper, gradients=_scaler(wrapper) is None)

    def _before_clearing(self, wrapper: OptimWrapper, clear: Any, *args: Any, **kwargs: Any) -> None:
        # The steps a GradScaler leaves out are counted after the iteration; for the last one the names are needed then.
        if id(wrapper) not in self._stepped and self._scaler_skips + 1 >= self.max_scaler_skips:
            self._gradients = report.bad_gradients(self._parameters[id(wrapper)])
        clear(*args, **kwargs)

    def _judge(self, runner: Runner, wrapper: OptimWrapper, *, gradients: bool) -> None:
        parameters = self._parameters[id(wrapper)]
        bad_loss, bad_gradient = self._verdict(parameters, gradients)
        if bad_gradient:
            # The norm of finite gradients may overflow. Rare, so only now each element is looked at.
            bad_gradient = _agreed(bool(report.bad_gradients(parameters)), _device(parameters))
        if bad_loss or bad_gradient:
            self._leave_out(runner, wrapper, parameters)
        else:
            self._skipped_in_row = 0

    def _verdict(self, parameters: Mapping[str, Tensor], gradients: bool) -> tuple[bool, bool]:
        """Return whether any process has a loss, and whether any has a gradient, that looks not finite."""
        device = _device(parameters)
        losses = [loss.isfinite().to(device) for one in self._passes for loss in one.losses.values()]
        good_loss = torch.stack(losses).all() if losses else torch.ones((), dtype=torch.bool, device=device)
        good_gradient = torch.ones_like(good_loss)
        if gradients:
            present = [grad for value in parameters.values() if (grad := report.dense_gradient(value)) is not None]
            good_gradient = torch.nn.utils.get_total_norm(present).isfinite().to(device)
        bad = (~torch.stack([good_loss, good_gradient])).to(torch.uint8)
        if dist.get_world_size() > 1:
            dist.all_reduce(bad, op="max")
        bad_loss, bad_gradient = bad.tolist()
        return bool(bad_loss), bool(bad_gradient)

    def _judge_scaler_skip(self, runner: Runner, wrapper: OptimWrapper) -> None:
        parameters = self._parameters[id(wrapper)]
        bad_loss, _ = self._verdict(parameters, gradients=False)
        if bad_loss:
            self._leave_out(runner, wrapper, parameters)
            return
        self._scaler_skips += 1
        if self._scaler_skips >= self.max_scaler_skips:
            raise NonFiniteLossError(
                f"iteration {runner.iter + 1}: the GradScaler has left out {self._scaler_skips} optimizer steps in a "
                f"row, because gradients were not finite at any loss scale, expected fewer than {self.max_scaler_skips}"
                f" (NonFiniteHook.max_scaler_skips). The weights are those of the last good step.\n"
                f"{self._report(wrapper, parameters)}\n"
                "Train in bfloat16 (optim_wrapper.dtype='bfloat16') or without --amp, or lower the learning rate."
            )

    def _leave_out(self, runner: Runner, wrapper: OptimWrapper, parameters: Mapping[str, Tensor]) -> None:
        """Let the coming step do nothing, or raise if too many were left out in a row."""
        text = self._report(wrapper, parameters)
        if self._model is not None:
            self._restore_buffers(self._model)
        for parameter in parameters.values():
            parameter.grad = None
        self._skipped += 1
        self._skipped_in_row += 1
        what = f"iteration {runner.iter + 1} (epoch {runner.epoch + 1}): a loss or gradient is NaN or infinite"
        if self._skipped_in_row <= self.max_skipped:
            runner.logger.warning(
                f"{what}; the step is left out, number {self._skipped} in all, {self._skipped_in_row} of at most "
                f"{self.max_skipped} in a row\n{text}"
            )
            return
        allowed = (
            f"{self._skipped_in_row} steps in a row, at most {self.max_skipped} may be left out; "
            if self.max_skipped
            else ""
        )
        raise NonFiniteLossError(
            f"{what}, expected finite values; {allowed}stopped before the optimizer step, the weights are those of the "
            f"last good step\n{text}\n"
            "Look at these images and their annotations, lower the learning rate or clip gradients (optim_wrapper."
            "clip_grad). To leave out a few such steps: custom_hooks=[dict(type='mmvmamba.NonFiniteHook', "
            "max_skipped=3)]."
        )

    def _report(self, wrapper: OptimWrapper, parameters: Mapping[str, Tensor]) -> str:
        self._name_images()
        lines = [report.gathered(report.local_report(self._passes), _device(parameters))]
        if phrases := report.bad_gradients(parameters) or self._gradients:
            counts = f"{len(phrases)} of {len(parameters)} parameters"
            lines.append(f"  gradients not finite in {counts}: {report.shortened(phrases)}")
        if names := report.bad_weights(parameters):
            lines.append(f"  weights that were not finite before this iteration: {report.shortened(names)}")
        scaler = _scaler(wrapper)
        scale = None if scaler is None else float(scaler.get_scale())
        lines.append(report.settings(wrapper.optimizer.param_groups, scale))
        return "\n".join(lines)

    def _name_images(self) -> None:
        if self._batch is not None and self._passes:
            self._passes[-1].images = image_names(self._batch)
            self._passes[-1].bad_images = non_finite_images(self._batch)
        self._batch = None


def _loss_terms(output: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield the mean of each term that mmengine's ``BaseModel.parse_losses`` adds to the total loss."""
    for name, value in output.items():
        if "loss" not in name:
            continue
        if isinstance(value, Tensor):
            yield name, value.detach().mean()
        elif isinstance(value, (list, tuple)) and value:
            yield name, torch.stack([entry.detach().mean() for entry in value]).sum()


def _optim_wrappers(runner: Runner) -> list[BaseOptimWrapper]:
    wrapper = runner.optim_wrapper
    return list(wrapper.values()) if isinstance(wrapper, OptimWrapperDict) else [wrapper]


def _is_checkable(wrapper: BaseOptimWrapper) -> TypeGuard[OptimWrapper]:
    return isinstance(wrapper, OptimWrapper) and isinstance(wrapper.optimizer, torch.optim.Optimizer)


def _named_parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    own = {id(parameter): parameter for group in optimizer.param_groups for parameter in group["params"]}
    named = {name: parameter for name, parameter in model.named_parameters() if id(parameter) in own}
    known = {id(parameter) for parameter in named.values()}
    strangers = [parameter for key, parameter in own.items() if key not in known]
    return named | {f"parameter {index} outside the model": value for index, value in enumerate(strangers)}


def _scaler(wrapper: OptimWrapper) -> GradScaler | None:
    """Return the ``GradScaler`` that is in use, or None."""
    scaler = getattr(wrapper, "loss_scaler", None)
    return scaler if scaler is not None and scaler.is_enabled() else None


def _device(parameters: Mapping[str, Tensor]) -> torch.device:
    return next(iter(parameters.values())).device


def _agreed(mine: bool, device: torch.device) -> bool:
    flag = torch.tensor(mine, dtype=torch.uint8, device=device)
    if dist.get_world_size() > 1:
        dist.all_reduce(flag, op="max")
    return bool(flag.item())
