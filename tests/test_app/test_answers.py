"""What stands behind the buttons of the demo page, without a browser."""

import os
import shutil
from html.parser import HTMLParser

import cv2
import numpy as np
import pytest
import torch

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")
pytest.importorskip("mmpretrain")

from mmengine.registry import MODELS, DefaultScope

from mmvmamba.analysis.predictions import Prediction
from mmvmamba.analysis.scan_maps import overlay, scan_map
from mmvmamba.apis import app as behind
from mmvmamba.apis import inferencer, load_config
from mmvmamba.apis.app import Models, Request, Table, answer, class_table, demo_config, enlargement, first_pixel
from mmvmamba.apis.app_html import error_html, scan_html, table_html
from mmvmamba.apis.app_scans import answer_layers, scan_view
from mmvmamba.errors import CheckpointError, CheckpointMismatch, ConfigError, DataError
from tests.nano_models import NAMES, digits_config, nano_checkpoint


@pytest.fixture(scope="module")
def demo_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    for task in ("det", "seg", "cls"):
        (folder / task).mkdir()
        (folder / task / "last_checkpoint").write_text(f"/moved/since/{nano_checkpoint(task, folder / task).name}")
    return folder


@pytest.fixture(scope="module")
def models(demo_dir):
    return Models(demo_dir, "cpu")


@pytest.fixture(scope="module")
def scene(small_digits):
    return sorted((small_digits / "images/val").iterdir())[0]


def _request(models, task):
    model = str(demo_config(task))
    return Request(task, model, models.first_weights(task, model))


@pytest.mark.parametrize("task", ["det", "seg", "cls"])
def test_answers_are_those_of_the_inferencer(models, scene, task):
    request = _request(models, task)
    found = answer(models, request, str(scene), 0.5)
    (plain,) = inferencer(task, digits_config(task), request.weights, "cpu")(scene)
    assert found.table == class_table(plain, 0.5) and found.table.rows
    assert found.pixel == first_pixel(plain)
    image = cv2.imread(str(scene))
    assert (found.picture == image).all()
    factor = enlargement(image)
    assert factor > 1 and max(found.drawing.shape[:2]) > 400
    assert found.drawing.shape == (image.shape[0] * factor, image.shape[1] * factor, 3)
    assert f"picture of {image.shape[1]} x {image.shape[0]} pixels" in found.timing and " ms on cpu" in found.timing


def test_large_picture_is_shrunk_and_says_so(models, scene, tmp_path, monkeypatch):
    monkeypatch.setattr(behind, "MAX_SIDE", 96)
    file = tmp_path / "large.png"
    cv2.imwrite(str(file), cv2.resize(cv2.imread(str(scene)), (192, 96)))
    found = answer(models, _request(models, "cls"), str(file), 0.5)
    assert found.picture.shape == (48, 96, 3)
    assert "picture of 96 x 48 pixels, shrunk from 192 x 96" in found.timing


def test_models_stay_in_memory_until_their_files_change(demo_dir, tmp_path, monkeypatch):
    built = []
    monkeypatch.setattr(behind, "inferencer", lambda *args: built.append(args[:1]) or inferencer(*args))
    folder = shutil.copytree(demo_dir, tmp_path / "demo")
    models = Models(folder, "cpu")
    first = models.get(_request(models, "cls"))
    assert models.get(_request(models, "cls")) is first and len(built) == 1
    os.utime(folder / "cls" / "cls.pth", (1, 1))
    assert models.get(_request(models, "cls")) is not first and len(built) == 2
    assert len(models._loaded) == behind.KEPT
    models.get(_request(models, "seg"))
    assert len(models._loaded) == behind.KEPT, "what was not asked for longest is forgotten"


def test_demo_is_offered_first(models, tmp_path):
    assert models.first_task() == "det"
    names = models.names("det")
    assert names[0] == str(digits_config("det")) and "mask-rcnn_vmamba-tiny-s1l8_fpn_1x_coco" in names
    assert models.first_weights("det", names[1]) == ""
    empty = Models(tmp_path, "cpu")
    assert empty.first_weights("det", names[0]) == "" and empty.first_task() == "det"
    (tmp_path / "seg").mkdir()
    (tmp_path / "seg" / "last_checkpoint").write_text("/gone/iter_1.pth")
    assert empty.first_weights("seg", str(demo_config("seg"))) == ""


def test_what_is_wrong_is_said(models, scene, tmp_path, demo_dir):
    good = _request(models, "cls")
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff no more")
    for request, image, error, words in (
        (good, None, DataError, "there is no picture"),
        (good, broken, DataError, "broken.jpg.*cannot be decoded"),
        (Request("cls", good.model, "/no/such/file.pth"), scene, CheckpointError, "/no/such/file.pth"),
        (Request("cls", good.model, ""), scene, CheckpointError, "weights is empty.*make demo"),
        (Request("cls", good.model, str(broken)), scene, CheckpointError, "broken.jpg"),
        (Request("cls", good.model, str(demo_dir / "det/det.pth")), scene, CheckpointMismatch, "det.pth"),
        (Request("cls", "vmamba-tinny", good.weights), scene, ConfigError, "vmamba-tinny"),
        (Request("seg", good.model, good.weights), scene, ConfigError, "default_scope"),
    ):
        with pytest.raises(error, match=words):
            answer(models, request, image, 0.5)
    for task, model, words in (("pose", "x", "task is 'pose'"), ("det", "", "model is empty")):
        with pytest.raises(ConfigError, match=words):
            Request(task, model, "")


def test_configs_of_others_are_not_run(demo_dir, tmp_path, monkeypatch):
    """A config is Python: whoever may name one, or send one and name it, runs what it says."""
    ran = tmp_path / "ran"
    evil = tmp_path / "evil.py"
    evil.write_text(f"open({str(ran)!r}, 'w').close()\n")
    weights = str(demo_dir / "cls/cls.pth")
    offered = Request("cls", str(demo_config("cls")), weights)

    def refused(models, model, words):
        with pytest.raises(ConfigError, match=words):
            models.get(Request("cls", model, weights))
        assert not ran.exists()

    served = Models(demo_dir, "cpu", typed_configs=False)
    refused(served, str(evil), "evil.py'.*served to others")
    assert served.get(offered).answers.task == "cls"
    sent = Models(demo_dir, "cpu", uploads=tmp_path)
    refused(sent, str(evil), "was sent to this page")
    (demo_dir / "link.py").symlink_to(evil)
    refused(sent, str(demo_dir / "link.py"), "was sent to this page")
    for escape in (f"mmpretrain::{evil}", f"mmpretrain::../../../../..{evil}"):
        refused(served, escape, "inside the configs of mmpretrain")
    owner = evil.stat().st_uid
    monkeypatch.setattr(behind, "index_root", lambda: demo_dir)
    monkeypatch.setattr(Models, "names", lambda _models, _task: [])
    if owner == 0:
        os.chown(evil, 12345, -1)
        refused(Models(demo_dir, "cpu"), str(evil), "another user")
        os.chown(evil, 0, -1)
    with pytest.raises(ConfigError, match="default_scope"):  # its owner's own config is read
        Models(demo_dir, "cpu").get(Request("cls", str(evil), weights))
    assert ran.exists()


def _prediction(labels=None, **record):
    return Prediction("x", "x", {"source": "x", "height": 20, "width": 50, **record}, None, labels)


def test_tables_by_hand():
    def one(name, score, box=(0, 0, 1, 1)):
        return {"class": name, "score": score, "bbox": list(box)}

    objects = _prediction(instances=[one("b", 0.9, (10, 4, 21, 8)), one("a", 0.75), one("b", 0.5), one("c", 0.49)])
    assert class_table(objects, 0.5) == Table(
        "3 objects of score 0.50 or more",
        ("Class", "Objects", "Best score"),
        (("b", "2", "0.900"), ("a", "1", "0.750")),
    )
    assert class_table(objects, 0.8).caption == "1 object of score 0.80 or more"
    assert first_pixel(objects) == (6, 15)
    assert first_pixel(_prediction(instances=[one("b", 0.9, (48, 18, 60, 30))])) == (19, 49)
    segments = _prediction(np.zeros((20, 50)), classes=[{"class": "s", "pixels": 750}, {"class": "t", "pixels": 250}])
    assert class_table(segments, 0.5).rows == (("s", "75.0%"), ("t", "25.0%"))
    assert first_pixel(segments) == (10, 25)


def test_scan_maps_are_those_of_the_analysis(models, scene):
    found = answer(models, _request(models, "det"), str(scene), 0.5)
    layers, first = answer_layers(models, found)
    assert first in [layer.name for layer in layers] and len(layers) == 5
    pixel = (33, 70)
    view = scan_view(models, found, pixel, first, "qk")
    network = models.get(found.request).network
    image = torch.from_numpy(cv2.imread(str(scene))[..., ::-1].copy()).permute(2, 0, 1)[None].float()
    mean, std = (torch.tensor(v)[:, None, None] for v in ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)))
    maps = scan_map(network.backbone, (image - mean) / std, pixel, first)
    assert [name for name, _ in view.directions] == list(maps.directions) and len(maps.directions) == 4
    factor = enlargement(found.picture)
    large = cv2.resize(found.picture, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC)[..., ::-1]
    spot = (33 * factor + factor // 2, 70 * factor + factor // 2)
    assert np.abs(view.merged.astype(int) - overlay(large, maps.maps["qk"].sum(0), spot)).max() <= 1
    assert "row 33, column 70" in view.caption and first in view.caption
    for pixel, layer, kind, words in (
        ((33, 999), first, "qk", "pixel is"),
        ((33, 70), "layers.9", "qk", "layer is 'layers.9'"),
        ((33, 70), first, "sum", "kind is 'sum'"),
    ):
        with pytest.raises(ConfigError, match=words):
            scan_view(models, found, pixel, layer, kind)


def test_backbone_without_scans_gives_an_answer_and_says_that_nothing_scans(models, scene, tmp_path):
    cfg = load_config(str(digits_config("cls")))
    cfg.model.backbone = dict(type="mmvmamba.MambaOut", arch="nano", out_indices=(3,))
    cfg.model.head.in_channels = 128
    cfg.dump(str(tmp_path / "mambaout.py"))
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        network = MODELS.build(cfg.model)
    meta = {"dataset_meta": {"classes": NAMES["cls"]}}
    torch.save({"meta": meta, "state_dict": network.state_dict()}, tmp_path / "mambaout.pth")
    request = Request("cls", str(tmp_path / "mambaout.py"), str(tmp_path / "mambaout.pth"))
    found = answer(models, request, str(scene), 0.5)
    assert len(found.table.rows) == 5
    with pytest.raises(ConfigError, match="MambaOut ran no scan operator"):
        answer_layers(models, found)


class _Texts(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, text):
        self.texts.append(text)


def test_texts_from_outside_cannot_be_html():
    hostile = "<script>alert('1')</script>\"&"
    table = _Texts(table_html(Table(hostile, ("Class", hostile), ((hostile, hostile),))))
    assert "script" not in [tag for tag, _ in table.tags] and table.texts.count(hostile) == 4
    assert [dict(attributes).get("scope") for tag, attributes in table.tags if tag == "th"] == ["col", "col", "row"]
    assert _Texts(error_html(hostile)).texts == [hostile]


def test_scan_maps_as_html(models, scene):
    found = answer(models, _request(models, "cls"), str(scene), 0.5)
    _, first = answer_layers(models, found)
    page = _Texts(scan_html(scan_view(models, found, found.pixel, first, "weight")))
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 5 and all(image["src"].startswith("data:image/png;base64,") for image in images)
    assert images[0]["alt"] == "Scan map, all directions" and images[3]["alt"] == "Scan map, row reversed"
