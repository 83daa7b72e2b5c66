"""Every config builds, makes a training step and is tested, on a CPU with its real heads and pipelines.

Issue 6, done when 1. The budget is about 5 seconds a config on a quiet machine, 4 minutes for all of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mmvmamba.apis import build_runner, prepare_training
from tests.test_configs.small_data import CONFIGS, SCOPES, name_of, small_config, task_of
from tests.test_configs.steps import make_test_step, make_training_step

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
    make_training_step(runner)
    make_test_step(runner, task)


def _classes(model: Any, task: str) -> int:
    if task == "cls":
        return model.head.num_classes
    if task == "seg":
        assert not model.with_auxiliary_head or model.decode_head.num_classes == model.auxiliary_head.num_classes
        return model.decode_head.num_classes
    heads = model.roi_head.bbox_head if hasattr(model, "roi_head") else model.bbox_head
    counts = {head.num_classes for head in (heads if isinstance(heads, torch.nn.ModuleList) else [heads])}
    (count,) = counts
    return count
