"""The command lines: flags, early stops with one clear line, and their translation for every task."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mmengine")

import torch
from mmengine.config import Config

from mmvmamba.apis import check_data, check_weights, load_config, prepare_testing, prepare_training
from mmvmamba.errors import CheckpointError, CheckpointMismatch, ConfigError, DataError

ROOT = Path(__file__).parents[2]
DET = str(ROOT / "configs/det/vmamba/mask-rcnn_vmamba-tiny-s1l8_fpn_1x_coco.py")
SEG = str(ROOT / "configs/seg/vmamba/vmamba-tiny-s1l8_upernet_4xb4-160k_ade20k-512x512.py")
CLS = str(ROOT / "configs/cls/vmamba/vmamba-tiny-s1l8_8xb128_in1k.py")


def _run(tool, *arguments, **environment):
    return subprocess.run(
        [sys.executable, "-W", "ignore", str(ROOT / "tools" / tool), *arguments],
        cwd=ROOT, capture_output=True, text=True,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", **environment},
    )  # fmt: skip


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(b"")
    return str(path)


@pytest.mark.parametrize("tool", ["train.py", "test.py"])
def test_help_and_unknown_flags(tool):
    assert "--cfg-options" in _run(tool, "--help").stdout
    for flag in ("--work-dirr", "--work"):
        result = _run(tool, DET, *(["x.pth"] if tool == "test.py" else []), flag, "x")
        assert result.returncode == 2
        assert "unrecognized arguments" in result.stderr


@pytest.mark.parametrize("tool", ["train.py", "test.py"])
def test_the_process_that_fails_leaves_its_error_to_torchrun(tool, tmp_path):
    """``record`` of PyTorch writes the file, from which torchrun's summary takes the traceback."""
    file = tmp_path / "error.json"
    arguments = ["nothing.py", "x.pth"] if tool == "test.py" else ["nothing.py"]
    result = _run(tool, *arguments, TORCHELASTIC_ERROR_FILE=str(file))
    assert result.returncode == 1 and result.stderr.splitlines()[-1].startswith("error: config is 'nothing.py'")
    assert "ConfigError: config is 'nothing.py'" in file.read_text()


def test_training_without_data_stops_first():
    pytest.importorskip("mmdet")
    result = _run("train.py", DET, "--cfg-options", "train_dataloader.dataset.data_root=nowhere/coco/")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith(
        "error: data set not found: train_dataloader.dataset (CocoDataset)"
    )
    assert "nowhere/coco" in result.stderr
    assert "cocodataset.org" in result.stderr
    assert "Traceback" not in result.stderr


def test_testing_without_weights_stops_first():
    pytest.importorskip("mmdet")
    result = _run("test.py", DET, "nowhere.pth")
    assert result.returncode == 1
    assert "error: checkpoint 'nowhere.pth' does not exist" in result.stderr


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ("nowhere.pth", "does not exist"),
        ("http://example.org/a.pth", "begins with http://, expected a file, an https URL"),
        ("s3://bucket/a.pth", "begins with s3://"),
        ("open-mmlab://nowhere", "not in mmengine's table"),
    ],
)
def test_checkpoints_that_are_not_served_are_refused_first(checkpoint, message):
    cfg = Config(dict(default_scope="mmdet"))
    with pytest.raises(CheckpointError, match=message):
        prepare_testing(cfg, checkpoint)
    assert "load_from" not in cfg


@pytest.mark.parametrize("checkpoint", ["https://example.org/a.pth", "open-mmlab://resnet50_caffe"])
def test_checkpoints_of_every_kind_that_is_served_are_taken(checkpoint):
    cfg = Config(dict(default_scope="mmdet"))
    prepare_testing(cfg, checkpoint)
    assert cfg.load_from == checkpoint


def test_missing_config_is_named():
    with pytest.raises(ConfigError, match="config is 'nowhere.py', which is no file"):
        load_config("nowhere.py")


def test_config_without_scope_is_refused(tmp_path):
    (tmp_path / "bare.py").write_text("model = dict(type='X')\n")
    with pytest.raises(ConfigError, match="default_scope is None, expected one of mmdet, mmseg, mmpretrain"):
        load_config(str(tmp_path / "bare.py"))


def test_work_dir_and_options():
    pytest.importorskip("mmdet")
    assert Path(load_config(DET).work_dir) == Path("work_dirs/mask-rcnn_vmamba-tiny-s1l8_fpn_1x_coco")
    cfg = load_config(DET, work_dir="elsewhere", cfg_options={"model.backbone.arch": "nano"}, launcher="pytorch")
    assert (cfg.work_dir, cfg.model.backbone.arch, cfg.launcher) == ("elsewhere", "nano", "pytorch")


def test_data_paths(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "a.json").write_text("{}")
    inner = dict(type="CocoDataset", data_root=str(tmp_path), ann_file="a.json", data_prefix=dict(img="images"))
    good = Config(dict(train_dataloader=dict(dataset=dict(type="RepeatDataset", times=2, dataset=inner))))
    check_data(good, ["train", "val"])
    for entry, value, named in [
        ("ann_file", "b.json", "ann_file: .*b.json"),
        ("data_prefix", dict(img="im"), r"data_prefix\.img: .*im"),
        ("data_root", "no/digits", r"data_root: .*digits.*tools/dataset_converters/digits\.py"),
    ]:
        bad = Config(dict(val_dataloader=dict(dataset=dict(type="ConcatDataset", datasets=[{**inner, entry: value}]))))
        check_data(bad, ["train"])
        with pytest.raises(DataError, match=named):
            check_data(bad, ["train", "val"])


def test_data_set_types_and_backends():
    """A class is a type like its name; local files are checked, remote ones are not; COCO's advice is for COCO."""

    class CocoDataset:
        pass

    def check(**entries):
        check_data(Config(dict(test_dataloader=dict(dataset=dict(**entries)))), ["test"])

    check(type="CocoDataset", data_root="s3://data/coco", backend_args=dict(backend="petrel"))
    with pytest.raises(DataError, match=r"\(CocoDataset\).*cocodataset\.org"):
        check(type=CocoDataset, data_root="nowhere/coco", backend_args=dict(backend="local"))
    with pytest.raises(DataError, match=r"\(CocoDataset\).*Check the paths of the config"):
        check(type="mmdet.CocoDataset", data_root="nowhere/mine", backend_args={})


def test_data_that_downloads_itself_is_left_alone():
    check_data(Config(dict(train_dataloader=dict(dataset=dict(type="CIFAR10", data_root="nowhere")))), ["train"])


@pytest.mark.parametrize("path", [DET, SEG, CLS], ids=["det", "seg", "cls"])
def test_training_flags(path, tmp_path):
    pytest.importorskip("mmseg" if path == SEG else "mmdet" if path == DET else "mmpretrain")
    cfg = load_config(path, work_dir=str(tmp_path))
    prepare_training(cfg, auto_scale_lr=True)
    assert cfg.auto_scale_lr.enable is True
    cfg.pop("auto_scale_lr")
    with pytest.raises(ConfigError, match="auto_scale_lr"):
        prepare_training(cfg, auto_scale_lr=True)


def test_random_weights_of_a_backbone_are_no_surprise(tmp_path):
    """Some recipes cannot name their weights; whoever trains one as it is learns it from the log."""
    pytest.importorskip("mmdet")
    path = str(ROOT / "configs/det/efficientvmamba/mask-rcnn_efficientvmamba-tiny_fpn_1x_coco.py")

    def warned(path=path, **cfg_options):
        cfg = load_config(path, work_dir=str(tmp_path), cfg_options=cfg_options)
        return any("EfficientVMamba starts from random weights" in note.text for note in prepare_training(cfg))

    assert warned()
    assert not warned(**{"model.backbone.init_cfg": None})
    init = {"model.backbone.init_cfg.type": "Pretrained", "model.backbone.init_cfg.checkpoint": "FILE"}
    assert not warned(**init)
    assert not warned(load_from="detector.pth")
    assert not warned(DET)
    assert not warned(CLS)


def test_testing_flags_of_a_segmentor(weights, tmp_path):
    pytest.importorskip("mmseg")
    cfg = load_config(SEG)
    prepare_testing(cfg, weights, out=str(tmp_path / "out"), show_dir=str(tmp_path / "show"), tta=True)
    assert cfg.load_from == weights
    assert cfg.model.type == "SegTTAModel"
    assert cfg.model.module.backbone.type == "mmvmamba.VMamba"
    assert cfg.test_dataloader.dataset.pipeline[-1].type == "TestTimeAug"
    assert cfg.test_evaluator.output_dir == str(tmp_path / "out")
    assert cfg.visualizer.save_dir == str(tmp_path / "show")


def test_what_was_trained_with_fsdp_is_tested_without(weights, tmp_path):
    """FlexibleRunner has no model before it starts; its checkpoints are ordinary ones."""
    pytest.importorskip("mmdet")
    (tmp_path / "sharded.py").write_text(f"_base_ = [{DET!r}, {str(ROOT / 'configs/det/_base_/fsdp.py')!r}]\n")
    cfg = load_config(str(tmp_path / "sharded.py"))
    assert (cfg.runner_type, cfg.strategy.type) == ("FlexibleRunner", "mmvmamba.FSDPStrategy")
    prepare_testing(cfg, weights)
    assert "runner_type" not in cfg and "strategy" not in cfg
    assert cfg.load_from == weights


def test_segmentor_without_augmentation_of_its_own_gets_the_usual_one(weights):
    pytest.importorskip("mmseg")
    usual, cfg = load_config(SEG), load_config(SEG)
    cfg.pop("tta_model", None)
    assert cfg.pop("tta_pipeline") is not None
    cfg.test_dataloader.dataset.pipeline = [
        step for step in cfg.test_dataloader.dataset.pipeline if step.type != "Resize"
    ]
    prepare_testing(cfg, weights, tta=True)
    assert cfg.model.type == "SegTTAModel"
    ours, theirs = (steps[-1].transforms for steps in (cfg.tta_pipeline, usual.tta_pipeline))
    assert [list(map(dict, group)) for group in ours[:2]] == [list(map(dict, group)) for group in theirs[:2]]
    assert [[step.type for step in group] for group in ours[2:]] == [["LoadAnnotations"], ["PackSegInputs"]]


def test_testing_flags_of_a_detector(weights, tmp_path):
    pytest.importorskip("mmdet")
    cfg = load_config(DET)
    prepare_testing(cfg, weights, out=str(tmp_path / "out.pkl"), show_dir=str(tmp_path / "show"))
    assert cfg.test_evaluator[-1].type == "DumpDetResults"
    assert cfg.default_hooks.visualization.draw is True
    with pytest.raises(ConfigError, match=r"--tta: model MaskRCNN predicts masks"):
        prepare_testing(cfg, weights, tta=True)
    with pytest.raises(ConfigError, match="ending in .pkl"):
        prepare_testing(cfg, weights, out="predictions")
    del cfg.model.roi_head.mask_head
    prepare_testing(cfg, weights, tta=True)
    assert cfg.model.type == "DetTTAModel"


def test_testing_flags_of_a_classifier(weights, tmp_path):
    pytest.importorskip("mmpretrain")
    cfg = load_config(CLS)
    with pytest.raises(ConfigError, match="--tta and --show-dir"):
        prepare_testing(cfg, weights, show_dir=str(tmp_path / "show"), tta=True)
    prepare_testing(cfg, weights, out=str(tmp_path / "out.pkl"), tta=True)
    assert cfg.test_evaluator[-1].type == "DumpResults"
    assert cfg.model.type == "AverageClsScoreTTA"
    cfg = load_config(CLS)
    prepare_testing(cfg, weights, show_dir=str(tmp_path / "show"))
    assert cfg.default_hooks.visualization.out_dir == str(tmp_path / "show")


def _digits(tmp_path, task):
    """Write a digits config with an untrained model and its checkpoint on a few pictures; (config, checkpoint)."""
    from mmengine.registry import MODELS, init_default_scope

    (path,) = (ROOT / "configs" / task / "digits").glob("*.py")
    cfg = load_config(str(path))
    pytest.importorskip(cfg.default_scope)
    init_default_scope(cfg.default_scope)
    cfg.model.backbone.init_cfg = None
    model = MODELS.build(cfg.model)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "weights.pth")
    return model, cfg, str(tmp_path / "weights.pth")


@pytest.mark.parametrize("task", ["det", "seg", "cls"])
def test_weights_of_another_model_are_refused(task, tmp_path):
    model, _, good = _digits(tmp_path, task)
    check_weights(model, good)
    state = model.state_dict()
    state["backbone.patch_embed.0.weight"] = torch.ones(1, 3, 3, 3)
    dropped = [name for name in state if name.startswith("backbone.layers.3")]
    state = {name: value for name, value in state.items() if name not in dropped}
    torch.save({"state_dict": {**state, "neck.extra": torch.ones(1)}}, tmp_path / "other.pth")
    pattern = (
        rf"{len(dropped)} of {len(model.state_dict())} entries missing \['backbone\.layers\.3.*1 unexpected "
        r"\['neck\.extra'\], 1 of another shape \['backbone\.patch_embed\.0\.weight \(1, 3, 3, 3\) instead of"
    )
    with pytest.raises(CheckpointMismatch, match=pattern):
        check_weights(model, str(tmp_path / "other.pth"))


@pytest.mark.parametrize(("path", "name"), [(DET, "MaskRCNN"), (SEG, "EncoderDecoder")], ids=["det", "seg"])
def test_official_files_of_whole_models_fit(path, name, tmp_path):
    """Of VMamba-T in its real size, with the heads of mmdet and mmseg; also under the names of the first releases."""
    pytest.importorskip("mmdet" if path == DET else "mmseg")
    from mmengine.registry import MODELS, init_default_scope

    from tests.test_checkpoints.official_files import random_state, runner_file, with_old_names

    cfg = load_config(path)
    init_default_scope(cfg.default_scope)
    cfg.model.backbone.init_cfg = None
    with torch.device("meta"):
        model = MODELS.build(cfg.model)
    own = model.state_dict()
    state = {key: value.to(own[key].dtype) for key, value in random_state({k: v.shape for k, v in own.items()}).items()}
    for entries in (state, with_old_names(state, "backbone.")):
        match = check_weights(model, str(runner_file(tmp_path / "official.pth", entries)))
        assert f"{name} (VMamba tiny-s1l8): {len(own)}/{len(own)} tensors from" in match.line()
        assert all(torch.equal(match.taken[key], state[key]) for key in own)
    cfg.model.backbone.arch = "small-s2l15"
    with torch.device("meta"):
        other = MODELS.build(cfg.model)
    with pytest.raises(CheckpointMismatch, match=r"is VMamba tiny-s1l8 \(.*the model is VMamba small-s2l15 \("):
        check_weights(other, str(tmp_path / "official.pth"))


def test_test_py_refuses_weights_of_another_model(tmp_path):
    data = tmp_path / "data"
    for digit in range(10):
        (data / f"crops/val/{digit}").mkdir(parents=True)
    (config,) = (ROOT / "configs/cls/digits").glob("*.py")
    _, _, good = _digits(tmp_path, "det")
    result = _run("test.py", str(config), good, "--work-dir", str(tmp_path / "work"), "--cfg-options",
                  f"test_dataloader.dataset.data_root={data}")  # fmt: skip
    assert result.returncode == 1
    assert "does not fit ImageClassifier" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
