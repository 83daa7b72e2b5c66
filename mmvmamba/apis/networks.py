"""Networks of a config or of the model index, built and with their weights: what inferencers and analysis tools share.

A network may be one of this project's or of MMDetection, MMSegmentation or MMPretrain, to be compared with.
"""

from __future__ import annotations

import argparse
import importlib
import logging
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.logging import MMLogger
from mmengine.model import BaseModule, revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn

from mmvmamba.apis.runner import CONFIG_ENDINGS, load_config
from mmvmamba.checkpoints.matching import check, load
from mmvmamba.checkpoints.mmengine_loader import load_from_mmvmamba
from mmvmamba.errors import ConfigError

#: Task -> the library that serves it, which is also the config's ``default_scope``.
SCOPES = {"det": "mmdet", "seg": "mmseg", "cls": "mmpretrain"}
RANDOM = "random"
"""On a command line: weights as a training without a checkpoint starts with."""


@dataclass(frozen=True)
class Network:
    """A classifier, detector or segmentor in evaluation form, on its device.

    Attributes:
        name: What figures call it: its name in the model index, or the stem of the config file.
        cfg: Its config.
        model: The whole of it.
        weights: One line about what was loaded.
    """

    name: str
    cfg: Config
    model: nn.Module
    weights: str

    @property
    def task(self) -> str:
        """``"det"``, ``"seg"`` or ``"cls"``."""
        return next(task for task, scope in SCOPES.items() if scope == self.cfg.default_scope)

    @property
    def backbone(self) -> nn.Module:
        """What takes images (b, 3, h, w) and returns a tuple of maps (b, c, h, w), the finest first.

        Raises:
            ConfigError: If the network has none.
        """
        backbone = getattr(self.model, "backbone", None)
        if not isinstance(backbone, nn.Module):
            raise ConfigError(
                f"{self.name} is a {type(self.model).__name__} without a backbone, expected a classifier, detector or "
                "segmentor that has one. Name another model."
            )
        return backbone

    @property
    def preprocessor(self) -> dict[str, Any]:
        """What the config says of the images' mean, standard deviation and order of colours."""
        return dict(self.cfg.get("data_preprocessor") or {}) | dict(self.cfg.model.get("data_preprocessor") or {})

    def normalised(self, images: Tensor) -> Tensor:
        """Return images (b, 3, h, w) of 0 to 255, in the order BGR, as the backbone was trained to see them."""
        settings = self.preprocessor
        if settings.get("bgr_to_rgb") or settings.get("to_rgb"):
            images = images.flip(1)
        mean, std = (
            torch.as_tensor(settings.get(key) or (default,) * 3, dtype=torch.float32, device=images.device)
            for key, default in (("mean", 0.0), ("std", 1.0))
        )
        return (images.float() - mean[:, None, None]) / std[:, None, None]


def load_networks(
    models: Sequence[str | Path | Config], weights: Sequence[str | Path | None] | None = None, device: str | None = None
) -> list[Network]:
    """Return networks ready for evaluation.

    Args:
        models: Names of the model index, config files, ``"mmdet::..."``, ``"mmseg::..."`` or ``"mmpretrain::..."`` for
            a config of those packages, or configs.
        weights: A file or an https URL for each of them, None for random weights (of PyTorch's present random state).
            Without the argument all weights are random.
        device: Such as ``"cuda:0"``; by default the accelerator, if there is one.

    Raises:
        ConfigError: If a model or the device is unknown, or there are not as many weights as models.
        CheckpointError: If weights cannot be read.
        CheckpointMismatch: If weights are not those of the whole model.
    """
    if weights is not None and len(weights) != len(models):
        raise ConfigError(
            f"weights names {len(weights)} files, expected {len(models)}, one for each model. Write {RANDOM!r} on the "
            "command line (None in Python) for a model without any."
        )
    place = checked_device(device)
    return [
        _network(model, source, place) for model, source in zip(models, weights or [None] * len(models), strict=True)
    ]


def _network(model: str | Path | Config, source: str | Path | None, device: str) -> Network:
    cfg, _, _ = resolve_config(None, model)
    name = "model" if isinstance(model, Config) else Path(model).stem
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        module = build_network(cfg)
        if source is None:
            _initialise(module)
            line = "random weights"
        else:
            line, _ = load_network(module, str(source))
        module = place_network(module, device)
    return Network(name, cfg, module, line)


def _initialise(model: nn.Module) -> None:
    """Draw random weights as a training without any checkpoint does, and without MMEngine's line per parameter."""
    if not isinstance(model, BaseModule):
        return
    for part in model.modules():
        if isinstance(getattr(part, "init_cfg", None), dict) and part.init_cfg["type"] == "Pretrained":
            part.init_cfg = None
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        model.init_weights()
    finally:
        logger.setLevel(level)


def add_network_arguments(
    parser: argparse.ArgumentParser, *, several: bool = True, default: Sequence[str] = ()
) -> None:
    """Add the arguments that ``networks_from`` reads to a command line.

    Args:
        parser: Gets them.
        several: Whether more than one model can be named.
        default: The models if none is named; without them one must be.
    """
    parser.add_argument(
        "models",
        nargs=("*" if default else "+") if several else 1,
        default=list(default) or None,
        metavar="MODEL",
        help="a name of the model index (configs/README.md), a config file, or a config of another package such as "
        "mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py"
        + (f" (default: {' '.join(default)})" if default else ""),
    )
    parser.add_argument(
        "--weights",
        nargs="+",
        metavar="FILE",
        help=f"a checkpoint file or https URL for each model, in the same order; {RANDOM!r} for random weights "
        "(default: random for all)",
    )
    parser.add_argument("--device", help="such as cuda:0 or cpu (default: a GPU if there is one)")


def networks_from(args: argparse.Namespace) -> list[Network]:
    """Return the networks that a command line names; errors are those of ``load_networks``."""
    weights = None if args.weights is None else [None if name == RANDOM else name for name in args.weights]
    return load_networks(args.models, weights, args.device)


def checked_device(device: str | None) -> str:
    """Return the device by its name, by default the accelerator; a ConfigError says that there is no such kind."""
    if device is None:
        return str(get_device())
    try:
        return str(torch.device(device))
    except (RuntimeError, TypeError) as error:
        raise ConfigError(
            f"device is {device!r}, expected one of PyTorch's, such as 'cuda:0' or 'cpu'. Correct it."
        ) from error


def resolve_config(task: str | None, model: str | Path | Config) -> tuple[Config, str | None, str]:
    """Return the config, the official weights if the model is named by the index, and what to call the model.

    Args:
        task: ``"det"``, ``"seg"`` or ``"cls"``, or None for any of them.
        model: As in ``load_networks``.

    Raises:
        ConfigError: If there is no such model, or it is of another task.
    """
    weights = None
    if isinstance(model, Config):
        cfg, name = deepcopy(model), "a config"
    elif not isinstance(model, (str, Path)):
        raise ConfigError(
            f"model is a {type(model).__name__}, expected a name of the model index, a config file or a Config. "
            "Pass one of them."
        )
    elif isinstance(model, str) and "::" in model:
        cfg, name = load_config(str(_packaged(model))), f"the config {model!r}"
    elif isinstance(model, Path) or Path(model).suffix in CONFIG_ENDINGS:
        cfg, name = load_config(str(model)), f"the config file {str(model)!r}"
    else:
        # Of this project's index alone: MMEngine would look through those of other packages, or download them.
        from mmvmamba.apis.model_index import find_model

        entry = find_model(model, task)
        cfg, weights, name = load_config(str(entry.config)), entry.weights, f"the model {model!r}"
    if task is not None and cfg.get("default_scope") != SCOPES[task]:
        raise ConfigError(
            f"{name} has default_scope {cfg.get('default_scope')!r}, expected {SCOPES[task]!r} for task {task!r}. Name "
            "the task of the config, or another config."
        )
    return cfg, weights, name


def _packaged(name: str) -> Path:
    """Return the config file that ``package::path`` means; MMEngine would install a missing package."""
    package, _, inside = name.partition("::")
    if package not in SCOPES.values():
        raise ConfigError(
            f"model is {name!r}, expected one of {', '.join(map(repr, SCOPES.values()))} before '::'. Correct it."
        )
    root = Path(str(importlib.import_module(package).__file__)).parent / ".mim" / "configs"
    if Path(inside).is_absolute() or ".." in Path(inside).parts:
        raise ConfigError(
            f"model is {name!r}, expected a path inside the configs of {package} behind '::'. Name a file elsewhere by "
            "its path alone."
        )
    return root / inside


def build_network(cfg: Config) -> nn.Module:
    """Return the model as the runner builds it, with random weights."""
    if cfg.get("data_preprocessor") is not None:
        cfg.model.setdefault("data_preprocessor", cfg.data_preprocessor)
    cfg.model.pop("pretrained", None)
    model: nn.Module = MODELS.build(cfg.model)
    return model


def load_network(model: nn.Module, source: str) -> tuple[str, Mapping[str, Any]]:
    """Load all weights of a checkpoint or none; return what was loaded, in words, and the checkpoint's meta data."""
    content = load_from_mmvmamba(source, "cpu")
    match = check(
        model,
        content["state_dict"],
        source=repr(source),
        advice="Give the config the checkpoint was trained with, or the checkpoint of this config.",
    )
    load(model, match)
    return match.line(), content.get("meta") or {}


def place_network(model: nn.Module, device: str) -> nn.Module:
    """Move a model to a device, in evaluation form; a ConfigError says that the device cannot be used."""
    if device == "cpu":
        model = revert_sync_batchnorm(model)
    try:
        return model.to(device).eval()
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device is {device!r}, which cannot be used here ({str(error).splitlines()[0]}), expected one that this "
            "machine has. Use device='cpu', or leave it out."
        ) from error
