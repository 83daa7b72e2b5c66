"""The models of the digits configs with random weights, and their checkpoints."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

from mmvmamba.apis import load_config
from mmvmamba.datasets import CLASSES, SEG_CLASSES

ROOT = Path(__file__).parents[1]
NAMES = {"cls": CLASSES, "det": CLASSES, "seg": SEG_CLASSES}


def digits_config(task: str) -> Path:
    (path,) = (ROOT / "configs" / task / "digits").glob("*.py")
    return path


def nano_model(task: str, seed: int = 0) -> torch.nn.Module:
    """Build the model of a digits config; the last layers speak up, so that there is something to see."""
    cfg = load_config(str(digits_config(task)))
    cfg.model.backbone.init_cfg = None
    torch.manual_seed(seed)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model)
    for name, parameter in model.named_parameters():
        if name.endswith(("fc_cls.weight", "conv_seg.weight", "head.fc.weight")):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def nano_checkpoint(task: str, folder: Path, **meta: object) -> Path:
    """Write a checkpoint as a training of the digits config would, with the class names unless ``meta`` is given."""
    file = folder / f"{task}.pth"
    meta = meta or {"dataset_meta": {"classes": NAMES[task]}}
    torch.save({"meta": meta, "state_dict": nano_model(task).state_dict()}, file)
    return file


def on_digits(cfg: Config, data: Path) -> Config:
    """Point every path of a digits config to ``data``."""
    for split in ("train", "val", "test"):
        cfg[f"{split}_dataloader"].dataset.data_root = f"{data}/"
    for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
        if "ann_file" in evaluator:
            evaluator.ann_file = str(data / "annotations/instances_val.json")
    return cfg


def script(path: str) -> ModuleType:
    """Import a command line of this repository, without running it."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
