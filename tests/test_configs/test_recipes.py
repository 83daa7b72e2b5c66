"""Every shipped config loads, builds its model and runs one tiny forward."""

import argparse
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmengine")

from mmengine.config import DictAction

from mmvmamba.apis import load_config

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(
    path for path in (ROOT / "configs").rglob("*.py") if "_base_" not in path.relative_to(ROOT).parts
)  # fmt: skip
SCOPE_OF_TASK = {"cls": "mmpretrain", "det": "mmdet", "seg": "mmseg"}


def _name(path):
    return str(path.relative_to(ROOT / "configs"))


def test_there_are_configs():
    assert {path.relative_to(ROOT / "configs").parts[0] for path in CONFIGS} == set(SCOPE_OF_TASK)


@pytest.mark.parametrize("path", CONFIGS, ids=_name)
def test_config_builds_and_runs(path):
    from mmengine.registry import MODELS, init_default_scope

    scope = SCOPE_OF_TASK[path.relative_to(ROOT / "configs").parts[0]]
    pytest.importorskip(scope)
    cfg = load_config(str(path))
    assert cfg.default_scope == scope
    assert cfg.model.backbone.type == "mmvmamba.VMamba"
    init_default_scope(scope)
    if scope == "mmpretrain" and "data_preprocessor" in cfg:
        cfg.model.setdefault("data_preprocessor", cfg.data_preprocessor)
    model = MODELS.build(cfg.model).eval()
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        output = _detect(model, image) if scope == "mmdet" else model(image, mode="tensor")
    leaves = _flatten(output)
    assert leaves
    assert all(leaf.isfinite().all() for leaf in leaves)


@pytest.mark.parametrize("path", [p for p in CONFIGS if p.parent.name == "vmamba"], ids=_name)
def test_detectors_and_segmentors_start_from_imagenet(path):
    """Nobody trains from noise unknowingly; from scratch is one option away."""
    pytest.importorskip(load_config(str(path)).default_scope)
    init_cfg = load_config(str(path)).model.backbone.get("init_cfg")
    if path.relative_to(ROOT / "configs").parts[0] == "cls":
        assert init_cfg is None
        return
    assert init_cfg.type == "Pretrained"
    assert init_cfg.checkpoint.endswith("/%23v2cls/vssm1_tiny_0230s_ckpt_epoch_264.pth")
    parser = argparse.ArgumentParser()
    parser.add_argument("--cfg-options", nargs="+", action=DictAction)
    options = parser.parse_args(["--cfg-options", "model.backbone.init_cfg=None"]).cfg_options
    assert load_config(str(path), cfg_options=options).model.backbone.init_cfg is None


@pytest.mark.parametrize("path", CONFIGS, ids=_name)
def test_recipe_spares_the_state_space_parameters(path):
    """A_logs, Ds and the bias of the time step have no weight decay, neither have norms; weights have."""
    from mmengine.optim import build_optim_wrapper
    from mmengine.registry import MODELS, init_default_scope

    cfg = load_config(str(path))
    pytest.importorskip(cfg.default_scope)
    init_default_scope(cfg.default_scope)
    cfg.model.backbone.arch = "nano"
    backbone = MODELS.build(cfg.model.backbone)
    wrapper = build_optim_wrapper(torch.nn.ModuleDict({"backbone": backbone}), cfg.optim_wrapper)
    decay = {id(p): group["weight_decay"] for group in wrapper.optimizer.param_groups for p in group["params"]}
    spared = ("A_logs", "Ds", "dt_projs_bias", "norm.weight", "norm2.bias", "out_norm.weight", "outnorm3.weight")
    for name, parameter in backbone.named_parameters():
        if name.endswith(spared):
            assert decay[id(parameter)] == 0.0, name
        elif name.endswith(("in_proj.weight", "fc1.weight", "x_proj_weight")):
            assert decay[id(parameter)] > 0.0, name


def _detect(model, image):
    """Detect in one image; mmdet's mode ``tensor`` needs the image's meta data as well."""
    from mmdet.structures import DetDataSample

    shape = tuple(image.shape[2:])
    meta = dict(img_shape=shape, ori_shape=shape, pad_shape=shape, batch_input_shape=shape, scale_factor=(1.0, 1.0))
    (result,) = model(image, [DetDataSample(metainfo=meta)], mode="predict")
    return [result.pred_instances.bboxes, result.pred_instances.scores, result.pred_instances.masks.float()]


def _flatten(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    return [leaf for part in value for leaf in _flatten(part)] if value is not None else []
