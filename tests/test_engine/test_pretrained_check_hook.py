"""PretrainedCheckHook: a checkpoint that did not load stops the training, one that did does not."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mmengine.registry import HOOKS
from torch import nn

from mmvmamba.engine import PretrainedCheckHook
from mmvmamba.errors import CheckpointMismatch, ConfigError


class _Model(nn.Module):
    """A detector in miniature: a backbone with an output norm that a classifier lacks."""

    def __init__(self, path: Path, prefix: str | None = "backbone.") -> None:
        super().__init__()
        self.backbone = nn.ModuleDict({"stem": nn.Linear(3, 4), "outnorm0": nn.LayerNorm(4)})
        self.backbone.init_cfg = {"type": "Pretrained", "checkpoint": str(path), "prefix": prefix}  # type: ignore[assignment]


def _runner(model: nn.Module, resume: bool = False) -> Any:
    return SimpleNamespace(model=model, _resume=resume, _load_from=None, logger=logging.getLogger("test"))


def _checkpoint(tmp_path: Path, extra: dict[str, torch.Tensor] | None = None, width: int = 4) -> Path:
    state = {"backbone.stem.weight": torch.randn(width, 3), "backbone.stem.bias": torch.randn(width)}
    path = tmp_path / "cls.pth"
    torch.save({"state_dict": {**state, "head.fc.weight": torch.zeros(2, 4), **(extra or {})}}, path)
    return path


def _load(model: _Model, path: Path) -> None:
    state = torch.load(path, weights_only=True)["state_dict"]
    model.backbone["stem"].load_state_dict({key: state[f"backbone.stem.{key}"] for key in ("weight", "bias")})


def test_registered_under_the_scope_of_mmvmamba() -> None:
    assert isinstance(HOOKS.build(dict(type="mmvmamba.PretrainedCheckHook")), PretrainedCheckHook)


def test_loaded_weights_pass_and_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = _checkpoint(tmp_path)
    model = _Model(path)
    _load(model, path)
    with caplog.at_level(logging.INFO):
        PretrainedCheckHook().before_train(_runner(model))
    assert "2/4 tensors" in caplog.text
    assert "2 keep their values: outnorm0.weight, outnorm0.bias" in caplog.text


def test_random_weights_are_noticed(tmp_path: Path) -> None:
    model = _Model(_checkpoint(tmp_path))
    with pytest.raises(CheckpointMismatch, match=r"2 of 4 tensors differ from the checkpoint: .*stem"):
        PretrainedCheckHook().before_train(_runner(model))
    PretrainedCheckHook().before_train(_runner(model, resume=True))


def test_missing_unused_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    path = _checkpoint(tmp_path, {"backbone.layers.0.weight": torch.zeros(1)})
    model = _Model(path)
    _load(model, path)
    with pytest.raises(CheckpointMismatch, match=r"1 unexpected \['layers\.0\.weight'\]"):
        PretrainedCheckHook().before_train(_runner(model))
    with pytest.raises(CheckpointMismatch, match=r"2 of 4 entries missing \['outnorm0\.weight', 'outnorm0\.bias'\]"):
        PretrainedCheckHook(allow_missing=()).before_train(_runner(model))
    with pytest.raises(CheckpointMismatch, match=r"stem\.weight \(5, 3\) instead of \(4, 3\)"):
        PretrainedCheckHook().before_train(_runner(_Model(_checkpoint(tmp_path, width=5))))


def test_a_string_is_no_sequence_of_names() -> None:
    with pytest.raises(ConfigError, match="allow_missing is 'outnorm'"):
        PretrainedCheckHook(allow_missing="outnorm")
