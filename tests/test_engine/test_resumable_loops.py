"""Which training loops tools/train.py replaces."""

import copy

import pytest

pytest.importorskip("mmengine")

from mmengine.config import Config
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop

from mmvmamba.apis.guards import use_resumable_loops
from mmvmamba.engine import RandomStateHook

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
    assert (
        use_resumable_loops(cfg) == f"The training loop is {kind}: a resumed training may not be bit for bit the same."
    )
    assert cfg.train_cfg.type == kind
    assert cfg.custom_hooks == [HOOK]


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
