"""Parts of networks: what they give is what the whole network computes, and what cannot be had is said at once."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")
pytest.importorskip("mmpretrain")

from mmvmamba.deployment.parts import PARTS, obstacles, part_of
from mmvmamba.errors import ConfigError
from mmvmamba.models import VMamba
from mmvmamba.ops import use_backend
from tests.nano_models import nano_model

TINY = dict(dims=[8, 16], depths=[1, 1])


@pytest.fixture(scope="module")
def networks():
    return {task: nano_model(task).eval() for task in ("cls", "det", "seg")}


@torch.no_grad()
def test_every_part_gives_what_the_network_computes(networks):
    image = torch.randn(2, 3, 64, 96)
    for name, tasks in PARTS.items():
        for task in tasks:
            network = networks[task]
            if name == "backbone-neck" and getattr(network, "neck", None) is None:
                continue
            found = part_of(network, task, name).module(image)
            if name == "backbone":
                expected = network.backbone(image)
            elif name == "backbone-neck":
                expected = network.extract_feat(image)
            elif name == "classifier":
                expected = [network.forward(image, mode="tensor")]
                expected = [network.head(network.extract_feat(image))]
                found = [found]
            else:
                expected = [F.interpolate(network.decode_head(network.extract_feat(image)), size=(64, 96),
                                          mode="bilinear", align_corners=network.align_corners)]  # fmt: skip
                found = [found]
                assert found[0].shape == (2, 11, 64, 96)
            assert len(found) == len(expected)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), (name, task)


@pytest.mark.parametrize(
    ("task", "name", "message"),
    [
        ("det", "nack", "part is 'nack', expected one of 'backbone', 'backbone-neck'"),
        ("det", "segmentor", "which a network of the task 'det' does not have, expected one of 'backbone', 'backbone-"),
        ("seg", "backbone-neck", "has no neck. Choose the part 'backbone'"),
    ],
)
def test_parts_that_are_not_there(networks, task, name, message):
    with pytest.raises(ConfigError, match=message):
        part_of(networks[task], task, name)


def test_heads_that_are_no_single_head(networks):
    network = nano_model("seg").eval()
    network.decode_head = nn.ModuleList([networks["seg"].decode_head])
    with pytest.raises(ConfigError, match="is a ModuleList, expected one head such as UPerHead"):
        part_of(network, "seg", "segmentor")


def test_obstacles_are_found_without_running_anything():
    model = VMamba(TINY, out_indices=(0, 1))
    assert any("training mode" in reason for reason in obstacles(model.train()))
    assert obstacles(model.eval()) == []
    with use_backend("reference"):
        (reason,) = obstacles(model)
    assert "MMVMAMBA_BACKEND" in reason


def test_operators_of_mmcv_are_refused(networks):
    from mmcv.ops import ModulatedDeformConv2dPack

    network = nano_model("det").eval()
    network.neck.extra = ModulatedDeformConv2dPack(64, 64, 3).eval()
    message = r"1 layers run operators of mmcv.*neck.extra \(ModulatedDeformConv2dPack\)"
    with pytest.raises(ConfigError, match=message):
        part_of(network, "det", "backbone-neck")
    assert part_of(network, "det", "backbone").name == "backbone"
