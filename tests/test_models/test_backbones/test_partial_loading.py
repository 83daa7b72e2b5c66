"""MMEngine's inferencers load with strict off: a backbone that would get half of its weights refuses them."""

from __future__ import annotations

import copy

import pytest
import torch
from mmengine.model import BaseModel, ExponentialMovingAverage
from mmengine.runner import load_checkpoint
from mmengine.runner.checkpoint import load_state_dict
from torch import nn

from mmvmamba.errors import CheckpointMismatch
from mmvmamba.models import VMamba

ARCH = dict(dims=[8, 16], depths=[1, 1], patch_embed="patchify", downsample="patch_merging")
FIRST = "backbone.layers.0.blocks.0.op.out_proj.weight"
NORMS = tuple(f"backbone.outnorm{i}" for i in range(2))
#: What nothing but tests may ask PyTorch for.
LENIENT = {"strict": False}


class Detector(BaseModel):
    """A detector in miniature."""

    def __init__(self, **arguments: object) -> None:
        super().__init__()
        self.backbone = VMamba(**{"arch": ARCH, "out_indices": (0, 1), **arguments})
        self.roi_head = nn.Linear(16, 3)

    def forward(self, *_: object, **__: object) -> None:
        raise NotImplementedError


def _random(model):
    return {name: torch.rand_like(value) for name, value in model.state_dict().items()}


def _equal(model, state):
    own = model.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[name], state[name]) for name in own)


WRONG = {
    "missing": (lambda s: {k: v for k, v in s.items() if k != FIRST}, rf"1 of \d+ entries missing \['{FIRST[9:]}'\]"),
    "a stage missing": (lambda s: {k: v for k, v in s.items() if "layers.1" not in k}, r"entries missing \['layers\.1"),
    "shape": (lambda s: {**s, FIRST: torch.ones(3, 3)}, r"1 of another shape \['\S+ \(3, 3\) instead of \(8, 16\)'\]"),
    "unexpected": (lambda s: {**s, "backbone.extra": torch.ones(1)}, r"1 unexpected \['extra'\]"),
    "another variant": (
        lambda _: _random(Detector(arch=dict(ARCH, depths=[2, 1]))),
        r"the checkpoint is VMamba with depths \(2, 1\).*the model is VMamba with depths \(1, 1\)",
    ),
}  # fmt: skip


def _load(road, model, state, path):
    if road == "file":
        torch.save({"state_dict": state, "meta": {}}, path)
        load_checkpoint(model, str(path), map_location="cpu")
    elif road == "mmengine":
        load_state_dict(model, state)
    elif road == "average":
        load_state_dict(ExponentialMovingAverage(model), {f"module.{name}": value for name, value in state.items()})
    else:
        model.load_state_dict(state, **LENIENT)


@pytest.mark.parametrize("road", ["file", "mmengine", "average", "torch"])
@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_backbone_is_refused_inside_a_model(kind, road, tmp_path):
    make, message = WRONG[kind]
    model = Detector()
    before, wrong = copy.deepcopy(model.state_dict()), make(_random(model))
    with pytest.raises(CheckpointMismatch, match=message) as caught:
        _load(road, model, wrong, tmp_path / "x.pth")
    assert "backbone.*" in str(caught.value)
    assert _equal(model.backbone, {k[9:]: v for k, v in before.items() if k.startswith("backbone.")})


@pytest.mark.parametrize("wrap", [
    lambda m: m, copy.deepcopy, nn.DataParallel, ExponentialMovingAverage, torch.compile,
    lambda m: setattr(m, "backbone", torch.compile(m.backbone)) or m, lambda m: m.half(), lambda m: m.double(),
], ids=["plain", "copied", "parallel", "average", "compiled", "compiled inside", "half", "double"])  # fmt: skip
def test_the_right_one_loads_in_every_wrapper(wrap):
    model = wrap(Detector())
    state = {name: torch.rand(value.shape).to(value.dtype) for name, value in model.state_dict().items()}
    model.load_state_dict(state, strict=True)
    assert _equal(model, state)


def test_other_dtypes_are_converted_as_pytorch_does():
    model = Detector()
    state = _random(model)
    model.load_state_dict({name: value.double() for name, value in state.items()}, strict=True)
    assert _equal(model, state)


def test_a_model_without_memory_gets_its_tensors():
    with torch.device("meta"):
        model = Detector()
    state = _random(Detector())
    model.load_state_dict(state, strict=True, assign=True)
    assert _equal(model, state)


def test_weights_of_other_layouts_load():
    """1x1 convolutions for linear maps, and a position embedding of another size."""
    source, model = Detector(pos_embed_size=(8, 8)), Detector(pos_embed_size=(4, 6))
    state = _random(source)
    state[FIRST] = state[FIRST][:, :, None, None]
    load_state_dict(model, state)
    assert torch.equal(model.backbone.state_dict()[FIRST[9:]], state[FIRST].flatten(1))
    assert model.backbone.pos_embed.shape[2:] == (4, 6)


def test_out_norms_come_all_or_none():
    state = _random(Detector())
    half = {name: value for name, value in state.items() if not name.startswith(NORMS[0])}
    none = {name: value for name, value in half.items() if not name.startswith(NORMS)}
    for stored in (half, none):
        model = Detector()
        missing, unexpected = model.load_state_dict(dict(stored), **LENIENT)
        assert {name.rpartition(".")[0] for name in missing} == set(NORMS)
        assert unexpected == []
        assert torch.equal(model.backbone.outnorm1.weight, torch.ones(16))
        assert torch.equal(model.state_dict()[FIRST], state[FIRST])
        with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict"):
            model.load_state_dict(stored, strict=True)
    one = Detector(out_indices=(1,))
    assert one.load_state_dict(state, **LENIENT).missing_keys == []
    assert torch.equal(one.backbone.outnorm1.weight, state["backbone.outnorm1.weight"])


def test_parts_that_are_meant_are_loaded():
    """A head alone, and a part of a backbone by its own load_state_dict."""
    model = Detector()
    state = _random(model)
    load_state_dict(model, {"roi_head.weight": state["roi_head.weight"], "roi_head.bias": state["roi_head.bias"]})
    assert torch.equal(model.roi_head.weight, state["roi_head.weight"])
    model.backbone.load_state_dict({FIRST[9:]: state[FIRST]}, **LENIENT)
    assert torch.equal(model.state_dict()[FIRST], state[FIRST])
