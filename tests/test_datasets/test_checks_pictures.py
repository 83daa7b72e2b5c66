"""Pictures and label pictures: each broken kind is found and named, under both policies, in little memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmvmamba.datasets.checks import (
    KINDS,
    LabelRule,
    Level,
    PictureOptions,
    Report,
    check_class_folders,
    check_coco,
    check_coco_pictures,
    check_label_pictures,
    look_at_labels,
    look_at_picture,
    plan_coco,
    plan_names,
    refuse_what_cannot_be_left_out,
)
from mmvmamba.errors import DataError
from tests.test_datasets.broken_pictures import HEIGHT, LABELS, PICTURES, WIDTH, good_pair, labels, picture, place

ROOT = Path(__file__).parents[2]
RULE = LabelRule(10, zero_is_ignored=True)
OPTIONS = PictureOptions(workers=1)
NAMES = ("a", "bad", "c")
CELLS = [("image", *each) for each in PICTURES] + [("label", *each) for each in LABELS]


def _pairs(root, part, content):
    for name in NAMES:
        good_pair(root, name)
    path = root / ("images/bad.jpg" if part == "image" else "labels/bad.png")
    path.unlink()
    place(path, content)
    return path


def _coco_of(root):
    images = [{"id": k, "file_name": f"{n}.jpg", "height": HEIGHT, "width": WIDTH} for k, n in enumerate(NAMES)]
    boxes = [
        {"id": k + 1, "image_id": k, "category_id": 1, "bbox": [1, 1, 9, 9], "area": 81, "iscrowd": 0} for k in range(3)
    ]
    document = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "x"}]}
    (root / "coco.json").write_text(json.dumps(document))
    return root / "coco.json"


@pytest.mark.parametrize("policy", ["error", "skip"])
@pytest.mark.parametrize(("part", "make", "kind"), [(c[0], *c[2:]) for c in CELLS], ids=[c[1] for c in CELLS])
def test_broken_pictures(part, make, kind, policy, tmp_path):
    """In a folder of pairs, and pictures in a COCO file, too; what else is there stays."""
    path = _pairs(tmp_path, part, make())
    (tmp_path / "list.txt").write_text("\n".join(NAMES))
    report = Report()
    found = check_label_pictures(
        tmp_path / "images", tmp_path / "labels", report, OPTIONS, rule=RULE, listed=tmp_path / "list.txt"
    )
    assert str(path) in [example.file for example in report.examples[kind]], report.text()
    is_error = KINDS[kind].level is Level.ERROR
    coco = check_coco(_coco_of(tmp_path), report)
    if part == "image":
        before = report.counts[kind]
        check_coco_pictures(coco, tmp_path / "images", report, OPTIONS)
        assert report.counts[kind] == before + 1
        turned = make is {name: maker for name, maker, _ in PICTURES}["turned by EXIF"]
        assert coco.bad_images == ({1} if is_error or turned else set())
    if policy == "error":
        if is_error:
            with pytest.raises(DataError, match=str(path)):
                report.raise_for_errors()
        return
    refuse_what_cannot_be_left_out(report)
    plan_names(found, tmp_path / "kept.txt", tmp_path, max_skipped=0.5).write()
    bad = is_error or found.bad == {"bad"}
    assert (tmp_path / "kept.txt").read_text().split() == (["a", "c"] if bad else list(NAMES))
    plan_coco(coco, tmp_path / "kept.json", max_skipped=0.5).write()
    kept = json.loads((tmp_path / "kept.json").read_text())
    assert len(kept["images"]) == len(kept["annotations"]) == 3 - len(coco.bad_images)


def test_there_are_enough_cells():
    assert len(CELLS) >= 30 and len({cell[1] for cell in CELLS}) == len(CELLS)


def test_memory_stays_below_1_gib(tmp_path):
    program = str(Path(__file__).with_name("broken_pictures.py"))
    done = subprocess.run(
        [sys.executable, program, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    number, kibibytes = map(int, done.stdout.split()[-2:])
    assert number >= len(CELLS) - 2  # without the sizes, which need a partner
    assert kibibytes < 1 << 20


def test_the_limit_of_pixels_is_the_caller_s(tmp_path):
    picture().save(tmp_path / "a.png")
    number = WIDTH * HEIGHT
    assert look_at_picture(tmp_path / "a.png", number).problems == []
    (problem,) = look_at_picture(tmp_path / "a.png", number - 1).problems
    assert problem == ("image-too-large", f"it is 64 x 48 = {number} pixels, expected at most {number - 1}")
    (problem,) = look_at_labels(tmp_path / "a.png", None, None, number - 1).problems
    assert problem[0] == "image-too-large"


def test_pillow_s_own_limit_is_as_before(tmp_path):
    before = Image.MAX_IMAGE_PIXELS
    good_pair(tmp_path, "a")
    check_label_pictures(tmp_path / "images", None, Report(), OPTIONS)
    assert before == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("turn", [1, 3, 5, 6, 8])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_the_size_is_opencv_s(kind, turn, tmp_path):
    import cv2

    exif = Image.Exif()
    exif[0x0112] = turn
    path = tmp_path / "a.jpg"
    picture().save(path, kind, exif=exif)
    height, width = cv2.imread(str(path)).shape[:2]
    assert look_at_picture(path).size == (width, height)


@pytest.mark.parametrize("turn", [0, 9, 65535])
def test_values_that_turn_nothing_are_no_finding(turn, tmp_path):
    """Cameras write such; OpenCV passes over them."""
    exif = Image.Exif()
    exif[0x0112] = turn
    picture().save(tmp_path / "a.jpg", exif=exif)
    assert look_at_picture(tmp_path / "a.jpg").problems == []


@pytest.mark.parametrize("mode", ["L", "1", "RGBA", "LA", "P", "YCbCr"])
def test_usual_pictures_give_no_finding(mode, tmp_path):
    path = tmp_path / "a.jpg"
    picture().convert(mode).save(path, "JPEG" if mode == "YCbCr" else "PNG")
    assert look_at_picture(path).problems == []


@pytest.mark.parametrize(
    ("rule", "highest", "found"),
    [
        (LabelRule(10, zero_is_ignored=True), 10, False),
        (LabelRule(10, zero_is_ignored=False), 10, True),
        (LabelRule(11, zero_is_ignored=False), 10, False),
        (LabelRule(11, zero_is_ignored=False, ignored=254), 11, True),
        (None, 255, False),
    ],
)
def test_the_range_of_labels(rule, highest, found, tmp_path):
    numbers = labels(highest).astype(np.uint8)
    Image.fromarray(numbers).save(tmp_path / "a.png")
    seen = look_at_labels(tmp_path / "a.png", rule, (WIDTH, HEIGHT))
    assert [kind for kind, _ in seen.problems] == (["label-range"] if found else [])
    assert sum(seen.pixels.values()) == numbers.size
    numbers[0, 0] = 255
    Image.fromarray(numbers).save(tmp_path / "a.png")
    ignored = look_at_labels(tmp_path / "a.png", rule, (WIDTH, HEIGHT))
    assert any("255 (" in text for _, text in ignored.problems) == (rule is not None and rule.ignored == 254)


def test_folders_of_pairs(tmp_path):
    for name in NAMES:
        good_pair(tmp_path, name)
    (tmp_path / "labels/more.png").write_bytes((tmp_path / "labels/a.png").read_bytes())
    (tmp_path / "images/other.JPG").write_bytes((tmp_path / "images/a.jpg").read_bytes())
    (tmp_path / "images/.hidden.jpg").write_bytes(b"")
    (tmp_path / "images/notes.txt").write_text("x")
    report = Report()
    found = check_label_pictures(tmp_path / "images", tmp_path / "labels", report, OPTIONS, rule=RULE)
    assert found.names == list(NAMES) and sum(found.pixels.values()) == 3 * WIDTH * HEIGHT
    assert dict(report.counts) == {"label-unused": 1, "folder-other-files": 1}
    report = Report()
    check_label_pictures(tmp_path / "images", tmp_path / "labels", report, OPTIONS, image_suffix=".png")
    assert report.counts["folder-empty"] == 1
    check_label_pictures(tmp_path / "none", tmp_path / "labels", report, OPTIONS)
    assert report.counts["file-missing"] == 1
    (tmp_path / "list.txt").write_text("a\n../b\n\n")
    check_label_pictures(tmp_path / "images", None, report, OPTIONS, listed=tmp_path / "list.txt")
    assert [example.place for example in report.examples["list-line"]] == ["line 2", "line 3"]


def test_folders_of_classes(tmp_path):
    for number, name in enumerate(["cat", "dog"]):
        (tmp_path / "train" / name).mkdir(parents=True)
        picture(number).save(tmp_path / "train" / name / "1.JPEG")
    (tmp_path / "train/empty").mkdir()
    (tmp_path / "train/dog/2.jpg").write_bytes(b"")
    report = Report()
    found = check_class_folders(tmp_path / "train", report, OPTIONS)
    assert found.classes == ["cat", "dog", "empty"] and found.bad == {"dog/2.jpg"}
    assert dict(report.counts) == {"class-folder-empty": 1, "image-empty": 1}
    plan_names(found, tmp_path / "kept.txt", tmp_path, max_skipped=0.5).write()
    assert (tmp_path / "kept.txt").read_text() == "cat/1.JPEG 0\ndog/1.JPEG 1\n"
    report = Report()
    lines = "cat/1.JPEG 0\ndog/1.JPEG 5\ndog/1.JPEG\n/etc/passwd 1\ndog/1.JPEG one\n"
    (tmp_path / "list.txt").write_text(lines)
    check_class_folders(tmp_path / "train", report, OPTIONS, listed=tmp_path / "list.txt", classes=2)
    assert [example.place for example in report.examples["list-line"]] == ["line 2", "line 3", "line 4", "line 5"]
    (tmp_path / "nothing").mkdir()
    check_class_folders(tmp_path / "nothing", report, OPTIONS)
    assert report.counts["folder-empty"] == 1
