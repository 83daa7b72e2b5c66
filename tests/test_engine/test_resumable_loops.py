"""Which training loops tools/train.py replaces."""

import copy
import inspect
import itertools
import random

import numpy as np
import pytest
import torch

pytest.importorskip("mmengine")

from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.hooks import Hook
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from torch.utils.data import DataLoader

from mmvmamba import engine
from mmvmamba.apis.guards import guard_training, use_our_checkpoint_hook, use_resumable_loops
from mmvmamba.engine import RandomStateHook
from tests.test_engine.random_training import config, train
from tests.test_engine.tiny_training import TinyData, TinyModel

HOOK = dict(type="mmvmamba.RandomStateHook")


@pytest.mark.parametrize(
    ("loop", "expected"),
    [
        (dict(by_epoch=True, max_epochs=3), dict(type="mmvmamba.EpochBasedTrainLoop", max_epochs=3)),
        (dict(by_epoch=False, max_iters=3), dict(type="mmvmamba.IterBasedTrainLoop", max_iters=3)),
        (dict(type="EpochBasedTrainLoop", max_epochs=3), dict(type="mmvmamba.EpochBasedTrainLoop", max_epochs=3)),
        (dict(type="IterBasedTrainLoop", max_iters=3), dict(type="mmvmamba.IterBasedTrainLoop", max_iters=3)),
        (dict(type=EpochBasedTrainLoop, max_epochs=3), dict(type="mmvmamba.EpochBasedTrainLoop", max_epochs=3)),
        (dict(type=IterBasedTrainLoop, max_iters=3), dict(type="mmvmamba.IterBasedTrainLoop", max_iters=3)),
    ],
)
def test_loops_of_mmengine_are_replaced(loop, expected):
    cfg = Config(dict(train_cfg=loop))
    assert "in place of MMEngine's" in use_resumable_loops(cfg)
    assert cfg.train_cfg == expected
    assert cfg.custom_hooks == [HOOK]


@pytest.mark.parametrize("kind", ["mmengine.EpochBasedTrainLoop", "MultiTaskLoop"])
def test_other_loops_stay_and_are_named(kind):
    cfg = Config(dict(train_cfg=dict(type=kind, max_epochs=3)))
    assert use_resumable_loops(cfg) == f"The training loop is {kind}: a resumed training is not bit for bit the same."
    assert cfg.train_cfg.type == kind
    assert "custom_hooks" not in cfg, "random states put back would repeat the order of the data in every epoch"


def test_ours_stay():
    cfg = Config(dict(train_cfg=dict(type="mmvmamba.EpochBasedTrainLoop", max_epochs=3), custom_hooks=[HOOK]))
    before = copy.deepcopy(cfg.to_dict())
    assert use_resumable_loops(cfg) is None
    assert cfg.to_dict() == before
    cfg.custom_hooks = [dict(type=RandomStateHook)]
    use_resumable_loops(cfg)
    assert len(cfg.custom_hooks) == 1


@pytest.mark.parametrize(
    "cfg", [dict(), dict(train_cfg=None), dict(runner_type="FlexibleRunner", train_cfg=dict(by_epoch=True))]
)
def test_without_a_training_nothing_changes(cfg):
    cfg = Config(cfg)
    before = copy.deepcopy(cfg.to_dict())
    assert use_resumable_loops(cfg) is None
    assert cfg.to_dict() == before


def test_custom_hooks_may_be_none():
    cfg = Config(dict(train_cfg=dict(by_epoch=True, max_epochs=1), custom_hooks=None))
    guard_training(cfg)
    assert HOOK in cfg.custom_hooks


def test_each_checkpoint_hook_is_judged_by_itself():
    """One that writes to a remote place does not keep the others from being replaced."""
    remote, local = dict(type="CheckpointHook", out_dir="s3://bucket"), dict(type="CheckpointHook", interval=2)
    cfg = Config(dict(default_hooks=dict(checkpoint=dict(remote)), custom_hooks=[dict(remote), dict(local)]))
    line = use_our_checkpoint_hook(cfg)
    assert [hook["type"] for hook in cfg.custom_hooks] == ["CheckpointHook", "mmvmamba.CheckpointHook"]
    assert cfg.default_hooks.checkpoint["type"] == "CheckpointHook"
    assert line.count("remote place") == 1 and "in place of MMEngine's hook" in line


@pytest.mark.parametrize("name", ["EpochBasedTrainLoop", "IterBasedTrainLoop"])
def test_our_loops_take_what_mmengines_take(name):
    ours, stock = (inspect.signature(getattr(module, name)).parameters for module in (engine, _mmengine()))
    assert [*ours] == [*stock]
    assert [one.default for one in ours.values()] == [one.default for one in stock.values()]


def _mmengine():
    from mmengine import runner

    return runner


def test_fast_forward_is_taken_and_named(tmp_path, capsys):
    cfg = config(tmp_path, by_epoch=False, length=2, val_interval=9, log_level="INFO")
    cfg.train_cfg.fast_forward_on_resume = True
    assert train(cfg).iter == 2
    assert "fast_forward_on_resume changes nothing" in next(tmp_path.glob("*/*.log")).read_text()


class Noted(TinyData):
    """Notes in which order its samples are asked for."""

    def __init__(self):
        self.order = []

    def __getitem__(self, index):
        self.order.append(index)
        return super().__getitem__(index)


def test_hook_leaves_loops_of_others_alone(tmp_path):
    """MMEngine's loader draws its order from the global generators, which must move on from epoch to epoch."""
    data = Noted()
    runner = Runner(
        TinyModel(),
        str(tmp_path),
        train_dataloader=DataLoader(data, batch_size=2, shuffle=True, collate_fn=pseudo_collate),
        train_cfg=dict(type="mmengine.EpochBasedTrainLoop", max_epochs=4),
        optim_wrapper=dict(optimizer=dict(type="AdamW", lr=0.01)),
        custom_hooks=[HOOK],
        randomness=dict(seed=5),
        default_scope="mmengine",
        log_level="WARNING",
        experiment_name="loops_of_others",
    )
    runner.train()
    orders = [data.order[first : first + len(data)] for first in range(0, 4 * len(data), len(data))]
    assert all(sorted(order) == [*range(len(data))] for order in orders)
    assert all(one != other for one, other in itertools.pairwise(orders))
    assert (
        "RandomStateHook does nothing: the training loop is EpochBasedTrainLoop of mmengine"
        in next(tmp_path.glob("*/*.log")).read_text()
    )


class DrawsBetween(Hook):
    """Draws outside of the step, as a hook does that picks images to show."""

    def __init__(self):
        self.drawn = {}

    @staticmethod
    def by(runner):
        """Return what the hook of a runner, a copy of the config's, has drawn."""
        return next(hook.drawn for hook in runner.hooks if isinstance(hook, DrawsBetween))

    def _draw(self, runner, what):
        self.drawn[what, runner.iter] = (random.random(), float(np.random.rand()), float(torch.rand(1)))

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self._draw(runner, "iteration")

    def before_train_epoch(self, runner):
        self._draw(runner, "epoch")

    def before_val_epoch(self, runner):
        self._draw(runner, "validation")


def test_hooks_draw_other_numbers_every_time_and_the_same_after_resuming(tmp_path):
    def settings(name):
        cfg = config(tmp_path / name, length=3)
        cfg.custom_hooks.append(DrawsBetween())
        return cfg

    drawn = DrawsBetween.by(train(settings("uninterrupted")))
    assert len(drawn) == 15 + 3 + 3
    for numbers in zip(*drawn.values(), strict=True):
        assert len({*numbers}) == len(drawn)
    resumed = DrawsBetween.by(train(settings("resumed"), tmp_path / "uninterrupted/iter_8.pth"))
    # The epoch that is gone on with begins in its middle, which the uninterrupted training has not.
    assert {**drawn, **resumed, ("epoch", 8): 0} == {**drawn, ("epoch", 8): 0}
    assert len(resumed) == 7 + 2 + 2
