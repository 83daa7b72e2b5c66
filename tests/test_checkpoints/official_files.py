"""Synthetic official files: random weights in the real layouts."""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

#: (what upstream's present releases call it, what the first ones called it), applied in order.
OLD_NAMES = (
    ("patch_embed.0.", "patch_embed.proj."),
    ("patch_embed.2.", "patch_embed.norm."),
    (".op.", ".self_attention."),
    ("classifier.", ""),
)
_LINEAR = ("in_proj.weight", "out_proj.weight", "fc1.weight", "fc2.weight")


def random_state(shapes: Mapping[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Return random float32 entries of these names and shapes."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(tuple(shape), generator=generator) - 0.5 for name, shape in shapes.items()}


def with_old_names(state: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Return the entries, those of the backbone after ``prefix``, under the names of the first releases."""
    return {
        prefix + _old_name(name.removeprefix(prefix)) if name.startswith(prefix) else name: value
        for name, value in state.items()
    }


def _old_name(name: str) -> str:
    if ".blocks." in name and ".op." not in name:
        name = name.replace(".norm.", ".ln_1.")
    for new, old in OLD_NAMES:
        name = name.replace(new, old)
    return name


def with_pointwise_convolutions(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the entries with the linear maps of the blocks as 1x1 convolutions."""
    return {name: value[:, :, None, None] if name.endswith(_LINEAR) else value for name, value in state.items()}


def classifier_file(path: Path, state: Mapping[str, Tensor]) -> Path:
    """Write what upstream's ImageNet training writes: the weights, their average, and its yacs config among others."""
    with _yacs() as node:
        config = node({"MODEL": node({"TYPE": "vssm", "NUM_CLASSES": 1000}), "TRAIN": node({"EPOCHS": 300})})
        content = {
            "model": dict(state),
            "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]},
            "lr_scheduler": {"base_values": [1e-3]},
            "max_accuracy": 82.6,
            "scaler": {"scale": 65536.0},
            "epoch": 262,
            "config": config,
            "model_ema": {name: value + 1 for name, value in state.items()},
            "max_accuracy_ema": 82.7,
        }
        torch.save(content, path)
    return path


def runner_file(path: Path, state: Mapping[str, Tensor], dataset_meta: Mapping[str, Any] | None = None) -> Path:
    """Write what MMEngine's runner writes for a detector or segmentor."""
    from mmengine.logging import HistoryBuffer

    history = HistoryBuffer()
    history.update(1.5)
    content = {
        "meta": {
            "epoch": 12,
            "iter": 87960,
            "cfg": "model = dict(type='MaskRCNN')\n",
            "seed": 1,
            "dataset_meta": dict(dataset_meta or {}),
        },
        "state_dict": dict(state),
        "message_hub": {"log_scalars": {"train/loss": history}, "runtime_info": {"epoch": 11}, "resumed_keys": {}},
        "optimizer": {"state": {}, "param_groups": []},
        "param_schedulers": [],
    }
    torch.save(content, path)
    return path


@contextlib.contextmanager
def _yacs() -> Iterator[type]:
    """Have the package yacs, in miniature, for the time of writing a file; who reads it has not."""

    class CfgNode(dict):
        def __init__(self, entries: Mapping[str, Any]) -> None:
            super().__init__(entries)
            self.__dict__["__immutable__"] = False

    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    module = types.ModuleType("yacs.config")
    module.CfgNode = CfgNode  # type: ignore[attr-defined]
    sys.modules.update({"yacs": types.ModuleType("yacs"), "yacs.config": module})
    try:
        yield CfgNode
    finally:
        del sys.modules["yacs.config"], sys.modules["yacs"]
