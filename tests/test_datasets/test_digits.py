"""The digits data set: determinism, no leak between splits, and agreement of its three kinds of annotation."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools import mask as mask_api
from pycocotools.coco import COCO

from mmvmamba.datasets import CLASSES, DigitsSettings, write_digits
from mmvmamba.datasets.digit_scenes import SIDES, draw_scene, load_digit_sources
from mmvmamba.datasets.digits import MANIFEST, encode_mask, label_picture
from mmvmamba.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = DigitsSettings(train=60, val=30, seed=3, train_crops=80, val_crops=40)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("digits") / "data"
    assert write_digits(out, SETTINGS)
    return out


def _load_coco(data: Path, split: str) -> COCO:
    return COCO(str(data / "annotations" / f"instances_{split}.json"))


def _digest(folder: Path) -> str:
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            total.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return total.hexdigest()


def test_same_seed_gives_the_same_bytes_in_another_process(data: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools/dataset_converters/digits.py"), "--out", str(tmp_path / "again")]
    command += ["--train", "60", "--val", "30", "--seed", "3", "--train-crops", "80", "--val-crops", "40"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    assert "train scenes 60/60" in done.stdout
    assert _digest(tmp_path / "again") == _digest(data)


def test_another_seed_gives_other_pictures(data: Path, tmp_path: Path) -> None:
    write_digits(tmp_path / "other", DigitsSettings(2, 1, 4, 1, 1))
    name = "images/train/000000.jpg"
    assert (tmp_path / "other" / name).read_bytes() != (data / name).read_bytes()


def test_splits_share_no_scan(data: Path) -> None:
    sources = load_digit_sources(SETTINGS.seed)
    assert not set(sources["train"].indices) & set(sources["val"].indices)
    scans = {split: {scan.tobytes() for scan in source.images} for split, source in sources.items()}
    assert not scans["train"] & scans["val"]
    for split, source in sources.items():
        used = {k for a in _load_coco(data, split).anns.values() for k in a["digit_sources"]}
        assert used and used <= set(source.indices.tolist())
        assert set(source.labels.tolist()) == set(range(10))


@pytest.mark.parametrize("split", ["train", "val"])
def test_coco_and_labels_agree(data: Path, split: str) -> None:
    coco = _load_coco(data, split)
    assert [coco.cats[k]["name"] for k in sorted(coco.cats)] == list(CLASSES)
    assert len(coco.imgs) == getattr(SETTINGS, split)
    for image in coco.imgs.values():
        picture = cv2.imread(str(data / "images" / split / image["file_name"]))
        labels = cv2.imread(str(data / "labels" / split / image["file_name"].replace(".jpg", ".png")), -1)
        assert picture.shape == (image["height"], image["width"], 3)
        assert image["height"] in SIDES and image["width"] in SIDES
        assert labels.shape == picture.shape[:2] and labels.dtype == np.uint8
        painted = np.ones_like(labels)
        for annotation in coco.imgToAnns[image["id"]]:
            mask = coco.annToMask(annotation).astype(bool)
            _check_annotation(annotation, mask, image)
            painted[mask] = 0 if annotation["iscrowd"] else annotation["category_id"] + 1
        # Polygons tell an outline to a fraction of a pixel, so single border pixels may differ.
        assert np.mean(painted != labels) < 0.004


def _check_annotation(annotation: dict, mask: np.ndarray, image: dict) -> None:
    left, top, width, height = annotation["bbox"]
    assert width >= 1 and height >= 1
    assert left >= 0 and top >= 0 and left + width <= image["width"] and top + height <= image["height"]
    assert abs(mask.sum() - annotation["area"]) <= max(3, 0.04 * annotation["area"])
    rows, columns = np.nonzero(mask)
    assert abs(columns.min() - left) <= 1 and abs(columns.max() + 1 - left - width) <= 1
    assert abs(rows.min() - top) <= 1 and abs(rows.max() + 1 - top - height) <= 1
    if annotation["iscrowd"]:
        assert isinstance(annotation["segmentation"], dict)
    if isinstance(annotation["segmentation"], dict):
        assert annotation["segmentation"]["size"] == [image["height"], image["width"]]
        assert mask.sum() == annotation["area"]


def test_every_kind_of_annotation_and_picture_is_present(data: Path) -> None:
    coco = _load_coco(data, "train")
    single = [a for a in coco.anns.values() if not a["iscrowd"]]
    assert {a["category_id"] for a in single} == set(range(1, 11))
    assert any(isinstance(a["segmentation"], list) for a in single)
    assert any(isinstance(a["segmentation"], dict) for a in single)
    assert any(a["iscrowd"] for a in coco.anns.values())
    assert any(not coco.imgToAnns[k] for k in coco.imgs)
    assert any(i["height"] != i["width"] for i in coco.imgs.values())
    counts = json.loads((data / MANIFEST).read_text())["counts"]["train"]
    assert counts["objects"] == len(single) and counts["scenes"] == 60


def test_later_digits_cover_earlier_ones() -> None:
    source = load_digit_sources(0)["train"]
    covered = 0
    for index in range(40):
        scene = draw_scene(np.random.default_rng([7, index]), source)
        claimed = np.zeros(scene.image.shape[:2], dtype=int)
        for instance in scene.instances:
            claimed += instance.mask
            covered += instance.mask.sum() < instance.painted
        assert claimed.max(initial=0) <= 1
        labels = label_picture(scene)
        for instance in scene.instances:
            assert (labels[instance.mask] == (0 if instance.crowd else instance.label + 2)).all()
            if not instance.crowd:
                assert instance.mask.sum() >= 0.65 * instance.painted
    assert covered > 10


def test_masks_with_holes_become_rle_and_others_polygons() -> None:
    source = load_digit_sources(0)["train"]
    kinds = set()
    for index in range(30):
        for instance in draw_scene(np.random.default_rng([8, index]), source).instances:
            code = encode_mask(instance)
            height, width = instance.mask.shape
            rle = code if isinstance(code, dict) else mask_api.merge(mask_api.frPyObjects(code, height, width))
            decoded = mask_api.decode(rle).astype(bool)
            kinds.add(type(code))
            assert (decoded & instance.mask).sum() / (decoded | instance.mask).sum() > 0.93
    assert kinds == {list, dict}


def test_crops_are_in_a_folder_per_class(data: Path) -> None:
    for split, count in (("train", 80), ("val", 40)):
        crops = sorted((data / "crops" / split).glob("*/*.jpg"))
        assert len(crops) == count
        assert {crop.parent.name for crop in crops} <= set(CLASSES)
        assert cv2.imread(str(crops[0])).shape == (64, 64, 3)


def test_second_call_does_nothing(data: Path) -> None:
    before = _digest(data)
    assert not write_digits(data, SETTINGS)
    assert _digest(data) == before


def test_foreign_or_different_folders_are_refused(data: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="holds other files"):
        write_digits(foreign, SETTINGS)
    assert [path.name for path in foreign.iterdir()] == ["thesis.txt"]
    with pytest.raises(DataError, match="was made with"):
        write_digits(data, DigitsSettings(train=61, val=30, seed=3, train_crops=80, val_crops=40))
    with pytest.raises(DataError, match="is a file"):
        write_digits(foreign / "thesis.txt", SETTINGS)


def test_incomplete_folder_is_reported(tmp_path: Path) -> None:
    settings = DigitsSettings(2, 1, 0, 2, 1)
    write_digits(tmp_path / "data", settings)
    (tmp_path / "data/images/train/000001.jpg").unlink()
    with pytest.raises(DataError, match="holds 1 files, expected 2"):
        write_digits(tmp_path / "data", settings)


def test_an_interrupted_call_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_digits(tmp_path / "data", SETTINGS, interrupt)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bad", [{"train": 0}, {"val": -1}, {"seed": -1}, {"train": 1.5}])
def test_bad_settings_are_named(bad: dict) -> None:
    with pytest.raises(DataError, match=next(iter(bad))):
        DigitsSettings(**bad)
