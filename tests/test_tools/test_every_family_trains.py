"""Every family learns inside Mask R-CNN and UperNet: a hundred iterations of the digits configs by ``tools/train.py``.

Issue 7, done when 4. The budget is 40 seconds for both on a quiet core; a new family is tested by being listed. Every
change trains each family once, the families in turn as detectors and segmentors; ``make test-slow`` trains the rest.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mmvmamba.datasets.digits import DigitsSettings, write_digits
from mmvmamba.models.backbones import FAMILIES
from mmvmamba.models.backbones.base import BaseBackbone
from tests.nano_models import digits_config, script

ITERATIONS, ENDS = 100, 20
#: Task: library, images of a step, and by what part the mean loss of the last iterations must be below the first's.
TASKS = {"det": ("mmdet", 1, 0.3), "seg": ("mmseg", 2, 0.3)}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("digits") / "data"
    write_digits(folder, DigitsSettings(40, 2, 0, 10, 10))
    return folder


def _options(task: str, family: str, data: Path, batch_size: int) -> dict[str, object]:
    """Return what is overridden in the digits config of a task: backbone, widths behind it, length and data."""
    nano = FAMILIES[family]("nano")
    channels = [nano.stage_channels[i] for i in nano.out_indices]
    if task == "det":
        widths = _pyramid(nano, channels)
        widths |= {f"{split}_evaluator.ann_file": data / "annotations/instances_val.json" for split in ("val", "test")}
    else:
        widths = {}
        if [nano.stage_strides[i] for i in nano.out_indices] == [16, 32, 64]:
            # Upstream's segmentors have a pyramid, too. Batch norms over few cells learn less from two images.
            batch_size *= 2
            widths, channels = _mobile_pyramid(channels, 32), [32] * 4
        auxiliary = min(2, len(channels) - 2)
        widths |= {
            "model.decode_head.in_channels": channels,
            "model.decode_head.in_index": list(range(len(channels))),
            "model.auxiliary_head.in_channels": channels[auxiliary],
            "model.auxiliary_head.in_index": auxiliary,
        }
    return {
        "model.backbone.out_indices": list(nano.out_indices),
        **widths,
        "model.backbone.type": f"mmvmamba.{FAMILIES[family].__name__}",
        "model.backbone.init_cfg": None,
        "train_dataloader.batch_size": batch_size,
        "train_dataloader.num_workers": 0,
        "train_dataloader.persistent_workers": False,
        **{f"{split}_dataloader.dataset.data_root": f"{data}/" for split in ("train", "val", "test")},
        "train_cfg.max_iters": ITERATIONS,
        "train_cfg.val_interval": 10 * ITERATIONS,
        "default_hooks.checkpoint.interval": 10 * ITERATIONS,
        "default_hooks.logger.interval": 1,
        "log_processor.window_size": 1,
        # MMEngine has one visualizer of a name in a process, and it writes the losses.
        "visualizer.name": f"{family}-{task}",
    }


def _pyramid(nano: BaseBackbone, channels: list[int]) -> dict[str, object]:
    """Return what makes maps of strides 4, 8, 16 and 32 of those of the backbone."""
    strides = [nano.stage_strides[i] for i in nano.out_indices]
    if strides == [4, 8, 16, 32]:
        return {"model.neck.in_channels": channels}
    if len(set(strides)) == 1:
        return {
            "model.backbone.out_indices": [nano.out_indices[-1]],
            "model.neck.type": "mmvmamba.SimpleFeaturePyramid",
            "model.neck.in_channels": channels[-1:],
        }
    assert strides == [16, 32, 64]
    return {**_mobile_pyramid(channels, 64), "model.rpn_head.anchor_generator.strides": [4, 8, *strides]}


def _mobile_pyramid(channels: list[int], out_channels: int) -> dict[str, object]:
    """Return a neck that makes maps of strides 4 to 64 of those of strides 16, 32 and 64."""
    return {
        "model.neck.type": "mmvmamba.EfficientViTFPN",
        "model.neck.in_channels": channels,
        "model.neck.out_channels": out_channels,
        "model.neck.num_extra_trans_convs": 2,
        "model.neck.num_outs": 5,
    }


def _trainings() -> Iterator[Any]:
    for number, family in enumerate(FAMILIES):
        for turn, task in enumerate(TASKS):
            yield pytest.param(family, task, marks=[] if (number + turn) % 2 == 0 else pytest.mark.soak)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "task"), list(_trainings()))
def test_the_loss_falls(family: str, task: str, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library, batch_size, fall = TASKS[task]
    pytest.importorskip(library)
    options = [f"{key}={value}" for key, value in _options(task, family, digits, batch_size).items()]
    work_dir = tmp_path / "work"
    arguments = ["tools/train.py", str(digits_config(task)), "--work-dir", str(work_dir), "--no-amp", "--cfg-options"]
    monkeypatch.setattr(sys, "argv", [*arguments, *(option.replace(" ", "") for option in options)])
    monkeypatch.setenv("LOCAL_RANK", "0")
    script("tools/train.py").main()
    (record,) = work_dir.rglob("scalars.json")
    losses = [entry["loss"] for entry in map(json.loads, record.read_text().splitlines()) if "loss" in entry]
    assert len(losses) == ITERATIONS and all(map(math.isfinite, losses))
    first, last = statistics.mean(losses[:ENDS]), statistics.mean(losses[-ENDS:])
    print(f"{family} {task}: {first:.3f} -> {last:.3f}")
    assert last < (1 - fall) * first
