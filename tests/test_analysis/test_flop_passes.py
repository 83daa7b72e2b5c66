"""Forward and backward in PyTorch's convention, and which row of a table they are counted for."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import cv2
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mmvmamba.analysis.flop_passes import count_backbone_passes, count_passes
from mmvmamba.analysis.flops import count_backbone, count_model, table_rows
from mmvmamba.apis.runner import load_config
from mmvmamba.errors import ConfigError
from mmvmamba.models.backbones import FAMILIES
from mmvmamba.ops.flops import NOT_OURS
from tests.nano_models import digits_config

ROOT = Path(__file__).parents[2]


class Branches(nn.Module):
    """Two stages; the second is read twice, by a norm and by a side branch that autograd interleaves with it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 2, stride=2)
        self.stages = nn.ModuleList([nn.Sequential(nn.Conv2d(4, 8, 1)), nn.Sequential(nn.Conv2d(8, 8, 1, groups=8))])
        self.side = nn.Conv2d(4, 2, 1)
        self.frozen = nn.Conv2d(8, 5, 1).requires_grad_(False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.stem(x)
        side = self.side(x)
        for stage in self.stages:
            x = stage(x)
        return side, self.frozen(x)


def test_rows_by_hand():
    model = Branches()
    assert table_rows(model) == ["stem", "stages.0", "stages.1", "side", "frozen"]
    passes, published = count_backbone_passes(model, 8, 12), count_backbone(model, 8, 12)
    pixels = 4 * 6
    products = {
        "stem": pixels * 4 * 3 * 4,
        "side": pixels * 4 * 2,
        "stages.0": pixels * 4 * 8,
        "stages.1": pixels * 8,
        "frozen": pixels * 8 * 5,
    }
    assert published.by_row == products
    assert passes.forward.by_row == {name: 2 * count for name, count in products.items()}
    assert passes.backward is not None
    # The image wants no gradient, and neither do frozen weights; all else takes two products.
    gradients = dict.fromkeys(products, 2) | {"stem": 1, "frozen": 1}
    assert passes.backward.by_row == {name: 2 * gradients[name] * count for name, count in products.items()}
    assert passes.backward.by_operator == {"aten.convolution_backward": passes.backward.flops}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_backbone_has_a_backward_of_about_two_forwards(family):
    """The rows add up, and every stage has its share."""
    model = FAMILIES[family](arch="nano")
    passes = count_backbone_passes(model, 64, 96)
    assert passes.backward is not None
    for one in (passes.forward, passes.backward):
        assert sum(one.by_row.values()) == sum(one.by_operator.values()) == one.flops
    assert 1.7 < passes.backward.flops / passes.forward.flops < 2.2
    stages = [name for name in passes.forward.by_row if name.startswith("layers.")]
    # MobileMamba's first stage is empty.
    assert stages == [f"layers.{index}" for index, layer in enumerate(model.layers) if list(layer.parameters())]
    assert set(passes.forward.by_row) == set(passes.backward.by_row)
    # A multiply-add counts 2 here and 1 there; norms count there, scans 9 n + 1 there and 6 n and more here.
    assert 1.4 < passes.forward.flops / count_backbone(model, 64, 96).flops < 2


@pytest.mark.parametrize("family", ["vmamba", "vssd"])
def test_shapes_alone_count_as_real_tensors_do(family):
    """On the CPU the compiled operators run; for VSSD they are products of its own, counted by their formula."""
    torch.manual_seed(0)
    model = FAMILIES[family](arch="nano").eval()
    passes = count_backbone_passes(model, 64, 64)
    with FlopCounterMode(display=False, custom_mapping=NOT_OURS) as counter:
        outputs = model(torch.randn(1, 3, 64, 64))
        forward = counter.get_total_flops()
        sum(output.sum() for output in outputs).backward()
    assert forward == pytest.approx(passes.forward.flops, rel=0.02)
    assert passes.backward is not None
    assert counter.get_total_flops() - forward == pytest.approx(passes.backward.flops, rel=0.02)


def test_without_the_backward():
    passes = count_backbone_passes(Branches().requires_grad_(False), 8, 8, backward=False)
    assert passes.backward is None and passes.forward.flops > 0
    with pytest.raises(ConfigError, match="the backward is asked for, but no parameter of the model wants a gradient"):
        count_backbone_passes(Branches().requires_grad_(False), 8, 8)


def test_all_heads_of_a_detector_are_differentiated():
    """A linear layer of a head costs two products as large as its own, whatever the boxes come from."""
    cfg = load_config(str(digits_config("det")))
    passes = count_passes(cfg, 64, 64, proposals=50)
    assert passes.backward is not None
    assert list(passes.forward.by_row)[-3:] == ["rpn_head", "roi_head.bbox_head", "roi_head.mask_head"]
    for head in list(passes.forward.by_row)[-3:]:
        assert passes.backward.by_row[head] == 2 * passes.forward.by_row[head]
    assert passes.forward.by_row.keys() < count_model(cfg, 64, 64, proposals=50).by_row.keys()


def test_mask_heads_of_a_cascade_are_differentiated():
    pytest.importorskip("mmdet")
    cfg = load_config("configs/det/vmamba/cascade-mask-rcnn_vmamba-tiny-s1l8_fpn_ms-crop-3x_coco.py")
    cfg.model.backbone = dict(type="mmvmamba.VMamba", arch="nano", out_indices=(0, 1, 2, 3))
    cfg.model.neck.in_channels = [32, 64, 128, 256]
    passes = count_passes(cfg, 64, 64, proposals=20)
    assert passes.backward is not None
    for stage in range(3):
        for head in (f"roi_head.mask_head.{stage}", f"roi_head.bbox_head.{stage}"):
            assert passes.backward.by_row[head] == pytest.approx(2 * passes.forward.by_row[head], rel=0.02)


def test_the_tool_prints_both_conventions(tmp_path):
    command = [sys.executable, "-W", "ignore", "tools/analysis_tools/get_flops.py", str(digits_config("cls"))]
    folder = tmp_path / "new"
    done = subprocess.run([*command, "--backward", "--out-dir", str(folder)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "a multiply-add counts 1" in done.stdout and "a multiply-add counts 2" in done.stdout
    written = json.loads((folder / "get_flops.json").read_text())
    with (folder / "get_flops.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["part"] for row in rows] == list(written["by_row"])
    assert sum(int(row["PyTorch backward"]) for row in rows) == written["pytorch_backward"]["flops"]
    image = cv2.imread(str(folder / "get_flops.png"))
    assert image is not None and image.std() > 1
    assert written["pytorch_backward"]["flops"] > written["pytorch_forward"]["flops"] > written["flops"]
    assert f"{written['pytorch_backward']['flops']:,}" in done.stdout
    (tmp_path / "taken").write_text("")
    done = subprocess.run([*command, "--out-dir", str(tmp_path / "taken")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: the folder"), done.stderr
