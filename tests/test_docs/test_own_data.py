"""The commands of docs/own_data.md, run one after the other as they stand there, on the digits set.

What makes it quick is written to the end of the user's copies of the configs: a nano network, small pictures, few
iterations, no download. Everything else is what the page says.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

import torch

from mmvmamba.apis import load_config
from tests.nano_models import ROOT, script

PAGE = (ROOT / "docs/own_data.md").read_text()
FEW = ["--train", "8", "--val", "4", "--train-crops", "100", "--val-crops", "10"]
NANO = """
model["backbone"] = dict(arch="nano", init_cfg=None)
train_dataloader.update(batch_size=4, num_workers=0, persistent_workers=False)
val_dataloader.update(num_workers=0, persistent_workers=False)
test_dataloader.update(num_workers=0, persistent_workers=False)
"""
QUICK = {
    "det": NANO + """
model["neck"] = dict(in_channels=[32, 64, 128, 256])
model["train_cfg"] = dict(
    rpn_proposal=dict(nms_pre=50, max_per_img=20), rpn=dict(sampler=dict(num=32)), rcnn=dict(sampler=dict(num=16))
)
# Without a threshold of the scores: so short a training may leave no box above it, and COCO has no figure for none.
model["test_cfg"] = dict(rpn=dict(nms_pre=50, max_per_img=20), rcnn=dict(score_thr=0.0, max_per_img=3))
train_dataset["pipeline"] = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="Resize", scale=(160, 160), keep_ratio=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
val_dataset["pipeline"] = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(160, 160), keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
""",
    "seg": NANO + """
model["data_preprocessor"] = dict(size=(64, 64))
model["decode_head"].update(in_channels=[32, 64, 128, 256], channels=32)
model["auxiliary_head"].update(in_channels=128, channels=32)
train_pipeline[2]["scale"] = (160, 160)
train_pipeline[3]["crop_size"] = (64, 64)
test_pipeline[1]["scale"] = (160, 160)
""",
}  # fmt: skip
SHORT = {"det": "train_cfg = dict(max_epochs=1)\n", "seg": ""}
LAST = {"epoch_12.pth": "epoch_1.pth", "epoch_3.pth": "epoch_2.pth", "iter_20000.pth": "iter_2.pth"}


def _commands(part):
    """Return the commands of a part of the page, in words."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", part, re.MULTILINE | re.DOTALL)
    return [shlex.split(line) for language, block in blocks if not language for line in block.splitlines()]


def _parts():
    """Return the page's parts by the task they are about."""
    head, detection = PAGE.split("## Detection")
    detection, segmentation = detection.split("## Semantic segmentation")
    segmentation, smaller = segmentation.split("## A smaller copy first")
    return {"data": head, "det": detection, "seg": segmentation, "few": smaller}


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A checkout to work in, with the page's first command done: the digits set, small."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "configs", folder / "configs")
    before = Path.cwd()
    os.chdir(folder)
    try:
        ((_, tool, *arguments),) = _commands(_parts()["data"])
        _call(tool, [*arguments, *FEW])
        yield folder
    finally:
        os.chdir(before)


def _call(tool, arguments):
    """Run a command line of ours in this process; raise unless it ends well."""
    argv = sys.argv
    sys.argv = [tool, *arguments]
    try:
        ended = script(tool).main()
    finally:
        sys.argv = argv
    assert ended in (None, 0), f"{tool} {arguments} ended with {ended}"


def _write_config(task, target):
    """Put the page's lines in the place of "your data" of a copy, and what makes it quick behind it."""
    (lines,) = re.findall(rf"^```python\n# {re.escape(target)}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    copy = Path(target).read_text()
    head, rest = copy.split("# ---- your data\n")
    block, below = rest.split("# ---- everything below follows\n")
    assigned = re.compile(r"^([a-z_]+(?:, [a-z_]+)*) = ", re.MULTILINE)
    assert assigned.findall(block) == assigned.findall(lines), "the page and the config name other things"
    lines = lines.replace("max_iters = 20000", "max_iters = 2")
    quick = QUICK[task] + SHORT[task]
    Path(target).write_text(f"{head}{lines}{below}{quick}")


def _run(task, words):
    """Run one command of the page."""
    words = [_in_ci(word) for word in words]
    if words[0] == "cp":
        shutil.copy(words[1], words[2])
        _write_config(task, words[2])
        return
    if words[0] == "sed":  # the small network, for two epochs
        *command, arrow, target = words
        assert arrow == ">"
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        assert '_base_ = "mine.py"' in text
        Path(target).write_text(
            text.replace("max_epochs = 3 ", "max_epochs = 2 ").replace("num_workers=1", "num_workers=0")
        )
        return
    assert words[0] == "python"
    tool, *arguments = words[1:]
    if tool == "demo/image_demo.py":
        arguments += ["--score-threshold", "0", "--device", "cpu"]
    _call(tool, arguments)


def _in_ci(word):
    for page, quick in LAST.items():
        word = word.replace(page, quick)
    return word


def _detector_of_other_classes(path):
    """Write a detector like that of the user's config, but of three classes, as a training would."""
    from mmengine.registry import MODELS, DefaultScope

    cfg = load_config("configs/det/own_data/mine.py")
    for head in (cfg.model.roi_head.bbox_head, cfg.model.roi_head.mask_head):
        head.num_classes = 3
    with DefaultScope.overwrite_default_scope("mmdet"):
        state = MODELS.build(cfg.model).state_dict()
    torch.save({"state_dict": state, "meta": {}}, path)
    return state


def _log(folder):
    (path,) = Path(folder).glob("*/*.log")
    return path.read_text()


@pytest.mark.slow
def test_detection(here):
    for words in _commands(_parts()["det"]):
        if any(word.startswith("load_from=") for word in words):
            _detector_of_other_classes("DETECTOR.pth")
        _run("det", words)
    log = _log("work_dirs/mine")
    assert "Epoch(train) [1]" in log and "coco/bbox_mAP" in log
    assert (here / "work_dirs/mine/test.pkl").stat().st_size > 0
    assert re.search(r"\| category +\| mAP", _log("work_dirs/mine/test"))  # the table of the classes
    assert len(list((here / "work_dirs/mine/pictures/vis").iterdir())) == 4
    log = _log("work_dirs/mine-from-coco")
    taken = re.search(r"(\d+)/(\d+) tensors from 'DETECTOR.pth'; (\d+) keep their values: (.*)", log)
    assert taken and int(taken[1]) + 6 == int(taken[2]) and int(taken[3]) == 6
    for name in ("fc_cls", "fc_reg", "conv_logits"):
        assert name in taken[4]
    log = _log("work_dirs/mine-boxes")
    assert "coco/bbox_mAP" in log and "segm" not in log.split("Epoch(val)")[1]
    assert "coco/bbox_mAP" in _log("work_dirs/mine-boxes/test")
    assert "coco/segm_mAP" in _log("work_dirs/mine-cpu")
    for name in ("mine-boxes", "mine-cpu"):
        assert len(list((here / "work_dirs" / name / "pictures/vis").iterdir())) == 4


@pytest.mark.slow
def test_segmentation(here):
    for words in _commands(_parts()["seg"]):
        _run("seg", words)
    assert "mIoU" in _log("work_dirs/mine-seg")
    assert re.search(r"\|\s+background \|", _log("work_dirs/mine-seg/test"))  # the table of the classes
    assert len(list((here / "work_dirs/mine-seg/labels").iterdir())) == 4
    assert len(list((here / "work_dirs/mine-seg/pictures/vis").iterdir())) == 4


def test_smaller_copies(here):
    for _, tool, *arguments in _commands(_parts()["few"]):
        _call(tool, arguments)
    assert len(list((here / "data/digits-few/images/train").iterdir())) == 8
    assert len(list((here / "data/digits-few-seg/labels/train").iterdir())) == 8
    assert len(list((here / "data/digits-few-crops/train/4").iterdir())) == 2


def test_the_page_names_what_there_is():
    """The configs and tools of the page, also those outside of its commands."""
    for path in set(re.findall(r"\b(?:configs|tools|demo|tests)/[\w./-]*\w", PAGE)):
        if not path.endswith(("mine.py", "mine_cpu.py")) and "." in path:
            assert (ROOT / path).exists(), path
