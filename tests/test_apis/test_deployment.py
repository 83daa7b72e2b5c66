"""Exports of networks and their tests: files, descriptions, refusals before any work, the same metrics."""

import json
import math
import sys

import pytest
import torch

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")
pytest.importorskip("mmpretrain")

from mmvmamba.apis import deployment
from mmvmamba.apis.deployment import Exported, ExportRequest, export_network, load_exported, put_into
from mmvmamba.apis.networks import load_networks
from mmvmamba.errors import ConfigError, MissingPackage, OpInputError
from tests.nano_models import digits_config, nano_checkpoint, nano_model, script

EXPORT, TEST = "tools/deployment/export.py", "tools/deployment/test_exported.py"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    return {task: nano_checkpoint(task, folder) for task in ("cls", "det", "seg")}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(part="bakbone"), "part is 'bakbone', expected one of 'backbone', 'backbone-neck'"),
        (dict(part="backbone", format="tensorrt"), "format is 'tensorrt', expected one of 'torch', 'aotinductor'"),
        (dict(part="backbone", format="onnx", int8=True), "int8 with the format 'onnx'.*onnxruntime's own tools"),
        (dict(part="backbone", dynamic=("depth",)), "dynamic is"),
        (dict(part="backbone", images=0), "images of at least 1"),
        (dict(part="backbone", tolerance=math.nan), "a tolerance above 0"),
    ],
)
def test_impossible_requests_are_refused_at_once(settings, message):
    with pytest.raises(ConfigError, match=message):
        ExportRequest(**settings).check()


@pytest.mark.parametrize(
    ("settings", "package"),
    [(dict(int8=True), "torchao"), (dict(format="onnx"), "onnx"), (dict(format="onnx"), "onnxruntime")],
)
def test_missing_packages_are_named_at_once(monkeypatch, settings, package):
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises((MissingPackage, ModuleNotFoundError), match=package):
        ExportRequest(part="backbone", **settings).check()


def test_an_export_and_its_description(checkpoints, tmp_path):
    (network,) = load_networks([digits_config("cls")], [checkpoints["cls"]], "cpu")
    lines = []
    export = export_network(network, ExportRequest("classifier", images=4, repeats=1), tmp_path, lines.append)
    assert export.file.name == "vmamba-nano_digits_classifier_torch.pt2" and len(lines) == 2
    assert len(export.runs) == 4 and all(run.error < 1e-5 and run.exported_ms > 0 for run in export.runs)
    content = json.loads(export.description.read_text())
    assert content["input"]["channels"] == "RGB" and content["input"]["mean"] == [123.675, 116.28, 103.53]
    assert content["input"]["free"] == {name: list(bounds) for name, bounds in export.sizes.items()}
    assert content["part"] == "classifier" and content["int8_layers"] == 0
    exported = load_exported(export.file)
    image = torch.randn(3, 3, 64, 71)
    with torch.no_grad():
        expected = network.model.head(network.model.extract_feat(image))
    assert torch.allclose(exported.run(image), expected, atol=1e-5)
    with pytest.raises(OpInputError, match=r"the height is 8, but .* was exported for at least \d+"):
        exported.run(torch.randn(1, 3, 8, 64))
    export.description.write_text("{}")
    with pytest.raises(ConfigError, match="Keep the two together"):
        load_exported(export.file)


def test_packages_of_another_pytorch_are_refused(tmp_path):
    file = tmp_path / "a.pt2"
    file.with_suffix(".pt2.json").write_text(
        json.dumps(
            {
                "format": "aotinductor",
                "part": "backbone",
                "task": "cls",
                "torch": "2.1.0",
                "input": {"shape": [1, 3, 8, 8], "free": {}},
            }
        )
    )
    with pytest.raises(ConfigError, match=r"compiled by PyTorch 2.1.0, but this is"):
        load_exported(file)


def test_a_wrong_export_is_refused(checkpoints, tmp_path, monkeypatch):
    """What does not give PyTorch's numbers is an error."""
    (network,) = load_networks([digits_config("cls")], [checkpoints["cls"]], "cpu")
    opened = deployment._opened
    monkeypatch.setattr(deployment, "_opened", lambda file: lambda image: 1.001 * opened(file)(image))
    with pytest.raises(ConfigError, match="differs from PyTorch's at 2 of 2 sizes"):
        export_network(network, ExportRequest("classifier", images=2, repeats=0), tmp_path)


@pytest.mark.parametrize(
    ("task", "part"), [("cls", "classifier"), ("cls", "backbone"), ("det", "backbone-neck"), ("seg", "segmentor")]
)
@torch.no_grad()
def test_a_part_takes_the_place_of_pytorch_s(task, part):
    """The whole network predicts as before, through the part alone."""
    whole, other = nano_model(task).eval(), nano_model(task).eval()
    module = deployment.part_of(nano_model(task).eval(), task, part).module
    calls = []

    def call(image):
        calls.append(tuple(image.shape))
        result = module(image)
        return list(result) if isinstance(result, tuple) else [result]  # as onnxruntime and packages give it

    put_into(other, Exported("memory", part, task, {"batch": (1, None)}, (1, 3, 64, 96), call))
    image = torch.randint(0, 256, (1, 3, 64, 96)).float()
    found, expected = (
        network.test_step(dict(inputs=list(image), data_samples=_samples(task, image)) if task != "cls"
                          else dict(inputs=image, data_samples=_samples(task, image)))
        for network in (other, whole)
    )  # fmt: skip
    assert calls == [(1, 3, 64, 96)]
    for a, b in zip(found, expected, strict=True):
        assert _tensors(task, a).shape == _tensors(task, b).shape
        assert torch.allclose(_tensors(task, a), _tensors(task, b), atol=1e-4)


def _samples(task, image):
    shape = tuple(image.shape[2:])
    info = dict(img_shape=shape, ori_shape=shape, pad_shape=shape, batch_input_shape=shape, scale_factor=(1.0, 1.0),
                flip=False, flip_direction=None, padding_size=[0, 0, 0, 0], img_padding_size=[0, 0, 0, 0])  # fmt: skip
    if task == "det":
        from mmdet.structures import DetDataSample as Sample
    elif task == "seg":
        from mmseg.structures import SegDataSample as Sample
    else:
        from mmpretrain.structures import DataSample as Sample
    return [Sample(metainfo=info)]


def _tensors(task, sample):
    if task == "cls":
        return sample.pred_score
    return sample.pred_instances.bboxes if task == "det" else sample.seg_logits.data


@pytest.mark.slow
@pytest.mark.parametrize(("task", "part"), [("det", "backbone-neck"), ("seg", "segmentor")])
def test_the_same_metrics_after_export(task, part, checkpoints, small_digits, tmp_path, monkeypatch, capsys):
    """The two command lines, on the digits: the runner's test with and without the exported part."""
    config = str(digits_config(task))
    export = [
        EXPORT,
        config,
        "--weights",
        str(checkpoints[task]),
        "--part",
        part,
        "--quick",
        "--out-dir",
        str(tmp_path),
    ]
    monkeypatch.setattr(sys, "argv", export)
    script(EXPORT).main()
    assert "largest difference" in capsys.readouterr().out
    (file,) = tmp_path.glob("*.pt2")
    options = [f"test_dataloader.dataset.data_root={small_digits}/", "test_dataloader.num_workers=0",
               "test_dataloader.persistent_workers=False"]  # fmt: skip
    if task == "det":
        options.append(f"test_evaluator.ann_file={small_digits}/annotations/instances_val.json")
    test = [TEST, config, str(checkpoints[task]), str(file), "--compare", "--work-dir", str(tmp_path / "test")]
    monkeypatch.setattr(sys, "argv", [*test, "--cfg-options", *options])
    script(TEST).main()
    results = json.loads((tmp_path / "test" / "metrics.json").read_text())
    found, expected = results["exported"], results["pytorch"]
    assert found.keys() == expected.keys() and len(found) > 2
    for name, value in expected.items():
        if "time" not in name:
            assert found[name] == pytest.approx(value, abs=1e-3), name


def test_another_device_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(
        sys, "argv", [EXPORT, str(digits_config("cls")), "--device", "cuda:0", "--out-dir", str(tmp_path)]
    )
    with pytest.raises(ConfigError, match="--device is 'cuda:0', expected cpu"):
        script(EXPORT).main()


def test_parts_of_another_task_are_refused(monkeypatch, checkpoints, tmp_path):
    file = tmp_path / "a.pt2"
    monkeypatch.setattr(sys, "argv", [TEST, str(digits_config("det")), str(checkpoints["det"]), str(file)])
    tool = script(TEST)
    monkeypatch.setattr(tool, "load_exported", lambda _: Exported(file, "classifier", "cls", {}, (1, 3, 8, 8), print))
    with pytest.raises(ConfigError, match="is a part of a network of the task 'cls', but .* is for mmdet"):
        tool.main()
