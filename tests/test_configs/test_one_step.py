"""Every config builds, makes a training step and is tested, on a CPU with its real heads and pipelines.

Issue 6, done when 1. The budget is about 5 seconds a config on a quiet machine, 4 minutes for all of them.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.runner import Runner

from mmvmamba.apis import build_runner, prepare_training
from tests.test_configs.small_data import CONFIGS, IMAGES, SCOPES, name_of, small_config, task_of

#: Class of the models, and what an untrained one is measured by.
SCORES = {"cls": "accuracy/top1", "det": "coco/bbox_mAP", "seg": "mIoU"}
CLASSES = {"cls": 1000, "det": 80, "seg": 150}


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_config_makes_a_training_and_a_test_step(path: Path, small_data: Path, tmp_path: Path) -> None:
    task = task_of(path)
    pytest.importorskip(SCOPES[task])
    cfg = small_config(path, small_data, tmp_path)
    prepare_training(cfg)
    runner = build_runner(cfg)
    if path.parent.name != "digits":
        assert _classes(runner.model, task) == CLASSES[task]
    _train_one_step(runner)
    _test(runner, task)


def _train_one_step(runner: Runner) -> None:
    """Make one step and check what distributed training and the optimizer need."""
    model = runner.model.train()
    runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    batch = next(iter(runner.build_dataloader(runner._train_dataloader)))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = runner.optim_wrapper.optimizer
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == set(map(id, trained.values()))
    before = {name: parameter.detach().clone() for name, parameter in _probes(trained).items()}
    gradients: dict[str, Any] = {}
    optimizer.register_step_pre_hook(lambda *_: gradients.update({n: p.grad for n, p in trained.items()}))
    losses = model.train_step(batch, optim_wrapper=runner.optim_wrapper)
    assert "loss" in losses and all(torch.as_tensor(value).isfinite().all() for value in losses.values()), losses
    # DDP with find_unused_parameters=False waits for a gradient of every parameter that wants one.
    assert [name for name in trained if gradients[name] is None] == []
    assert [name for name, gradient in gradients.items() if not gradient.isfinite().all()] == []
    assert [name for name, value in before.items() if torch.equal(value, trained[name])] == []


def _probes(trained: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a few parameters that must move: the scan's, the first weight and those of the last module."""
    names = [name for name in trained if name.endswith(("0.blocks.0.op.A_logs", "0.blocks.0.op.dt_projs_bias"))]
    return {name: trained[name] for name in (*names, next(iter(trained)), next(reversed(trained)))}


def _test(runner: Runner, task: str) -> None:
    metrics = runner.test()
    # Scores of classes that the digits lack are NaN. Without any prediction COCO gives no score at all.
    assert math.isfinite(metrics[SCORES[task]]), metrics
    assert len(runner.test_dataloader.dataset) == IMAGES


def _classes(model: Any, task: str) -> int:
    if task == "cls":
        return model.head.num_classes
    if task == "seg":
        assert model.decode_head.num_classes == model.auxiliary_head.num_classes
        return model.decode_head.num_classes
    heads = model.roi_head.bbox_head if hasattr(model, "roi_head") else model.bbox_head
    counts = {head.num_classes for head in (heads if isinstance(heads, torch.nn.ModuleList) else [heads])}
    (count,) = counts
    return count
