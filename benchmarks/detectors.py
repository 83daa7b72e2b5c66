"""Time whole models: ``python -m benchmarks.detectors --threads 1 --json FILE``.

Mask R-CNN with FPN at 800x1216 and UperNet at 512x512, batch 1, random image, boxes and labels: a training step (all
losses, backward, optimiser excluded) and inference. VMamba-T comes from the configs of this repository, Swin-T from
mmdet's and mmseg's own, on which ours are built; weights are random. Both run in one process, interleaved, and each in
a fresh process for peak memory. ``--nano`` shrinks both backbones alike, for tests.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import memory
from benchmarks.harness import DisagreementError, Notes, interleave, save
from benchmarks.models import parse_size

Row = dict[str, Any]
ROOT = Path(__file__).parents[1]
TASKS = {"mask-rcnn": "800x1216", "upernet": "512"}
"""Model: its default size."""
NEEDS = {"mask-rcnn": "mmdet", "upernet": "mmseg"}
BACKBONES = ("vmamba", "swin")
LABELS = {"vmamba": "VMamba-T", "swin": "Swin-T"}
INFERENCE, TRAINING = "inference", "training step"
MOST_ROUNDS = 20
BOXES, CLASSES = 16, 80

_CONFIGS = {
    ("mask-rcnn", "vmamba"): str(ROOT / "configs/det/vmamba/mask-rcnn_vmamba-tiny-s1l8_fpn_1x_coco.py"),
    ("mask-rcnn", "swin"): "mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py",
    ("upernet", "vmamba"): str(ROOT / "configs/seg/vmamba/vmamba-tiny-s1l8_upernet_4xb4-160k_ade20k-512x512.py"),
    ("upernet", "swin"): "mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py",
}
_NANO: dict[str, dict[str, Any]] = {
    "vmamba": {"model.backbone.arch": "nano"},
    "swin": {"model.backbone.embed_dims": 32, "model.backbone.depths": [1, 1, 2, 1],
             "model.backbone.num_heads": [1, 2, 4, 8]},
}  # fmt: skip
_NANO_DIMS = [32, 64, 128, 256]


def build(task: str, backbone: str, nano: bool) -> nn.Module:
    """Build a detector or segmentor from its config, without weights."""
    from mmengine.registry import MODELS, init_default_scope

    from mmvmamba.apis import load_config

    options: dict[str, Any] = {"model.backbone.init_cfg": None}
    if nano:
        options |= _NANO[backbone]
        if task == "mask-rcnn":
            options["model.neck.in_channels"] = _NANO_DIMS
        else:
            options |= {"model.decode_head.in_channels": _NANO_DIMS, "model.auxiliary_head.in_channels": _NANO_DIMS[2]}
    if task == "upernet":  # SyncBN needs a GPU
        for part in ("model.decode_head", "model.auxiliary_head"):
            options[f"{part}.norm_cfg"] = dict(type="BN", requires_grad=True)
    # One drop path rate for all, as the configs of the two libraries differ.
    options["model.backbone.drop_path_rate"] = 0.2
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "benchmark.py"
        path.write_text(f"_base_ = [{_CONFIGS[task, backbone]!r}]\n")
        cfg = load_config(str(path), cfg_options=options)
    if task == "upernet":
        cfg.model.pretrained = None
    init_default_scope(cfg.default_scope)
    model: nn.Module = MODELS.build(cfg.model)
    return model


def make_sample(task: str, height: int, width: int) -> Any:
    """Draw annotations for one image."""
    if task == "mask-rcnn":
        return _detection_sample(height, width)
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    sample = SegDataSample(metainfo=_meta(height, width))
    sample.gt_sem_seg = PixelData(data=torch.randint(0, 150, (1, height, width)))
    return sample


def _meta(height: int, width: int) -> dict[str, Any]:
    shape = (height, width)
    return dict(img_shape=shape, ori_shape=shape, pad_shape=shape, batch_input_shape=shape, scale_factor=(1.0, 1.0))


def _detection_sample(height: int, width: int) -> Any:
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    corners = torch.rand(BOXES, 2) * torch.tensor([width, height]) * 0.7
    sides = (0.05 + 0.25 * torch.rand(BOXES, 2)) * torch.tensor([width, height])
    boxes = torch.cat([corners, corners + sides], 1)
    masks = torch.zeros(BOXES, height, width, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.long().tolist(), strict=True):
        mask[top : bottom + 1, left : right + 1] = 1
    sample = DetDataSample(metainfo=_meta(height, width))
    labels = torch.randint(0, CLASSES, (BOXES,))
    sample.gt_instances = InstanceData(bboxes=boxes, labels=labels, masks=BitmapMasks(masks.numpy(), height, width))
    return sample


def _autocast(model: nn.Module, bfloat16: bool) -> contextlib.AbstractContextManager[object]:
    """Return autocast around a whole segmentor; in a detector it is switched on around backbone and neck alone.

    The non-maximum suppression of mmcv takes no bfloat16 on a CPU, so the heads of a detector stay in float32.
    """
    if not bfloat16:
        return contextlib.nullcontext()
    if not hasattr(model, "roi_head"):
        return torch.autocast("cpu", torch.bfloat16)
    kind: Any = type(model)  # not the instance's method, which the lines below replace

    def narrow(image: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16):
            features = kind.extract_feat(model, image)
        return tuple(feature.float() for feature in features)

    model.extract_feat = narrow  # type: ignore[assignment]
    return contextlib.nullcontext()


def training_step(model: nn.Module, image: Tensor, sample: Any, bfloat16: bool) -> Callable[[], Tensor]:
    """Return a function that computes all losses and their gradients once."""
    model.train(True)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()  # UperNet pools to one pixel, and the statistics of one value are none

    def run() -> Tensor:
        # Which proposals are sampled decides how much work the heads have: the same for all models and rounds.
        torch.manual_seed(0)
        random.seed(0)
        model.zero_grad(set_to_none=True)
        with _autocast(model, bfloat16):
            losses = model(image, [sample], mode="loss")
        parse_losses: Callable[[Any], tuple[Tensor, Any]] = getattr(model, "parse_losses")  # noqa: B009 (mypy)
        total, _ = parse_losses(losses)
        total.backward()
        return total.detach()

    return run


def inference_step(model: nn.Module, image: Tensor, sample: Any, bfloat16: bool) -> Callable[[], Any]:
    """Return a function that predicts once."""
    model.train(False)

    def run() -> Any:
        with torch.no_grad(), _autocast(model, bfloat16):
            return model(image, [sample], mode="predict")

    return run


def memory_case(task: str, backbone: str, size: str, nano: bool, threads: int, bfloat16: bool) -> Callable[[], Tensor]:
    """Build one training step; called in a fresh process by `benchmarks.memory`."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    height, width = parse_size(size)
    model = build(task, backbone, nano)
    return training_step(model, torch.randn(1, 3, height, width), make_sample(task, height, width), bfloat16)


def check_model(name: str, model: nn.Module, image: Tensor, sample: Any, bfloat16: bool) -> None:
    """Run a training step: the loss is finite and its gradient reaches every trained weight of the backbone.

    Raises:
        DisagreementError: It is not so.
    """
    loss = training_step(model, image, sample, bfloat16)()
    if not loss.isfinite():
        raise DisagreementError(f"{name}: the loss is {float(loss)}, expected a finite number")
    backbone = model.get_submodule("backbone")
    without = [key for key, p in backbone.named_parameters() if p.requires_grad and p.grad is None]
    if without:
        raise DisagreementError(f"{name}: no gradient for {', '.join(without[:3])}")


def time_task(task: str, size: str, options: argparse.Namespace) -> list[Row]:
    """Check and time both backbones in one model."""
    height, width = parse_size(size)
    image, sample = torch.randn(1, 3, height, width), make_sample(task, height, width)
    bfloat16 = options.dtype == "bfloat16"
    models = {backbone: build(task, backbone, options.nano) for backbone in options.backbones}
    for backbone, model in models.items():
        check_model(f"{task}, {LABELS[backbone]}", model, image, sample, bfloat16)
    rows = []
    for passes, make in ((TRAINING, training_step), (INFERENCE, inference_step)):
        runs = {backbone: make(model, image, sample, bfloat16) for backbone, model in models.items()}
        timings = interleave(runs, options.seconds, MOST_ROUNDS)
        for backbone, timing in timings.items():
            ratio = timing.minimum / timings["swin"].minimum if "swin" in timings else None
            row = {
                "case": f"{task} {size}",
                "pass": passes,
                "dtype": options.dtype,
                "contestant": _label(backbone, options),
            }
            rows.append(row | {"over_swin": ratio} | timing.fields())
    return rows


def _label(backbone: str, options: argparse.Namespace) -> str:
    return LABELS[backbone].replace("-T", "-nano") if options.nano else LABELS[backbone]


def memory_rows(task: str, size: str, options: argparse.Namespace) -> list[Row]:
    """Peak memory of one training step, each in a fresh process."""
    rows = []
    for backbone in options.backbones:
        arguments = {"task": task, "backbone": backbone, "size": size, "nano": options.nano,
                     "threads": options.threads, "bfloat16": options.dtype == "bfloat16"}  # fmt: skip
        peak = memory.measure("benchmarks.detectors", "memory_case", arguments)
        rows.append({"case": f"{task} {size}", "pass": TRAINING, "dtype": options.dtype,
                     "contestant": _label(backbone, options), "method": peak.method, "step_bytes": peak.step,
                     "peak_bytes": peak.peak})  # fmt: skip
    return rows


def print_row(row: Row) -> None:
    """Print one row."""
    shown = {"minimum": "{:.3f} s", "median": "median {:.3f} s", "spread": "spread {:.0%}",
             "over_swin": "{:.3f} x Swin", "step_bytes": "{:.3e} bytes"}  # fmt: skip
    figures = [text.format(row[key]) for key, text in shown.items() if row.get(key) is not None]
    print(
        f"{row['case']:20} {row['pass']:14} {row['dtype']:9} {row['contestant']:12} {'   '.join(figures)}", flush=True
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--seconds", type=float, default=60.0, help="time for each model and pass")
    parser.add_argument("--json", type=Path, help="also write the raw results here")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--backbones", nargs="+", choices=BACKBONES, default=list(BACKBONES))
    parser.add_argument("--size", help="side or rows x columns instead of 800x1216 (mask-rcnn) and 512 (upernet)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32",
                        help="bfloat16: autocast, in mask-rcnn of backbone and neck")  # fmt: skip
    parser.add_argument("--nano", action="store_true", help="tiny backbones of equal widths, for tests")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="do not measure peak memory")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, time, print; return the exit code."""
    options = parse(arguments)
    try:
        sizes = {task: options.size or TASKS[task] for task in options.tasks}
        for size in sizes.values():
            parse_size(size)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    notes, rows = Notes(), []
    for task, size in sizes.items():
        if importlib.util.find_spec(NEEDS[task]) is None:
            notes.skip(task, f"{NEEDS[task]} is not installed")
            continue
        try:
            new = time_task(task, size, options)
        except DisagreementError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        new += memory_rows(task, size, options) if options.memory else []
        for row in new:
            print_row(row)
        rows += new
    if options.json:
        save(options.json, "detectors", rows, notes.lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
