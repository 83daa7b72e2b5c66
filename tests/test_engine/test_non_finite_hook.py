"""NonFiniteHook: whatever is NaN or infinite stops before the weights, with a report that names the cause."""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("mmengine")

from mmengine.hooks import Hook
from mmengine.optim import BaseOptimWrapper
from mmengine.registry import HOOKS
from torch.amp.grad_scaler import GradScaler

from mmvmamba.engine import NonFiniteHook
from mmvmamba.errors import ConfigError, NonFiniteLossError
from tests.test_engine.guarded_training import PLACES, Model, Poison, Snapshots, differing, make_runner, state_of

VALUES = {"nan": float("nan"), "inf": float("inf")}
WRAPPERS = {
    "plain": {},
    "clipping": {"clip_grad": {"max_norm": 1.0}},
    "accumulation": {"accumulative_counts": 2},
}


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setattr("mmengine.runner.runner.Runner.dump_config", lambda self: None)


def _train_until_it_stops(runner) -> str:
    with pytest.raises(NonFiniteLossError) as stop:
        runner.train()
    return str(stop.value)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_training_stops_with_the_state_before_the_bad_step(tmp_path, place, value, wrapper):
    """D7, 18 of the 24 cases; the other six are in test_guards_of_two_processes.py."""
    snapshots = Snapshots()
    poison = Poison(place, VALUES[value], 5)
    runner = make_runner(tmp_path, [snapshots, NonFiniteHook()], poison=poison, optim_wrapper=WRAPPERS[wrapper])
    message = _train_until_it_stops(runner)
    # With two passes to a step, iteration 5 is the first of its pair and iteration 6 makes the step.
    stops_at = 6 if wrapper == "accumulation" else 5
    assert differing(snapshots.before[4], state_of(runner)) == []
    assert message.startswith(f"iteration {stops_at} (epoch 1): ")
    assert "images/008.jpg, images/009.jpg" in message
    assert ("images/010.jpg" in message) is (stops_at == 6)
    assert ("images not finite" in message) is False
    assert ("not finite before the model: images/008.jpg (1 of 192 values)" in message) is (place == "input")
    if place == "gradient":
        assert re.search(r"losses: loss_main \d", message)
        assert re.search(
            r"gradients not finite in \d of 6 parameters: conv\.weight \(\d+ NaN, \d+ infinite of 108", message
        )
    else:
        assert re.search(r"losses: loss_main (nan|inf)", message)
    assert "learning rate 0.01" in message and "loss scale" not in message


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_without_the_hook_the_weights_are_lost(tmp_path, wrapper):
    """The tests above can fail."""
    runner = make_runner(tmp_path, [], poison=Poison("loss", VALUES["nan"], 5), optim_wrapper=WRAPPERS[wrapper])
    runner.train()
    assert not runner.model.head.weight.isfinite().all()


def test_clipping_does_not_spread_a_nan_before_it_is_reported(tmp_path):
    """Clipping by norm multiplies every gradient by the norm; the report must name the one that began."""

    class OneBadGradient(Model):
        def __init__(self):
            super().__init__()
            self.head.bias.register_hook(lambda gradient: gradient * float("nan"))

    runner = make_runner(tmp_path, [NonFiniteHook()], model=OneBadGradient(), optim_wrapper=WRAPPERS["clipping"])
    assert "in 1 of 6 parameters: head.bias (1 NaN, 0 infinite of 1)" in _train_until_it_stops(runner)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_step_left_out_changes_nothing(tmp_path, place, wrapper, caplog):
    snapshots, poison = Snapshots(), Poison(place, VALUES["nan"], 5)
    hooks = [snapshots, NonFiniteHook(max_skipped=1)]
    runner = make_runner(tmp_path, hooks, poison=poison, optim_wrapper=WRAPPERS[wrapper])
    runner.train()
    assert runner.iter == 8
    after = 6 if wrapper == "accumulation" else 5
    assert differing(snapshots.before[4], snapshots.before[after]) == []
    assert differing(snapshots.before[after], state_of(runner)) != []
    assert all(value.isfinite().all() for value in state_of(runner).values())


def test_the_limit_counts_steps_in_a_row(tmp_path):
    scattered = Poison("loss", VALUES["nan"], 2, 4, 6)
    make_runner(tmp_path / "a", [NonFiniteHook(max_skipped=1)], poison=scattered).train()
    runner = make_runner(tmp_path / "b", [NonFiniteHook(max_skipped=2)], poison=Poison("loss", VALUES["inf"], 3, 4, 5))
    message = _train_until_it_stops(runner)
    assert message.startswith("iteration 5 ") and "3 steps in a row, at most 2 may be left out" in message


def test_an_undisturbed_training_is_bitwise_the_same_with_the_hook(tmp_path):
    for name, wrapper in WRAPPERS.items():
        ends = []
        for hooks in ([], [NonFiniteHook()]):
            runner = make_runner(tmp_path / name, hooks, optim_wrapper=wrapper)
            runner.train()
            ends.append(state_of(runner))
        assert differing(*ends) == []


def test_finite_gradients_with_an_infinite_norm_are_no_error(tmp_path):
    class Steep(Model):
        def __init__(self):
            super().__init__()
            self.head.weight.register_hook(lambda gradient: torch.full_like(gradient, 3e38))

    make_runner(tmp_path, [NonFiniteHook()], model=Steep()).train()


@pytest.mark.parametrize("when", ["between iterations", "in the forward pass"])
def test_buffers_that_were_replaced_are_put_back_too(tmp_path, when):
    """MMEngine's PreciseBNHook puts other tensors in the places of the running statistics, models their own."""

    class Replace(Hook):
        priority = "HIGHEST"

        def before_train_iter(self, runner, batch_idx, data_batch=None):
            norm = runner.model.norm
            if when == "between iterations":
                norm.running_mean = torch.full_like(norm.running_mean, float(runner.iter))

    class Restless(Model):
        def forward(self, *arguments, **settings):
            if when == "in the forward pass":
                self.norm.running_mean = self.norm.running_mean + 1
            return super().forward(*arguments, **settings)

    snapshots = Snapshots()
    model = Restless(Poison("loss", VALUES["nan"], 5))
    runner = make_runner(tmp_path, [Replace(), snapshots, NonFiniteHook()], model=model)
    _train_until_it_stops(runner)
    assert differing(snapshots.before[4], state_of(runner)) == []


class _ForeignWrapper(BaseOptimWrapper):
    """As MMEngine's DeepSpeedOptimWrapper: of the methods of an OptimWrapper it has only these."""

    def update_params(self, loss):
        self.step(self.backward(loss))

    def backward(self, loss):
        loss.backward()

    def zero_grad(self):
        self.optimizer.zero_grad()

    def step(self, _):
        self.optimizer.step()
        self.zero_grad()

    def state_dict(self):
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict):
        self.optimizer.load_state_dict(state_dict)


def test_a_wrapper_of_another_kind_is_only_warned_of(tmp_path):
    model = Model()
    runner = make_runner(tmp_path, [NonFiniteHook()], model=model)
    runner.optim_wrapper = _ForeignWrapper(torch.optim.AdamW(model.parameters(), lr=0.01))
    runner.model.train_step = lambda data, optim_wrapper: optim_wrapper.update_params(
        model(**model.data_preprocessor(data), mode="loss")["loss_main"]
    )
    hook = next(hook for hook in runner.hooks if isinstance(hook, NonFiniteHook))
    warnings = []
    runner.logger.warning = warnings.append
    hook.before_train(runner)
    for iteration in range(2):
        batch = {"inputs": [torch.randn(3, 8, 8)], "data_samples": None}
        hook.before_train_iter(runner, iteration, batch)
        runner.model.train_step(batch, runner.optim_wrapper)
        hook.after_train_iter(runner, iteration, batch)
    hook.after_train(runner)
    assert [text for text in warnings if "_ForeignWrapper around AdamW is no mmengine.OptimWrapper" in text]


def test_nothing_is_left_behind(tmp_path):
    runner = make_runner(tmp_path, [NonFiniteHook()], optim_wrapper=WRAPPERS["clipping"])
    runner.train()
    assert runner.optim_wrapper.clip_func is torch.nn.utils.clip_grad_norm_
    assert not runner.optim_wrapper.optimizer._optimizer_step_pre_hooks
    assert not runner.model._forward_hooks


@pytest.mark.parametrize("argument", [{"max_skipped": -1}, {"max_skipped": True}, {"max_scaler_skips": 0}])
def test_wrong_numbers_are_refused(argument):
    with pytest.raises(ConfigError, match=f"NonFiniteHook: {next(iter(argument))} is"):
        HOOKS.build(dict(type="mmvmamba.NonFiniteHook", **argument))


# ---------------------------------------------------------------- loss scaling


def _scaled(runner, **settings):
    """Give the runner's optimizer wrapper a GradScaler, as MMEngine's AmpOptimWrapper has it on a GPU."""
    wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    wrapper.loss_scaler = GradScaler("cpu", init_scale=1024.0, **settings)

    def backward(loss, **kwargs):
        wrapper.loss_scaler.scale(loss).backward(**kwargs)
        wrapper._inner_count += 1

    def step(**kwargs):
        if wrapper.clip_grad_kwargs:
            wrapper.loss_scaler.unscale_(wrapper.optimizer)
            wrapper._clip_grad()
        wrapper.loss_scaler.step(wrapper.optimizer, **kwargs)
        wrapper.loss_scaler.update()

    wrapper.backward, wrapper.step = backward, step
    runner.optim_wrapper = wrapper
    return runner


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("wrapper", ["plain", "clipping"])
def test_gradients_that_the_scaler_skips_are_no_error_until_too_many(tmp_path, wrapper, fused):
    settings = {**WRAPPERS[wrapper], "optimizer": {"type": "AdamW", "lr": 0.01, "fused": fused}}
    poison = Poison("gradient", VALUES["inf"], 2, 3, 5, 6)
    runner = make_runner(tmp_path / "a", [NonFiniteHook(max_scaler_skips=3)], poison=poison, optim_wrapper=settings)
    _scaled(runner).train()
    assert runner.iter == 8 and runner.optim_wrapper.loss_scaler.get_scale() == 1024 / 2**4
    assert runner.model.head.weight.isfinite().all()

    snapshots = Snapshots()
    poison = Poison("gradient", VALUES["inf"], 2, 3, 4)
    hooks = [snapshots, NonFiniteHook(max_scaler_skips=3)]
    runner = make_runner(tmp_path / "b", hooks, poison=poison, optim_wrapper=settings)
    message = _train_until_it_stops(_scaled(runner))
    assert message.startswith("iteration 4: the GradScaler has left out 3 optimizer steps in a row")
    assert "loss scale 128" in message and "parameters: conv.weight" in message
    assert differing(snapshots.before[1], state_of(runner)) != []  # running statistics move on, as without the hook
    assert [name for name in differing(snapshots.before[1], state_of(runner)) if "norm.running" not in name
            and "num_batches" not in name] == []  # fmt: skip


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("place", ["loss", "input"])
def test_a_bad_loss_is_an_error_under_a_scaler_too(tmp_path, place, fused):
    snapshots = Snapshots()
    runner = make_runner(tmp_path, [snapshots, NonFiniteHook()], poison=Poison(place, VALUES["nan"], 5),
                         optim_wrapper={"optimizer": {"type": "AdamW", "lr": 0.01, "fused": fused}})  # fmt: skip
    message = _train_until_it_stops(_scaled(runner))
    assert message.startswith("iteration 5 ") and "images/008.jpg" in message
    assert differing(snapshots.before[4], state_of(runner)) == []
