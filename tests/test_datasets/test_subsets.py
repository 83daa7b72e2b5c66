"""Small sets out of large ones: valid, the same each time, and nothing of what was there is changed."""

import hashlib
import json
import sys

import cv2
import numpy as np
import pytest

from mmvmamba.datasets.subsets import Choice, subset_ade20k, subset_coco, subset_imagenet
from mmvmamba.errors import DataError
from tests.nano_models import script

COCO = {"annotations": "annotations/instances_train.json", "images": "images/train"}
ADE = {"images": "images/train", "labels": "labels/train"}


def _content(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _document(folder):
    return json.loads((folder / COCO["annotations"]).read_text())


def test_coco(small_digits, tmp_path):
    before = _content(small_digits)
    images, annotations = subset_coco(small_digits, tmp_path / "a", **COCO, choice=Choice(5))
    whole, small = _document(small_digits), _document(tmp_path / "a")
    assert (len(small["images"]), len(small["annotations"])) == (images, annotations) == (5, annotations)
    assert small["categories"] == whole["categories"] and small["info"] == whole["info"]
    ids = [image["id"] for image in small["images"]]
    assert ids == sorted(ids)
    assert small["annotations"] == [entry for entry in whole["annotations"] if entry["image_id"] in ids]
    assert {entry["image_id"] for entry in small["annotations"] if not entry["iscrowd"]} == set(ids)
    names = sorted(image["file_name"] for image in small["images"])
    assert sorted(path.name for path in (tmp_path / "a/images/train").iterdir()) == names
    assert [path.name for path in (tmp_path / "a").iterdir() if path.name.startswith(".")] == []
    subset_coco(small_digits, tmp_path / "b", **COCO, choice=Choice(5))
    assert _content(tmp_path / "a") == _content(tmp_path / "b")
    subset_coco(small_digits, tmp_path / "c", **COCO, choice=Choice(5, seed=1))
    assert _content(tmp_path / "a") != _content(tmp_path / "c")
    assert _content(small_digits) == before


def test_coco_is_read_by_mmdet(small_digits, tmp_path):
    pytest.importorskip("mmdet")
    from mmdet.datasets import CocoDataset

    _, annotations = subset_coco(small_digits, tmp_path, **COCO, choice=Choice(6))
    dataset = CocoDataset(
        data_root=str(tmp_path), ann_file=COCO["annotations"], data_prefix={"img": "images/train/"}, pipeline=[],
        metainfo={"classes": tuple("0123456789")}, filter_cfg={"filter_empty_gt": True},
    )  # fmt: skip
    assert len(dataset) == 6
    assert sum(len(dataset.get_data_info(index)["instances"]) for index in range(6)) == annotations


def test_coco_of_some_classes(small_digits, tmp_path):
    subset_coco(small_digits, tmp_path, **COCO, choice=Choice(3), classes=["7", "3"])
    small = _document(tmp_path)
    assert [entry["name"] for entry in small["categories"]] == ["3", "7"]  # in the order of the file, with their ids
    assert {entry["category_id"] for entry in small["annotations"]} <= {4, 8}
    objects = {entry["image_id"] for entry in small["annotations"] if not entry["iscrowd"]}
    assert {image["id"] for image in small["images"]} == objects  # none that holds other classes only
    with pytest.raises(DataError, match="class 'seven' is not among the categories of .*, expected one of 10"):
        subset_coco(small_digits, tmp_path / "x", **COCO, choice=Choice(3), classes=["seven"])


def test_coco_images_without_objects(small_digits, tmp_path):
    root = tmp_path / "root"
    subset_coco(small_digits, root, **COCO, choice=Choice(4))
    document = _document(root)
    empty = document["images"][0]["id"]
    document["annotations"] = [entry for entry in document["annotations"] if entry["image_id"] != empty]
    (root / COCO["annotations"]).write_text(json.dumps(document))
    with pytest.raises(DataError, match="there are 3 images with objects of these classes, expected at least 4"):
        subset_coco(root, tmp_path / "out", **COCO, choice=Choice(4))
    assert not (tmp_path / "out").exists()
    assert subset_coco(root, tmp_path / "out", **COCO, choice=Choice(4), keep_empty=True)[0] == 4


def test_several_splits_and_links(small_digits, tmp_path):
    subset_coco(small_digits, tmp_path, **COCO, choice=Choice(2))
    val = {"annotations": "annotations/instances_val.json", "images": "images/val"}
    subset_coco(small_digits, tmp_path, **val, choice=Choice(2, link=True))
    linked = list((tmp_path / "images/val").iterdir())
    assert len(linked) == 2 and all(path.is_symlink() and path.is_file() for path in linked)
    assert not any(path.is_symlink() for path in (tmp_path / "images/train").iterdir())
    with pytest.raises(DataError, match=r"images/train' exists and is left alone"):
        subset_coco(small_digits, tmp_path, **COCO, choice=Choice(2))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../../../outside.jpg", "leads out of"),
        ("/etc/passwd", "leads out of"),
        ("nowhere.jpg", "nowhere.jpg' does not exist"),
    ],
)
def test_names_that_lead_elsewhere(small_digits, tmp_path, name, message):
    root = tmp_path / "root"
    (tmp_path / "outside.jpg").touch()
    subset_coco(small_digits, root, **COCO, choice=Choice(2))
    document = _document(root)
    document["images"][1]["file_name"] = name
    (root / COCO["annotations"]).write_text(json.dumps(document))
    with pytest.raises(DataError, match=message):
        subset_coco(root, tmp_path / "out", **COCO, choice=Choice(2))
    assert list((tmp_path / "out").iterdir()) == []
    with pytest.raises(DataError, match="is no path below the data set"):
        subset_coco(small_digits, tmp_path / "out", **{**COCO, "images": "../train"}, choice=Choice(2))


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"images": 3}', '{"images": [{"id": 1}], "annotations": [], "categories": []}', "\x00"]
)
def test_files_that_are_no_coco(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=r"a\.json' (is no JSON|has no list|: entry 0 of)|entry 0"):
        subset_coco(tmp_path, tmp_path / "out", annotations="a.json", images="i", choice=Choice(1))
    with pytest.raises(DataError, match="cannot be read"):
        subset_coco(tmp_path, tmp_path / "out", annotations="b.json", images="i", choice=Choice(1))


def test_ade20k(small_digits, tmp_path):
    assert subset_ade20k(small_digits, tmp_path / "a", **ADE, choice=Choice(4)) == 4
    images, labels = tmp_path / "a/images/train", tmp_path / "a/labels/train"
    assert {path.stem for path in images.iterdir()} == {path.stem for path in labels.iterdir()}
    for path in labels.iterdir():
        assert path.read_bytes() == (small_digits / "labels/train" / path.name).read_bytes()
    subset_ade20k(small_digits, tmp_path / "b", **ADE, choice=Choice(4))
    assert _content(tmp_path / "a") == _content(tmp_path / "b")


def test_ade20k_with_certain_labels(small_digits, tmp_path):
    subset_ade20k(small_digits, tmp_path / "a", **ADE, choice=Choice(2), containing=[5])
    for path in (tmp_path / "a/labels/train").iterdir():
        assert (cv2.imread(str(path), cv2.IMREAD_UNCHANGED) == 5).any()
    with pytest.raises(DataError, match=r"there are 0 images with one of the labels \[77\], expected at least 2"):
        subset_ade20k(small_digits, tmp_path / "b", **ADE, choice=Choice(2), containing=[77])


def test_ade20k_without_a_label_picture(tmp_path):
    for folder in ("images/train", "labels/train"):
        (tmp_path / folder).mkdir(parents=True)
    cv2.imwrite(str(tmp_path / "images/train/a.jpg"), np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(DataError, match=r"1 of 1 images in .* have no label picture, such as .*labels/train/a\.png"):
        subset_ade20k(tmp_path, tmp_path / "out", **ADE, choice=Choice(1))
    cv2.imwrite(str(tmp_path / "labels/train/a.png"), np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(DataError, match="no picture of one channel"):
        subset_ade20k(tmp_path, tmp_path / "out", **ADE, choice=Choice(1), containing=[0])


def test_imagenet(small_digits, tmp_path):
    root = small_digits / "crops"
    counts = {folder.name: len(list(folder.iterdir())) for folder in (root / "train").iterdir()}
    chosen = [name for name, count in sorted(counts.items()) if count >= 2][:3]
    classes, images = subset_imagenet(root, tmp_path / "a", folder="train", choice=Choice(2), classes=chosen)
    assert (classes, images) == (3, 6)
    folders = sorted((tmp_path / "a/train").iterdir())
    assert [folder.name for folder in folders] == list("0123456789")  # so that the numbers of the classes stay
    assert [len(list(folder.iterdir())) for folder in folders] == [2 * (folder.name in chosen) for folder in folders]
    with pytest.raises(DataError, match="class 'x' is not among the folders"):
        subset_imagenet(root, tmp_path / "b", folder="train", choice=Choice(2), classes=["x"])
    with pytest.raises(DataError, match="has no folders"):
        subset_imagenet(small_digits, tmp_path / "b", folder="images/train", choice=Choice(2))
    with pytest.raises(DataError, match=r"expected at least 10000\. Ask for fewer"):
        subset_imagenet(root, tmp_path / "b", folder="train", choice=Choice(10000))


def test_classes_keep_their_numbers_in_mmpretrain(small_digits, tmp_path):
    pytest.importorskip("mmpretrain")
    from mmpretrain.datasets import CustomDataset

    counts = {folder.name: len(list(folder.iterdir())) for folder in (small_digits / "crops/train").iterdir()}
    last = max(name for name, count in counts.items() if count)
    subset_imagenet(small_digits / "crops", tmp_path, folder="train", choice=Choice(1), classes=[last])
    dataset = CustomDataset(data_root=str(tmp_path), data_prefix="train", classes=list("0123456789"), pipeline=[])
    assert [dataset.get_data_info(index)["gt_label"] for index in range(len(dataset))] == [int(last)]


def test_folders_that_cannot_be_written(small_digits, tmp_path):
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file/x", tmp_path / ("x" * 300)):
        with pytest.raises(DataError, match="cannot be written .*Name another one"):
            subset_coco(small_digits, out, **COCO, choice=Choice(2))
    with pytest.raises(DataError, match="is no folder"):
        subset_ade20k(tmp_path / ("x" * 5000), tmp_path / "out", **ADE, choice=Choice(2))


@pytest.mark.parametrize(("count", "seed"), [(0, 0), (-1, 0), (1.5, 0), (1, -1)])
def test_choices_that_are_none(count, seed):
    with pytest.raises(DataError, match="expected a whole number from"):
        Choice(count, seed)


@pytest.mark.parametrize(
    ("tool", "arguments", "said"),
    [
        ("coco", ["--annotations", COCO["annotations"], "--images", COCO["images"], "--count", "2"], "2 images with"),
        ("ade20k", ["--images", "images/val", "--labels", "labels/val", "--count", "2"], "2 images with labels"),
        ("imagenet", ["--folder", "crops/train", "--count", "1", "--classes", "1", "4"], "2 images of 2 classes"),
    ],
)
def test_command_lines(monkeypatch, capsys, small_digits, tmp_path, tool, arguments, said):
    main = script(f"tools/dataset_converters/{tool}_subset.py").main
    monkeypatch.setattr(sys, "argv", ["x", str(small_digits), str(tmp_path / "out"), *arguments])
    assert main() == 0
    assert said in capsys.readouterr().out
    assert main() == 1
    assert capsys.readouterr().err.startswith("error: subset: ")
