"""Test pipelines at other sizes, and metrics of such tests against numbers counted by hand."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")
pytest.importorskip("mmpretrain")

from mmengine.config import Config

from mmvmamba.analysis.accuracy_scaling import figure_of, resized
from mmvmamba.analysis.outputs import save_figure
from mmvmamba.apis.accuracy import demo_models, evaluate_at_sizes, trained_models
from mmvmamba.apis.networks import load_networks
from mmvmamba.apis.runner import load_config
from mmvmamba.errors import CheckpointError, ConfigError, DataError
from tests.nano_models import ROOT, digits_config, nano_checkpoint, script

LOAD, PACK = dict(type="LoadImageFromFile"), dict(type="PackInputs")


def pipeline(scope: str, size: int, *steps: dict) -> list[dict]:
    """Return what becomes of the steps between loading and packing."""
    dataset = dict(type="X", pipeline=[LOAD, *steps, PACK])
    cfg = Config(dict(default_scope=scope, test_dataloader=dict(dataset=dataset)))
    changed = [dict(step) for step in resized(cfg, size).test_dataloader.dataset.pipeline]
    assert cfg.test_dataloader.dataset.pipeline == [LOAD, *steps, PACK]
    assert changed[0] == LOAD and changed[-1] == PACK
    return changed[1:-1]


def test_pipelines_of_classifiers():
    edge, crop = dict(type="ResizeEdge", scale=256, edge="short"), dict(type="CenterCrop", crop_size=224)
    assert pipeline("mmpretrain", 448, edge, crop) == [{**edge, "scale": 512}, {**crop, "crop_size": 448}]
    assert pipeline("mmpretrain", 96, dict(type="mmpretrain.Resize", scale=(64, 64))) == [
        dict(type="mmpretrain.Resize", scale=(96, 96))
    ]
    assert pipeline("mmpretrain", 96) == [dict(type="Resize", scale=(96, 96))]
    assert pipeline("mmpretrain", 96, {**edge, "scale": 64}) == [
        {**edge, "scale": 96},
        dict(type="CenterCrop", crop_size=96),
    ]
    assert pipeline("mmpretrain", 96, crop) == [
        dict(type="Resize", scale=(96, 96)),
        {**crop, "crop_size": 96},
    ]


@pytest.mark.parametrize("scope", ["mmdet", "mmseg"])
def test_pipelines_of_dense_tasks(scope):
    truth = dict(type="LoadAnnotations")
    coco = dict(type="Resize", scale=(1333, 800), keep_ratio=True)
    assert pipeline(scope, 400, coco, truth) == [{**coco, "scale": (666, 400)}, truth]
    free = dict(type="Resize", scale=(16 * 96, 96), keep_ratio=True)
    assert pipeline(scope, 96, truth) == [free, truth]
    assert pipeline(scope, 96, dict(type="Resize", scale_factor=1.0), truth) == [free, truth]
    assert pipeline(scope, 96, dict(type="Resize", scale=(512, 512), keep_ratio=False), truth) == [free, truth]


@pytest.mark.parametrize("task", ["cls", "det", "seg"])
def test_images_have_the_size(task, small_digits):
    """The library's own transforms, on a picture of another shape."""
    from mmengine.dataset import Compose
    from mmengine.registry import init_default_scope

    cfg = load_config(str(digits_config(task)))
    init_default_scope(cfg.default_scope)
    steps = [step for step in resized(cfg, 50).test_dataloader.dataset.pipeline if step["type"] != "LoadAnnotations"]
    steps[-1].pop("meta_keys", None)
    file = next(small_digits.glob("crops/val/*/*.jpg" if task == "cls" else "images/val/*.jpg"))
    height, width = cv2.imread(str(file)).shape[:2]
    info = dict(img_path=str(file), img_id=0, gt_label=0, seg_fields=[], instances=[])
    shape = tuple(Compose(steps)(info)["inputs"].shape[1:])
    if task == "cls":
        assert shape == (50, 50)
    else:
        short = min(height, width)
        assert shape == (int(height * 50 / short + 0.5), int(width * 50 / short + 0.5))


@pytest.mark.parametrize(
    ("cfg", "size", "message"),
    [
        (dict(test_dataloader=None), 0, "size is 0, expected at least 1"),
        (dict(test_dataloader=None), 8, "test_dataloader is missing"),
        (dict(test_dataloader=dict(dataset=dict(type="ConcatDataset"))), 8, "is a ConcatDataset without a pipeline"),
        (dict(test_dataloader=dict(dataset=dict(pipeline=[PACK]))), 8, "begins with 'PackInputs', expected LoadImage"),
        (dict(test_dataloader=dict(dataset=dict(pipeline=[]))), 8, "begins with 'nothing'"),
    ],
    ids=str,
)
def test_configs_are_checked(cfg, size, message):
    with pytest.raises(ConfigError, match=message):
        resized(Config(dict(default_scope="mmdet", **cfg)), size)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("weights")
    return {task: nano_checkpoint(task, folder) for task in ("cls", "det", "seg")}


def trained(task: str, checkpoints: dict[str, Path], data: Path):
    options = {"test_dataloader.num_workers": 0}
    config = str(digits_config(task))
    return trained_models([config], [str(checkpoints[task])], cfg_options=options, data_root=f"{data}/")


def test_accuracy_of_a_classifier_by_hand(checkpoints, small_digits, tmp_path):
    tests = evaluate_at_sizes(trained("cls", checkpoints, small_digits), [[32, 64]], tmp_path)
    (network,) = load_networks([digits_config("cls")], [checkpoints["cls"]], "cpu")
    for test in tests:
        right = []
        for file in sorted((small_digits / "crops/val").glob("*/*.jpg")):
            image = cv2.resize(cv2.imread(str(file)), (test.size, test.size), interpolation=cv2.INTER_LINEAR)
            with torch.no_grad():
                images = network.normalised(torch.from_numpy(image).permute(2, 0, 1)[None])
                right.append(int(network.model(images, mode="tensor").argmax()) == int(file.parent.name))
        assert test.metrics["accuracy/top1"] == pytest.approx(100 * np.mean(right), abs=1e-3)
        assert [row["label"] for row in test.rows()] == ["top-1 accuracy, %"]
    assert [test.size for test in tests] == [32, 64]


def test_miou_of_a_segmentor_by_hand(checkpoints, small_digits, tmp_path):
    """The truth stays at the size of the picture; scores are resized to it."""
    (test,) = evaluate_at_sizes(trained("seg", checkpoints, small_digits), [[96]], tmp_path)
    (network,) = load_networks([digits_config("seg")], [checkpoints["seg"]], "cpu")
    both, either = np.zeros(11), np.zeros(11)
    for file in sorted((small_digits / "images/val").glob("*.jpg")):
        image, labels = cv2.imread(str(file)), cv2.imread(str(small_digits / f"labels/val/{file.stem}.png"), 0)
        height, width = image.shape[:2]
        factor = 96 / min(height, width)
        shape = (int(height * factor + 0.5), int(width * factor + 0.5))
        small = cv2.resize(image, shape[::-1], interpolation=cv2.INTER_LINEAR)
        pixels = network.normalised(torch.from_numpy(small).permute(2, 0, 1)[None])
        padded = F.pad(pixels, (0, -shape[1] % 32, 0, -shape[0] % 32))
        with torch.no_grad():
            scores = network.model(padded, mode="tensor")
        scores = F.interpolate(scores, padded.shape[2:], mode="bilinear")[..., : shape[0], : shape[1]]
        found = F.interpolate(scores, (height, width), mode="bilinear")[0].argmax(0).numpy()
        counted = labels > 0
        for label in range(11):
            one, other = (found == label) & counted, (labels == label + 1) & counted
            both[label] += (one & other).sum()
            either[label] += (one | other).sum()
    expected = 100 * np.mean(both[either > 0] / either[either > 0])
    assert test.metrics["mIoU"] == pytest.approx(expected, abs=0.2)  # mmseg rounds to two digits


def test_a_detector_is_tested_at_every_size(checkpoints, small_digits, tmp_path):
    models = trained("det", checkpoints, small_digits)
    tests = evaluate_at_sizes(models, [[64, 96]], tmp_path)
    assert [test.size for test in tests] == [64, 96]
    for test in tests:
        assert {row["label"] for row in test.rows()} == {"box mAP, %", "mask mAP, %"}
        assert all(0 <= row["value"] <= 100 for row in test.rows())


def test_models_are_checked_before_anything_runs(checkpoints, small_digits, tmp_path):
    config = str(digits_config("cls"))
    with pytest.raises(ConfigError, match="--weights names 0 files, expected 1"):
        trained_models([config], [])
    with pytest.raises(CheckpointError, match="'missing.pth' does not exist"):
        trained_models([config], ["missing.pth"])
    models = trained_models([config] * 2, [str(checkpoints["cls"])] * 2)
    assert [model.name for model in models] == ["vmamba-nano_digits (1)", "vmamba-nano_digits (2)"]
    away = trained_models([config], [str(checkpoints["cls"])], data_root=tmp_path / "nowhere")
    with pytest.raises(DataError, match="nowhere"):
        evaluate_at_sizes(away, [[64]], tmp_path)
    with pytest.raises(CheckpointError, match="Train them"):
        demo_models(ROOT, tmp_path)


def test_models_of_the_demo(tmp_path):
    for task in ("cls", "det", "seg"):
        (tmp_path / task).mkdir()
        (tmp_path / task / "last_checkpoint").write_text(f"{tmp_path}/{task}/iter_6.pth")
    configs, weights = demo_models(ROOT, tmp_path)
    assert [Path(config) for config in configs] == [digits_config(task) for task in ("cls", "det", "seg")]
    assert weights == [f"{tmp_path}/{task}/iter_6.pth" for task in ("cls", "det", "seg")]


def test_the_figure_has_a_panel_for_each_metric(tmp_path):
    rows = [
        {"model": model, "label": label, "size": size, "value": value}
        for model, label, value in (("a", "top-1 accuracy, %", 50.0), ("b", "mIoU, %", 20.0), ("c", "mIoU, %", 30.0))
        for size in (64, 96)
    ]
    figure = figure_of(rows)
    assert [axis.get_title() for axis in figure.axes] == ["top-1 accuracy, %", "mIoU, %"]
    assert [len(axis.lines) for axis in figure.axes] == [1, 2]
    assert list(figure.axes[1].lines[0].get_ydata()) == [20.0, 20.0]
    assert save_figure(figure, tmp_path / "figure.png").stat().st_size > 5000


def test_the_tool_writes_a_table_and_three_files(checkpoints, small_digits, tmp_path, monkeypatch, capsys):
    tool = script("tools/analysis_tools/accuracy_scaling.py")
    words = [str(digits_config("cls")), "--weights", str(checkpoints["cls"]), "--sizes", "64", "32"]
    words += ["--data-root", f"{small_digits}/", "--cfg-options", "test_dataloader.num_workers=0"]
    monkeypatch.setattr("sys.argv", ["accuracy_scaling.py", *words, "--out-dir", str(tmp_path)])
    tool.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines if line.startswith("vmamba")] == [
        ["vmamba-nano_digits", "32"],
        ["vmamba-nano_digits", "64"],
    ]
    content = json.loads((tmp_path / "accuracy_scaling.json").read_text())
    assert [test["size"] for test in content["tests"]] == [32, 64]
    assert len((tmp_path / "accuracy_scaling.csv").read_text().splitlines()) == 3
    assert (tmp_path / "accuracy_scaling.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.py"], "--weights is missing"),
        (["--weights", "a.pth"], "--weights is given without a model"),
        (["--demo-dir", "nowhere"], "there is no 'nowhere/cls/last_checkpoint'"),
    ],
    ids=str,
)
def test_the_tool_checks_its_arguments(words, message, tmp_path, monkeypatch):
    tool = script("tools/analysis_tools/accuracy_scaling.py")
    monkeypatch.setattr("sys.argv", ["accuracy_scaling.py", *words, "--out-dir", str(tmp_path)])
    with pytest.raises((ConfigError, CheckpointError), match=message):
        tool.main()
