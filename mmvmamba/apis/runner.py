"""Turning a config and a few flags into an MMEngine runner, for all three tasks.

The config's ``default_scope`` (mmdet, mmseg or mmpretrain) decides where the flags go.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict, DictAction
from mmengine.config import utils as config_utils
from mmengine.logging import print_log
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from mmvmamba.apis.distributed import check_same_start, join_processes
from mmvmamba.apis.guards import guard_loading, guard_training
from mmvmamba.apis.overrides import check_overrides
from mmvmamba.apis.precision import choose_precision
from mmvmamba.apis.resume import Note, choose_start
from mmvmamba.checkpoints.mmengine_loader import located
from mmvmamba.errors import CheckpointError, ConfigError
from mmvmamba.files import is_file

#: What the numbers of each class of a classifier begin with.
PER_CLASS = "per-class"
SCOPES = ("mmdet", "mmseg", "mmpretrain")
#: What MMEngine reads as a config.
CONFIG_ENDINGS = (".py", ".json", ".yaml", ".yml")
_DET_META_KEYS = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor", "flip", "flip_direction")

_SEG_TTA_RATIOS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


def add_shared_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that training and testing share to a command line."""
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=DictAction,
        metavar="KEY=VALUE",
        help="overwrite config entries, such as train_dataloader.batch_size=4",
    )
    parser.add_argument("--launcher", choices=["none", "pytorch", "slurm", "mpi"], default="none")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help="set by some launchers")


def load_config(
    path: str,
    *,
    work_dir: str | None = None,
    cfg_options: Mapping[str, Any] | None = None,
    launcher: str = "none",
) -> Config:
    """Read a config file and apply the flags that training and testing share.

    Args:
        path: The config file.
        work_dir: Where logs and checkpoints go; by default the config's own, else ``work_dirs/<config name>``.
        cfg_options: Entries to overwrite, dotted names to values.
        launcher: How distributed processes are started.

    Raises:
        ConfigError: If the file does not exist or is no config file, its ``default_scope`` is none of ``SCOPES``, or an
            override would have no effect.
    """
    if not is_file(path):
        raise ConfigError(
            f"config is {path!r}, which is no file in {str(Path.cwd())!r}, expected a config file. Check the path; the "
            "shipped ones are under configs/."
        )
    if Path(path).suffix not in CONFIG_ENDINGS:
        raise ConfigError(
            f"config is {path!r}, expected a file ending in {', '.join(CONFIG_ENDINGS)}. Name a config; data, weights "
            "and pictures are other arguments."
        )
    make_mmseg_bases_resolvable()
    cfg = Config.fromfile(path)
    if cfg_options:
        check_overrides(path, cfg, cfg_options)
        cfg.merge_from_dict(dict(cfg_options))
    scope = cfg.get("default_scope")
    if scope not in SCOPES:
        raise ConfigError(
            f"{path}: default_scope is {scope!r}, expected one of {', '.join(SCOPES)}. Inherit a base of that "
            "library or set default_scope."
        )
    cfg.launcher = launcher
    if work_dir is not None:
        cfg.work_dir = work_dir
    elif cfg.get("work_dir") is None:
        cfg.work_dir = str(Path("work_dirs") / Path(path).stem)
    return cfg


def make_mmseg_bases_resolvable() -> None:
    """Let ``_base_ = 'mmseg::...'`` be found where the distribution is not called mmsegmentation; ours too.

    MMEngine translates the module name mmseg to the distribution name mmsegmentation before it looks for the
    config files. The onedl fork is distributed under another name, and MMEngine would then start pip. Of packages that
    it does not list, such as this one, it refuses the config files, though a wheel has them in ``.mim``.
    """
    config_utils.MODULE2PACKAGE.setdefault("mmvmamba", "mmvmamba")
    try:
        metadata.distribution("mmsegmentation")
    except metadata.PackageNotFoundError:
        config_utils.MODULE2PACKAGE["mmseg"] = "mmseg"


def prepare_training(
    cfg: Config, *, amp: bool | None = None, auto_scale_lr: bool = False, resume: str | None = None
) -> list[Note]:
    """Apply the flags of training to ``cfg`` in place, and return lines for the log.

    Args:
        cfg: From ``load_config``.
        amp: True for mixed precision: on an accelerator with MMEngine's wrapper (float16, dynamic loss scale, unless
            the config has its own settings), on a CPU with backbone and neck in bfloat16. False for float32. None as
            the config says, except on a CPU, which takes the mixed precision it has or float32.
        auto_scale_lr: Scale the learning rate with the real batch size.
        resume: A checkpoint file, ``"auto"`` for the newest complete one in the work dir, ``"auto-or-start"`` for the
            same unless there is none, or None for a training from the beginning.

    Raises:
        ConfigError: If mixed precision is asked for on a CPU that does not multiply bfloat16, or it or float32 with an
            unusual optimizer wrapper, the config names no base batch size, or it has another seed than the checkpoint.
        CheckpointError: If there is nothing to resume from, or the work dir holds checkpoints of another training.
    """
    notes = choose_precision(cfg, amp)
    if auto_scale_lr:
        if cfg.get("auto_scale_lr", {}).get("base_batch_size") is None:
            raise ConfigError(
                "--auto-scale-lr: the config has no auto_scale_lr.base_batch_size, expected the batch size its "
                "learning rate is meant for. Add auto_scale_lr=dict(base_batch_size=...)."
            )
        cfg.auto_scale_lr.enable = True
    return [*notes, *choose_start(cfg, resume), *_random_start(cfg), *map(Note, guard_training(cfg))]


def _random_start(cfg: Config) -> list[Note]:
    """Warn of a detector or segmentor whose backbone has no weights, unless ``init_cfg=None`` says that it is meant.

    Some official ImageNet weights have no address that a recipe could name (MSVMamba, EfficientVMamba).
    """
    backbone = (cfg.get("model") or {}).get("backbone") or {}
    key = "model.backbone"
    if "backbone" in backbone and "init_cfg" not in backbone:  # an adapter, whose trunk has the weights
        backbone, key = backbone["backbone"], f"{key}.backbone"
    kind = backbone.get("type")
    if cfg.default_scope == "mmpretrain" or cfg.get("load_from") or "init_cfg" in backbone:
        return []
    if not isinstance(kind, str) or not kind.startswith("mmvmamba."):
        return []
    text = (
        f"The backbone {kind} starts from random weights: the config names none. With a file of ImageNet weights: "
        f"--cfg-options {key}.init_cfg.type=Pretrained {key}.init_cfg.checkpoint=FILE. "
        f"{key}.init_cfg=None says that random weights are meant."
    )
    return [Note(text, logging.WARNING)]


def prepare_testing(
    cfg: Config,
    checkpoint: str,
    *,
    out: str | None = None,
    show_dir: str | None = None,
    tta: bool = False,
    per_class: bool = False,
) -> None:
    """Apply the flags of testing to ``cfg`` in place.

    Args:
        cfg: From ``load_config``.
        checkpoint: The weights to test.
        out: Where predictions go: a ``.pkl`` file for mmdet and mmpretrain, a folder of label images for mmseg.
        show_dir: Folder for drawn predictions.
        tta: Use test-time augmentation.
        per_class: Evaluate each class, too. Segmentors always are.

    Raises:
        CheckpointError: If the checkpoint does not exist, or is a URL of a kind that is not served.
        ConfigError: If the config or model has no support for a flag.
    """
    if "://" in checkpoint:
        located(checkpoint)
    elif not Path(checkpoint).is_file():
        raise CheckpointError(
            f"checkpoint {checkpoint!r} does not exist, expected a file or an https URL. Train or download it first, "
            "or correct the path."
        )
    cfg.load_from = checkpoint
    _take_the_usual_runner(cfg)
    if tta and show_dir is not None and cfg.default_scope == "mmpretrain":
        raise ConfigError(
            "--tta and --show-dir: found both, expected one of them for mmpretrain, which cannot draw an image that "
            "was augmented into several. Drop one of the two."
        )
    if show_dir is not None:
        _draw_predictions(cfg, str(Path(show_dir).absolute()))
    if out is not None:
        _save_predictions(cfg, out)
    if per_class:
        _evaluate_classes(cfg)
    if tta:
        _augment_test(cfg)


def _take_the_usual_runner(cfg: Config) -> None:
    """Test by ``Runner``: another one builds its model when it starts, and the weights could not be checked before."""
    kind = cfg.pop("runner_type", "Runner")
    strategy = cfg.pop("strategy", None)
    if kind != "Runner" or strategy is not None:
        text = (
            f"The test is made by Runner, each process with the whole model: {kind} and its strategy are for training."
        )
        print_log(text, logger="current", level=logging.WARNING)


def build_runner(cfg: Config) -> Runner:
    """Join the other processes and build the runner the config asks for, with the check of everything it loads."""
    guard_loading(cfg)
    join_processes(cfg)
    check_same_start(cfg)
    return RUNNERS.build(cfg) if "runner_type" in cfg else Runner.from_cfg(cfg)


def _draw_predictions(cfg: Config, show_dir: str) -> None:
    hook = cfg.get("default_hooks", {}).get("visualization")
    if hook is None:
        raise ConfigError(
            "--show-dir: the config has no default_hooks.visualization, expected the one of its library's default "
            "runtime. Inherit that base."
        )
    if cfg.default_scope == "mmdet":
        hook.update(draw=True, test_out_dir=show_dir)
    elif cfg.default_scope == "mmseg":
        hook.update(draw=True, interval=1)
        cfg.visualizer.save_dir = show_dir
    else:
        hook.update(enable=True, interval=1, out_dir=show_dir)


def _save_predictions(cfg: Config, out: str) -> None:
    if cfg.default_scope == "mmseg":
        for metric in _as_list(cfg.test_evaluator):
            metric.update(output_dir=out, keep_results=True)
        return
    if not out.endswith((".pkl", ".pickle")):
        raise ConfigError(
            f"--out is {out!r}, expected a file name ending in .pkl for {cfg.default_scope}. Add the ending."
        )
    dump = "DumpDetResults" if cfg.default_scope == "mmdet" else "DumpResults"
    cfg.test_evaluator = [*_as_list(cfg.test_evaluator), dict(type=dump, out_file_path=out)]


def _evaluate_classes(cfg: Config) -> None:
    evaluators = _as_list(cfg.test_evaluator)
    if cfg.default_scope == "mmdet":
        of_coco = [evaluator for evaluator in evaluators if evaluator.type.endswith("CocoMetric")]
        if not of_coco:
            raise ConfigError(
                f"--per-class: test_evaluator is {', '.join(evaluator.type for evaluator in evaluators)}, expected "
                "CocoMetric or FasterCocoMetric, the ones with numbers of each class. Drop --per-class."
            )
        for evaluator in of_coco:
            evaluator.classwise = True
    elif cfg.default_scope == "mmpretrain":
        items = ("precision", "recall", "f1-score", "support")
        cfg.test_evaluator = [*evaluators, dict(type="SingleLabelMetric", average=None, items=items, prefix=PER_CLASS)]


def _augment_test(cfg: Config) -> None:
    if cfg.default_scope == "mmdet":
        _set_detection_tta(cfg)
    elif cfg.default_scope == "mmpretrain":
        cfg.setdefault("tta_model", ConfigDict(type="AverageClsScoreTTA"))
        cfg.setdefault("tta_pipeline", _flip_tta(cfg, dict(type="PackInputs")))
    else:
        cfg.setdefault("tta_model", ConfigDict(type="SegTTAModel"))
        cfg.setdefault("tta_pipeline", _scale_and_flip_tta(cfg))
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline


def _set_detection_tta(cfg: Config) -> None:
    heads = [cfg.model.get("roi_head", {}).get("mask_head"), cfg.model.get("mask_head")]
    if any(head is not None for head in heads):
        raise ConfigError(
            f"--tta: model {cfg.model.type} predicts masks, expected a model of boxes only: mmdet merges augmented "
            "boxes but not masks. Test without --tta."
        )
    nms = dict(nms=dict(type="nms", iou_threshold=0.5), max_per_img=100)
    cfg.setdefault("tta_model", ConfigDict(type="DetTTAModel", tta_cfg=nms))
    cfg.setdefault("tta_pipeline", _flip_tta(cfg, dict(type="PackDetInputs", meta_keys=_DET_META_KEYS)))


def _flip_tta(cfg: Config, pack: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the test pipeline with its packing step replaced by packing a mirrored and an unmirrored image."""
    flips = [dict(type="RandomFlip", prob=1.0, direction="horizontal"), dict(type="RandomFlip", prob=0.0)]
    steps = list(cfg.test_dataloader.dataset.pipeline[:-1])
    return [*steps, dict(type="TestTimeAug", transforms=[flips, [pack]])]


def _scale_and_flip_tta(cfg: Config) -> list[dict[str, Any]]:
    """Return mmseg's usual augmentation, six scales with and without mirroring, around the steps of the test pipeline.

    The scales are relative to the image's own size, as the test pipeline of a config without a resize step has it.
    """
    first, *rest = cfg.test_dataloader.dataset.pipeline
    annotations = [[step] for step in rest if step.get("type") == "LoadAnnotations"]
    scales = [dict(type="Resize", scale_factor=ratio, keep_ratio=True) for ratio in _SEG_TTA_RATIOS]
    flips = [dict(type="RandomFlip", prob=prob, direction="horizontal") for prob in (0.0, 1.0)]
    return [first, dict(type="TestTimeAug", transforms=[scales, flips, *annotations, [rest[-1]]])]


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
