"""Class activation maps against what the papers' formulas give by hand; scores of classes for all three tasks."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mmvmamba.analysis.cam import METHODS, ActivationMap, AsMap, activation_maps, draw_activation_maps
from mmvmamba.analysis.class_scores import class_scores
from mmvmamba.errors import ConfigError, DataError, MissingPackage
from mmvmamba.models.backbones import FAMILIES
from tests.nano_models import ROOT, nano_checkpoint, nano_model, script

pytest.importorskip("mmpretrain")
pytest.importorskip("mmdet")
pytest.importorskip("mmseg")
pytest.importorskip("pytorch_grad_cam")


def picture(side: int = 96) -> Tensor:
    return torch.randn(1, 3, side, side)


def shown(cam: Tensor, side: int) -> np.ndarray:
    """A map (h, w) as the package shows it: positive part, from 0 to 1, enlarged, from 0 to 1 again."""
    for enlarge in (True, False):
        cam = cam.clamp(min=0)
        cam = (cam - cam.min()) / (cam.max() - cam.min() + 1e-7)
        if enlarge:
            cam = torch.from_numpy(cv2.resize(cam.detach().numpy(), (side, side)))
    return cam.numpy()


def test_gradcam_of_a_linear_classifier_is_its_own_map() -> None:
    """Behind a mean over the map and a linear layer, the gradient of a class is its weights: CAM as first published."""
    model = nano_model("cls").eval()
    image = picture()
    for label in (2, 7):
        (found,) = activation_maps(model, "cls", image, ["GradCAM"], label=label)
        with torch.no_grad():
            features = model.backbone(image)[-1][0]
        wanted = torch.einsum("c,chw->hw", model.head.fc.weight[label], features)
        np.testing.assert_allclose(found.values, shown(wanted, 96), atol=1e-4)
        assert found.label == label
        assert found.score == pytest.approx(float(model(image, mode="tensor")[0, label]), rel=1e-4)


@pytest.mark.parametrize("task", ["det", "seg"])
def test_gradcam_is_what_its_formula_says(task: str) -> None:
    model = nano_model(task).eval()
    image = picture()
    (found,) = activation_maps(model, task, image, ["GradCAM"], stage=1)

    kept: list[Tensor] = []
    handle = model.backbone.register_forward_hook(lambda _m, _i, maps: kept.append(maps[1]))
    scores = class_scores(model, task)
    assert scores.fix(image) == found.label
    score = scores(image)[0, found.label]
    handle.remove()
    (grad,) = torch.autograd.grad(score, kept[-1])
    wanted = (grad.mean((2, 3), keepdim=True) * kept[-1]).sum(1)[0]
    np.testing.assert_allclose(found.values, shown(wanted, 96), atol=1e-3)
    assert found.score == pytest.approx(float(score), rel=1e-4)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.backbone._forward_hooks


def test_a_segmentor_s_score_is_the_mean_over_what_a_class_wins() -> None:
    model = nano_model("seg").eval()
    image = picture()
    scores = class_scores(model, "seg")
    surest = scores.fix(image)
    logits = model(image, mode="tensor")[0]
    won = logits.argmax(0)
    assert surest == int(torch.bincount(won.flatten()).argmax())
    got = scores(image)[0]
    for label in range(len(logits)):
        cells = won == label
        wanted = logits[label][cells].mean() if cells.any() else logits[label].mean()
        assert float(got[label]) == pytest.approx(float(wanted), abs=1e-4)


def test_a_detector_s_score_is_summed_over_its_boxes() -> None:
    model = nano_model("det").eval()
    image = picture(128)
    scores = class_scores(model, "det")
    label = scores.fix(image)
    got = scores(image)
    assert got.shape == (1, 10)
    logits = model.roi_head._bbox_forward(model.extract_feat(image), scores.rois)["cls_score"]
    own = scores.labels == label
    assert own.any() and float(got[0, label]) == pytest.approx(float(logits[own, label].sum()), rel=1e-4)


def test_a_detector_that_finds_nothing_says_so() -> None:
    model = nano_model("det").eval()
    model.roi_head.test_cfg.score_thr = 1.1
    with pytest.raises(DataError, match="finds nothing in this picture"):
        activation_maps(model, "det", picture(64))


def test_one_stage_detectors_have_the_best_place_of_all_levels() -> None:
    class Head(nn.Module):
        cls_out_channels, num_classes = 3, 2  # with a background class, as SSD's

        def forward(self, maps):
            return [maps[0], maps[1]], None

    levels = [torch.randn(1, 2 * 3, 4, 4), torch.randn(1, 2 * 3, 2, 2)]
    model = nn.Module()
    model.bbox_head = Head()
    model.extract_feat = lambda _image: levels
    got = class_scores(model, "det")(torch.zeros(1, 3, 8, 8))
    each = [level.view(2, 3, -1)[:, label].max() for level in levels for label in range(2)]
    wanted = torch.stack(each).view(2, 2).amax(0)
    torch.testing.assert_close(got, wanted[None])


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_a_map_of_the_picture(method: str) -> None:
    torch.manual_seed(0)
    (found,) = activation_maps(nano_model("cls").eval(), "cls", picture(64), [method], layer="layers.2.blocks.0")
    assert found.values.shape == (64, 64) and np.isfinite(found.values).all()
    assert found.values.min() >= 0 and found.values.max() <= 1


def test_eigencam_does_not_ask_for_the_class_and_gradcam_does() -> None:
    model, image = nano_model("cls").eval(), picture()
    one = activation_maps(model, "cls", image, ["EigenCAM", "GradCAM"], label=1)
    other = activation_maps(model, "cls", image, ["EigenCAM", "GradCAM"], label=6)
    np.testing.assert_allclose(one[0].values, other[0].values, atol=1e-5)
    assert np.abs(one[1].values - other[1].values).max() > 0.1


@pytest.mark.parametrize(
    ("family", "layer"), [("vmamba", "layers.1.blocks.0"), ("vim", "layers.2"), ("mambaout", None)]
)
def test_blocks_come_out_as_maps(family: str, layer: str | None) -> None:
    """Channels-last maps and tokens, of which the class token is left out."""
    backbone = FAMILIES[family]("nano").eval()
    name = layer or "layers.1.blocks.0"
    module = dict(backbone.named_modules())[name]
    transform = AsMap(name, module)
    outs: list[Tensor] = []
    module.register_forward_hook(lambda _m, _i, out: outs.append(out))
    with torch.no_grad():
        backbone(torch.randn(1, 3, 64, 96))
        found = transform(outs[0])
    if family == "vim":
        assert found.shape[2:] == (4, 6)
        at = transform.layout.extra[0]
        torch.testing.assert_close(found[0, :, 0, 1], outs[0][0, 1 if at > 1 else 2])
        torch.testing.assert_close(found[0, :, 3, 5], outs[0][0, -1])
    else:
        assert found.shape[2:] == (8, 12)
        torch.testing.assert_close(found[0, :, 3, 5], outs[0][0, 3, 5])


def test_bad_questions_are_answered() -> None:
    model, image = nano_model("cls").eval(), picture(64)
    with pytest.raises(ConfigError, match="method is 'GradCam', expected one of GradCAM"):
        activation_maps(model, "cls", image, ["GradCam"])
    with pytest.raises(ConfigError, match="label is 10, expected 0 to 9"):
        activation_maps(model, "cls", image, label=10)
    with pytest.raises(ConfigError, match="stage is 3, expected one of the 1 maps"):
        activation_maps(model, "cls", image, stage=3)
    with pytest.raises(ConfigError, match=r"layer is 'layers\.9'.*'layers\.0\.blocks\.0'"):
        activation_maps(model, "cls", image, layer="layers.9")
    with pytest.raises(ConfigError, match=r"a SS2D, expected a block of VMamba.*'layers\.0\.blocks\.0'"):
        activation_maps(model, "cls", image, layer="layers.0.blocks.0.op")  # channels last: no map as it stands
    with pytest.raises(ConfigError, match="expected a classifier, a segmentor"):
        activation_maps(SimpleNamespace(), "det", image)  # type: ignore[arg-type]
    assert not model.backbone._forward_hooks


def test_without_the_package_the_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_grad_cam", None)
    with pytest.raises(MissingPackage, match=r"pip install .mmvmamba\[analysis\]"):
        activation_maps(nano_model("cls").eval(), "cls", picture(64))


def test_figure(tmp_path: Path) -> None:
    image = np.full((40, 60, 3), 120, np.uint8)
    maps = [ActivationMap("GradCAM", 3, 1.5, np.eye(40, 60, dtype=np.float32))] * 2
    draw_activation_maps([(image, maps), (image, maps[:1])], tmp_path / "cam.png")
    assert cv2.imread(str(tmp_path / "cam.png")).std() > 20


def test_command_line(tmp_path: Path, small_digits: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    config = str(ROOT / "configs/cls/digits/vmamba-nano_digits.py")
    line = ["cam.py", config, "--weights", str(nano_checkpoint("cls", tmp_path)), "--shape", "64", "64", "--limit", "2"]
    more = ["--images", str(small_digits / "images/val"), "--class", "4", "--out-dir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [*line, *more])
    script("tools/analysis_tools/cam.py").main()
    about = json.loads((tmp_path / "out/cam.json").read_text())
    assert [(entry["image"], entry["label"]) for entry in about["maps"]] == [(0, 4)] * 3 + [(1, 4)] * 3
    maps = np.load(tmp_path / "out/cam.npz")
    assert maps["1/GradCAM"].shape == (64, 64)
    assert (tmp_path / "out/cam.png").is_file() and "cam.png" in capsys.readouterr().out
