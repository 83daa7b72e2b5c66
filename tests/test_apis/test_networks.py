"""Networks by name, file and package, with random weights or those of a file."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

from mmvmamba.apis.networks import add_network_arguments, load_networks, networks_from
from mmvmamba.checkpoints.mmengine_loader import load_from_mmvmamba
from mmvmamba.errors import CheckpointError, CheckpointMismatch, ConfigError

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")
pytest.importorskip("mmpretrain")

ROOT = Path(__file__).parents[2]
DIGITS = str(ROOT / "configs/cls/digits/vmamba-nano_digits.py")
UPERNET = str(ROOT / "configs/seg/digits/vmamba-nano_upernet_digits.py")


def _networks(*words: str):
    parser = argparse.ArgumentParser()
    add_network_arguments(parser)
    return networks_from(parser.parse_args([*words, "--device", "cpu"]))


def test_weights_of_a_file(tmp_path: Path) -> None:
    (first,) = load_networks([DIGITS], device="cpu")
    torch.save({"state_dict": first.model.state_dict(), "meta": {}}, tmp_path / "a.pth")
    again, other = _networks(DIGITS, DIGITS, "--weights", str(tmp_path / "a.pth"), "random")
    assert first.weights == other.weights == "random weights" and "a.pth" in again.weights
    own = first.model.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in again.model.state_dict().items())
    name = "backbone.layers.0.blocks.0.op.in_proj.weight"
    assert not torch.equal(other.model.state_dict()[name], own[name])
    assert load_from_mmvmamba(str(tmp_path / "a.pth"), "cpu")["state_dict"].keys() == own.keys()
    assert not again.model.training
    with pytest.raises(CheckpointMismatch):
        load_networks([UPERNET], [tmp_path / "a.pth"], "cpu")


def test_other_packages_and_names_of_the_index() -> None:
    swin, ours = _networks("mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py", "vssd-micro_8xb128_in1k")
    assert (swin.name, ours.name) == ("swin-tiny_16xb64_in1k", "vssd-micro_8xb128_in1k")
    assert (type(swin.backbone).__name__, type(ours.backbone).__name__) == ("SwinTransformer", "VSSD")
    (detector,) = load_networks(["mmdet::retinanet/retinanet_r18_fpn_1x_coco.py"], device="cpu")
    assert (detector.task, swin.task) == ("det", "cls")


def test_random_weights_read_no_file() -> None:
    """The detector's config wants weights of the demo, which are not there."""
    (network,) = load_networks([str(ROOT / "configs/det/digits/mask-rcnn_vmamba-nano_fpn_digits.py")], device="cpu")
    assert all(value.isfinite().all() for value in network.model.state_dict().values())


def test_images_are_normalised_as_the_preprocessor_does() -> None:
    """The configs say RGB, mean and standard deviation of ImageNet; the picture is BGR."""
    from mmseg.structures import SegDataSample

    for (network,) in (load_networks([DIGITS], device="cpu"), load_networks([UPERNET], device="cpu")):
        image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
        settings = network.model.data_preprocessor
        samples = [SegDataSample()] if network.task == "seg" else None
        told = settings({"inputs": [image], "data_samples": samples}, False)["inputs"]
        torch.testing.assert_close(network.normalised(image[None]), told)


@pytest.mark.parametrize(
    ("words", "error", "told"),
    [
        (["vmamba-tiny-s1l8_8xb128_in1"], ConfigError, "Take one of these, such as 'vmamba-tiny-s1l8_8xb128_in1k'"),
        (["mmyolo::a.py"], ConfigError, "expected one of 'mmdet', 'mmseg', 'mmpretrain' before '::'"),
        (["mmdet::no/such.py"], ConfigError, "no file"),
        ([DIGITS, "--weights", "a.pth", "b.pth"], ConfigError, "weights names 2 files, expected 1"),
        ([DIGITS, "--weights", "a.pth"], CheckpointError, "a.pth"),
    ],
)
def test_what_is_wrong_is_said(words, error, told) -> None:
    with pytest.raises(error, match=told):
        _networks(*words)


def test_a_model_without_a_backbone() -> None:
    (network,) = load_networks([DIGITS], device="cpu")
    del network.model.backbone
    with pytest.raises(ConfigError, match="ImageClassifier without a backbone"):
        _ = network.backbone
