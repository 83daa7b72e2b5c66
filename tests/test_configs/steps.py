"""One step of a runner, and what must hold of it on every device."""

from __future__ import annotations

import math
from typing import Any

import torch
from mmengine.runner import Runner

from tests.test_configs.small_data import IMAGES

#: What a model of each task is measured by.
SCORES = {"cls": "accuracy/top1", "det": "coco/bbox_mAP", "seg": "mIoU"}


def make_training_step(runner: Runner) -> None:
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


def make_test_step(runner: Runner, task: str) -> None:
    """Test by the runner's own loop and evaluator; the score of the task must be a number."""
    metrics = runner.test()
    # Scores of classes that the digits lack are NaN. Without any prediction COCO gives no score at all.
    assert math.isfinite(metrics[SCORES[task]]), metrics
    assert len(runner.test_dataloader.dataset) == IMAGES
