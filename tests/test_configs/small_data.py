"""The digits in the layouts of COCO, ADE20K and ImageNet, with all classes of each, and configs made small for them."""

from __future__ import annotations

import dataclasses
import json
import shutil
import uuid
from importlib import import_module
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmvmamba.apis import load_config
from mmvmamba.datasets.digits import DigitsSettings, write_digits
from mmvmamba.models.backbones.columnar import ColumnarBackbone
from mmvmamba.registry import MODELS

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*/*/*.py"))
# The configs of own data hold places to fill in; tests/test_docs/test_own_data.py fills them in and trains.
CONFIGS = [path for path in CONFIGS if not {"_base_", "own_data"} & set(path.parts)]
#: Task: the scope of its configs.
SCOPES = {"cls": "mmpretrain", "det": "mmdet", "seg": "mmseg"}

IMAGES = 2  # of each split
SHRINK = 8  # image scales and crops are divided by this
PROPOSALS = 20  # of an image, and objects found in it
LARGEST_STRIDE = 64  # of a network with its neck; images are padded to multiples of such
DEEP, FEW = 24, 4  # layers
_SIZES = ("scale", "scales", "crop_size", "size", "stride")


def name_of(path: Path) -> str:
    """Return such as ``det/vmamba/x``, the name of a test."""
    return str(path.relative_to(ROOT / "configs").with_suffix(""))


def task_of(path: Path) -> str:
    """Return ``"cls"``, ``"det"`` or ``"seg"``."""
    return path.relative_to(ROOT / "configs").parts[0]


def write_data(root: Path) -> Path:
    """Make ``digits``, ``coco``, ``ade`` and ``imagenet`` below ``root`` and return it."""
    digits = root / "digits"
    write_digits(digits, DigitsSettings(IMAGES, IMAGES, 0, 10, 10))
    for split, coco, ade in (("train", "train2017", "training"), ("val", "val2017", "validation")):
        _write_coco(digits, root / "coco", split, coco)
        for source, folder in (("images", "images"), ("labels", "annotations")):
            shutil.copytree(digits / source / split, root / "ade" / folder / ade)
        _write_imagenet(digits, root / "imagenet", split)
    return root


def _write_coco(digits: Path, root: Path, split: str, name: str) -> None:
    """The digit k becomes the k-th of COCO's 80 classes; the others have no objects."""
    from mmdet.datasets import CocoDataset

    content = json.loads((digits / "annotations" / f"instances_{split}.json").read_text())
    classes = CocoDataset.METAINFO["classes"]
    first = content["categories"][0]["id"]
    content["categories"] = [{"id": first + k, "name": label} for k, label in enumerate(classes)]
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / "annotations" / f"instances_{name}.json").write_text(json.dumps(content))
    shutil.copytree(digits / "images" / split, root / name)


def _write_imagenet(digits: Path, root: Path, split: str) -> None:
    """A thousand folders, one per class; they share the crops."""
    crops = sorted((digits / "crops" / split).glob("*/*.jpg"))
    for k in range(1000):
        folder = root / split / f"n{k:08d}"
        folder.mkdir(parents=True)
        (folder / "0.jpg").symlink_to(crops[k % len(crops)])


def small_config(path: Path, data: Path, work_dir: Path, **options: Any) -> Config:
    """Return a config for a few small images on a CPU; network, heads, classes and kinds of steps are its own.

    Changed are image scales and crops, batch sizes, workers, numbers of proposals and detections, and where data and
    weights come from. A detector keeps all scores besides: untrained, it finds nothing above the usual threshold, and
    nothing would be evaluated. Networks but HRVMamba keep at most two blocks of each stage, columnar ones that are
    deeper than usual four layers: the rest is more of the same, and wants gigabytes and minutes.
    """
    cfg = load_config(str(path), work_dir=str(work_dir), cfg_options={"model.backbone.init_cfg": None, **options})
    own_data = path.parent.name == "digits"
    folder = "digits" if own_data else {"cls": "imagenet", "det": "coco", "seg": "ade"}[task_of(path)]
    for split, batch_size in (("train", 2), ("val", 1), ("test", 1)):
        loader = cfg[f"{split}_dataloader"]
        loader.update(batch_size=batch_size, num_workers=0, persistent_workers=False)
        dataset = loader.dataset.get("dataset", loader.dataset)  # of a RepeatDataset, what it repeats
        dataset.update(data_root=f"{data / folder}/", indices=IMAGES)
        if not own_data:
            _shrink(dataset.pipeline)
    for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
        if "ann_file" in evaluator:
            evaluator.ann_file = str(data / folder / "annotations" / Path(evaluator.ann_file).name)
    if task_of(path) == "seg" and not own_data:
        _shrink(cfg.model)
        _shrink(cfg.tta_pipeline)
    if task_of(path) == "det":
        _keep_few_proposals(cfg.model)
        if not own_data and cfg.model.data_preprocessor.pad_size_divisor > LARGEST_STRIDE:  # the side of a square
            cfg.model.data_preprocessor.pad_size_divisor //= SHRINK
    _keep_few_layers(cfg.model.backbone)
    cfg.custom_hooks = [hook for hook in cfg.get("custom_hooks") or [] if "PretrainedCheckHook" not in hook.type]
    cfg.experiment_name = uuid.uuid4().hex
    cfg.randomness = dict(seed=0)  # else a new one at every run
    return cfg


def _keep_few_layers(backbone: Any) -> None:
    trunk = backbone.get("backbone", backbone)
    cls = MODELS.get(trunk.type)
    arch = import_module(cls.__module__).ARCHS[trunk.arch]
    fields = {field.name: getattr(arch, field.name) for field in dataclasses.fields(arch)}
    if not issubclass(cls, ColumnarBackbone):
        if "modules" not in fields:  # HRVMamba's, which divide its depths
            trunk.arch = fields | {"depths": tuple(min(depth, FEW // 2) for depth in arch.depths)}
        return
    if arch.depth <= DEEP:
        return
    trunk.arch = fields | {"depth": FEW}
    if trunk.get("out_indices") is not None:
        trunk.out_indices = tuple(range(FEW))[-len(trunk.out_indices) :]
    if "interaction_indexes" in backbone:
        backbone.interaction_indexes = tuple((layer, layer) for layer in range(FEW))


def _keep_few_proposals(model: Any) -> None:
    model.test_cfg.get("rcnn", model.test_cfg).update(score_thr=0.0, max_per_img=PROPOSALS)
    if "rpn" not in model.test_cfg:
        return
    model.train_cfg.rpn_proposal.max_per_img = model.test_cfg.rpn.max_per_img = PROPOSALS
    stages = model.train_cfg.rcnn
    for stage in stages if isinstance(stages, list) else [stages]:
        stage.sampler.num = PROPOSALS


def _shrink(value: Any) -> None:
    """Divide all sizes in nested steps or a model, in place."""
    if isinstance(value, dict):
        for key, entry in value.items():
            if key in _SIZES and entry is not None:
                value[key] = _divided(entry)
            else:
                _shrink(entry)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            _shrink(entry)


def _divided(size: Any) -> Any:
    if isinstance(size, (list, tuple)):
        return type(size)(_divided(side) for side in size)
    return max(1, size // SHRINK)
