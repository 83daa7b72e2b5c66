"""Answers for pictures: all kinds of inputs, the toolboxes' own answers, whole weights only, nobody else's names."""

import dataclasses
import json
import shutil
import socket
import subprocess
import sys
import types
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")
pytest.importorskip("mmpretrain")

from mmengine.registry import DefaultScope, init_default_scope

from mmvmamba.apis import inferencer, load_config
from mmvmamba.errors import CheckpointError, CheckpointMismatch, ConfigError, DataError
from tests.nano_models import NAMES, ROOT, digits_config, nano_checkpoint, script

TASKS = ("det", "seg", "cls")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("inferencers")


@pytest.fixture(scope="module")
def ready(folder):
    """One inferencer for each task, with random weights."""
    return {task: inferencer(task, digits_config(task), nano_checkpoint(task, folder), "cpu") for task in TASKS}


@pytest.fixture(scope="module")
def scenes(small_digits):
    return sorted((small_digits / "images/val").iterdir())


def _plain(prediction):
    return {key: value for key, value in prediction.record.items() if key != "source"}


@pytest.mark.parametrize("task", TASKS)
def test_files_folders_and_arrays(ready, scenes, task, tmp_path):
    inside = tmp_path / "a folder"
    inside.mkdir()
    for scene in scenes[:2]:
        shutil.copy(scene, inside)
    (inside / "notes.txt").write_text("no image\n")
    array = cv2.imread(str(scenes[0]))
    single = ready[task](str(scenes[0]))
    many = ready[task]([inside, scenes[0], array, scenes[1]])
    assert [prediction.name for prediction in many] == ["000000", "000001", "000000_2", "array-0", "000001_2"]
    assert many[2].source == str(scenes[0]) and many[3].source == "array 0"
    for other in (many[0], many[2], many[3]):
        assert _plain(other) == _plain(single[0])
    assert _plain(many[4]) == _plain(many[1]) != _plain(single[0])
    height, width = array.shape[:2]
    assert (single[0].record["height"], single[0].record["width"]) == (height, width)
    assert json.loads(json.dumps(single[0].record)) == single[0].record


def test_detections_are_those_of_the_toolbox(ready, scenes, folder):
    from mmdet.apis import DetInferencer

    with warnings.catch_warnings(), DefaultScope.overwrite_default_scope("mmdet"):
        warnings.simplefilter("ignore")
        stock = DetInferencer(str(digits_config("det")), str(folder / "det.pth"), "cpu", show_progress=False)
        (theirs,) = stock(str(scenes[0]))["predictions"]
    ours = ready["det"](scenes[0])[0].record["instances"]
    order = np.argsort(-np.array(theirs["scores"]), kind="stable")
    assert len(order) > 3
    assert [entry["bbox"] for entry in ours] == [theirs["bboxes"][i] for i in order]
    assert [entry["label"] for entry in ours] == [theirs["labels"][i] for i in order]
    assert [entry["mask"] for entry in ours] == [theirs["masks"][i] for i in order]
    assert all(entry["class"] == NAMES["det"][entry["label"]] for entry in ours)


def test_labels_of_pixels_are_those_of_the_toolbox(ready, scenes, folder):
    from mmseg.apis import MMSegInferencer

    with warnings.catch_warnings(), DefaultScope.overwrite_default_scope("mmseg"):
        warnings.simplefilter("ignore")
        stock = MMSegInferencer(
            str(digits_config("seg")), str(folder / "seg.pth"), device="cpu", show_progress=False,
            classes=list(NAMES["seg"]), palette=[[0, 0, 0]] * 11,
        )  # fmt: skip
        theirs = stock(str(scenes[0]))["predictions"]
    ours = ready["seg"](scenes[0])[0]
    assert np.array_equal(ours.labels, theirs) and len(np.unique(theirs)) > 1
    for entry in ours.record["classes"]:
        assert entry["pixels"] == (theirs == entry["label"]).sum()
        assert entry["class"] == NAMES["seg"][entry["label"]]
    pixels = [entry["pixels"] for entry in ours.record["classes"]]
    assert pixels == sorted(pixels, reverse=True) and sum(pixels) == theirs.size


def test_classes_are_those_of_the_toolbox(ready, scenes, folder):
    from mmpretrain.apis import ImageClassificationInferencer

    with DefaultScope.overwrite_default_scope("mmpretrain"):  # another test may have left another library's
        stock = ImageClassificationInferencer(str(digits_config("cls")), str(folder / "cls.pth"), device="cpu")
        (theirs,) = stock(str(scenes[0]))
    ours = ready["cls"](scenes[0])[0].record["classes"]
    assert len(ours) == 5
    assert (ours[0]["label"], ours[0]["score"], ours[0]["class"]) == (
        theirs["pred_label"], theirs["pred_score"], theirs["pred_class"],
    )  # fmt: skip
    scores = [entry["score"] for entry in ours]
    assert scores == sorted(theirs["pred_scores"].tolist(), reverse=True)[:5]


@pytest.mark.parametrize("task", TASKS)
def test_answers_on_disk_and_drawn(ready, scenes, task, tmp_path):
    out = tmp_path / "out"
    predictions = ready[task](scenes[:2], draw=True, score_threshold=0.0, out_dir=out)
    for prediction, scene in zip(predictions, scenes, strict=False):
        image = cv2.imread(str(scene))[..., ::-1]
        assert prediction.drawing.dtype == np.uint8 and prediction.drawing.shape[2] == 3
        if task != "cls":  # mmpretrain may scale the picture
            assert prediction.drawing.shape == image.shape
            assert (prediction.drawing != image).any()
        assert json.loads((out / "preds" / f"{prediction.name}.json").read_text()) == prediction.record
        assert cv2.imread(str(out / "vis" / f"{prediction.name}.jpg")).shape == prediction.drawing.shape
        if task == "seg":
            written = cv2.imread(str(out / "preds" / f"{prediction.name}.png"), cv2.IMREAD_UNCHANGED)
            assert np.array_equal(written, prediction.labels)
    assert ready[task](scenes[0])[0].drawing is None


def test_colours_of_a_drawn_array_are_its_own(ready):
    """Arrays are BGR for the model, and drawings RGB: the toolboxes mix the two up."""
    array = np.zeros((64, 64, 3), np.uint8)
    array[..., 0] = 255  # blue
    (prediction,) = ready["det"](array, draw=True, score_threshold=1.0)
    assert (prediction.drawing == [0, 0, 255]).all()


@pytest.mark.parametrize("task", ["seg", "cls"])
def test_batches_of_pictures_of_several_sizes(ready, scenes, task):
    """Segmentors and classifiers get pictures of one size together; nothing of a picture depends on its neighbours."""
    sizes = {cv2.imread(str(scene)).shape for scene in scenes[:6]}
    assert len(sizes) > 1
    singly, together = ready[task](scenes[:6]), ready[task]([scenes[0], *scenes[:6]], batch_size=4)[1:]
    for one, other in zip(singly, together, strict=True):
        assert one.name == other.name.removesuffix("_2")
        assert [entry["label"] for entry in one.record["classes"]] == [e["label"] for e in other.record["classes"]]
        assert one.record["height"] == other.record["height"]


def test_detections_in_batches(ready, scenes):
    together = ready["det"](scenes[:5], batch_size=2)
    assert [prediction.source for prediction in together] == [str(scene) for scene in scenes[:5]]
    alone = ready["det"](scenes[4])[0]  # alone in its batch there, too
    assert _plain(alone) == _plain(together[4])


def test_a_stream_reads_no_further_than_it_is_asked(ready, scenes, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(scenes[0].read_bytes()[:20])
    stream = ready["cls"].stream([scenes[0], broken])
    assert next(stream).source == str(scenes[0])
    with pytest.raises(DataError, match=r"image '.*broken\.jpg' cannot be decoded"):
        next(stream)


@pytest.mark.parametrize("task", TASKS)
def test_inputs_that_are_none(ready, scenes, task, tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "empty").mkdir()
    for inputs, message in [
        (tmp_path / "text.jpg", "cannot be decoded, expected a whole JPEG"),
        (tmp_path / "empty", "has no image right in it"),
        ("nowhere.jpg", "'nowhere.jpg' does not exist"),
        ("x" * 5000, "'x+' does not exist"),
        ("https://example.org/a.jpg", "a URL must be downloaded first"),
        ([], "inputs is empty"),
        (np.zeros((8, 8)), r"array of shape \(8, 8\) and type float64, expected \(height, width, 3\) of uint8"),
        (np.zeros((0, 8, 3), np.uint8), "array of shape"),
        ([scenes[0], 3], "input is a int, expected a file"),
    ]:
        with pytest.raises(DataError, match=message):
            ready[task](inputs)


def test_answers_that_cannot_be_written(ready, scenes, tmp_path):
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / ("x" * 300)):
        with pytest.raises(DataError, match="could not write .*Choose another out_dir"):
            ready["cls"](scenes[0], out_dir=out)


def test_arguments_out_of_range(ready, scenes):
    for arguments in ({"batch_size": 0}, {"batch_size": 1.5}, {"score_threshold": 30}):
        with pytest.raises(ConfigError, match=f"{next(iter(arguments))} is"):
            ready["det"](scenes[0], **arguments)


@pytest.mark.parametrize("task", TASKS)
def test_a_checkpoint_fits_whole_or_is_refused(task, folder, tmp_path):
    """Heads and necks too, which MMEngine's inferencers leave at random values with a line in the log."""
    content = torch.load(nano_checkpoint(task, tmp_path), weights_only=True)
    state = content["state_dict"]
    foreign = next(name for name in reversed(state) if name.endswith("weight") and "backbone" not in name)
    for change, message in [
        ({name: value for name, value in state.items() if name != foreign}, "entries missing"),
        ({**state, "neck.extra": torch.ones(1)}, "1 unexpected"),
        ({**state, foreign: torch.ones(7, 7)}, "1 of another shape"),
        ({**state, foreign: state[foreign] * float("nan")}, "NaN"),
    ]:
        torch.save({"state_dict": change}, tmp_path / "other.pth")
        with pytest.raises(CheckpointError, match=message):
            inferencer(task, digits_config(task), tmp_path / "other.pth", "cpu")


def test_weights_of_another_task(folder, ready):
    with pytest.raises(CheckpointMismatch, match="does not fit ImageClassifier"):
        inferencer("cls", digits_config("cls"), folder / "det.pth", "cpu")


def test_misspelt_arguments(folder, ready):
    config, weights = digits_config("cls"), folder / "cls.pth"
    for arguments, message in [
        (("clss", config, weights), r"task is 'clss', expected one of 'det', 'seg', 'cls'\. Did you mean 'cls'\?"),
        (("det", config, weights), "default_scope 'mmpretrain', expected 'mmdet' for task 'det'"),
        (("cls", "nowhere.py", weights), "config is 'nowhere.py', which is no file"),
        (("cls", "x" * 5000 + ".py", weights), "which is no file"),
        (("cls", 3, weights), "model is a int"),
        (("cls", config, weights, "gpu"), "device is 'gpu', expected one of PyTorch's"),
        (("cls", config, weights, "meta:x"), "device is 'meta:x'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            inferencer(*arguments)
    with pytest.raises(CheckpointError, match=r"weights is None.*vmamba-nano_digits\.py' brings no official weights"):
        inferencer("cls", config)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is there")
def test_a_device_that_is_not_there(folder, ready):
    with pytest.raises(ConfigError, match="device is 'cuda:0', which cannot be used here"):
        inferencer("cls", digits_config("cls"), folder / "cls.pth", "cuda:0")


@dataclasses.dataclass
class Entry:
    name: str
    task: str
    config: Path
    weights: str | None


@pytest.fixture
def index(monkeypatch, folder, ready):
    """A model index of one classifier whose official weights are a file."""
    entry = Entry("vmamba-nano_digits", "cls", digits_config("cls"), str(folder / "cls.pth"))
    asked = []

    def find_model(name, task=None):
        asked.append((name, task))
        return entry

    stand_in = types.SimpleNamespace(find_model=find_model)
    monkeypatch.setitem(sys.modules, "mmvmamba.apis.model_index", stand_in)
    return types.SimpleNamespace(entry=entry, asked=asked)


def test_names_of_the_index_bring_their_weights(index, ready, scenes, monkeypatch):
    """Neither pip nor a server nor MMEngine's own search is asked."""

    def refuse(*_, **__):
        raise AssertionError("nothing of this may be called")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr("mmengine.infer.infer.BaseInferencer._load_model_from_metafile", refuse)
    monkeypatch.setattr("mmpretrain.apis.model.ModelHub.get", refuse)
    named = inferencer("cls", "vmamba-nano_digits", device="cpu")
    assert index.asked == [("vmamba-nano_digits", "cls")]
    assert _plain(named(scenes[0])[0]) == _plain(ready["cls"](scenes[0])[0])
    index.entry.weights = None
    with pytest.raises(CheckpointError, match="the model 'vmamba-nano_digits' brings no official weights"):
        inferencer("cls", "vmamba-nano_digits")


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(ConfigError, match="such as .*'vmamba-tiny-s1l8_8xb128_in1k'"):
        inferencer("cls", "vmamba-tiny-s1l8_8xb128")


@pytest.mark.parametrize("task", TASKS)
def test_names_of_classes(task):
    """Those given, else the checkpoint's, else the config's: never COCO's or Cityscapes', never a wrong number."""
    from mmvmamba.apis.inferencers import SCOPES, _class_names

    cfg, own = load_config(str(digits_config(task))), NAMES[task]
    others = tuple(f"class {index}" for index in range(len(own)))

    def names(given=None, **meta):
        with DefaultScope.overwrite_default_scope(SCOPES[task]):
            return _class_names(cfg, meta, given)[0]

    for key in ("classes", "CLASSES"):
        assert names(dataset_meta={key: list(others)}) == others
        assert names(own, dataset_meta={key: others}) == own
    assert names(CLASSES=others) == others  # as the first releases of the toolboxes wrote it
    if task == "cls":  # its names come from folders, which are not there
        with pytest.warns(UserWarning, match="they are called by their numbers"):
            assert names(epoch=1) == tuple(map(str, range(10)))
    else:
        assert names(epoch=1) == own
    for given, meta, message in [
        (["one"], {}, f"classes has 1 class names, expected {len(own)}"),
        ("one", {}, "A single class needs a comma"),
        (None, {"dataset_meta": {"classes": (0, 1, 2)}}, f"the checkpoint has 3 class names, expected {len(own)}"),
    ]:
        with pytest.raises(ConfigError, match=message):
            names(given, **meta)


def test_names_of_classes_reach_the_answers(folder, ready, scenes):
    names = [f"class {index}" for index in range(10)]
    renamed = inferencer("cls", digits_config("cls"), folder / "cls.pth", "cpu", classes=names)
    before, after = (answers(scenes[0])[0].record["classes"] for answers in (ready["cls"], renamed))
    assert renamed.classes == tuple(names)
    assert [entry["class"] for entry in after] == [f"class {entry['label']}" for entry in before]


def test_a_config_in_memory_stays_as_it_was(folder, ready, scenes, tmp_path):
    cfg = load_config(str(digits_config("seg")))
    # One that would ask a server belongs here; this one writes files, so that a test can see it.
    cfg.visualizer.vis_backends = [dict(type="LocalVisBackend", save_dir=str(tmp_path / "logged"))]
    before = cfg.pretty_text
    init_default_scope("mmdet")
    loaded = inferencer("seg", cfg, folder / "seg.pth", "cpu")
    assert _plain(loaded(scenes[0], draw=True)[0]) == _plain(ready["seg"](scenes[0])[0])
    assert loaded.toolbox.visualizer._vis_backends == {}
    assert cfg.pretty_text == before
    assert DefaultScope.get_current_instance().scope_name == "mmdet"


@pytest.mark.parametrize(("task", "count"), [("det", 80), ("seg", 150), ("cls", 1000)])
def test_names_of_well_known_data_sets(task, count):
    """They come with the data set's class, although there are no data here."""
    from mmvmamba.apis.inferencers import SCOPES, _metainfo, _number_of_classes

    cfg = load_config(str(next((ROOT / "configs" / task / "vmamba").glob("*vmamba-tiny*.py"))))
    with DefaultScope.overwrite_default_scope(SCOPES[task]):
        assert len(_metainfo(cfg)["classes"]) == count == _number_of_classes(cfg)


def _demo(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["image_demo.py", *map(str, arguments)])
    return script("demo/image_demo.py").main()


@pytest.mark.parametrize("task", TASKS)
def test_demo(monkeypatch, capsys, folder, ready, scenes, task, tmp_path):
    arguments = [task, digits_config(task), scenes[0], scenes[1], "--weights", folder / f"{task}.pth"]
    assert _demo(monkeypatch, *arguments, "--out-dir", tmp_path, "--score-threshold", 0.05, "--device", "cpu") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "tensors from" in lines[0]
    first = next(line for line in lines if line.startswith(str(scenes[0])))
    assert {"det": " x ", "seg": "%", "cls": " 0."}[task] in first
    assert sorted(path.name for path in (tmp_path / "vis").iterdir()) == ["000000.jpg", "000001.jpg"]
    assert (tmp_path / "preds/000001.json").is_file()


def test_demo_says_what_is_wrong_in_one_line(monkeypatch, capsys, folder, ready, scenes):
    config, weights = digits_config("cls"), folder / "cls.pth"
    for arguments, message in [
        (["cls", config, "nowhere.jpg", "--weights", weights], "error: input 'nowhere.jpg' does not exist"),
        (["det", config, scenes[0], "--weights", weights], "error: the config file"),
    ]:
        assert _demo(monkeypatch, *arguments) == 1
        assert capsys.readouterr().err.startswith(message)
    with pytest.raises(SystemExit, match="2"):
        _demo(monkeypatch, "clss", config, scenes[0])
