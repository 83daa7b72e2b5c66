"""A training that takes milliseconds: a model with batch norm, a dataset with named samples, an MMEngine runner."""

from __future__ import annotations

import time
import uuid
from pathlib import Path
from typing import Any

import torch
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, HOOKS, METRICS, MODELS
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement
from torch import nn
from torch.utils.data import DataLoader, Dataset

#: Where ``Poison`` may strike; a fourth place is "constant": in the loss, but not in the gradients.
PLACES = ("loss", "gradient", "input")
BATCH = 2


@DATASETS.register_module(force=True)
class Images(Dataset):
    """Random images under file names; those of iteration ``poisoned`` hold ``value`` if ``place`` is the input."""

    def __init__(self, count: int = 16, poison: Poison | None = None) -> None:
        self.images = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        if poison is not None and poison.place == "input":
            for iteration in poison.iterations:
                self.images[(iteration - 1) * BATCH, 1, 2, 3] = poison.value

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = BaseDataElement(metainfo={"img_path": f"images/{index:03}.jpg"})
        return {"inputs": self.images[index], "data_samples": sample}


class Poison:
    """What goes wrong: ``value`` in the loss, the gradient or the input of the given iterations, counted from 1."""

    def __init__(self, place: str, value: float, *iterations: int) -> None:
        self.place, self.value, self.iterations = place, value, iterations


class Model(BaseModel):
    """A convolution, batch norm and a linear layer; ``poison`` strikes in its forward pass."""

    def __init__(self, poison: Poison | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 1)
        self.poison = poison
        self.passes = 0

    def forward(self, inputs: Any, data_samples: Any = None, mode: str = "tensor") -> Any:
        images = torch.stack(list(inputs))
        out = self.head(self.norm(self.conv(images)).relu().mean((2, 3)))
        if mode != "loss":
            return [BaseDataElement() for _ in images]
        self.passes += 1
        loss = (out - 1).square().mean()
        struck = self.poison is not None and self.passes in self.poison.iterations
        if struck and self.poison.place == "loss":
            loss = loss * self.poison.value
        if struck and self.poison.place == "constant":
            loss = loss + self.poison.value  # the gradients stay finite
        if struck and self.poison.place == "gradient":
            out.register_hook(lambda gradient: gradient * self.poison.value)
        return {"loss_main": loss, "loss_parts": [0.1 * loss, 0 * loss], "accuracy": torch.tensor(float("nan"))}


@MODELS.register_module(force=True)
class SlowModel(Model):
    """Takes a moment for each batch, so that a signal from outside finds it at work."""

    def forward(self, inputs: Any, data_samples: Any = None, mode: str = "tensor") -> Any:
        time.sleep(0.02)
        return super().forward(inputs, data_samples, mode)


@METRICS.register_module(force=True)
class Count(BaseMetric):
    """Counts validation samples."""

    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results += list(data_samples)

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        return {"count": float(len(results))}


@HOOKS.register_module(force=True)
class Progress(Hook):
    """Tell another process how far the training is, by files in a folder: how many iterations, what it does."""

    priority = "LOW"

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        with (self.folder / "iterations").open("a") as file:
            file.write(f"{runner.iter + 1}\n")

    def before_val_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        (self.folder / "validating").touch()

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        (self.folder / "saving").touch()
        time.sleep(0.2)


class Snapshots(Hook):
    """Keep what a training consists of as it was before each iteration."""

    priority = "VERY_HIGH"

    def __init__(self) -> None:
        self.before: list[dict[str, Any]] = []

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        self.before.append(state_of(runner))


def state_of(runner: Runner) -> dict[str, Any]:
    """Return copies of weights, buffers and optimizer state."""
    model = {f"model.{name}": value.clone() for name, value in runner.model.state_dict().items()}
    optimizer = runner.optim_wrapper.optimizer
    moments = {
        f"optimizer.{index}.{name}": torch.as_tensor(value).clone()
        for index, parameter in enumerate(optimizer.param_groups[0]["params"])
        for name, value in optimizer.state[parameter].items()
    }
    return {**model, **moments}


def differing(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Return the names of what is not bitwise equal (NaN equals NaN)."""
    names = sorted(first.keys() ^ second.keys())
    shared = first.keys() & second.keys()
    return names + [name for name in shared if first[name].numpy().tobytes() != second[name].numpy().tobytes()]


def make_runner(
    work_dir: Path,
    hooks: list[Any],
    *,
    poison: Poison | None = None,
    model: nn.Module | None = None,
    dataset: Dataset | None = None,
    optim_wrapper: dict[str, Any] | None = None,
    iterations: int = 8,
    validation: int = 0,
    workers: int = 0,
    **settings: Any,
) -> Runner:
    """Return a runner over ``iterations`` iterations of two images each, in the order of the dataset.

    After each third iteration it validates on ``validation`` images, if that is not 0.
    """
    model = model or Model(poison)
    wrapper = {"optimizer": {"type": "AdamW", "lr": 0.01}, **(optim_wrapper or {})}
    loader = DataLoader(
        dataset or Images(iterations * BATCH, poison), BATCH, num_workers=workers, collate_fn=_collate
    )  # fmt: skip
    if validation:
        settings = {
            "val_dataloader": DataLoader(Images(validation), BATCH, num_workers=workers, collate_fn=_collate),
            "val_cfg": {},
            "val_evaluator": Evaluator(Count()),
            **settings,
        }
    return Runner(
        model,
        str(work_dir),
        train_dataloader=loader,
        train_cfg={"type": "IterBasedTrainLoop", "max_iters": iterations, "val_interval": 3},
        optim_wrapper=wrapper,
        default_hooks={"logger": None, "checkpoint": None, **settings.pop("default_hooks", {})},
        custom_hooks=hooks,
        log_level="WARNING",
        experiment_name=uuid.uuid4().hex,
        **settings,
    )


def _collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    return {key: [sample[key] for sample in samples] for key in samples[0]}
