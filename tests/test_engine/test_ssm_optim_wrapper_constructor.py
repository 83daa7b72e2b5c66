"""Weight decay and learning rates of every parameter, in models of every kind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("mmengine")

from mmengine.model import BaseModel
from mmengine.optim import build_optim_wrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS

from mmvmamba.engine import SSMOptimWrapperConstructor
from mmvmamba.errors import ConfigError
from mmvmamba.models.backbones import VMamba

LR, DECAY = 1e-3, 0.05


class Model(BaseModel):
    """A nano backbone and a head with a norm, a convolution and a layer whose name has nothing of a norm."""

    def __init__(self, arch: str | dict[str, Any] = "nano", **options: Any) -> None:
        super().__init__()
        self.backbone = VMamba(arch, **options)
        self.head = nn.ModuleDict({"norm": nn.LayerNorm(8), "bn": nn.BatchNorm2d(8), "conv": nn.Conv2d(8, 8, 1)})

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.backbone(inputs)[0]


def settings(model: nn.Module, **paramwise_cfg: Any) -> dict[str, tuple[float, float]]:
    """Build the optimizer of ``model`` and return (learning rate, weight decay) of its parameters, by name."""
    wrapper = build_optim_wrapper(
        model,
        dict(
            type="OptimWrapper",
            constructor="mmvmamba.SSMOptimWrapperConstructor",
            optimizer=dict(type="AdamW", lr=LR, weight_decay=DECAY),
            paramwise_cfg=paramwise_cfg,
        ),
    )
    found = {id(p): (g["lr"], g["weight_decay"]) for g in wrapper.optimizer.param_groups for p in g["params"]}
    total = sum(len(group["params"]) for group in wrapper.optimizer.param_groups)
    assert total == len(found), "a parameter is in two groups"
    return {name: found[id(p)] for name, p in model.named_parameters() if id(p) in found}


def is_spared(module: nn.Module, name: str) -> bool:
    """Whether the issue wants ``name`` of ``module`` without decay, told independently of ``no_weight_decay``."""
    owner, _, own = name.rpartition(".")
    norms = (nn.LayerNorm, nn.BatchNorm2d)
    return own in ("A_logs", "Ds", "dt_projs_bias", "pos_embed") or isinstance(module.get_submodule(owner), norms)


def test_configs_find_it() -> None:
    assert OPTIM_WRAPPER_CONSTRUCTORS.get("mmvmamba.SSMOptimWrapperConstructor") is SSMOptimWrapperConstructor


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"arch": dict(dims=(8, 16), depths=(1, 1), norm="batch_norm"), "out_indices": (1,)},
        {"arch": dict(dims=(8, 16), depths=(1, 1), patch_embed="patchify", downsample="patch_merging", gated=True)},
        {"arch": dict(dims=(8, 16), depths=(1, 1), out_norm="norm_depthwise_conv"), "pos_embed_size": (4, 4)},
    ],
    ids=["nano", "batch norm", "vanilla", "position embedding"],
)
def test_the_backbone_names_norms_and_scan_parameters_and_nothing_else(options: dict[str, Any]) -> None:
    backbone = VMamba(**{"arch": "nano", "out_indices": (0, 1), **options})
    names = {name for name, _ in backbone.named_parameters()}
    assert backbone.no_weight_decay() == {name for name in names if is_spared(backbone, name)}
    assert len(backbone.no_weight_decay()) > 10


def test_spared_parameters_have_no_decay_and_all_others_have() -> None:
    model = Model()
    for name, (lr, decay) in settings(model).items():
        spared = name.startswith("backbone.") and is_spared(model, name)
        assert decay == (0.0 if spared else DECAY), name
        assert lr == LR, name


class Wrapper(nn.Module):
    """What DistributedDataParallel looks like to MMEngine."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def test_a_bare_backbone_and_a_distributed_model() -> None:
    backbone = VMamba("nano")
    assert settings(backbone)["layers.0.blocks.0.op.A_logs"] == (LR, 0.0)
    wrapped = Wrapper(Model())
    found = settings(wrapped)
    assert found["module.backbone.outnorm0.weight"] == (LR, 0.0)
    assert found["module.head.norm.weight"] == (LR, DECAY)
    assert len(found) == len(list(wrapped.parameters()))


def test_mmengines_own_options_hold_for_everything_else() -> None:
    model = Model()
    found = settings(
        model,
        norm_decay_mult=0.0,
        bias_lr_mult=2.0,
        custom_keys={"backbone.patch_embed": dict(lr_mult=0.1), "fc1": dict(decay_mult=0.5)},
    )
    assert found["head.norm.weight"] == (LR, 0.0)
    assert found["head.conv.bias"] == (2 * LR, DECAY)
    assert found["head.conv.weight"] == (LR, DECAY)
    assert found["backbone.patch_embed.0.weight"] == pytest.approx((0.1 * LR, DECAY))
    assert found["backbone.patch_embed.2.weight"] == pytest.approx((0.1 * LR, 0.0)), "a norm below a custom key"
    assert found["backbone.layers.0.blocks.0.mlp.fc1.weight"] == (LR, 0.5 * DECAY)


def test_custom_keys_may_set_what_the_optimizer_takes() -> None:
    model = Model()
    wrapper = build_optim_wrapper(
        model,
        dict(
            constructor="mmvmamba.SSMOptimWrapperConstructor",
            optimizer=dict(type="AdamW", lr=LR),
            paramwise_cfg=dict(custom_keys=dict(head=dict(betas=(0.5, 0.5)))),
        ),
    )
    by_id = {id(p): group for group in wrapper.optimizer.param_groups for p in group["params"]}
    assert by_id[id(model.head["conv"].weight)]["betas"] == (0.5, 0.5)
    # Without weight_decay in the config AdamW has one of its own; what is spared is spared of that as well.
    assert by_id[id(model.backbone.layers[0].blocks[0].op.Ds)]["weight_decay"] == 0.0
    assert by_id[id(model.head["conv"].weight)]["weight_decay"] > 0.0


def test_layer_wise_rates_fall_towards_the_stem_and_spare_the_heads() -> None:
    rate, model = 0.5, Model()
    found = settings(model, layer_decay_rate=rate)
    last = sum(model.backbone.depths) + 1
    assert found["backbone.patch_embed.0.weight"][0] == pytest.approx(LR * rate**last)
    assert found["backbone.layers.0.blocks.0.norm.weight"] == pytest.approx((LR * rate ** (last - 1), 0.0))
    assert found["backbone.layers.3.blocks.0.op.Ds"][0] == pytest.approx(LR * rate)
    assert found["backbone.outnorm3.weight"][0] == LR
    assert found["head.conv.weight"] == (LR, DECAY)
    bare = settings(model.backbone, layer_decay_rate=rate)
    assert bare == {name.removeprefix("backbone."): value for name, value in found.items() if "backbone" in name}


def test_layer_wise_rates_multiply_with_custom_ones() -> None:
    found = settings(Model(), layer_decay_rate=0.5, custom_keys=dict(backbone=dict(lr_mult=0.1)))
    assert found["backbone.layers.3.blocks.0.op.in_proj.weight"] == pytest.approx((LR * 0.1 * 0.5, DECAY))


def test_names_that_wrappers_change_have_the_same_depth() -> None:
    model = Model()
    plain = settings(model, layer_decay_rate=0.5)
    model.backbone.layers[1].blocks[0] = nn.ModuleDict({"_fsdp_wrapped_module": model.backbone.layers[1].blocks[0]})
    wrapped = settings(model, layer_decay_rate=0.5)
    assert {name.replace("_fsdp_wrapped_module.", ""): value for name, value in wrapped.items()} == plain


def test_frozen_parameters_are_left_out_and_shared_ones_come_once() -> None:
    model = Model(frozen_stages=1)
    model.head["tied"] = nn.Conv2d(8, 8, 1)
    model.head["tied"].weight = model.head["conv"].weight
    found = settings(model)
    assert not any(name.startswith(("backbone.patch_embed", "backbone.layers.0.")) for name in found)
    assert "backbone.layers.1.blocks.0.op.A_logs" in found
    assert "head.conv.weight" in found  # and ``settings`` looks for doubles


def test_equal_settings_are_one_group() -> None:
    model = Model()
    wrapper = build_optim_wrapper(
        model,
        dict(
            constructor="mmvmamba.SSMOptimWrapperConstructor",
            optimizer=dict(type="AdamW", lr=LR, weight_decay=DECAY),
            paramwise_cfg=dict(custom_keys=dict(norm=dict(decay_mult=0.0))),
        ),
    )
    assert len(wrapper.optimizer.param_groups) == 2


def test_one_step_is_the_one_of_mmengines_constructor_where_they_agree() -> None:
    """The same rule spelt out in MMEngine's own terms gives the same weights, bit for bit."""
    ours, theirs = Model(), Model()
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    names = {f"backbone.{name}": dict(decay_mult=0.0) for name in ours.backbone.no_weight_decay()}
    optimizer = dict(type="AdamW", lr=0.1, weight_decay=0.5)
    for model, options in (
        (ours, dict(constructor="mmvmamba.SSMOptimWrapperConstructor")),
        (theirs, dict(paramwise_cfg=dict(custom_keys=names))),
    ):
        wrapper = build_optim_wrapper(model, dict(optimizer=dict(optimizer), **options))
        wrapper.update_params(model(torch.ones(1, 3, 32, 32)).square().mean())
    assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))


@pytest.mark.parametrize(
    ("paramwise_cfg", "message"),
    [
        (dict(layer_decay=0.9), r"unknown key 'layer_decay'.* Did you mean 'layer_decay_rate'\?"),
        (dict(norm_decay_mul=0.0), r"unknown key 'norm_decay_mul'.* Did you mean 'norm_decay_mult'\?"),
        (dict(custom_keys=dict(norm=0.0)), r"custom_keys\['norm'\] is 0.0, expected a dict with keys among lr_mult"),
        (dict(custom_keys=dict(norm=dict(decay_mul=0.0))), r"custom_keys\['norm'\]: unknown key 'decay_mul'"),
        (dict(layer_decay_rate=1.5), "layer_decay_rate is 1.5, expected a number above 0 and up to 1"),
        (dict(layer_decay_rate=0), "layer_decay_rate is 0"),
        (dict(layer_decay_rate=True), "layer_decay_rate is True"),
        (dict(layer_decay_rate="0.9"), "layer_decay_rate is '0.9'"),
    ],
)
def test_mistakes_are_refused(paramwise_cfg: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(Model(), **paramwise_cfg)


def test_an_optimizer_that_nobody_knows_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.type is 'AdamWW', expected .* Did you mean 'AdamW'\?"):
        SSMOptimWrapperConstructor(dict(optimizer=dict(type="AdamWW", lr=1.0)))


def test_a_model_without_a_backbone_of_ours_is_refused() -> None:
    with pytest.raises(ConfigError, match="no module of Linear has a method no_weight_decay"):
        settings(nn.Linear(2, 2))


def test_layer_wise_rates_need_a_learning_rate() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.lr is missing"):
        SSMOptimWrapperConstructor(dict(optimizer=dict(type="AdamW")), dict(layer_decay_rate=0.9))


def test_flattened_parameters_are_refused() -> None:
    model = Model()
    model.backbone.register_parameter("_flat_param", nn.Parameter(torch.zeros(3)))
    with pytest.raises(ConfigError, match="use_orig_params=True"):
        settings(model)
