"""Tests of trained models at other sizes than they were trained for, through the runner's test loop."""

from __future__ import annotations

import copy
import logging
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmvmamba.analysis.accuracy_scaling import SHOWN, resized
from mmvmamba.apis.data import check_data
from mmvmamba.apis.demo import STAGES
from mmvmamba.apis.networks import resolve_config
from mmvmamba.apis.overrides import check_overrides
from mmvmamba.apis.runner import build_runner, prepare_testing
from mmvmamba.apis.weights import check_weights
from mmvmamba.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class Trained:
    """A model that was trained, as the config of its test and its weights."""

    name: str
    cfg: Config
    checkpoint: str


@dataclass(frozen=True)
class SizeTest:
    """The test of a model at one size.

    Attributes:
        model: Its name.
        scope: The library of its task.
        size: What ``mmvmamba.analysis.accuracy_scaling`` says that it is.
        metrics: All numbers of the test.
    """

    model: str
    scope: str
    size: int
    metrics: Mapping[str, float]

    def rows(self) -> list[dict[str, Any]]:
        """One row for every metric that a figure shows."""
        return [
            {"model": self.model, "label": label, "size": self.size, "value": factor * self.metrics[name]}
            for name, label, factor in SHOWN[self.scope]
            if name in self.metrics
        ]


def trained_models(
    models: Sequence[str],
    weights: Sequence[str],
    *,
    cfg_options: Mapping[str, Any] | None = None,
    data_root: str | Path | None = None,
) -> list[Trained]:
    """Return models with their weights, checked as far as that is possible without building anything.

    Args:
        models: Names of the model index, config files, or configs of other packages, see ``load_networks``.
        weights: A file or https URL for each.
        cfg_options: Config entries to overwrite in all of them.
        data_root: Where the data set of the test lies, if not where the config says.

    Raises:
        ConfigError: If there are not as many weights as models, or a model or an override is unknown.
        CheckpointError: If a checkpoint does not exist.
    """
    if len(models) != len(weights):
        raise ConfigError(
            f"--weights names {len(weights)} files, expected {len(models)}, one for each model: what was not trained "
            "has no accuracy. Name one checkpoint for each model."
        )
    found = []
    for model, checkpoint in zip(models, weights, strict=True):
        cfg, _, _ = resolve_config(None, model)
        if data_root is not None:
            _move_data(cfg, str(data_root))
        if cfg_options:
            check_overrides(model, cfg, cfg_options)
            cfg.merge_from_dict(dict(cfg_options))
        prepare_testing(cfg, checkpoint)
        found.append(Trained(Path(model).stem, cfg, checkpoint))
    names = [each.name for each in found]
    if len(set(names)) < len(names):
        found = [Trained(f"{each.name} ({index})", each.cfg, each.checkpoint) for index, each in enumerate(found, 1)]
    return found


def demo_models(root: Path, folder: Path) -> tuple[list[str], list[str]]:
    """Return the config files of the demo's models and their newest weights.

    Args:
        root: The repository.
        folder: What the demo wrote, with ``cls``, ``det`` and ``seg``.

    Raises:
        CheckpointError: If it has not trained all of them there.
    """
    weights = []
    for stage in STAGES:
        pointer = folder / stage.name / "last_checkpoint"
        if not pointer.is_file():
            raise CheckpointError(
                f"there is no {str(pointer)!r}, expected the demo's trained models. Train them (python tools/demo.py), "
                "name their folder (--demo-dir), or name models and --weights."
            )
        weights.append(pointer.read_text().strip())
    return [str(root / stage.config) for stage in STAGES], weights


def _move_data(cfg: Config, root: str) -> None:
    """Point the test of a config to another folder; files of its evaluators that lie in the old one go along."""
    dataset = cfg.test_dataloader.dataset
    before = dataset.get("data_root")
    if before is None:
        raise ConfigError(
            "--data-root is given, but test_dataloader.dataset has no data_root, expected one to replace. Use "
            "--cfg-options with the key that the data set has."
        )
    dataset.data_root = root
    evaluators = cfg.test_evaluator if isinstance(cfg.test_evaluator, list) else [cfg.test_evaluator]
    for evaluator in evaluators:
        file = evaluator.get("ann_file")
        if file is not None and file.startswith(before):
            evaluator.ann_file = str(Path(root) / file[len(before) :].lstrip("/"))


def sizes_of(trained: Trained, sizes: Sequence[int]) -> list[Config]:
    """Return the config of each size; the errors are those of ``resized`` and ``check_data``."""
    configs = [resized(trained.cfg, size) for size in sizes]
    for cfg in configs:
        check_data(cfg, ["test"])
    return configs


def evaluate_at_sizes(
    models: Sequence[Trained],
    sizes: Sequence[Sequence[int]],
    work_dir: Path,
    done: Callable[[], None] = lambda: None,
) -> list[SizeTest]:
    """Test every model at its sizes.

    Args:
        models: From ``trained_models``.
        sizes: Sizes for each of them.
        work_dir: Receives what the runner writes, in a folder for each test.
        done: Called after each test.

    Raises:
        ConfigError: If a size, a pipeline or a data set is not one to test with, before anything is tested.
        CheckpointError: If a checkpoint cannot be read.
        CheckpointMismatch: If one is of another model.
    """
    planned = [
        (trained, size, cfg)
        for trained, own in zip(models, sizes, strict=True)
        for size, cfg in zip(own, sizes_of(trained, own), strict=True)
    ]
    results = []
    for trained, size, cfg in planned:
        results.append(SizeTest(trained.name, cfg.default_scope, size, _test(trained, size, cfg, work_dir)))
        done()
    return results


def _test(trained: Trained, size: int, cfg: Config, work_dir: Path) -> dict[str, float]:
    cfg = copy.deepcopy(cfg)
    cfg.work_dir = str(work_dir / f"{trained.name}-{size}")
    cfg.experiment_name = f"{trained.name}-{size}"
    cfg.log_level = logging.getLevelName(logging.WARNING)
    cfg.test_dataloader.pop("persistent_workers", None)  # the loader is gone after one round
    runner = build_runner(cfg)
    check_weights(runner.model, trained.checkpoint)
    metrics = runner.test()
    # mmseg's are numbers of NumPy; what a data set has no truth for is NaN in some metrics.
    return {name: float(n) for name, n in metrics.items() if isinstance(n, numbers.Real) and math.isfinite(n)}
