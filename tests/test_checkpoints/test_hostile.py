"""Hostile files on every road that a weight file takes (C1): refused, and no code of theirs has run."""

from __future__ import annotations

import io

import pytest
import torch

from mmvmamba.checkpoints import download, read_checkpoint
from tests.test_checkpoints.forked import forked
from tests.test_checkpoints.hostile import KINDS

mmengine = pytest.importorskip("mmengine")


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    """The smallest runner of mmengine that can load and resume."""
    from mmengine.model import BaseModel
    from mmengine.runner import Runner

    from mmvmamba.models import VMamba  # puts our reader in the place of mmengine's

    class Model(BaseModel):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(3, 2))
            self.bias = torch.nn.Parameter(torch.zeros(3))

        def forward(self, x, mode="loss"):
            return {"loss": self.weight.sum()}

    runner = Runner(
        Model(),
        work_dir=str(tmp_path_factory.mktemp("work")),
        train_dataloader=dict(
            batch_size=1, dataset=[{"x": torch.ones(1)}], sampler=dict(type="DefaultSampler", shuffle=False)
        ),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1)),
        train_cfg=dict(by_epoch=True, max_epochs=1),
        log_level="ERROR",
        experiment_name="hostile",
    )
    runner.backbone = VMamba(arch="nano", init_cfg=dict(type="Pretrained", checkpoint="later", prefix="backbone."))
    return runner


def _load_from(path, runner):
    runner._load_from, runner._resume = str(path), False
    runner.load_or_resume()


def _resume(path, runner):
    runner._load_from, runner._resume = str(path), True
    runner.load_or_resume()


def _init_cfg(path, runner):
    runner.backbone.init_cfg["checkpoint"] = str(path)
    runner.backbone.init_weights()


def _test(path, runner):
    from mmengine.config import Config

    from mmvmamba.apis import check_weights, prepare_testing

    cfg = Config(dict(default_scope="mmpretrain"))
    prepare_testing(cfg, str(path))
    check_weights(runner.model, cfg.load_from)


def _convert(path, runner):
    _converters().convert_file(path, path.with_name("out.safetensors"))


def _convert_back(path, runner):
    _converters().restore_file(path, path.with_name("out.pth"))


def _converters():
    from mmvmamba.converters import files

    return files


def _publish(path, runner):
    from mmengine.hooks import CheckpointHook

    CheckpointHook(interval=1, published_keys=["state_dict"])._publish_model(runner, str(path))


def _url(path, runner):
    answer = io.BytesIO(path.read_bytes())
    answer.headers = {}
    download.open_url = lambda url: answer
    torch.hub.set_dir(str(path.parent / "hub"))
    read_checkpoint("https://example.org/weights.pth")


ENTRY_POINTS = {
    "load_from": _load_from,
    "resume": _resume,
    "init_cfg": _init_cfg,
    "test": _test,
    "convert": _convert,
    "convert back": _convert_back,
    "publish": _publish,
    "URL": _url,
}


@pytest.mark.parametrize("entry", ENTRY_POINTS)
@pytest.mark.parametrize("kind", KINDS)
def test_refused_without_running_anything(kind, entry, runner, tmp_path, monkeypatch):
    path, canary = tmp_path / "weights.pth", tmp_path / "canary"
    KINDS[kind][0](path, canary)
    assert not canary.exists()
    classes, message = forked(lambda: ENTRY_POINTS[entry](path, runner))
    assert not canary.exists()
    assert "UnsafeCheckpoint" in classes.split(), f"{classes}: {message}"
    assert "weights.pth" in message


@pytest.mark.parametrize("kind", [kind for kind, (_, careless) in KINDS.items() if careless])
def test_these_files_run_code_where_they_are_read_carelessly(kind, tmp_path):
    """Otherwise the test above would prove nothing."""
    write, reader = KINDS[kind]
    path, canary = tmp_path / "weights.pth", tmp_path / "canary"
    write(path, canary)
    forked(lambda: _careless(path, reader))
    assert canary.exists()


def _careless(path, reader):
    if reader in ("torch", "pickle"):
        torch.load(path, weights_only=False)
        return
    stored = torch.load(path, weights_only=True)
    text = stored["meta"].get("config") or stored["meta"].get("cfg") or stored["message_hub"]["runtime_info"]["cfg"]
    mmengine.Config.fromstring(text, ".yaml" if reader == "yaml" else ".py")
