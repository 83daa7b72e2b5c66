"""Classes of configs against their data and models (E3), and the data sets of configs of the three libraries."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config
from PIL import Image

from mmvmamba.apis import check_data, load_config
from mmvmamba.apis.dataset_checks import DataCheck
from mmvmamba.apis.described_data import described_data
from mmvmamba.datasets.checks import PictureOptions
from mmvmamba.datasets.checks.classes import category_names
from mmvmamba.datasets.checks.report import Report
from mmvmamba.errors import ConfigError, DataError
from tests.test_datasets.broken_pictures import good_pair, labels, picture
from tests.test_datasets.planted import NAMES, sound, write_data

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")
pytest.importorskip("mmpretrain")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_data(folder, sound())
    return folder


def _config(root, classes=NAMES, heads=4, **dataset):
    entries = dict(
        type="CocoDataset", data_root=str(root), ann_file="planted.json", data_prefix=dict(img="pictures/"),
        metainfo=dict(classes=classes), pipeline=[dict(type="LoadAnnotations", with_bbox=True, with_mask=True)],
    )  # fmt: skip
    loader = dict(dataset={**entries, **dataset})
    roi_head = dict(bbox_head=dict(num_classes=heads), mask_head=dict(num_classes=heads))
    return Config(
        dict(
            default_scope="mmdet", model=dict(type="MaskRCNN", rpn_head=dict(num_classes=1), roi_head=roi_head),
            train_dataloader=loader, val_dataloader=copy.deepcopy(loader),
            val_evaluator=dict(type="CocoMetric", metric=["bbox", "segm"]),
        )
    )  # fmt: skip


def _checked(cfg, splits=("train", "val"), pictures=True):
    check = DataCheck(options=PictureOptions(workers=1) if pictures else None)
    check.config(cfg, splits)
    return check.report


def test_a_sound_config_gives_no_finding(root):
    report = _checked(_config(root))
    assert dict(report.counts) == {}
    assert [facts["pictures looked at"] for facts in report.checked] == [6]  # val is the same data
    check_data(_config(root), ["train", "val"])


def _val_with(**entries):
    def change(cfg):
        cfg.val_dataloader.dataset.update(entries)

    return change


def _head(path, number):
    def change(cfg):
        cfg.merge_from_dict({f"model.{path}.num_classes": number})

    return change


def _classes(*names):
    def change(cfg):
        for split in ("train", "val"):
            cfg[f"{split}_dataloader"].dataset.metainfo.classes = names

    return change


def _classes_as(value):
    def change(cfg):
        for split in ("train", "val"):
            cfg[f"{split}_dataloader"].dataset.metainfo.classes = value

    return change


def _none(cfg):
    for split in ("train", "val"):
        del cfg[f"{split}_dataloader"].dataset["metainfo"]


#: What is done to the config, the kind that is found, what the message says.
MISMATCHES = {
    "misspelt": (_classes("cat", "dgo", "fire hydrant", "Zebra"), "classes-not-in-file", "'dgo' (did you mean 'dog'?)"),
    "case": (_classes("cat", "dog", "fire hydrant", "zebra"), "classes-not-in-file", "the data has 'Zebra': case"),
    "space": (_classes("cat", "dog ", "fire hydrant", "Zebra"), "classes-not-in-file", "the data has 'dog'"),
    "underscore": (_classes("cat", "dog", "fire_hydrant", "Zebra"), "classes-not-in-file", "has 'fire hydrant'"),
    "order": (_classes("dog", "cat", "fire hydrant", "Zebra"), "classes-order", "label 0: 'dog' in classes, 'cat' in"),
    "sorted": (_classes(*sorted(NAMES)), "classes-order", "label 0: 'Zebra'"),
    "comma forgotten": (_classes_as("cat"), "classes-not-a-list", "classes is the text 'cat'"),
    "comma between forgotten": (_classes("catdog", *NAMES[2:]), "classes-not-in-file", "a comma is missing"),
    "more than the file": (_classes(*NAMES, "bus"), "classes-not-in-file", "'bus'"),
    "COCO's by default": (_none, "classes-not-in-file", "sets no metainfo.classes"),
    "none": (_classes_as([]), "classes-entry", "classes is []"),
    "twice": (_classes("cat", "cat", "dog", "fire hydrant", "Zebra"), "classes-entry", "['cat'] more than once"),
    "numbers": (_classes(0, 1, 2, 3), "classes-entry", "classes holds 0"),
    "letter of another script": (_classes("c\u0430t", "dog", *NAMES[2:]), "classes-not-in-file", "c\u0430t"),
    "box head": (_head("roi_head.bbox_head", 80), "num-classes", "roi_head.bbox_head.num_classes is 80, expected 4"),
    "mask head": (_head("roi_head.mask_head", 3), "num-classes", "roi_head.mask_head.num_classes is 3, expected 4"),
    "one head of a cascade": (
        lambda cfg: cfg.model.roi_head.update(bbox_head=[dict(num_classes=4), dict(num_classes=5)]),
        "num-classes", "roi_head.bbox_head[1].num_classes is 5",
    ),
    "head under test-time augmentation": (
        lambda cfg: cfg.update(model=dict(type="DetTTAModel", module=dict(bbox_head=dict(num_classes=91)))),
        "num-classes", "is 91",
    ),
    "head of RetinaNet": (lambda cfg: cfg.update(model=dict(bbox_head=dict(num_classes=91))), "num-classes", "is 91"),
    "validation has others": (
        _val_with(metainfo=dict(classes=NAMES[:3])), "classes-differ", "val has 3; only in train: ['Zebra']",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISMATCHES)
def test_mismatches_of_classes(name, root):
    change, kind, said = MISMATCHES[name]
    cfg = _config(root)
    change(cfg)
    with pytest.raises(DataError) as error:
        check_data(cfg, ["train", "val"])
    lines = [line for line in str(error.value).splitlines() if line.startswith((f"error: {kind}", "    "))]
    assert any(said in line for line in lines), str(error.value)
    if kind in ("classes-not-in-file", "classes-order"):
        assert all(name in str(error.value) for name in NAMES)
    report = _checked(cfg, pictures=False)
    assert set(lines) <= set(report.text().splitlines())


def test_a_mask_head_for_all_classes_and_a_subset_of_the_classes_are_no_errors(root):
    cfg = _config(root, classes=("dog", "Zebra"), heads=2)
    cfg.model.roi_head.mask_head = dict(num_classes=80, class_agnostic=True)
    report = _checked(cfg)
    assert dict(report.counts) == {"classes-left-out": 2}
    assert "['cat', 'fire hydrant']" in report.text()
    (warning,) = check_data(cfg, ["train", "val"])  # once for both
    assert warning.startswith("classes-left-out: ['cat', 'fire hydrant'] of the data is not in classes")


def test_a_class_without_annotations_is_named(root, tmp_path):
    document = sound()
    document["categories"].append({"id": 77, "name": "unicorn"})
    write_data(tmp_path, document)
    report = _checked(_config(tmp_path, classes=(*NAMES, "unicorn"), heads=5))
    assert dict(report.counts) == {"category-unused": 1} and "'unicorn'" in report.text()


def test_classes_from_a_file(root, tmp_path):
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    assert dict(_checked(_config(root, classes=str(tmp_path / "names.txt"))).counts) == {}


@pytest.mark.parametrize("wrap", [lambda d: dict(type="RepeatDataset", times=2, dataset=d),
                                  lambda d: dict(type="ConcatDataset", datasets=[d])])  # fmt: skip
def test_wrapped_data_sets(wrap, root):
    cfg = _config(root)
    cfg.train_dataloader.dataset = wrap(cfg.train_dataloader.dataset.to_dict())
    assert len(_checked(cfg).checked) == 1
    cfg = _config(root, classes=("cat", "dgo"))
    cfg.train_dataloader.dataset = wrap(cfg.train_dataloader.dataset.to_dict())
    with pytest.raises(DataError, match="dgo"):
        check_data(cfg, ["train"])


def test_what_the_pipeline_reads_must_be_there(tmp_path):
    document = sound()
    for annotation in document["annotations"]:
        del annotation["segmentation"]
    write_data(tmp_path, document)
    cfg = _config(tmp_path)
    assert set(_checked(cfg).counts) == {"mask-missing"}
    cfg = _config(tmp_path, pipeline=[dict(type="LoadAnnotations", with_bbox=True)])
    assert dict(_checked(cfg, ["train"]).counts) == {}


@pytest.mark.parametrize("name", [f"{task}/vmamba" for task in ("cls", "det", "seg")])
def test_recipes_that_inherit_a_library_are_understood(name):
    """What MMEngine notes in inherited dicts is no argument of a data set."""
    config = sorted((ROOT / "configs" / name).glob("*tiny-s1l8*.py"))[0]
    found = described_data(load_config(str(config)), ["train", "val", "test"])
    assert [data.split for data in found] == ["train", "val", "test"]
    assert all(len(data.classes or ()) in (80, 150, 1000) for data in found)


def test_unknown_layouts_and_refused_arguments(root):
    with pytest.raises(ConfigError, match="'CocoPanopticDataset'.*none of the layouts"):
        _checked(_config(root, type="CocoPanopticDataset"))
    with pytest.raises(ConfigError, match="train_dataloader.dataset: CocoDataset refuses its arguments.*data_rot"):
        _checked(_config(root, data_rot="x"))
    with pytest.raises(ConfigError, match="'CocoDatset', which is no data set of mmdet"):
        _checked(_config(root, type="CocoDatset"))


def test_missing_files_are_findings(root):
    report = _checked(_config(root, ann_file="none.json"))
    assert set(report.counts) == {"file-missing"}


@pytest.mark.parametrize("indent", [None, 2])
def test_categories_are_read_without_the_rest(root, tmp_path, indent):
    document = sound()
    # The list may stand at the end, as in COCO's own files, with anything before it.
    text = json.dumps({"x": None, **document}, indent=indent)
    path = tmp_path / "a.json"
    path.write_text(text.replace("null", "garbage"))
    assert category_names(path, Report()) == list(NAMES)
    # A second place that has the word is a reason to read everything.
    report = Report()
    path.write_text(text.replace("null", '{"categories": [{"id": 1, "name": "other"}]}'))
    assert category_names(path, report) == list(NAMES) and report.errors == 0
    path.write_text(text.replace('"categories"', '"\\u0063ategories"'))
    assert category_names(path, report) == list(NAMES) and report.errors == 0
    path.write_text("")
    assert category_names(path, report) == [] and report.counts["json-invalid"] == 1


def _seg_config(root, **dataset):
    entries = dict(
        type="BaseSegDataset", data_root=str(root), data_prefix=dict(img_path="images", seg_map_path="labels"),
        metainfo=dict(classes=[str(k) for k in range(10)]), reduce_zero_label=True, pipeline=[],
    )  # fmt: skip
    heads = dict(decode_head=dict(num_classes=10), auxiliary_head=[dict(num_classes=10)])
    return Config(dict(default_scope="mmseg", model=heads, train_dataloader=dict(dataset={**entries, **dataset})))


def test_segmentation(tmp_path):
    good_pair(tmp_path, "a")
    assert dict(_checked(_seg_config(tmp_path), ["train"]).counts) == {}
    check_data(_seg_config(tmp_path), ["train"])
    report = _checked(_seg_config(tmp_path, reduce_zero_label=False), ["train"])
    assert "10 (" in report.text() and "expected 0 to 9 or 255" in report.text()
    eleven = dict(classes=[str(k) for k in range(11)])
    report = _checked(_seg_config(tmp_path, metainfo=eleven), ["train"])
    assert dict(report.counts) == {"category-unused": 1, "num-classes": 2}
    assert "auxiliary_head[0]" in report.text() and "'10' has no annotation" in report.text()
    report = _checked(_seg_config(tmp_path, metainfo=None), ["train"])
    assert set(report.counts) == {"classes-entry"}
    with pytest.raises(DataError, match="num_classes is 10, expected 11"):
        check_data(_seg_config(tmp_path, metainfo=eleven), ["train"])


def test_a_part_of_ade20k(tmp_path):
    good_pair(tmp_path, "a")
    Image.fromarray(np.full((48, 64), 150, dtype=np.uint8)).save(tmp_path / "labels/a.png")
    cfg = _seg_config(tmp_path, type="ADE20KDataset", metainfo=dict(classes=("wall", "floor")))
    cfg.model = dict(decode_head=dict(num_classes=2))
    assert dict(_checked(cfg, ["train"]).counts) == {}  # labels are those of the file, not of the part
    cfg.train_dataloader.dataset.metainfo.classes = ("wall", "flor")
    report = _checked(cfg, ["train"])
    assert "'flor' (did you mean 'floor'?)" in report.text()
    with pytest.raises(DataError, match="'flor'"):
        check_data(cfg, ["train"])


def test_classification(tmp_path):
    for split, names in (("train", "abc"), ("val", "ac")):
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            picture().save(tmp_path / split / name / "1.jpg")
    loaders = {
        f"{split}_dataloader": dict(
            dataset=dict(type="CustomDataset", data_root=str(tmp_path), data_prefix=split, pipeline=[])
        )
        for split in ("train", "val")
    }
    cfg = Config(dict(default_scope="mmpretrain", model=dict(head=dict(num_classes=3)), **loaders))
    report = _checked(cfg)
    assert dict(report.counts) == {"classes-differ": 1}
    assert "train has 3 classes, val has 2; only in train: ['b']" in report.text()
    with pytest.raises(DataError, match="only in train"):
        check_data(cfg, ["train", "val"])
    assert dict(_checked(cfg, ["train"]).counts) == {}
    cfg.model.head.num_classes = 1000
    assert dict(_checked(cfg, ["train"]).counts) == {"num-classes": 1}


def _imagenet(root, val, number=2, kind="ImageNet", **entries):
    """A config of ImageNet's type on folders of two classes; ``val`` are further entries of the validation data."""
    for split in ("train", "val"):
        for name in ("n01", "n02"):
            (root / split / name).mkdir(parents=True, exist_ok=True)
            picture().save(root / split / name / "1.JPEG")
    (root / "val.txt").write_text("n01/1.JPEG 0\nn02/1.JPEG 1\n")
    shared = dict(type=kind, data_root=str(root), pipeline=[], **entries)
    splits = {"train": dict(data_prefix="train"), "val": {**val, "data_prefix": "val"}}
    splits["test"] = splits["val"]
    loaders = {f"{split}_dataloader": dict(dataset={**shared, **own}) for split, own in splits.items()}
    return Config(dict(default_scope="mmpretrain", model=dict(head=dict(num_classes=number)), **loaders))


@pytest.mark.parametrize("val", [{}, {"ann_file": "val.txt"}], ids=["folders", "list"])
def test_folders_and_lists_number_classes_whatever_they_are_called(val, tmp_path):
    """ImageNet's folders are numbers of WordNet, its classes words; its validation pictures come with a list."""
    cfg = _imagenet(tmp_path, val, metainfo=dict(classes=["tench", "goldfish"]))
    assert dict(_checked(cfg, ["train", "val", "test"]).counts) == {}
    check_data(cfg, ["train", "val", "test"])


def test_as_many_folders_as_classes(tmp_path):
    """MMPretrain stops where the type of a data set has another number of classes, as ImageNet's 1000."""
    cfg = _imagenet(tmp_path, {})
    report = _checked(cfg, ["train"], pictures=False)
    assert report.counts["class-folders"] == 1
    with pytest.raises(DataError, match="there are 2 folders, ImageNet by itself has 1000 classes"):
        check_data(cfg, ["train"])
    check_data(_imagenet(tmp_path, {}, kind="CustomDataset"), ["train"])


def test_pictures_that_the_type_does_not_read_are_named(tmp_path):
    cfg = _imagenet(tmp_path, {}, kind="CustomDataset")
    picture().save(tmp_path / "train/n01/2.webp")
    assert dict(_checked(cfg, ["train"]).counts) == {"folder-other-files": 1}
    cfg.train_dataloader.dataset.extensions = [".webp", ".jpeg"]
    assert dict(_checked(cfg, ["train"]).counts) == {}


def test_pictures_without_classes_cannot_be_checked(tmp_path):
    with pytest.raises(ConfigError, match="expected .* a labelled CustomDataset"):
        _checked(_imagenet(tmp_path, {}, with_label=False), ["train"])


def test_a_file_that_two_splits_read_is_checked_for_both(root, tmp_path):
    document = sound()
    for annotation in document["annotations"]:
        del annotation["iscrowd"]
    write_data(tmp_path, document)
    cfg = _config(tmp_path)
    assert dict(_checked(cfg, ["train"]).counts) == {}
    assert set(_checked(cfg, ["train", "val"]).counts) == {"crowd-missing"}


def test_classes_of_a_part_of_ade20k_from_a_file(tmp_path):
    good_pair(tmp_path, "a")
    (tmp_path / "names.txt").write_text("wall\nfloor\n")
    cfg = _seg_config(tmp_path, type="ADE20KDataset", metainfo=dict(classes=str(tmp_path / "names.txt")))
    cfg.model = dict(decode_head=dict(num_classes=2))
    check_data(cfg, ["train"])
    (tmp_path / "names.txt").write_text("wall\nflor\n")
    with pytest.raises(DataError, match="'flor'"):
        check_data(cfg, ["train"])


def test_nothing_is_written_unless_everything_can_be(root, tmp_path):
    """The training data could be kept, the validation data not."""
    document = sound(images=201)
    document["images"][0]["height"] = "x"
    write_data(tmp_path, document)
    few = sound(images=10)
    few["images"][0]["height"] = "x"
    (tmp_path / "few.json").write_text(json.dumps(few))
    cfg = _config(tmp_path)
    cfg.val_dataloader.dataset.ann_file = "few.json"
    check = DataCheck(options=None)
    check.config(cfg, ["train", "val"])
    with pytest.raises(DataError, match="1 of 10 images .* nothing was written"):
        check.keep(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_lines_of_a_list_that_cannot_be_used_are_left_out(tmp_path):
    good_pair(tmp_path, "a")
    (tmp_path / "list.txt").write_text("a\n\n")
    check = DataCheck(options=PictureOptions(workers=1))
    check.config(_seg_config(tmp_path, ann_file=str(tmp_path / "list.txt")), ["train"])
    assert dict(check.report.counts) == {"list-line": 1}
    with pytest.raises(DataError, match="1 of 2 images"):
        check.keep(tmp_path / "out")
    (kept,) = check.keep(tmp_path / "out", max_skipped=0.5)
    assert kept.path.read_text() == "a\n" and kept.images_left_out == 1


def test_labels_are_turned_into_lists_by_split(tmp_path):
    """Two data sets of a split get two lists; what is sound gets none."""
    for name in ("a", "b"):
        good_pair(tmp_path, name)
    Image.fromarray((labels() + 1).astype(np.uint8)).save(tmp_path / "labels/b.png")
    check = DataCheck(options=PictureOptions(workers=1))
    check.config(_seg_config(tmp_path), ["train"])
    (kept,) = check.keep(tmp_path / "out", max_skipped=0.5)
    assert kept.path == tmp_path / "out/train.txt" and kept.path.read_text() == "a\n"
    assert kept.line() == f"{kept.path}: 1 of 2 images"
    again = _seg_config(tmp_path, ann_file=str(kept.path))
    assert dict(_checked(again, ["train"]).counts) == {}
