"""Mixed precision of backbone and neck: what runs in bfloat16, what stays float32, and that nothing is left behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("mmengine")

from mmengine.model import BaseModel
from mmengine.registry import OPTIM_WRAPPERS

from mmvmamba.engine import Bfloat16OptimWrapper


class Model(BaseModel):
    """A backbone, a neck and a head; records the dtype that each of them gets and gives."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.backbone, self.neck, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 1)
        self.fails = fails
        self.seen: list[torch.dtype] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = self.backbone(x)
        self.seen.append(features.dtype)
        if self.fails:
            features = self.backbone(x.new_zeros(2, 5))  # a shape it cannot take
        neck = self.neck(features)
        self.seen.append(neck.dtype)
        return self.head(neck)


def wrapper_for(model: nn.Module) -> Bfloat16OptimWrapper:
    return Bfloat16OptimWrapper(optimizer=torch.optim.SGD(model.parameters(), lr=0.1))


def test_backbone_and_neck_are_narrow_inside_and_float32_outside() -> None:
    model = Model()
    inside = []
    model.backbone.register_forward_hook(lambda _module, _args, out: inside.append(out.dtype))
    wrapper = wrapper_for(model)
    with wrapper.optim_context(model):
        out = model(torch.randn(4, 8))
    assert inside == [torch.bfloat16]
    assert model.seen == [torch.float32, torch.float32]
    assert out.dtype == torch.float32
    before = model.backbone.weight.detach().clone()
    wrapper.update_params(out.square().mean())
    assert model.backbone.weight.dtype == torch.float32
    assert not torch.equal(before, model.backbone.weight)


def test_nothing_is_left_behind() -> None:
    model = Model()
    with wrapper_for(model).optim_context(model):
        model(torch.randn(4, 8))
        assert not torch.is_autocast_enabled("cpu")
    assert not model.backbone._forward_hooks and not model.backbone._forward_pre_hooks
    inside = []
    model.backbone.register_forward_hook(lambda _module, _args, out: inside.append(out.dtype))
    model(torch.randn(4, 8))
    assert inside == [torch.float32]


def test_an_error_in_the_backbone_turns_autocast_off() -> None:
    model = Model(fails=True)
    with pytest.raises(RuntimeError), wrapper_for(model).optim_context(model):
        model(torch.randn(2, 8))
    assert not torch.is_autocast_enabled("cpu")


def test_autocast_is_of_the_device_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model().to("meta")
    entered = []
    real = torch.autocast
    monkeypatch.setattr("torch.autocast", lambda *args: entered.append(args) or real("cpu", torch.bfloat16))
    with wrapper_for(model).optim_context(model):
        model(torch.empty(4, 8, device="meta"))
    assert entered == [("meta", torch.bfloat16)] * 2


def test_a_detection_head_under_autocast_would_round_its_anchors() -> None:
    """Why heads stay out: mmdet gives anchors and boxes the type of the scores and features."""
    pytest.importorskip("mmdet")
    from mmdet.models.task_modules.prior_generators import AnchorGenerator

    generator = AnchorGenerator(strides=[4], ratios=[1.0], scales=[8])
    exact, rounded = (
        generator.grid_priors([(1, 334)], dtype=dtype, device="cpu")[0] for dtype in (torch.float32, torch.bfloat16)
    )
    assert (exact - rounded.float()).abs().max() >= 4.0  # pixels of an image that is 1333 wide
    assert len(rounded.unique(dim=0)) < len(exact.unique(dim=0))


def test_configs_find_it() -> None:
    assert OPTIM_WRAPPERS.get("mmvmamba.Bfloat16OptimWrapper") is Bfloat16OptimWrapper
