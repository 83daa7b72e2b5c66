"""COCO files: every planted defect is found, and nothing in what is sound or odd but legal."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
from pycocotools import mask as mask_api

from mmvmamba.datasets import DigitsSettings, write_digits
from mmvmamba.datasets.checks import KINDS, CocoUse, Level, PictureOptions, Report, check_coco, check_coco_pictures
from mmvmamba.datasets.checks.report import EXAMPLES
from mmvmamba.datasets.checks.shapes import decode_counts
from mmvmamba.errors import DataError
from tests.test_datasets.planted import DEFECTS, HEIGHT, NAMES, WIDTH, compressed, sound, write_data


def _check(path, pictures=None, use=None):
    report = Report()
    coco = check_coco(path, report, use)
    if pictures is not None:
        check_coco_pictures(coco, pictures, report, PictureOptions(workers=2))
    return report, coco


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("sound"), sound())


def test_sound_files_give_no_finding(data):
    report, coco = _check(*data)
    assert dict(report.counts) == {}
    assert tuple(coco.names.values()) == NAMES and sum(coco.per_category.values()) == 15


def test_digits_give_no_finding(tmp_path):
    write_digits(tmp_path / "digits", DigitsSettings(40, 10, 5, 1, 1))
    for split in ("train", "val"):
        path = tmp_path / f"digits/annotations/instances_{split}.json"
        report, _ = _check(path, tmp_path / f"digits/images/{split}", CocoUse(masks=True))
        assert report.text() == "errors: 0, warnings: 0"


@pytest.mark.parametrize(("plant", "kind"), [d[1:] for d in DEFECTS], ids=[d[0] for d in DEFECTS])
def test_planted_defects(plant, kind, data, tmp_path):
    document = sound()
    plant(document)
    path = tmp_path / "planted.json"
    path.write_text(json.dumps(document))
    before = path.read_bytes()
    report, _ = _check(path, data[1])
    assert kind in report.counts, report.text()
    assert KINDS[kind].level is Level.WARNING or report.errors
    # The annotation file or the picture is named, with the place in it and what was expected.
    example = report.examples[kind][0]
    assert str(path) in example.file or str(data[1]) in example.file
    report.text().encode()
    json.dumps(report.as_dict())
    assert path.read_bytes() == before


def test_the_catalogue_is_as_large_as_it_should_be():
    assert len(DEFECTS) >= 30
    assert len({name for name, *_ in DEFECTS}) == len(DEFECTS)


@pytest.mark.parametrize(
    ("content", "kind", "said"),
    [
        (b"", "json-invalid", "no bytes"),
        (json.dumps(sound()).encode()[:-200], "json-invalid", "cut off"),
        (json.dumps(sound()).encode() + b"]", "json-invalid", "Extra data in line 1"),
        (b"\xef\xbb\xbf{}", "json-invalid", "BOM"),
        (b"\x1f\x8b\x08\x00\xff\xff", "json-invalid", "no UTF-8 text"),
        (b"<!DOCTYPE html>", "json-invalid", "line 1, column 1"),
        (b"[" * 200_000, "json-invalid", "too deep"),
        (b'{"images": ' + b"9" * 5000 + b"}", "json-invalid", "integer string conversion"),
        (b"[]", "json-structure", "expected an object"),
        (b"null", "json-structure", "expected an object"),
        (b'{"images": [], "images": []}', "json-repeated-key", "'images' stands twice"),
    ],
)
def test_files_that_are_no_coco(content, kind, said, tmp_path):
    (tmp_path / "bad.json").write_bytes(content)
    report, coco = _check(tmp_path / "bad.json")
    assert said in report.examples[kind][0].text
    assert coco.document is None or kind == "json-repeated-key"
    with pytest.raises(DataError, match=kind):
        report.raise_for_errors()


def test_missing_files(tmp_path):
    report, _ = _check(tmp_path / "none.json")
    assert "No such file" in report.examples["file-missing"][0].text
    report, _ = _check(tmp_path)
    assert "directory" in report.examples["file-missing"][0].text


def _odd_but_legal(document):
    images, annotations, categories = (document[part] for part in ("images", "annotations", "categories"))
    document["licenses"] = [{"id": 1, "name": "any", "url": ""}]
    images[0].update(license=3, coco_url="http://x/y.jpg", date_captured="2013-11-14 11:18:45", flickr_url="")
    images[1]["id"] = 10**12
    for annotation in annotations:
        annotation["image_id"] = 10**12 if annotation["image_id"] == 2 else annotation["image_id"]
    # Boxes and outlines with fractions, up to a pixel over the edge; two polygons; run lengths of what is no crowd.
    annotations[0].update(
        bbox=[6.43, 4.0, 42.07, 28.5],
        area=702.1057499999998,
        segmentation=[[0.0, -0.5, 48.9, 0, 48, 32.7], [1, 1, 5, 1, 5, 9]],
    )
    annotations[1]["id"] = 900100259690
    annotations[2].update(area=1, score=0.5, attributes={"occluded": False}, iscrowd=True)
    annotations[3]["segmentation"] = [[6, 4, 6, 4, 6, 4]]  # no area, but three points
    annotations[4]["segmentation"] = compressed(np.zeros((HEIGHT, WIDTH)))
    annotations[5]["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": [0, HEIGHT * WIDTH]}
    annotations.reverse()
    images.reverse()
    categories[0].update(keypoints=["nose"], skeleton=[[1, 2]])
    categories[1]["id"], categories[2]["name"] = 0, "Straßenschild / 路标"
    for annotation in annotations:
        annotation["category_id"] = 0 if annotation["category_id"] == 4 else annotation["category_id"]


def test_odd_but_legal_files_give_no_finding(tmp_path):
    document = sound()
    _odd_but_legal(document)
    path, pictures = write_data(tmp_path, document)
    report, _ = _check(path, pictures)
    assert report.text() == "errors: 0, warnings: 0"


def test_oddities_of_cocos_own_training_file_are_no_errors(tmp_path):
    """It has a box without height; MMDetection leaves it out."""
    document = sound()
    document["annotations"][0]["bbox"] = [296.65, 388.33, 1.03, 0.0]
    path, pictures = write_data(tmp_path, document)
    report, _ = _check(path, pictures)
    assert report.errors == 0 and dict(report.counts) == {"box-tiny": 1}


def test_what_a_file_is_for_decides_what_it_must_hold(tmp_path):
    document = sound()
    for annotation in document["annotations"]:
        del annotation["segmentation"], annotation["iscrowd"]
    path, _ = write_data(tmp_path, document)
    number = len(document["annotations"])
    assert dict(_check(path)[0].counts) == {"crowd-missing": number}
    assert dict(_check(path, use=CocoUse(evaluation=False))[0].counts) == {}
    assert dict(_check(path, use=CocoUse(masks=True, evaluation=False))[0].counts) == {"mask-missing": number}
    path.write_text(json.dumps({"images": document["images"]}))
    assert dict(_check(path, use=CocoUse(annotations=False))[0].counts) == {}
    assert dict(_check(path)[0].counts) == {"json-structure": 2}


def test_all_problems_in_one_report(tmp_path):
    document = sound(images=40)
    for annotation in document["annotations"]:
        annotation["bbox"] = [0, 0, -1, 5]
    document["images"][3]["file_name"] = "evil\n\x1b[2J\ud800.jpg"
    document["annotations"][0]["segmentation"] = [[1, 2]]
    path = tmp_path / "many.json"
    path.write_text(json.dumps(document))
    report, _ = _check(path, tmp_path)
    number = len(document["annotations"])
    assert report.counts["box-negative"] == number and len(report.examples["box-negative"]) == EXAMPLES
    text = report.text()
    assert f"error: box-negative, {number} times: a box has a negative" in text
    assert f"... and {number - EXAMPLES} more" in text
    assert "annotations[0] (id 1, image 1, 000.jpg): bbox is [0, 0, -1, 5]" in text
    assert "polygon-short, 1 times" in text and "image-missing, 40 times" in text
    assert "\x1b" not in text and "evil\\n\\x1b[2J\\ud800.jpg" in text
    report.write(tmp_path / "report.json")
    read = json.loads((tmp_path / "report.json").read_text())
    assert read["errors"] == report.errors == number + 41
    assert read["found"]["box-negative"]["count"] == number
    with pytest.raises(DataError, match="cannot be written"):
        report.write(tmp_path / "no/report.json")
    with pytest.raises(DataError, match=f"has {report.errors} errors"):
        report.raise_for_errors()


def test_compressed_run_lengths_are_those_of_pycocotools():
    rng = np.random.default_rng(0)
    for trial in range(200):
        height, width = (int(side) for side in rng.integers(1, 90, 2))
        mask = rng.random((height, width)) < rng.choice([0.0, 0.01, 0.5, 0.99, 1.0])
        if trial % 2:
            mask = np.repeat(mask[:1], height, axis=0)
        rle = compressed(mask)
        counts = decode_counts(rle["counts"], height * width)
        assert sum(counts) == height * width
        again = mask_api.frPyObjects({"size": rle["size"], "counts": counts}, height, width)
        assert again["counts"].decode() == rle["counts"]


def test_the_document_is_not_changed(data):
    _, coco = _check(*data)
    assert coco.document == copy.deepcopy(json.loads(data[0].read_text()))
