"""Models on a GPU: the same features on every backend, training under autocast."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from mmvmamba.testing import assert_close
from tests import gpu_checks

pytestmark = pytest.mark.gpu

CONFIG = Path(__file__).parents[2] / "configs/det/digits/mask-rcnn_vmamba-nano_fpn_digits.py"
STEPS = 50
NO_MMENGINE = "the models need mmengine: pip install 'mmvmamba[onedl]', or gpu_session.py --fetch-wheels before"


def test_features_are_those_of_the_cpu(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mmengine", reason=NO_MMENGINE)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    for have, want in zip(gpu_checks.features("cuda", backend), gpu_checks.features("cpu", None), strict=True):
        assert_close("features", have, want, 3e-5)


@pytest.mark.parametrize("dtype", gpu_checks.LOW, ids=str)
def test_backbone_trains_under_autocast(dtype: torch.dtype) -> None:
    pytest.importorskip("mmengine", reason=NO_MMENGINE)
    losses = gpu_checks.losses_of_training("cuda", dtype, STEPS)
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("dtype", gpu_checks.LOW, ids=str)
def test_detector_trains_under_autocast(dtype: torch.dtype) -> None:
    pytest.importorskip("mmdet", reason="mmdet is not installed; the backbone alone is trained above")
    losses = gpu_checks.losses_of_detector_training("cuda", dtype, STEPS, str(CONFIG))
    assert all(map(math.isfinite, losses))
