"""The recipes in numbers: which configs there are, how they differ from the libraries' own, and what they train with.

The numbers are those of upstream's README and configs, as collected in the fact sheet of issue 6.
"""

from __future__ import annotations

import argparse
import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("mmengine")

from mmengine.config import Config, ConfigDict, DictAction
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope

from mmvmamba.apis import build_runner, load_config, prepare_testing, prepare_training
from mmvmamba.models.backbones.vmamba import ARCHS
from tests.test_configs.small_data import CONFIGS, SCOPES, name_of, small_config, task_of

#: Variant: first width, stochastic depth, official ImageNet weights.
VARIANTS = {
    "tiny-s1l8": (96, 0.2, "%23v2cls/vssm1_tiny_0230s_ckpt_epoch_264.pth"),
    "tiny-s2l5": (96, 0.2, "%23v2cls/vssm_tiny_0230_ckpt_epoch_262.pth"),
    "small-s2l15": (96, 0.3, "%23v2cls/vssm_small_0229_ckpt_epoch_222.pth"),
    "small-s1l20": (96, 0.3, "%23v2cls/vssm1_small_0229s_ckpt_epoch_240.pth"),
    "base-s2l15": (128, 0.6, "%23v2cls/vssm_base_0229_ckpt_epoch_237.pth"),
    "base-s1l20": (128, 0.5, "%23v2cls/vssm1_base_0229s_ckpt_epoch_225.pth"),
    "vanilla-tiny": (96, 0.2, "%23v0cls/vssmtiny_dp01_ckpt_epoch_292.pth"),
    "vanilla-small": (96, 0.3, "%23v0cls/vssmsmall_dp03_ckpt_epoch_238.pth"),
    "vanilla-base": (128, 0.6, "%23v0cls/vssmbase_dp06_ckpt_epoch_241.pth"),
}
RELEASES = "https://github.com/MzeroMiko/VMamba/releases/download/"
WITH_1X = ("tiny-s1l8", "tiny-s2l5", "small-s2l15", "base-s2l15", "vanilla-tiny", "vanilla-small", "vanilla-base")
WITH_3X = ("tiny-s1l8", "tiny-s2l5", "small-s2l15", "vanilla-tiny", "vanilla-small")
SLIDES = (("tiny-s1l8", 512), ("base-s2l15", 512), ("small-s2l15", 512), ("small-s2l15", 640), ("small-s2l15", 896))
UPERNET = "upernet_4xb4-160k_ade20k"

OURS = [path for path in CONFIGS if path.parent.name == "vmamba"]
DET, SEG, CLS = ([path for path in OURS if task_of(path) == task] for task in ("det", "seg", "cls"))


def _path(name: str) -> Path:
    (path,) = [path for path in OURS if path.stem == name]
    return path


def _variant(path: Path) -> str:
    (variant,) = [name for name in VARIANTS if f"vmamba-{name}_" in path.name]
    return variant


def _side(path: Path) -> int:
    (side,) = [side for side in (512, 640, 896) if f"-{side}x{side}" in path.name]
    return side


@functools.cache
def _read(path: Path) -> Config:
    return load_config(str(path))


def _load(path: Path) -> Config:
    pytest.importorskip(SCOPES[task_of(path)])
    return copy.deepcopy(_read(path))


def test_the_configs_are_those_of_the_released_models_and_the_recipes_beside_them():
    expected = {f"vmamba-{name}_8xb128_in1k" for name in VARIANTS}
    expected |= {f"mask-rcnn_vmamba-{name}_fpn_1x_coco" for name in WITH_1X}
    expected |= {f"mask-rcnn_vmamba-{name}_fpn_ms-crop-3x_coco" for name in WITH_3X}
    expected |= {"cascade-mask-rcnn_vmamba-tiny-s1l8_fpn_ms-crop-3x_coco", "retinanet_vmamba-tiny-s1l8_fpn_1x_coco"}
    expected |= {f"vmamba-{name}_{UPERNET}-512x512" for name in VARIANTS}
    expected |= {f"vmamba-{n}_{UPERNET}-{s}x{s}" for n in ("small-s2l15", "vanilla-small") for s in (640, 896)}
    expected |= {f"vmamba-{name}_{UPERNET}-{side}x{side}-slide" for name, side in SLIDES}
    assert {path.stem for path in OURS} == expected
    assert {task_of(path) for path in CONFIGS} == set(SCOPES)
    assert set(VARIANTS) == set(ARCHS) - {"nano"}


@pytest.mark.parametrize("path", OURS, ids=name_of)
def test_the_name_is_the_variant(path):
    """Network, widths of what follows it, stochastic depth and weights belong together."""
    cfg = _load(path)
    width, drop_path, weights = VARIANTS[_variant(path)]
    dims = [width, 2 * width, 4 * width, 8 * width]
    backbone = cfg.model.backbone
    assert cfg.default_scope == SCOPES[task_of(path)]
    assert (backbone.type, backbone.arch) == ("mmvmamba.VMamba", _variant(path))
    assert ARCHS[backbone.arch].drop_path_rate == drop_path
    assert set(backbone) <= {"type", "arch", "out_indices", "init_cfg"}, "a variant's own stochastic depth is used"
    if task_of(path) == "cls":
        assert cfg.model.head.in_channels == dims[-1]
        assert "init_cfg" not in backbone
        return
    used = [dims[i] for i in backbone.get("out_indices", range(4))]
    assert cfg.model.neck.in_channels == used if task_of(path) == "det" else True
    if task_of(path) == "seg":
        assert (cfg.model.decode_head.in_channels, cfg.model.auxiliary_head.in_channels) == (dims, dims[2])
    assert backbone.init_cfg == dict(type="Pretrained", checkpoint=RELEASES + weights)


def test_training_from_scratch_is_one_option():
    parser = argparse.ArgumentParser()
    parser.add_argument("--cfg-options", nargs="+", action=DictAction)
    options = parser.parse_args(["--cfg-options", "model.backbone.init_cfg=None"]).cfg_options
    pytest.importorskip("mmdet")
    assert load_config(str(DET[0]), cfg_options=options).model.backbone.init_cfg is None


#: Config of ours: the library's own, and what differs besides the backbone, the optimizer wrapper and the notes.
BASES = {
    "mask-rcnn_vmamba-base-s2l15_fpn_1x_coco": (
        "mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py",
        {"model.neck.in_channels", "val_evaluator.type", "test_evaluator.type", "test_evaluator.classwise"},
    ),
    "mask-rcnn_vmamba-tiny-s2l5_fpn_ms-crop-3x_coco": (
        "mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py",
        {"val_evaluator.type", "test_evaluator.type", "test_evaluator.classwise"},
    ),
    "cascade-mask-rcnn_vmamba-tiny-s1l8_fpn_ms-crop-3x_coco": (
        "mmdet::convnext/cascade-mask-rcnn_convnext-t-p4-w7_fpn_4conv1fc-giou_amp-ms-crop-3x_coco.py",
        {"val_evaluator.type", "test_evaluator.type", "test_evaluator.classwise", "custom_imports"},
    ),
    "retinanet_vmamba-tiny-s1l8_fpn_1x_coco": (
        "mmdet::swin/retinanet_swin-t-p4-w7_fpn_1x_coco.py",
        {"val_evaluator.type", "test_evaluator.type", "test_evaluator.classwise"},
    ),
    f"vmamba-small-s2l15_{UPERNET}-512x512": (
        "mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py",
        {"train_dataloader.batch_size", "auto_scale_lr"},
    ),
    "vmamba-base-s1l20_8xb128_in1k": (
        "mmpretrain::swin_transformer/swin-base_16xb64_in1k.py",
        {"train_dataloader.batch_size", "val_dataloader.batch_size", "test_dataloader.batch_size", "custom_hooks"},
    ),
}


@pytest.mark.parametrize("name", BASES)
def test_a_recipe_is_the_librarys_own_but_for_what_is_named(name, tmp_path):
    base, expected = BASES[name]
    ours = _load(_path(name))
    (tmp_path / "theirs.py").write_text(f"_base_ = {base!r}\n")
    theirs = load_config(str(tmp_path / "theirs.py"))
    ignored = ("model.backbone", "optim_wrapper", "checkpoint", "pretrained", "checkpoint_file", "work_dir")
    assert {key for key in _differences(ours, theirs) if not key.startswith(ignored)} == expected


@pytest.mark.parametrize("path", [*DET, *SEG, *CLS], ids=name_of)
def test_optimizer_and_schedule(path):
    cfg = _load(path)
    lr, decay, batch = {"det": (1e-4, 0.05, 16), "seg": (6e-5, 0.01, 16), "cls": (1e-3, 0.05, 1024)}[task_of(path)]
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ("AdamW", lr, decay)
    assert tuple(optimizer.betas) == (0.9, 0.999)
    gpus = {"det": 8, "seg": 4, "cls": 8}[task_of(path)]
    assert gpus * cfg.train_dataloader.batch_size == batch == cfg.auto_scale_lr.base_batch_size
    assert cfg.auto_scale_lr.get("enable", False) is False
    warm_up, decline = cfg.param_scheduler
    if task_of(path) == "det":
        epochs = 36 if "3x" in path.name else 12
        assert (cfg.train_cfg.max_epochs, decline.milestones) == (epochs, [27, 33] if epochs == 36 else [8, 11])
        assert (warm_up.start_factor, warm_up.end) == (0.001, 500 if "retinanet" in path.name else 1000)
    elif task_of(path) == "seg":
        assert (cfg.train_cfg.max_iters, decline.type, decline.power, decline.end) == (160000, "PolyLR", 1.0, 160000)
        assert (warm_up.start_factor, warm_up.end) == (1e-6, 1500)
    else:
        assert (cfg.train_cfg.max_epochs, warm_up.end, decline.type) == (300, 20, "CosineAnnealingLR")
        assert cfg.optim_wrapper.clip_grad.max_norm == 5.0


@pytest.mark.parametrize("path", CLS, ids=name_of)
def test_imagenet_has_ema_and_the_augmentation_of_swin(path):
    cfg = _load(path)
    (ema,) = cfg.custom_hooks
    assert (ema.type, 1 - ema.momentum) == ("EMAHook", pytest.approx(0.9999))
    assert [(a.type, a.alpha) for a in cfg.model.train_cfg.augments] == [("Mixup", 0.8), ("CutMix", 1.0)]
    assert cfg.model.head.loss.label_smooth_val == 0.1
    steps = {step.type: step for step in cfg.train_dataloader.dataset.pipeline}
    assert steps["RandomErasing"].erase_prob == 0.25
    assert (steps["RandAugment"].magnitude_level, steps["RandAugment"].num_policies) == (9, 2)


@pytest.mark.parametrize("path", OURS, ids=name_of)
def test_precision_and_evaluation(path):
    cfg = _load(path)
    wrapper = cfg.optim_wrapper
    assert wrapper.constructor == "mmvmamba.SSMOptimWrapperConstructor"
    if task_of(path) == "det":
        assert wrapper.type == "mmvmamba.Bfloat16OptimWrapper"
        assert cfg.val_evaluator.type == cfg.test_evaluator.type == "FasterCocoMetric"
        assert cfg.test_evaluator.classwise is True and "classwise" not in cfg.val_evaluator
        return
    assert (wrapper.type, wrapper.dtype, wrapper.loss_scale) == ("AmpOptimWrapper", "bfloat16", dict(enabled=False))
    if task_of(path) == "seg":
        assert cfg.val_evaluator.type == cfg.test_evaluator.type == "IoUMetric"


@pytest.mark.parametrize("path", SEG, ids=name_of)
def test_crops_scales_and_windows_of_segmentation(path):
    cfg = _load(path)
    side = _side(path)
    assert cfg.crop_size == cfg.model.data_preprocessor.size == (side, side)
    for split, kind, key in (("train", "RandomResize", "scale"), ("train", "RandomCrop", "crop_size"),
                             ("val", "Resize", "scale"), ("test", "Resize", "scale")):  # fmt: skip
        (step,) = [step for step in cfg[f"{split}_dataloader"].dataset.pipeline if step.type == kind]
        assert step[key] == ((side, side) if key == "crop_size" else (4 * side, side))
    if path.stem.endswith("-slide"):
        stride = {512: 341, 640: 426, 896: 597}[side]
        assert cfg.model.test_cfg == dict(mode="slide", crop_size=(side, side), stride=(stride, stride))
    else:
        assert cfg.model.test_cfg == dict(mode="whole")


@pytest.mark.parametrize("side", [640, 896])
def test_pipelines_of_larger_crops_are_those_of_512_at_another_scale(side):
    small, large = (
        _load(_path(f"vmamba-small-s2l15_{UPERNET}-512x512")),
        _load(_path(f"vmamba-small-s2l15_{UPERNET}-{side}x{side}")),
    )
    factor = side / 512
    expected = {"model.data_preprocessor.size", "crop_size", "scale", "train_pipeline", "test_pipeline"}
    expected |= {f"{split}_dataloader.dataset.pipeline" for split in ("train", "val", "test")}
    assert {key for key in _differences(large, small) if key not in ("work_dir", "data_preprocessor.size")} == expected
    for name in ("train_pipeline", "test_pipeline"):
        for ours, theirs in zip(large[name], small[name], strict=True):
            scaled = {key: value for key, value in theirs.items() if key != "_scope_"}
            for key in {"scale", "crop_size"} & set(scaled):
                scaled[key] = tuple(int(side * factor) for side in scaled[key])
            assert dict(ours) == scaled


@pytest.mark.parametrize("side", [512, 640, 896])
def test_augmented_test_of_segmentation(side, tmp_path):
    """That of mmseg at every crop, as in upstream's configs: six ratios of the image's own size, and mirroring."""
    path = _path(f"vmamba-small-s2l15_{UPERNET}-{side}x{side}")
    cfg = _load(path)
    (tmp_path / "weights.pth").touch()
    prepare_testing(cfg, str(tmp_path / "weights.pth"), tta=True)
    assert cfg.model.type == "SegTTAModel"
    load, augment = cfg.test_dataloader.dataset.pipeline
    assert (load.type, augment.type) == ("LoadImageFromFile", "TestTimeAug")
    scales, flips, annotations, pack = augment.transforms
    ratios = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
    assert [step.scale_factor for step in scales] == list(ratios)
    assert all(step.type == "Resize" and step.keep_ratio for step in scales)
    assert [(step.prob, step.direction) for step in flips] == [(0.0, "horizontal"), (1.0, "horizontal")]
    assert [step.type for step in (*annotations, *pack)] == ["LoadAnnotations", "PackSegInputs"]


def test_augmented_test_of_segmentation_runs(tmp_path, small_data):
    path = _path(f"vmamba-small-s2l15_{UPERNET}-640x640")
    pytest.importorskip("mmseg")
    heads = {"model.decode_head.in_channels": [32, 64, 128, 256], "model.auxiliary_head.in_channels": 128}
    cfg = small_config(path, small_data, tmp_path, **{"model.backbone.arch": "nano", **heads})
    (tmp_path / "weights.pth").touch()
    prepare_testing(cfg, str(tmp_path / "weights.pth"), tta=True)
    cfg.load_from = None
    cfg.test_dataloader.dataset.indices = 1
    assert 0.0 <= build_runner(cfg).test()["mIoU"] <= 100.0


#: What is not another family's (test_families.py); of each way to say how a backbone is trained, and of each variant,
#: one config.
VMAMBAS = [path for path in CONFIGS if path in OURS or path.parent.name in ("digits", "own_data")]
SPARING = [*CLS, *(path for path in VMAMBAS if '_base_ = "./' not in path.read_text() and path not in CLS)]


def test_every_other_config_trains_as_one_of_those_whose_weight_decay_is_looked_at():
    assert {_read(path).model.backbone.arch for path in SPARING} == set(ARCHS)
    looked_at = [(task_of(path), dict(_read(path).optim_wrapper)) for path in SPARING]
    assert [p.stem for p in VMAMBAS if (task_of(p), dict(_read(p).optim_wrapper)) not in looked_at] == []


@pytest.mark.parametrize("path", SPARING, ids=name_of)
def test_recipe_spares_norms_and_the_parameters_of_the_scan(path):
    """None of them has weight decay; matrices have."""
    cfg = _load(path)
    init_default_scope(cfg.default_scope)
    cfg.model.backbone.init_cfg = None
    with torch.device("meta"):
        backbone = MODELS.build(cfg.model.backbone)
    prepare_training(cfg, amp=False)
    wrapper = build_optim_wrapper(torch.nn.ModuleDict({"backbone": backbone}), cfg.optim_wrapper)
    decay = {id(p): group["weight_decay"] for group in wrapper.optimizer.param_groups for p in group["params"]}
    norms = {id(p) for m in backbone.modules() if isinstance(m, torch.nn.LayerNorm) for p in m.parameters()}
    for name, parameter in backbone.named_parameters():
        if name.endswith(("A_logs", "Ds", "dt_projs_bias")) or id(parameter) in norms:
            assert decay[id(parameter)] == 0.0, name
        elif name.endswith("weight"):
            assert decay[id(parameter)] > 0.0, name


def test_heads_keep_the_rule_of_the_recipe():
    """Upstream's: no decay for what has ``norm`` in its name, and for nothing else outside the backbone."""
    cfg = _load(_path("mask-rcnn_vmamba-tiny-s1l8_fpn_1x_coco"))
    init_default_scope("mmdet")
    cfg.model.backbone.update(arch="nano", init_cfg=None)
    cfg.model.neck.in_channels = [32, 64, 128, 256]
    model = MODELS.build(cfg.model)
    groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if not name.startswith("backbone."):
            assert decay[id(parameter)] == (0.0 if "norm" in name else 0.05), name


@pytest.mark.parametrize("task", SCOPES)
def test_auto_scale_lr_scales_with_the_batch(task, tmp_path, small_data):
    """Through the runner's own start of a training, without an iteration; for segmentation too."""
    path = {"cls": CLS, "det": DET, "seg": SEG}[task][0]
    pytest.importorskip(SCOPES[task])
    widths = {"det": {"model.neck.in_channels": [32, 64, 128, 256]}, "cls": {"model.head.in_channels": 256},
              "seg": {"model.decode_head.in_channels": [32, 64, 128, 256],
                      "model.auxiliary_head.in_channels": 128}}[task]  # fmt: skip
    cfg = small_config(path, small_data, tmp_path, **{"model.backbone.arch": "nano", **widths})
    lr, base = cfg.optim_wrapper.optimizer.lr, cfg.auto_scale_lr.base_batch_size
    prepare_training(cfg, auto_scale_lr=True, amp=False)
    cfg.train_cfg = ConfigDict(type="IterBasedTrainLoop", max_iters=0, val_interval=10)
    cfg.param_scheduler = [dict(type="ConstantLR", factor=1.0, by_epoch=False, begin=0, end=10)]
    cfg.default_hooks.checkpoint = None
    cfg.custom_hooks = []
    runner = build_runner(cfg)
    runner.train()
    found = [group["initial_lr"] for group in runner.optim_wrapper.optimizer.param_groups]
    assert found == pytest.approx([lr * cfg.train_dataloader.batch_size / base] * len(found))


def _differences(ours: Any, theirs: Any, prefix: str = "") -> set[str]:
    """Return the dotted names of what differs; what is no dict on either side counts as a whole."""
    if not (isinstance(ours, (dict, Config)) and isinstance(theirs, (dict, Config))):
        return set() if ours == theirs else {prefix}
    found: set[str] = set()
    for key in set(ours) | set(theirs):
        name = f"{prefix}.{key}".lstrip(".")
        found |= _differences(ours.get(key), theirs.get(key), name)
    return found
