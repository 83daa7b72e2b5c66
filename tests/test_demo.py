"""The quick demo from end to end: the road `make demo` walks, in a few iterations."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import cv2
import pytest

from mmvmamba.apis.demo import STAGES, DemoError, _remove_earlier, _run

ROOT = Path(__file__).resolve().parents[1]
METRICS = ("accuracy", "bbox_mAP", "segm_mAP", "mIoU")


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, str(ROOT / "tools/demo.py"), "--quick"]
    command += ["--work-dir", str(folder / "work"), "--data-root", str(folder / "data")]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder / "work", done.stdout


def test_summary_has_finite_numbers(quick_run: tuple[Path, str]) -> None:
    summary = json.loads((quick_run[0] / "summary.json").read_text())
    for name in METRICS:
        assert isinstance(summary[name], float) and 0.0 <= summary[name] <= 1.0, name
    assert math.isfinite(summary["train_seconds"]) and summary["train_seconds"] > 0
    assert summary["quick"] is True


def test_every_stage_left_its_files(quick_run: tuple[Path, str]) -> None:
    work, _ = quick_run
    summary = json.loads((work / "summary.json").read_text())
    assert list(summary["stages"]) == [stage.name for stage in STAGES]
    for name, stage in summary["stages"].items():
        assert Path(stage["checkpoint"]).is_file()
        assert Path(stage["checkpoint"]).parent == work / name
        assert Path(stage["log"]).is_file() and (work / name / "test.log").is_file()
        for picture in ("curves", "predictions"):
            image = cv2.imread(stage[picture])
            assert image is not None and image.std() > 1, f"{name}: {picture} is blank or unreadable"


def test_backbone_weights_really_come_from_the_classifier(quick_run: tuple[Path, str]) -> None:
    for name in ("det", "seg"):
        log = (quick_run[0] / name / "train.log").read_text()
        assert re.search(r"VMamba .*: (\d+)/\d+ tensors from .*cls/iter_\d+\.pth", log)


def test_closing_table_names_metrics_and_files(quick_run: tuple[Path, str]) -> None:
    work, output = quick_run
    for text in (*METRICS, str(work / "summary.json"), "quick demo"):
        assert text in output


def test_checkpoints_of_an_earlier_demo_are_removed_and_others_are_not(tmp_path: Path, capsys) -> None:
    names = ["iter_2.pth", "iter_2.pth.json", "last_checkpoint"]
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(DemoError, match="holds checkpoints .*iter_2.pth.* but no train.log of the demo"):
        _remove_earlier(tmp_path)
    assert all((tmp_path / name).exists() for name in names)
    (tmp_path / "train.log").write_text("$ python tools/train.py\n")
    _remove_earlier(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["train.log"]
    assert "removed 1 checkpoints of an earlier demo" in capsys.readouterr().out


def test_failing_step_shows_the_end_of_its_output(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('some words'); raise SystemExit(3)"]
    with pytest.raises(DemoError, match="(?s)status 3.*some words"):
        _run(command, tmp_path, tmp_path / "log")
