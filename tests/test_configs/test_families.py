"""The recipes of every family but VMamba, whose own are in test_recipes.py: variant, widths, weights and precision."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmengine")

from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope

from mmvmamba.apis import load_config, prepare_training
from mmvmamba.apis.model_index import find_model
from mmvmamba.models.backbones import FAMILIES
from mmvmamba.models.layers import BatchNorm
from tests.test_configs.small_data import CONFIGS, SCOPES, name_of, task_of

OTHERS = [path for path in CONFIGS if path.parent.name in set(FAMILIES) - {"vmamba"}]
#: What a scan has that must not be pulled towards zero, by the names of the families.
OF_THE_SCAN = ("A_logs", "Ds", "dt_projs_bias", "dt_bias", "A_log", ".D")
every_other = pytest.mark.parametrize("path", OTHERS, ids=name_of)


@functools.cache
def _read(path: Path) -> Config:
    return load_config(str(path))


def _load(path: Path) -> Config:
    pytest.importorskip(SCOPES[task_of(path)])
    return copy.deepcopy(_read(path))


def test_every_family_has_recipes_for_all_tasks():
    assert {(path.parent.name, task_of(path)) for path in CONFIGS} >= {(f, t) for f in FAMILIES for t in SCOPES}


@every_other
def test_the_name_is_the_variant(path):
    """Network, widths of what follows it, and weights belong together."""
    cfg, family = _load(path), path.parent.name
    backbone = cfg.model.backbone
    assert cfg.default_scope == SCOPES[task_of(path)]
    assert backbone.type == f"mmvmamba.{FAMILIES[family].__name__}"
    assert f"{family}-{backbone.arch}_" in path.name
    with torch.device("meta"):
        model = MODELS.build({key: value for key, value in backbone.items() if key != "init_cfg"})
    dims = list(model.arch.dims)
    if task_of(path) == "cls":
        assert cfg.model.head.in_channels == dims[-1]
        assert "init_cfg" not in backbone
        return
    if task_of(path) == "seg":
        assert (cfg.model.decode_head.in_channels, cfg.model.auxiliary_head.in_channels) == (dims, dims[2])
    else:
        assert cfg.model.neck.in_channels == [dims[i] for i in model.out_indices]
    weights = find_model(f"{family}-{backbone.arch}_8xb128_in1k").weights
    assert backbone.get("init_cfg") == (weights and dict(type="Pretrained", checkpoint=weights))


@every_other
def test_precision_batch_and_evaluation(path):
    cfg, task = _load(path), task_of(path)
    wrapper = cfg.optim_wrapper
    assert wrapper.constructor == "mmvmamba.SSMOptimWrapperConstructor"
    assert wrapper.optimizer.type == "AdamW" and cfg.auto_scale_lr.get("enable", False) is False
    gpus = {"det": 8, "seg": 4, "cls": 8}[task]
    assert gpus * cfg.train_dataloader.batch_size == cfg.auto_scale_lr.base_batch_size
    if task == "det":
        assert wrapper.type == "mmvmamba.Bfloat16OptimWrapper"
        assert cfg.val_evaluator.type == cfg.test_evaluator.type == "FasterCocoMetric"
        epochs = 36 if "3x" in path.name else 12
        assert (cfg.train_cfg.max_epochs, cfg.param_scheduler[1].milestones) == (
            epochs, [27, 33] if epochs == 36 else [8, 11])  # fmt: skip
        return
    assert (wrapper.type, wrapper.dtype, wrapper.loss_scale) == ("AmpOptimWrapper", "bfloat16", dict(enabled=False))
    if task == "seg":
        assert cfg.train_cfg.max_iters == 160000 and cfg.model.test_cfg == dict(mode="whole")


@every_other
def test_recipe_spares_norms_and_the_parameters_of_the_scan(path):
    """None of them has weight decay; matrices have."""
    cfg = _load(path)
    init_default_scope(cfg.default_scope)
    cfg.model.backbone.pop("init_cfg", None)
    with torch.device("meta"):
        backbone = MODELS.build(cfg.model.backbone)
    prepare_training(cfg, amp=False)
    wrapper = build_optim_wrapper(torch.nn.ModuleDict({"backbone": backbone}), cfg.optim_wrapper)
    decay = {id(p): group["weight_decay"] for group in wrapper.optimizer.param_groups for p in group["params"]}
    of_norms = (torch.nn.LayerNorm, BatchNorm)
    norms = {id(p) for m in backbone.modules() if isinstance(m, of_norms) for p in m.parameters()}
    for name, parameter in backbone.named_parameters():
        if name.endswith(OF_THE_SCAN) or id(parameter) in norms:
            assert decay[id(parameter)] == 0.0, name
        elif name.endswith("weight"):
            assert decay[id(parameter)] > 0.0, name
