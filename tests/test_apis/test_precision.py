"""Which optimizer wrapper a training gets, by flag, config and machine, and that bfloat16 goes with our other parts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("mmengine")

from mmengine.config import Config

from mmvmamba.apis import load_config, prepare_training
from mmvmamba.apis.precision import choose_precision
from mmvmamba.engine import NonFiniteHook
from mmvmamba.errors import ConfigError, NonFiniteLossError
from tests.test_engine.guarded_training import Poison, Snapshots, differing, make_runner, state_of

CONFIGS = Path(__file__).parents[2] / "configs"
DET = str(CONFIGS / "det/vmamba/mask-rcnn_vmamba-tiny-s1l8_fpn_1x_coco.py")
SEG = str(CONFIGS / "seg/vmamba/vmamba-tiny-s1l8_upernet_4xb4-160k_ade20k-512x512.py")
MIXED = dict(type="AmpOptimWrapper", dtype="bfloat16", loss_scale=dict(enabled=False))


@pytest.fixture
def machine(monkeypatch):
    """Return a function that pretends to be on a machine."""

    def pretend(device, multiplies=True):
        monkeypatch.setattr("mmvmamba.apis.precision.get_device", lambda: device)
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: multiplies)

    return pretend


def _config(**optim_wrapper):
    return Config(dict(optim_wrapper=dict(optimizer=dict(type="AdamW"), **optim_wrapper)))


@pytest.fixture
def mmengines_wrapper_on_a_cpu(monkeypatch):
    """MMEngine refuses its wrapper without a GPU, though with bfloat16 all of it works."""
    monkeypatch.setattr("mmengine.optim.optimizer.amp_optimizer_wrapper.is_cuda_available", lambda: True)
    monkeypatch.setattr("mmengine.runner.runner.Runner.dump_config", lambda self: None)


@pytest.mark.parametrize(
    "kind", ["OptimWrapper", "AmpOptimWrapper", "mmvmamba.Bfloat16OptimWrapper", "ApexOptimWrapper"]
)
def test_without_a_flag_an_accelerator_gets_what_the_config_says(machine, kind):
    machine("cuda")
    cfg = _config(type=kind, dtype="bfloat16")
    assert choose_precision(cfg, None) == []
    assert (cfg.optim_wrapper.type, cfg.optim_wrapper.dtype) == (kind, "bfloat16")


def test_a_cpu_that_multiplies_bfloat16_takes_our_wrapper(machine):
    machine("cpu")
    cfg = _config(**MIXED, clip_grad=dict(max_norm=5.0))
    (note,) = choose_precision(cfg, None)
    assert "There is no GPU" in note.text and "mmvmamba.Bfloat16OptimWrapper" in note.text
    assert cfg.optim_wrapper.pop("type") == "mmvmamba.Bfloat16OptimWrapper"
    assert set(cfg.optim_wrapper) == {"optimizer", "clip_grad"}
    cfg = _config(type="mmvmamba.Bfloat16OptimWrapper")
    assert choose_precision(cfg, None) == []


@pytest.mark.parametrize("kind", ["AmpOptimWrapper", "mmvmamba.Bfloat16OptimWrapper"])
def test_any_other_cpu_takes_float32(machine, kind):
    machine("cpu", multiplies=False)
    cfg = _config(**{**MIXED, "type": kind})
    (note,) = choose_precision(cfg, None)
    assert "float32: this CPU has no bfloat16 instructions" in note.text
    assert cfg.optim_wrapper.pop("type") == "OptimWrapper"
    assert set(cfg.optim_wrapper) == {"optimizer"}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_float32_on_request(machine, device):
    machine(device)
    cfg = _config(**MIXED)
    (note,) = choose_precision(cfg, False)
    assert note.text == "All of the model is trained in float32: --no-amp."
    assert (cfg.optim_wrapper.type, "dtype" in cfg.optim_wrapper) == ("OptimWrapper", False)
    assert choose_precision(cfg, False) == []


def test_a_config_without_an_optimizer_is_left_alone(machine):
    machine("cpu")
    assert choose_precision(Config({}), None) == []


def test_mixed_precision_on_an_accelerator(machine):
    machine("cuda")
    cfg = _config()
    choose_precision(cfg, True)
    assert (cfg.optim_wrapper.type, cfg.optim_wrapper.loss_scale) == ("AmpOptimWrapper", "dynamic")
    pytest.importorskip("mmdet")
    cfg = load_config(DET)
    prepare_training(cfg, amp=True)
    assert cfg.optim_wrapper.type == "mmvmamba.Bfloat16OptimWrapper", "a detector's heads are not narrowed by --amp"
    assert "loss_scale" not in cfg.optim_wrapper


@pytest.mark.parametrize("supported", [True, False])
def test_mixed_precision_on_a_cpu(machine, supported):
    machine("cpu", multiplies=supported)
    cfg = _config(type="AmpOptimWrapper", loss_scale=64.0)
    if not supported:
        with pytest.raises(ConfigError, match="--amp: this CPU has no bfloat16 instructions"):
            choose_precision(cfg, True)
        return
    choose_precision(cfg, True)
    assert cfg.optim_wrapper.type == "mmvmamba.Bfloat16OptimWrapper"
    assert "loss_scale" not in cfg.optim_wrapper


def test_mixed_precision_keeps_the_settings_of_the_config(machine):
    machine("cuda")
    cfg = _config(type="mmengine.AmpOptimWrapper", dtype="bfloat16", loss_scale=64.0)
    choose_precision(cfg, True)
    assert (cfg.optim_wrapper.type, cfg.optim_wrapper.loss_scale) == ("mmengine.AmpOptimWrapper", 64.0)
    assert cfg.optim_wrapper.dtype == "bfloat16"


@pytest.mark.parametrize(("amp", "flag"), [(True, "--amp"), (False, "--no-amp")])
def test_flags_refuse_unusual_wrappers(machine, amp, flag):
    machine("cuda")
    with pytest.raises(ConfigError, match=f"{flag}: optim_wrapper.type is 'ApexOptimWrapper', expected 'OptimWrapper'"):
        choose_precision(_config(type="ApexOptimWrapper"), amp)


def test_segmentor_and_classifier_configs_have_the_settings_that_are_tested_here():
    pytest.importorskip("mmseg")
    wrapper = load_config(SEG).optim_wrapper
    assert {key: wrapper[key] for key in MIXED} == MIXED


@pytest.mark.parametrize("place", ["loss", "gradient"])
def test_a_nan_stops_a_training_without_loss_scaling_at_once(tmp_path, mmengines_wrapper_on_a_cpu, place):
    """A switched-off GradScaler is none: NonFiniteHook looks at the gradients itself and does not wait for it."""
    snapshots = Snapshots()
    hooks = [snapshots, NonFiniteHook()]
    runner = make_runner(tmp_path, hooks, poison=Poison(place, float("nan"), 5), optim_wrapper=MIXED)
    with pytest.raises(NonFiniteLossError, match=r"^iteration 5 "):
        runner.train()
    assert type(runner.optim_wrapper).__name__ == "AmpOptimWrapper"
    assert differing(snapshots.before[4], state_of(runner)) == []


def test_without_loss_scaling_the_state_of_the_optimizer_is_saved_and_read(tmp_path, mmengines_wrapper_on_a_cpu):
    runner = make_runner(tmp_path, [], optim_wrapper=MIXED, iterations=2)
    runner.train()
    again = make_runner(tmp_path, [], optim_wrapper=MIXED, iterations=2)
    again.optim_wrapper = again.build_optim_wrapper(again.optim_wrapper)
    again.optim_wrapper.load_state_dict(runner.optim_wrapper.state_dict())
    states = [wrapper.optimizer.state_dict()["state"] for wrapper in (runner.optim_wrapper, again.optim_wrapper)]
    assert states[0] and states[0].keys() == states[1].keys()
