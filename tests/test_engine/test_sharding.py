"""What FSDP wraps, and the hook that makes checkpoints of ``FlexibleRunner`` plain."""

from __future__ import annotations

import pytest

pytest.importorskip("mmengine")

import numpy as np
import torch
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.registry import FUNCTIONS, STRATEGIES

from mmvmamba.apis.guards import guard_training
from mmvmamba.checkpoints import read_checkpoint
from mmvmamba.engine import PlainFormHook, wrap_blocks
from mmvmamba.models import VMamba
from mmvmamba.models.backbones.vmamba import VSSBlock


def test_policy_and_strategy_are_found_by_their_names():
    assert FUNCTIONS.get("mmvmamba.wrap_blocks") is wrap_blocks
    strategy = STRATEGIES.get("mmvmamba.FSDPStrategy")
    assert strategy.__module__ == "mmvmamba.engine.strategies"
    assert issubclass(strategy, STRATEGIES.get("mmengine.FSDPStrategy"))


@pytest.mark.parametrize("arch", ["nano", "tiny-s1l8", "vanilla-tiny"])
def test_policy_wraps_the_blocks_and_nothing_else(arch):
    with torch.device("meta"):
        model = VMamba(arch=arch)
    wrapped = [part for part in model.modules() if wrap_blocks(part, False, 1)]
    assert len(wrapped) == sum(model.depths) and all(type(part) is VSSBlock for part in wrapped)
    assert all(wrap_blocks(part, True, 1) for part in model.modules())
    inside = sum(value.numel() for part in wrapped for value in part.parameters())
    assert inside > 0.5 * sum(value.numel() for value in model.parameters())


def test_other_runners_get_the_plain_form():
    cfg = Config(dict(runner_type="FlexibleRunner", train_cfg=dict(by_epoch=True)))
    guard_training(cfg)
    assert dict(type="mmvmamba.PlainFormHook") in [dict(hook) for hook in cfg.custom_hooks]
    cfg = Config(dict(train_cfg=dict(by_epoch=True)))
    guard_training(cfg)
    assert "mmvmamba.PlainFormHook" not in [hook.type for hook in cfg.custom_hooks]


def test_plain_form_and_back(tmp_path):
    weight = torch.arange(3.0)
    weight._has_been_cloned = True  # as FSDP does; stored with it, the file is refused
    history = HistoryBuffer([1.0, 2.0], [1, 1])
    checkpoint = dict(
        meta=dict(iter=2, config="lr = 0.1\n"),
        state_dict=dict(weight=weight),
        optimizer=dict(state=dict(weight=dict(step=torch.tensor(2.0))), param_groups=[dict(params=["weight"])]),
        message_hub=dict(log_scalars=dict(loss=history), runtime_info=dict(lr=np.float64(0.1)), resumed_keys={}),
    )
    hook = PlainFormHook()
    hook.before_save_checkpoint(None, checkpoint)
    torch.save(checkpoint, tmp_path / "iter_2.pth")
    found = read_checkpoint(tmp_path / "iter_2.pth")
    assert "config" not in found["meta"] and found["config_text"] == "lr = 0.1\n"
    assert torch.equal(found["state_dict"]["weight"], weight)
    hook.after_load_checkpoint(None, found)
    back = found["message_hub"]["log_scalars"]["loss"]
    assert isinstance(back, HistoryBuffer) and back.data[0].tolist() == [1.0, 2.0]
    assert found["optimizer"]["param_groups"] == [dict(params=["weight"])]
