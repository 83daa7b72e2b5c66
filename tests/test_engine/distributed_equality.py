"""Trainings of VMamba nano whose loss curves are compared: ``FILE ANSWER CASE...``, alone or as one of two processes.

A case is "batch size per process,accumulated iterations,bits of the floating-point numbers", or "fsdp": what 4,1,32 is,
sharded, then once more from its checkpoint in the middle.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from mmengine import dist
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import BaseModel, is_model_wrapper
from mmengine.registry import DATASETS, HOOKS, MODELS
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn import functional as F
from torch.utils.data import Dataset

from mmvmamba.apis import build_runner, prepare_training
from mmvmamba.models.pretrained import innermost

ROOT = Path(__file__).parents[2]
#: Samples of an update of the weights, whoever computes them; updates of a training; classes.
TOGETHER, UPDATES, CLASSES = 8, 8, 4


@DATASETS.register_module()
class FixedImages(Dataset):
    """Images that are always the same."""

    metainfo = {"classes": ("a", "b", "c", "d")}  # noqa: RUF012

    def __init__(self, bits: int) -> None:
        draw = torch.Generator().manual_seed(0)
        dtype = torch.float64 if bits == 64 else torch.float32
        self.images = torch.randn(32, 3, 32, 32, generator=draw, dtype=torch.float64).to(dtype)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"inputs": self.images[index], "label": index % CLASSES, "index": index}


@MODELS.register_module()
class NetWithoutBatchNorm(BaseModel):
    """VMamba nano (layer norms only, no drop path) and a linear classifier; every sample counts by itself."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.backbone = MODELS.build(
            dict(type="mmvmamba.VMamba", arch="nano", out_indices=(3,), drop_path_rate=0.0)
        )  # fmt: skip
        self.head = nn.Linear(self.backbone.arch.dims[-1], CLASSES)
        self.to(torch.float64 if bits == 64 else torch.float32)

    def forward(self, inputs: Tensor, label: Tensor, index: Tensor, mode: str = "loss") -> dict[str, Tensor]:
        logits = self.head(self.backbone(inputs)[-1].mean((2, 3)))
        return {"loss": F.cross_entropy(logits, label)}


@HOOKS.register_module()
class Curve(Hook):
    """Keep the loss of all processes together, and the samples, of each iteration."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.samples: list[list[int]] = []

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        loss = outputs["loss"].detach().clone()
        dist.all_reduce(loss, op="mean")
        self.losses.append(loss.item())
        self.samples.append(sorted(int(i) for part in dist.all_gather(data_batch["index"]) for i in part))


def _config(folder: Path, batch: int, accumulated: int, bits: int, launcher: str) -> Config:
    return Config(
        dict(
            default_scope="mmengine",
            launcher=launcher,
            work_dir=str(folder),
            experiment_name=folder.name,
            model=dict(type="NetWithoutBatchNorm", bits=bits),
            train_dataloader=dict(
                dataset=dict(type="FixedImages", bits=bits),
                batch_size=batch,
                num_workers=0,
                collate_fn=dict(type="default_collate"),
                sampler=dict(type="DefaultSampler", shuffle=True),
            ),
            train_cfg=dict(type="mmvmamba.IterBasedTrainLoop", max_iters=UPDATES * accumulated),
            # Not Adam: where a gradient is zero but for rounding, it steps as far as for a large one; and neither Adam
            # nor clipping would show a wrong factor in all gradients.
            optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.005, momentum=0.9), accumulative_counts=accumulated),
            default_hooks=dict(checkpoint=None, logger=None),
            custom_hooks=[dict(type="Curve")],
            randomness=dict(seed=3),
            log_level="ERROR",
        )
    )


def _sharded(folder: Path) -> dict[str, Any]:
    """Train with FSDP by what tools/train.py does; then the second half again."""
    base = Config.fromfile(str(ROOT / "configs/det/_base_/fsdp.py"))
    found: dict[str, Any] = {}
    for name, resume in (("whole", None), ("resumed", str(folder / "iter_4.pth"))):
        cfg = _config(folder, 4, 1, 32, "pytorch")
        cfg.merge_from_dict(base.to_dict())
        cfg.train_cfg = dict(by_epoch=False, max_iters=UPDATES)
        cfg.default_hooks.checkpoint = dict(type="CheckpointHook", by_epoch=False, interval=4)
        cfg.env_cfg = dict(dist_cfg=dict(backend="nccl"))
        cfg.experiment_name = f"{folder.name}-{name}"
        found[f"{name} notes"] = [note.text for note in prepare_training(cfg, resume=resume)]
        runner = build_runner(cfg)
        runner.train()
        (curve,) = [hook for hook in runner.hooks if isinstance(hook, Curve)]
        groups = [m for m in runner.model.modules() if isinstance(m, FullyShardedDataParallel)]
        found[name] = curve.losses
        found["groups"] = [type(group.module).__name__ for group in groups]
        found["blocks"] = sum(innermost(runner.model).backbone.depths)
        found["held"] = sum(parameter.numel() for parameter in runner.model.parameters())
        found["hooks"] = [type(hook).__name__ for hook in runner.hooks]
    return found


def main(answer: Path, cases: list[str]) -> None:
    launcher = "pytorch" if "RANK" in os.environ else "none"
    found = {}
    for case in cases:
        if case == "fsdp":
            found[case] = _sharded(answer.with_name("sharded"))
            continue
        batch, accumulated, bits = map(int, case.split(","))
        runner = build_runner(
            _config(answer.with_name(f"{answer.stem}-{case}"), batch, accumulated, bits, launcher)
        )  # fmt: skip
        runner.train()
        (curve,) = [hook for hook in runner.hooks if isinstance(hook, Curve)]
        wrapped = is_model_wrapper(runner.model)
        weights = (runner.model.module if wrapped else runner.model).state_dict()
        found[case] = dict(
            losses=curve.losses,
            samples=curve.samples,
            weights=sum(value.numel() for value in weights.values()),
            sums=[value.double().sum().item() for value in weights.values()],
            sizes=[value.double().norm().item() for value in weights.values()],
            wrapper=type(runner.model).__name__,
            unused=getattr(runner.model, "find_unused_parameters", None),
        )
    if dist.get_rank() == 0:
        answer.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
