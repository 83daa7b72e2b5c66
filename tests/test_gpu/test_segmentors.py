"""The test of a segmentor in windows: what the GPU holds of it."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("mmseg")

import torch
from mmengine.registry import MODELS, init_default_scope

from mmvmamba.apis import load_config

CONFIG = Path(__file__).parents[2] / "configs/seg/digits/vmamba-nano_upernet_digits.py"

pytestmark = pytest.mark.gpu


def test_the_gpu_holds_no_scores_of_the_whole_image():
    cfg = load_config(str(CONFIG))
    init_default_scope("mmseg")
    cfg.model.type = "mmvmamba.WindowedEncoderDecoder"
    cfg.model.backbone.init_cfg = None
    cfg.model.test_cfg = dict(mode="slide", crop_size=(64, 96), stride=(43, 64))
    model = MODELS.build(cfg.model).eval().cuda()
    peaks = []
    for side in (256, 1024):
        info = [dict(img_shape=(side, side), ori_shape=(side, side), pad_shape=(side, side))]
        image = torch.randn(1, 3, side, side, device="cuda")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.no_grad():
            assert model.inference(image, info).device.type == "cpu"
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] <= 1.1 * peaks[0]
