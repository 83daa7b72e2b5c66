"""The policy skip: what is left out is counted, never more than allowed, and the user's files stay as they are."""

from __future__ import annotations

import json

import pytest

from mmvmamba.datasets.checks import KINDS, Part, Report, check_coco, plan_coco, refuse_what_cannot_be_left_out
from mmvmamba.errors import DataError
from tests.test_datasets.planted import DEFECTS, sound, write_data


def _write(folder, document):
    path = folder / "planted.json"
    path.write_text(json.dumps(document))
    return path


@pytest.mark.parametrize(("plant", "kind"), [d[1:] for d in DEFECTS], ids=[d[0] for d in DEFECTS])
def test_what_is_kept_has_no_error(plant, kind, tmp_path):
    document = sound()
    plant(document)
    path = _write(tmp_path, document)
    before = path.read_bytes()
    report = Report()
    coco = check_coco(path, report)
    if KINDS[kind].part is Part.NOTHING and report.errors:
        with pytest.raises(DataError, match=f"found .*{kind}.*nothing was written"):
            refuse_what_cannot_be_left_out(report)
        return
    refuse_what_cannot_be_left_out(report)
    kept = plan_coco(coco, tmp_path / "kept.json", max_skipped=0.5).write()
    again = Report()
    check_coco(kept.path, again)
    assert again.errors == 0, again.text()
    assert (kept.images_left_out + kept.annotations_left_out > 0) == (report.errors > 0)
    assert path.read_bytes() == before


def test_annotations_go_with_their_image(tmp_path):
    document = sound()
    document["images"][1]["height"] = "32"
    coco = check_coco(_write(tmp_path, document), Report())
    kept = plan_coco(coco, tmp_path / "new/kept.json", max_skipped=0.2).write()
    assert (kept.images, kept.images_left_out, kept.annotations, kept.annotations_left_out) == (6, 1, 15, 3)
    assert kept.line() == f"{kept.path}: 5 of 6 images, 12 of 15 annotations"
    read = json.loads(kept.path.read_text())
    assert {annotation["image_id"] for annotation in read["annotations"]} == {1, 3, 4, 5}
    assert read["info"] == document["info"] and read["categories"] == document["categories"]


def test_annotations_of_an_id_of_two_images_go(tmp_path):
    document = sound()
    document["images"][1]["id"] = 1
    coco = check_coco(_write(tmp_path, document), Report())
    plan_coco(coco, tmp_path / "kept.json", max_skipped=0.5).write()
    read = json.loads((tmp_path / "kept.json").read_text())
    assert [image["id"] for image in read["images"]] == [3, 4, 5, 6]
    assert all(annotation["image_id"] not in (1, 2) for annotation in read["annotations"])


@pytest.mark.parametrize(("part", "change"), [("images", {"height": 0}), ("annotations", {"area": -1})])
def test_no_more_than_one_in_a_hundred(part, change, tmp_path):
    document = sound(images=201)
    while len(document["images"]) + len(document["annotations"]) > 400 and len(document["annotations"]) > 200:
        document["annotations"].pop()
    for entry in document[part][:2]:
        entry.update(change)
    for annotation in document["annotations"]:
        annotation["image_id"] = 150 if annotation["image_id"] <= 2 else annotation["image_id"]
    plan_coco(check_coco(_write(tmp_path, document), Report()), tmp_path / "kept.json").write()
    document[part][2].update(change)
    coco = check_coco(_write(tmp_path, document), Report())
    with pytest.raises(DataError, match=rf"3 of 20[01] {part} of .*\(1\.5%\).*at most 1\.0%; nothing was written"):
        plan_coco(coco, tmp_path / "more.json").write()
    assert not (tmp_path / "more.json").exists()


def test_never_everything(tmp_path):
    document = sound()
    for image in document["images"]:
        image["height"] = 0
    with pytest.raises(DataError, match="6 of 6 images"):
        plan_coco(check_coco(_write(tmp_path, document), Report()), tmp_path / "kept.json", max_skipped=1.0).write()


def test_no_file_is_written_over(tmp_path):
    path, _ = write_data(tmp_path, sound())
    before = path.read_bytes()
    coco = check_coco(path, Report())
    with pytest.raises(DataError, match="exists and is left alone"):
        plan_coco(coco, path).write()
    assert path.read_bytes() == before
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="cannot be written"):
        plan_coco(coco, tmp_path / "file/kept.json").write()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "pictures", "planted.json"]
