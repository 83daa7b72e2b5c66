"""Real heads in two processes: the digits recipes of all three tasks by ``dist_train.sh`` and ``dist_test.sh``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmvmamba.checkpoints import read_checkpoint

ROOT = Path(__file__).parents[2]
CONFIGS = {
    "det": ("mmdet", "configs/det/digits/mask-rcnn_vmamba-nano_fpn_digits.py"),
    "seg": ("mmseg", "configs/seg/digits/vmamba-nano_upernet_digits.py"),
    "cls": ("mmpretrain", "configs/cls/digits/vmamba-nano_digits.py"),
}


def _run(folder: Path, *arguments: str) -> str:
    result = subprocess.run(
        ["bash", *arguments], cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=400,
        env={**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout
    return result.stdout


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("digits")
    subprocess.run(
        [sys.executable, str(ROOT / "tools/dataset_converters/digits.py"), "--out", str(folder), "--train", "16",
         "--val", "6", "--train-crops", "40", "--val-crops", "20"],
        check=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    return folder


@pytest.mark.soak
@pytest.mark.parametrize("task", CONFIGS)
def test_recipe_in_two_processes(tmp_path, digits, task):
    """Three iterations: in the second and third DDP would complain about a parameter without a gradient."""
    scope, config = CONFIGS[task]
    pytest.importorskip(scope)
    data = [f"{split}_dataloader.dataset.data_root={digits}" for split in ("train", "val", "test")]
    if task == "det":
        data += [f"{split}_evaluator.ann_file={digits}/annotations/instances_val.json" for split in ("val", "test")]
    work = tmp_path / "work"
    output = _run(
        tmp_path, str(ROOT / "tools/dist_train.sh"), str(ROOT / config), "2", "--work-dir", str(work), "--cfg-options",
        "model.backbone.init_cfg=None", "train_dataloader.batch_size=2", "train_cfg.max_iters=3",
        "train_cfg.val_interval=3", "default_hooks.logger.interval=1", "default_hooks.checkpoint.interval=3", *data,
    )  # fmt: skip
    assert "Iter(train) [3/3]" in output
    content = read_checkpoint(work / "iter_3.pth")
    assert content["meta"]["iter"] == 3
    output = _run(
        tmp_path, str(ROOT / "tools/dist_test.sh"), str(ROOT / config), str(work / "iter_3.pth"), "2", "--work-dir",
        str(work / "test"), "--cfg-options", "model.backbone.init_cfg=None", *data,
    )  # fmt: skip
    assert "Iter(test)" in output or "Epoch(test)" in output
