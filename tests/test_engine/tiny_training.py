"""A training of a few milliseconds through MMEngine's runner, for tests of what is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from mmengine.evaluator import BaseMetric
from mmengine.hooks import EMAHook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.utils.data import Dataset

EPOCH = 4  # iterations of an epoch


class TinyModel(BaseModel):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1))

    def forward(self, x: Tensor, mode: str = "tensor") -> Any:
        y = self.layers(torch.stack(list(x)) if isinstance(x, list) else x)
        return {"loss": (y**2).mean()} if mode == "loss" else [y]


class TinyData(Dataset):
    metainfo = {"classes": ("a", "b")}  # noqa: RUF012

    def __len__(self) -> int:
        return 2 * EPOCH

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": torch.full((3,), float(index))}


class TinyMetric(BaseMetric):
    """Scores that get better in every validation."""

    default_prefix = "tiny"
    count = 0

    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results.append(0)

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        self.count += 1
        return {"acc": float(self.count)}


def tiny_runner(
    work_dir: Path,
    checkpoint: dict[str, Any],
    *,
    by_epoch: bool = True,
    length: int = 3,
    validate: bool = False,
    hooks: list[Any] | None = None,
    ema: bool = False,
    **options: Any,
) -> Runner:
    """Return a runner of ``length`` epochs or iterations."""
    data = dict(dataset=TinyData(), batch_size=2, num_workers=0)
    train_cfg = dict(by_epoch=True, max_epochs=length) if by_epoch else dict(by_epoch=False, max_iters=length)
    if validate:
        options.update(
            val_dataloader=dict(**data, sampler=dict(type="DefaultSampler", shuffle=False)),
            val_evaluator=[TinyMetric()],
            val_cfg=dict(),
        )
        train_cfg["val_interval"] = 1 if by_epoch else EPOCH
    name = f"tiny-{tiny_runner.calls}"
    tiny_runner.calls += 1
    return Runner(
        TinyModel(),
        str(work_dir),
        train_dataloader=dict(**data, sampler=dict(type="DefaultSampler", shuffle=True)),
        train_cfg=train_cfg,
        optim_wrapper=dict(optimizer=dict(type="AdamW", lr=0.01)),
        param_scheduler=dict(type="CosineAnnealingLR", by_epoch=by_epoch, T_max=length),
        default_hooks=dict(checkpoint=dict(type="mmvmamba.CheckpointHook", by_epoch=by_epoch, **checkpoint)),
        custom_hooks=[*(hooks or []), *([EMAHook()] if ema else [])],
        randomness=options.pop("randomness", dict(seed=5)),
        default_scope="mmengine",
        experiment_name=name,
        log_level="ERROR",
        **options,
    )


tiny_runner.calls = 0  # names of experiments are unique within a process
