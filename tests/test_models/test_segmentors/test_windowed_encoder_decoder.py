"""The test in windows: MMSegmentation's numbers in less memory."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("mmseg")

import torch
from mmengine.registry import MODELS, init_default_scope

from benchmarks.slide_memory import peak_bytes
from mmvmamba.apis import load_config

ROOT = Path(__file__).parents[3]
UPERNET = ROOT / "configs/seg/vmamba/vmamba-tiny-s1l8_upernet_4xb4-160k_ade20k-512x512-slide.py"
#: Bytes per pixel of the whole image: class scores, number of windows, the image itself.
SUMS = 4 * (150 + 1 + 3)
OURS, MMSEGS = "mmvmamba.WindowedEncoderDecoder", "EncoderDecoder"


def _small(kind):
    cfg = load_config(str(ROOT / "configs/seg/digits/vmamba-nano_upernet_digits.py"))
    init_default_scope("mmseg")
    cfg.model.type = kind
    cfg.model.backbone.init_cfg = None
    cfg.model.test_cfg = dict(mode="slide", crop_size=(64, 96), stride=(43, 64))
    torch.manual_seed(0)
    return MODELS.build(cfg.model).eval()


@pytest.mark.parametrize("size", [(64, 96), (107, 161), (40, 200), (33, 50), (200, 97)])
def test_scores_are_mmsegs_bit_for_bit(size):
    image = torch.randn(2, 3, *size)
    ours, mmsegs = _small(OURS), _small(MMSEGS)
    assert list(ours.state_dict()) == list(mmsegs.state_dict())
    info = [dict(img_shape=size, ori_shape=size, pad_shape=size) for _ in range(2)]
    with torch.no_grad():
        scores = ours.inference(image, info)
        assert [meta["img_shape"] for meta in info] == [size] * 2  # mmseg's test writes a window's size into it
        assert torch.equal(scores, mmsegs.inference(image, info))


def test_unknown_arguments_are_refused():
    with pytest.raises(TypeError, match="tset_cfg"):
        MODELS.build(dict(type=OURS, tset_cfg=dict(mode="slide")))


def test_memory_besides_the_sum_of_the_scores_is_that_of_one_window():
    """By shapes alone; on a GPU the sum lies in main memory."""
    cfg = load_config(str(UPERNET))
    init_default_scope("mmseg")
    cfg.model.backbone.init_cfg = None
    model = MODELS.build(cfg.model).eval().to("meta")
    besides = {side: peak_bytes(model, side) - SUMS * side**2 for side in (512, 1024)}
    assert besides[1024] == pytest.approx(besides[512], rel=0.01)
