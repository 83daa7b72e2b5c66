"""Overrides that would change a name nobody reads are refused; all others reach the config."""

import re

import pytest

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

from mmvmamba.apis import load_config
from mmvmamba.apis.overrides import read_names
from mmvmamba.errors import ConfigError
from tests.nano_models import ROOT, digits_config

DET, SEG = str(digits_config("det")), str(digits_config("seg"))
OWN = {task: str(next((ROOT / "configs" / task / "own_data").glob("*-s1l8_*own*"))) for task in ("det", "seg")}


@pytest.mark.parametrize(
    ("path", "options", "instead"),
    [
        (DET, {"data_root": "elsewhere/"}, "(train_dataloader.dataset.data_root, val_dataloader.dataset.data_root, "),
        (DET, {"max_iters": 3}, "(train_cfg.max_iters)"),
        (DET, {"train_pipeline.1.with_mask": False}, "made from it."),
        (SEG, {"max_iters": 3}, "(train_cfg.max_iters)"),
        (OWN["det"], {"classes": ["cat"]}, "(train_dataloader.dataset.metainfo.classes, "),
        (OWN["det"], {"resume": True, "metainfo": {}}, "(train_dataloader.dataset.metainfo, "),
        (OWN["seg"], {"reduce_zero_label": True}, "(train_dataloader.dataset.reduce_zero_label, "),
    ],
)
def test_variables_of_the_file_are_refused(path, options, instead):
    (key,) = [key for key in options if key != "resume"]
    with pytest.raises(ConfigError, match=f"has '{re.escape(key)}', which would have no effect") as caught:
        load_config(path, cfg_options=options)
    assert instead in str(caught.value)


def test_misspelt_names_are_refused():
    with pytest.raises(ConfigError, match=r"no 'lod_from' in the file.*Did you mean 'load_from'\?"):
        load_config(DET, cfg_options={"lod_from": "x.pth"})


def test_what_is_read_can_be_overridden(tmp_path):
    values = {
        "resume": True, "load_from": "x.pth", "work_dir": "there", "env_cfg.cudnn_benchmark": True,
        "randomness.seed": 3, "custom_hooks": [], "optim_wrapper.optimizer.lr": 0.1, "auto_scale_lr.enable": True,
        "default_hooks.logger.interval": 5, "log_level": "ERROR", "train_cfg.max_iters": 3, "sync_bn": "torch",
        "find_unused_parameters": True, "model_wrapper_cfg.type": "X", "train_dataloader.batch_size": 1,
        "val_evaluator.metric": "bbox", "visualizer.save_dir": "v", "tta_model.type": "X", "experiment_name": "e",
        "runner_type": "FlexibleRunner", "strategy.type": "X", "compile": True, "default_scope": "mmdet",
    }  # fmt: skip
    cfg = load_config(DET, cfg_options=values)
    assert (cfg.resume, cfg.work_dir, cfg.train_cfg.max_iters) == (True, "there", 3)
    assert cfg.model_wrapper_cfg.type == "X"


def test_what_mmengine_reads_is_known():
    """A newer MMEngine may read more; what its code asks of a config by name is compared with the list."""
    from pathlib import Path

    import mmengine

    asked = set()
    for file in ("runner/runner.py", "runner/_flexible_runner.py"):
        text = (Path(mmengine.__file__).parent / file).read_text()
        asked |= set(re.findall(r"\b(?:self\.)?cfg\.get\(\s*['\"](\w+)['\"]", text))
    assert {"sync_bn", "train_dataloader"} <= asked
    # of dicts inside the config that happen to be called cfg there
    inner = {"type", "cudnn_benchmark", "resource_limit", "seed", "log_name", "num_workers", "window_size"}
    assert asked - inner <= read_names()


@pytest.mark.parametrize("name", ["x.pth", "x.py.bak", "x"])
def test_other_files_are_no_configs(tmp_path, name):
    (tmp_path / name).write_text("default_scope = 'mmdet'\n")
    with pytest.raises(ConfigError, match=r"expected a file ending in \.py, \.json, \.yaml, \.yml") as caught:
        load_config(str(tmp_path / name))
    assert "\n" not in str(caught.value)
