"""Curves and picture grids are drawn from what MMEngine leaves behind; bad input is named."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

from mmvmamba.analysis.curves import plot_curves, read_scalars
from mmvmamba.analysis.gallery import save_gallery
from mmvmamba.errors import DataError


def test_scalars_become_series_and_a_picture(tmp_path: Path) -> None:
    path = tmp_path / "scalars.json"
    path.write_text(
        '{"loss": 2.0, "iter": 1, "step": 1}\n{"loss": 1.0, "iter": 2, "step": 2}\n{"mIoU": 50.0, "step": 2}\n'
    )
    assert read_scalars(path) == {"loss": [(1, 2.0), (2, 1.0)], "mIoU": [(2, 50.0)]}
    plot_curves(path, tmp_path / "curves.png", ["mIoU"], "title")
    assert cv2.imread(str(tmp_path / "curves.png")).std() > 1


def test_bad_scalars_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no scalars at"):
        read_scalars(tmp_path / "absent.json")
    (tmp_path / "broken.json").write_text('{"loss": 1.0, "step": 1}\n{"loss"')
    with pytest.raises(DataError, match="line 2"):
        read_scalars(tmp_path / "broken.json")


def test_classification_grid_marks_right_and_wrong(tmp_path: Path) -> None:
    crop = tmp_path / "crop.jpg"
    cv2.imwrite(str(crop), np.full((64, 64, 3), 90, dtype=np.uint8))
    samples = [
        SimpleNamespace(img_path=str(crop), gt_label=torch.tensor([1]), pred_label=torch.tensor([found]))
        for found in (1, 7)
    ]
    save_gallery("cls", samples, tuple("0123456789"), tmp_path / "grid.png")
    grid = cv2.imread(str(tmp_path / "grid.png"))
    right, wrong = grid[-2, 60], grid[-2, grid.shape[1] // 2 + 60]
    assert right[1] > right[2] and wrong[2] > wrong[1]


def test_unknown_task_and_unreadable_picture_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected 'det', 'seg' or 'cls'"):
        save_gallery("pose", [], (), tmp_path / "grid.png")
    sample = SimpleNamespace(img_path=str(tmp_path / "absent.jpg"))
    with pytest.raises(DataError, match=r"absent\.jpg"):
        save_gallery("cls", [sample], (), tmp_path / "grid.png")
