"""The recipes of every family but VMamba, whose own are in test_recipes.py: variant, widths, weights and precision."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("mmengine")

from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope

from mmvmamba.apis import load_config, prepare_training
from mmvmamba.apis.model_index import list_models
from mmvmamba.models.backbones import FAMILIES
from mmvmamba.models.layers import BatchNorm
from tests.test_configs.small_data import CONFIGS, SCOPES, name_of, task_of

OTHERS = [path for path in CONFIGS if path.parent.name in set(FAMILIES) - {"vmamba"}]
#: What a scan has that must not be pulled towards zero, by the names of the families.
OF_THE_SCAN = (
    "A_logs",
    "Ds",
    "dt_projs_bias",
    "dt_bias",
    "A_log",
    ".D",
    "A_b_log",
    ".D_b",
    "dt_proj.bias",
    "dt_proj_b.bias",
)
#: And what says where a token is.
OF_PLACES = ("pos_embed", "pos_embed_cls", "cls_token", "level_embed")
NORMS = (torch.nn.LayerNorm, torch.nn.RMSNorm, BatchNorm)
every_other = pytest.mark.parametrize("path", OTHERS, ids=name_of)


@functools.cache
def _read(path: Path) -> Config:
    return load_config(str(path))


def _load(path: Path) -> Config:
    pytest.importorskip(SCOPES[task_of(path)])
    return copy.deepcopy(_read(path))


def test_every_family_has_recipes_for_all_tasks():
    there = {(path.parent.name, task_of(path)) for path in CONFIGS}
    # Nobody published a detector of HRVMamba.
    assert there >= {(f, t) for f in FAMILIES for t in SCOPES} - {("hrvmamba", "det")}


def _trunk(backbone: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the backbone of a family, which may be inside an adapter."""
    return backbone.get("backbone", backbone)


def _widths(part: Mapping[str, Any], channels: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return the channels that a neck or head says it gets, and those that it gets."""
    told, index = part["in_channels"], part.get("in_index")
    if isinstance(index, int):
        return [told], [channels[index]]
    given = list(channels) if index is None else [channels[i] for i in index]
    return ([told], [given[-1]]) if isinstance(told, int) else (list(told), given)


@every_other
def test_the_name_is_the_variant(path):
    """Network, widths of what follows it, and weights belong together."""
    cfg, family = _load(path), path.parent.name
    backbone = _trunk(cfg.model.backbone)
    assert cfg.default_scope == SCOPES[task_of(path)]
    assert backbone.type == f"mmvmamba.{FAMILIES[family].__name__}"
    assert f"{family}-{backbone.arch}_" in path.name
    with torch.device("meta"):
        model = MODELS.build({key: value for key, value in backbone.items() if key != "init_cfg"})
    channels = [model.stage_channels[i] for i in model.out_indices]
    if task_of(path) == "cls":
        told = cfg.model.head.in_channels
        assert told == channels[-1] or list(told) == channels
        assert "init_cfg" not in backbone
        return
    if backbone is not cfg.model.backbone:
        # An adapter makes four maps of one; some detectors leave out the finest.
        channels = channels[-1:] * len(cfg.model.backbone.get("out_indices", range(4)))
    if "neck" in cfg.model:
        necks = cfg.model.neck if isinstance(cfg.model.neck, list) else [cfg.model.neck]
        parts = necks[:1]
    else:
        parts = [cfg.model.decode_head, *([cfg.model.auxiliary_head] if "auxiliary_head" in cfg.model else [])]
    for part in parts:
        told, given = _widths(part, channels)
        assert told == given
    weights = next(each.weights for each in list_models("cls") if each.name.startswith(f"{family}-{backbone.arch}_"))
    assert backbone.get("init_cfg") == (weights and dict(type="Pretrained", checkpoint=weights))


@every_other
def test_precision_batch_and_evaluation(path):
    cfg, task = _load(path), task_of(path)
    wrapper = cfg.optim_wrapper
    assert wrapper.constructor == "mmvmamba.SSMOptimWrapperConstructor"
    assert wrapper.optimizer.type == "AdamW" and cfg.auto_scale_lr.get("enable", False) is False
    in_name = re.search(r"_(\d+)xb(\d+)(?:-(\d+)k)?_", path.name)
    gpus = int(in_name[1]) if in_name else 8
    assert in_name is None or int(in_name[2]) == cfg.train_dataloader.batch_size
    assert gpus * cfg.train_dataloader.batch_size == cfg.auto_scale_lr.base_batch_size
    if task == "det":
        assert wrapper.type == "mmvmamba.Bfloat16OptimWrapper"
        assert cfg.val_evaluator.type == cfg.test_evaluator.type == "FasterCocoMetric"
        epochs = {"1x": 12, "3x": 36}.get(re.search(r"(\d+x|[a-z]+)_coco", path.name)[1])
        assert epochs in (None, cfg.train_cfg.get("max_epochs"))  # Vim's detector counts iterations
        steps = [part.milestones for part in cfg.param_scheduler if part.type == "MultiStepLR"]
        assert epochs is None or steps in ([], [[27, 33] if epochs == 36 else [8, 11]])
        return
    assert (wrapper.type, wrapper.dtype, wrapper.loss_scale) == ("AmpOptimWrapper", "bfloat16", dict(enabled=False))
    if task == "seg":
        assert cfg.train_cfg.max_iters == 1000 * int(in_name[3])
        assert (cfg.model.test_cfg.mode == "slide") is (cfg.model.test_cfg.get("crop_size") is not None)


@every_other
def test_recipe_spares_norms_and_the_parameters_of_the_scan(path):
    """None of them has weight decay; matrices have."""
    cfg = _load(path)
    init_default_scope(cfg.default_scope)
    _trunk(cfg.model.backbone).pop("init_cfg", None)
    with torch.device("meta"):
        backbone = MODELS.build(cfg.model.backbone)
    prepare_training(cfg, amp=False)
    wrapper = build_optim_wrapper(torch.nn.ModuleDict({"backbone": backbone}), cfg.optim_wrapper)
    decay = {id(p): group["weight_decay"] for group in wrapper.optimizer.param_groups for p in group["params"]}
    norms = {id(p) for m in backbone.modules() if isinstance(m, NORMS) for p in m.parameters()}
    for name, parameter in backbone.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.endswith((*OF_THE_SCAN, *OF_PLACES)) or id(parameter) in norms:
            assert decay[id(parameter)] == 0.0, name
        elif name.endswith("weight"):
            assert decay[id(parameter)] > 0.0, name
