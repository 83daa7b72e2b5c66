"""A training of milliseconds in which everything is random that may be: for tests of resuming."""

import itertools
import random
from unittest import mock

import numpy as np
import torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.hooks import EMAHook
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, METRICS, MODELS
from mmengine.runner import Runner
from torch import nn
from torch.nn import functional as F

from mmvmamba.models.layers.drop_path import DropPath

SAMPLES = 20
_numbers = itertools.count()

#: Scalars of the message hub that are times of the clock.
CLOCKS = ("time", "data_time", "memory")


@DATASETS.register_module(force=True)
class TinyImages:
    """Random crops, flips and noise, each from another library's generator.

    Args:
        size: Pixels of a side, of which 2 are cropped.
    """

    def __init__(self, size=8):
        generator = torch.Generator().manual_seed(0)
        self.crop = size - 2
        self.images = torch.randn(SAMPLES, 3, size, size, generator=generator)
        self.labels = torch.randint(0, 4, (SAMPLES,), generator=generator)
        self.metainfo = {"classes": ("a", "b", "c", "d")}

    def __len__(self):
        return len(self.images)

    def get_data_info(self, index):
        return {"img_path": f"images/{index}.png", "width": 8 + index % 3, "height": 9}

    def __getitem__(self, index):
        image = self.images[index]
        if random.random() < 0.5:
            image = image.flip(-1)
        x, y = np.random.randint(0, 3, 2)
        image = image[:, y : y + self.crop, x : x + self.crop] * float(np.random.normal(1, 0.1))
        return {"inputs": image + torch.randn_like(image) * 0.1, "label": int(self.labels[index])}


class Last(nn.Module):
    """Pick the last feature map."""

    def forward(self, features):
        return features[-1]


@MODELS.register_module(force=True)
class TinyModel(BaseModel):
    """Dropout, drop path and batch norm in a few parameters.

    Args:
        vmamba: Have a VMamba nano as the backbone.
    """

    def __init__(self, vmamba=False):
        super().__init__()
        if vmamba:
            backbone = MODELS.build(dict(type="mmvmamba.VMamba", arch="nano", out_indices=(3,), drop_path_rate=0.3))
            channels = backbone.arch.dims[-1]
            self.backbone = nn.Sequential(backbone, Last(), nn.BatchNorm2d(channels))
        else:
            channels = 8
            self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GELU())
        self.branch = nn.Conv2d(channels, channels, 1)
        self.drop_path = DropPath(0.3)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(channels, 4)

    def forward(self, inputs, label, mode="tensor"):
        features = self.backbone(torch.stack(inputs) if isinstance(inputs, list) else inputs)
        features = features + self.drop_path(self.branch(features))
        logits = self.head(self.dropout(features.mean((2, 3))))
        label = torch.as_tensor(label)
        if mode == "loss":
            return {"loss": F.cross_entropy(logits, label)}
        return [dict(loss=loss.item()) for loss in F.cross_entropy(logits, label, reduction="none")]


@METRICS.register_module(force=True)
class MeanLoss(BaseMetric):
    """Draws random numbers, as a metric should not."""

    default_prefix = "tiny"

    def process(self, data_batch, data_samples):
        torch.rand(3)
        self.results += [sample["loss"] + random.random() * 0 for sample in data_samples]

    def compute_metrics(self, results):
        np.random.rand(2)
        return {"loss": float(np.mean(results))}


def config(work_dir, *, by_epoch=True, workers=0, length=4, val_interval=1, optim=None, **changes):
    """Return the config of a training of 5 iterations per epoch.

    Args:
        work_dir: Where checkpoints go.
        by_epoch: Which loop.
        workers: Of the DataLoader; a single one persists.
        length: Epochs, or iterations.
        val_interval: Epochs or iterations between validations.
        optim: Entries of the optimizer wrapper.
        changes: Top-level entries to merge.
    """
    loop = (
        dict(type="mmvmamba.EpochBasedTrainLoop", max_epochs=length, val_interval=val_interval)
        if by_epoch
        else dict(type="mmvmamba.IterBasedTrainLoop", max_iters=length, val_interval=val_interval)
    )
    loader = dict(batch_size=4, dataset=dict(type="TinyImages"))
    content = dict(
        default_scope="mmengine",
        work_dir=str(work_dir),
        experiment_name=f"tiny_{next(_numbers)}",
        model=dict(type="TinyModel"),
        train_dataloader=dict(
            **loader,
            num_workers=workers,
            persistent_workers=workers == 1,
            sampler=dict(type="DefaultSampler", shuffle=True),
        ),
        val_dataloader=dict(**loader, sampler=dict(type="DefaultSampler", shuffle=False)),
        train_cfg=loop,
        val_cfg=dict(),
        val_evaluator=dict(type="MeanLoss"),
        optim_wrapper=dict(optimizer=dict(type="AdamW", lr=0.01, weight_decay=0.1), **(optim or {})),
        param_scheduler=[
            dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=7),
            dict(type="CosineAnnealingLR", by_epoch=by_epoch, begin=1, T_max=30),
        ],
        default_hooks=dict(
            checkpoint=dict(type="mmvmamba.CheckpointHook", interval=1, by_epoch=False),
            logger=dict(type="LoggerHook", interval=3),
        ),
        custom_hooks=[
            dict(type="mmvmamba.RandomStateHook"),
            dict(type="EMAHook", momentum=0.1, priority="ABOVE_NORMAL"),
        ],
        randomness=dict(seed=3),
        log_level="ERROR",
    )
    cfg = Config(content)
    cfg.merge_from_dict(changes)
    return cfg


def train(cfg, checkpoint=None):
    """Train, after resuming from ``checkpoint`` if one is given, and return the runner."""
    if checkpoint is not None:
        cfg.resume, cfg.load_from = True, str(checkpoint)
    # Whatever was drawn in this process before must not matter.
    random.seed()
    np.random.seed()
    # Formatting the config for the log takes longer than training.
    with mock.patch.object(Config, "pretty_text", ""):
        runner = Runner.from_cfg(cfg)
        runner.train()
    return runner


def state(runner):
    """Return all that must be equal bit for bit, as a flat dict."""
    flat = {}
    flatten("model", runner.model.state_dict(), flat)
    flatten("optimizer", runner.optim_wrapper.state_dict(), flat)
    flatten("schedulers", [one.state_dict() for one in runner.param_schedulers], flat)
    for hook in runner.hooks:
        if isinstance(hook, EMAHook):
            flatten("ema", hook.ema_model.state_dict(), flat)
    for name, buffer in runner.message_hub.log_scalars.items():
        if name.rpartition("/")[2] not in CLOCKS:
            values, counts = buffer.data
            flatten(f"scalar {name}", [torch.as_tensor(values.copy()), torch.as_tensor(counts.copy())], flat)
    flatten("python", random.getstate(), flat)
    flatten("numpy", np.random.get_state()[1].tolist(), flat)
    flatten("torch", torch.get_rng_state(), flat)
    flat["counters"] = (runner.epoch, runner.iter)
    return flat


def flatten(name, value, flat):
    """Put the leaves of nested dicts and lists into ``flat``, under dotted names."""
    if isinstance(value, dict):
        for key, item in value.items():
            flatten(f"{name}.{key}", item, flat)
    elif isinstance(value, (list, tuple)):
        if all(isinstance(item, (int, float, type(None))) for item in value):
            flat[name] = list(value)
        else:
            for number, item in enumerate(value):
                flatten(f"{name}.{number}", item, flat)
    else:
        flat[name] = value.detach().clone() if isinstance(value, torch.Tensor) else value


def differences(first, second):
    """Return the names of what is not bitwise equal in two states."""
    names = first.keys() | second.keys()
    return sorted(name for name in names if not _same(first.get(name), second.get(name)))


def _same(one, other):
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return (
            one.dtype == other.dtype and one.shape == other.shape and one.numpy().tobytes() == other.numpy().tobytes()
        )
    return type(one) is type(other) and one == other
