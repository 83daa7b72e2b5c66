"""The demo: classifier, detector and segmentor trained, tested and drawn on the digits data set.

Every step is the command a user would type: ``tools/train.py`` and ``tools/test.py`` as processes of their own, on
the configs of ``configs/{cls,det,seg}/digits``. The detector and the segmentor start from the classifier's
checkpoint.
"""

from __future__ import annotations

import json
import math
import shlex
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmvmamba.analysis.curves import plot_curves
from mmvmamba.analysis.gallery import collect_predictions, save_gallery
from mmvmamba.apis.runner import load_config
from mmvmamba.checkpoints import manifest_path
from mmvmamba.datasets import CLASSES, SEG_CLASSES, DigitsSettings, write_digits
from mmvmamba.errors import DataError, MMVMambaError

QUICK_DATA = DigitsSettings(train=24, val=8, train_crops=96, val_crops=40)
_SHOWN = (" Iter(train) ", " Epoch(train) ")  # the log lines worth a line on the console


class DemoError(MMVMambaError, RuntimeError):
    """A step of the demo failed; the message says which and where its log is."""


@dataclass(frozen=True)
class Stage:
    """One tool of the road: its config, the metrics it reports, and where the pictures take class names from.

    Attributes:
        name: Sub-folder of the work folder and task: cls, det or seg.
        config: Config relative to the root of the repository.
        title: What the curves are headed with.
        metrics: Name in summary.json -> (name in the test's log, factor that brings it to 0..1).
        data_options: Config keys -> path below the data folder.
        quick_options: Config keys changed by the quick demo.
        classes: Class names in order.
        pictures: How many samples the picture grid shows.
    """

    name: str
    config: str
    title: str
    metrics: Mapping[str, tuple[str, float]]
    data_options: Mapping[str, str]
    quick_options: Mapping[str, int]
    classes: tuple[str, ...]
    pictures: int


_DATA_ROOTS = {f"{split}_dataloader.dataset.data_root": "" for split in ("train", "val", "test")}
_COCO_VAL = "annotations/instances_val.json"
_QUICK = {"train_cfg.max_iters": 6, "train_cfg.val_interval": 6, "default_hooks.logger.interval": 2}

STAGES = (
    Stage(
        name="cls",
        config="configs/cls/digits/vmamba-nano_digits.py",
        title="VMamba nano classifier",
        metrics={"accuracy": ("accuracy/top1", 0.01)},
        data_options=_DATA_ROOTS,
        quick_options={**_QUICK, "train_dataloader.batch_size": 16},
        classes=CLASSES,
        pictures=48,
    ),
    Stage(
        name="det",
        config="configs/det/digits/mask-rcnn_vmamba-nano_fpn_digits.py",
        title="Mask R-CNN, VMamba nano",
        metrics={"bbox_mAP": ("coco/bbox_mAP", 1.0), "segm_mAP": ("coco/segm_mAP", 1.0)},
        data_options={**_DATA_ROOTS, "val_evaluator.ann_file": _COCO_VAL, "test_evaluator.ann_file": _COCO_VAL},
        quick_options={**_QUICK, "train_dataloader.batch_size": 2},
        classes=CLASSES,
        pictures=16,
    ),
    Stage(
        name="seg",
        config="configs/seg/digits/vmamba-nano_upernet_digits.py",
        title="UperNet, VMamba nano",
        metrics={"mIoU": ("mIoU", 0.01)},
        data_options=_DATA_ROOTS,
        quick_options={**_QUICK, "train_dataloader.batch_size": 2},
        classes=SEG_CLASSES,
        pictures=16,
    ),
)


@dataclass
class StageResult:
    """What one stage gave: metrics (0..1), seconds of training and testing, and its files."""

    metrics: dict[str, float]
    train_seconds: float
    test_seconds: float
    files: dict[str, Path] = field(default_factory=dict)


def run_demo(root: Path, work_dir: Path, data_root: Path, quick: bool) -> dict[str, Any]:
    """Walk the whole road and return what is written to ``work_dir/summary.json``.

    Args:
        root: The repository, which holds ``tools`` and ``configs``.
        work_dir: Receives ``cls``, ``det``, ``seg`` and ``summary.json``.
        data_root: The data folder, made if it is absent.
        quick: A few iterations on a few pictures, to see that everything works.

    Raises:
        DemoError: a step failed or left no result.
        DataError: ``data_root`` holds something else.
    """
    started = time.perf_counter()
    work_dir, data_root = work_dir.resolve(), data_root.resolve()
    _say(f"1/4 data set in {data_root}")
    settings = QUICK_DATA if quick else DigitsSettings()
    made = write_digits(data_root, settings, _data_progress)
    _say("made" if made else "already there")
    results: dict[str, StageResult] = {}
    for number, stage in enumerate(STAGES, start=2):
        _say(f"{number}/4 {stage.title}")
        init = results["cls"].files["checkpoint"] if results else None
        results[stage.name] = _run_stage(stage, root, work_dir / stage.name, data_root, init, quick)
    summary = _summary(results, quick, time.perf_counter() - started)
    path = work_dir / "summary.json"
    path.write_text(json.dumps(summary, indent=2) + "\n")
    print(format_table(results, path, summary), flush=True)
    return summary


def _run_stage(stage: Stage, root: Path, folder: Path, data_root: Path, init: Path | None, quick: bool) -> StageResult:
    """Train, test and draw one stage."""
    folder.mkdir(parents=True, exist_ok=True)
    _remove_earlier(folder)
    config = root / stage.config
    options: dict[str, Any] = {key: str(data_root / tail) for key, tail in stage.data_options.items()}
    if quick:
        options.update(stage.quick_options)
    if init is not None:
        options["model.backbone.init_cfg.checkpoint"] = str(init)
    flags = ["--cfg-options", *(f"{key}={value}" for key, value in options.items())]

    train = [sys.executable, str(root / "tools/train.py"), str(config), "--work-dir", str(folder), *flags]
    train_seconds = _run(train, root, folder / "train.log")
    checkpoint = _last_checkpoint(folder)
    test_dir = folder / "test"
    test = [sys.executable, str(root / "tools/test.py"), str(config), str(checkpoint), "--work-dir", str(test_dir)]
    test_seconds = _run([*test, *flags], root, folder / "test.log")

    files = {
        "checkpoint": checkpoint,
        "log": folder / "train.log",
        "curves": folder / "curves.png",
        "predictions": folder / "predictions.png",
    }
    metrics = _read_metrics(stage, test_dir)
    _draw(stage, config, options, folder, files)
    return StageResult(metrics, train_seconds, test_seconds, files)


def _remove_earlier(folder: Path) -> None:
    """Remove the checkpoints that an earlier demo left: the training would refuse to overwrite them.

    Raises:
        DemoError: they are not of a demo.
    """
    checkpoints = [path for path in sorted(folder.glob("*.pth")) if path.is_file()]
    if not checkpoints:
        return
    log = folder / "train.log"
    if not log.is_file() or not log.read_text(errors="replace").startswith("$ "):
        raise DemoError(
            f"{folder} holds checkpoints ({checkpoints[0].name}) but no train.log of the demo, expected an empty "
            "folder or that of an earlier demo. Name another one with --work-dir."
        )
    for path in checkpoints:
        path.unlink()
        manifest_path(path).unlink(missing_ok=True)
    (folder / "last_checkpoint").unlink(missing_ok=True)
    _say(f"removed {len(checkpoints)} checkpoints of an earlier demo in {folder}")


def _draw(stage: Stage, config: Path, options: dict[str, Any], folder: Path, files: Mapping[str, Path]) -> None:
    """Draw the curves and the picture grid of a stage."""
    plot_curves(_newest(folder, "*/vis_data/scalars.json"), files["curves"], _curve_names(stage), stage.title)
    cfg = load_config(str(config), cfg_options=options)
    samples = collect_predictions(cfg, files["checkpoint"], stage.pictures)
    save_gallery(stage.name, samples, stage.classes, files["predictions"])


def _curve_names(stage: Stage) -> list[str]:
    return [name for name, _ in stage.metrics.values()]


def _run(command: list[str], root: Path, log: Path) -> float:
    """Run a command, its output into ``log`` and its progress onto the console; return the seconds it took.

    Raises:
        DemoError: it failed; the end of its output is in the message.
    """
    _say(f"$ {shlex.join(command[:5])} ...  (all of it: {log})")
    started = time.perf_counter()
    tail: deque[str] = deque(maxlen=25)
    with log.open("w") as sink:
        sink.write(f"$ {shlex.join(command)}\n")
        process = subprocess.Popen(command, cwd=root, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # noqa: S603 (our own tools)
        try:
            for line in process.stdout or ():
                sink.write(line)
                sink.flush()
                tail.append(line)
                if any(mark in line for mark in _SHOWN):
                    print("   " + line.split("INFO - ")[-1].rstrip()[:150], flush=True)
        except BaseException:
            process.terminate()
            raise
        finally:
            code = process.wait()
    if code != 0:
        raise DemoError(
            f"{shlex.join(command[:3])} ended with status {code}; its last lines (all in {log}):\n{''.join(tail)}"
        )
    return time.perf_counter() - started


def _last_checkpoint(folder: Path) -> Path:
    """The checkpoint MMEngine names in ``last_checkpoint``."""
    pointer = folder / "last_checkpoint"
    if not pointer.is_file() or not Path(pointer.read_text().strip()).is_file():
        raise DemoError(f"the training left no checkpoint in {folder}; see {folder / 'train.log'}")
    return Path(pointer.read_text().strip())


def _newest(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime)
    if not found:
        raise DemoError(f"there is no {pattern} in {folder}; see the logs there")
    return found[-1]


def _read_metrics(stage: Stage, test_dir: Path) -> dict[str, float]:
    """The metrics of the newest test, brought to 0..1.

    Raises:
        DemoError: a metric is absent or not finite.
    """
    path = _newest(test_dir, "*/*.json")
    found = json.loads(path.read_text().splitlines()[-1])
    metrics = {}
    for name, (logged, factor) in stage.metrics.items():
        value = found.get(logged)
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise DemoError(
                f"{path} has {logged}={value!r}, expected a finite number; see {test_dir.parent / 'test.log'}"
            )
        metrics[name] = round(value * factor, 4)
    return metrics


def _summary(results: Mapping[str, StageResult], quick: bool, seconds: float) -> dict[str, Any]:
    """The content of summary.json: the four metrics (all 0..1), train_seconds of all trainings, and details."""
    summary: dict[str, Any] = {}
    for result in results.values():
        summary.update(result.metrics)
    summary["train_seconds"] = round(sum(result.train_seconds for result in results.values()), 1)
    summary["test_seconds"] = round(sum(result.test_seconds for result in results.values()), 1)
    summary["total_seconds"] = round(seconds, 1)
    summary["quick"] = quick
    summary["stages"] = {
        name: {
            "train_seconds": round(result.train_seconds, 1),
            "test_seconds": round(result.test_seconds, 1),
            **{what: str(path) for what, path in result.files.items()},
        }
        for name, result in results.items()
    }
    return summary


def format_table(results: Mapping[str, StageResult], path: Path, summary: Mapping[str, Any]) -> str:
    """The closing table: metrics on the held-out pictures, seconds of training, and where the files are."""
    lines = ["", f"{'metric (0 to 1)':<18}{'value':>8}   {'training':>9}   folder"]
    for name, result in results.items():
        for metric, value in result.metrics.items():
            lines.append(f"{metric:<18}{value:>8.4f}   {result.train_seconds:>7.0f} s   {path.parent / name}")
    lines.append(f"{'all trainings':<18}{'':>8}   {summary['train_seconds']:>7.0f} s   {path}")
    lines.append(f"The whole demo, with data, tests and pictures: {summary['total_seconds']:.0f} s.")
    lines.append("")
    lines.append("In each folder: predictions.png (beside the truth), curves.png, train.log, test.log, the checkpoint.")
    if summary["quick"]:
        lines.append(
            "This was the quick demo: a few iterations, so the metrics say nothing but that they were computed."
        )
    return "\n".join(lines)


def _data_progress(what: str, done: int, total: int) -> None:
    if done == total or done * 4 // total > (done - 1) * 4 // total:
        print(f"   {what} {done}/{total}", flush=True)


def _say(text: str) -> None:
    print(f"[demo] {text}", flush=True)


__all__ = ["STAGES", "DataError", "DemoError", "Stage", "StageResult", "format_table", "run_demo"]
