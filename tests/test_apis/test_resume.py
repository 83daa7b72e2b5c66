"""Where a training starts: what --resume chooses, refuses and says."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mmengine")

from mmengine.config import Config
from mmengine.hooks import CheckpointHook as MMEngineCheckpointHook

from mmvmamba.apis.guards import use_our_checkpoint_hook
from mmvmamba.apis.resume import choose_start
from mmvmamba.checkpoints.writer import write_checkpoint
from mmvmamba.errors import CheckpointError, ConfigError


def _config(work_dir: Path, **others: Any) -> Config:
    return Config(dict(work_dir=str(work_dir), default_hooks=dict(checkpoint=dict(type="CheckpointHook")), **others))


def _save(path: Path, iteration: int, **others: Any) -> Path:
    write_checkpoint(path, b"x" * iteration, iteration=iteration, epoch=0, resumable=True, **others)
    return path


def test_newest_is_taken_with_its_seed(tmp_path):
    _save(tmp_path / "iter_1.pth", 1, seed=8)
    newest = _save(tmp_path / "iter_2.pth", 2, seed=8)
    (damaged := _save(tmp_path / "iter_3.pth", 3)).write_bytes(b"no")
    cfg = _config(tmp_path)
    notes = choose_start(cfg, "auto")
    assert (cfg.resume, cfg.load_from, cfg.randomness.seed) == (True, str(newest), 8)
    assert notes[0].text.startswith(f"Passed over {damaged.name}: ") and "its manifest says 3" in notes[0].text
    assert notes[1].text == f"Resuming from {newest} (2 iterations, 0 epochs finished)."
    assert all(note.level == logging.WARNING for note in notes)
    assert len(notes) == 2


@pytest.mark.parametrize("resume", ["auto", "auto-or-start"])
def test_only_damaged_ones_are_an_error_with_the_reasons(tmp_path, resume):
    _save(tmp_path / "iter_3.pth", 3).write_bytes(b"no")
    with pytest.raises(
        CheckpointError, match="(?s)from none of the 1 checkpoints in .*--work-dir.*iter_3.pth: .*its manifest says 3"
    ):
        choose_start(_config(tmp_path), resume)


def test_nothing_to_resume_is_an_error_unless_told_otherwise(tmp_path):
    cfg = _config(tmp_path)
    with pytest.raises(CheckpointError, match="--resume: found no checkpoint.*--resume auto-or-start"):
        choose_start(cfg, "auto")
    assert choose_start(cfg, "auto-or-start") == []
    assert not cfg.get("resume")
    _save(tmp_path / "iter_2.pth", 2)
    choose_start(cfg, "auto-or-start")
    assert cfg.resume and cfg.load_from == str(tmp_path / "iter_2.pth")


def test_given_file_is_verified(tmp_path):
    path = _save(tmp_path / "elsewhere" / "iter_2.pth", 2, seed=4)
    cfg = _config(tmp_path / "work")
    choose_start(cfg, str(path))
    assert (cfg.load_from, cfg.randomness.seed) == (str(path), 4)
    path.write_bytes(b"no")
    with pytest.raises(CheckpointError, match="has the sha256"):
        choose_start(cfg, str(path))
    with pytest.raises(CheckpointError, match="'nowhere.pth' is no file"):
        choose_start(cfg, "nowhere.pth")


def test_older_file_is_refused_where_newer_ones_would_be_overwritten(tmp_path):
    old, new = _save(tmp_path / "iter_1.pth", 1), _save(tmp_path / "iter_2.pth", 2)
    with pytest.raises(CheckpointError, match="iter_1.pth' has 1 iterations, but .* holds iter_2.pth with 2"):
        choose_start(_config(tmp_path), str(old))
    choose_start(_config(tmp_path), str(new))


@pytest.mark.parametrize("name", ["epoch_3.pth", "iter_20.pth", "best_coco_bbox_mAP_epoch_1.pth", "mine_4.pth"])
def test_training_that_is_there_is_not_overwritten(tmp_path, name):
    cfg = _config(tmp_path)
    cfg.default_hooks.checkpoint.filename_tmpl = "mine_{}.pth"
    (tmp_path / "pretrained.pth").touch()
    assert choose_start(cfg, None) == []
    (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=f"holds 1 checkpoints \\({name}\\).*--resume"):
        choose_start(cfg, None)


def test_folder_of_the_hook_is_the_one_that_counts(tmp_path):
    cfg = _config(tmp_path / "work" / "name")
    cfg.default_hooks.checkpoint.out_dir = str(tmp_path / "out")
    _save(tmp_path / "work/name/iter_9.pth", 9)
    path = _save(tmp_path / "out/name/iter_2.pth", 2)
    choose_start(cfg, "auto")
    assert cfg.load_from == str(path)


def test_resume_of_the_config_itself_counts(tmp_path):
    path = _save(tmp_path / "iter_2.pth", 2)
    cfg = _config(tmp_path, resume=True)
    choose_start(cfg, None)
    assert cfg.load_from == str(path)


def test_another_seed_is_refused_and_the_same_is_not(tmp_path):
    _save(tmp_path / "iter_2.pth", 2, seed=4)
    choose_start(_config(tmp_path, randomness=dict(seed=4)), "auto")
    cfg = _config(tmp_path, randomness=dict(deterministic=True))
    choose_start(cfg, "auto")
    assert dict(cfg.randomness) == dict(deterministic=True, seed=4)
    with pytest.raises(ConfigError, match=r"randomness.seed is 5, expected 4.*load_from"):
        choose_start(_config(tmp_path, randomness=dict(seed=5)), "auto")


@pytest.mark.parametrize(("limit", "done"), [("max_iters", 2), ("max_iters", 3), ("max_epochs", 0)])
def test_a_finished_training_is_said_to_be_finished(tmp_path, limit, done):
    _save(tmp_path / "iter_2.pth", 2)
    notes = choose_start(_config(tmp_path, train_cfg={limit: done}), "auto")
    assert any(f"It has finished: train_cfg.{limit} is {done}" in note.text for note in notes) == (done < 3)


def test_other_versions_are_named(tmp_path, monkeypatch):
    _save(tmp_path / "iter_2.pth", 2)
    monkeypatch.setattr("mmvmamba.apis.resume.program_versions", lambda: {"torch": "9.9"})
    note = choose_start(_config(tmp_path), "auto")[-1].text
    assert note.startswith("Other versions than before (") and "-> 9.9" in note


@pytest.mark.parametrize(("resume", "load_from"), [("auto", None), ("auto-or-start", None), ("iter_2", "iter_2")])
def test_other_runners_resume_by_themselves(tmp_path, resume, load_from):
    """DeepSpeed's checkpoints are folders, which only its runner can read."""
    (tmp_path / "iter_2").mkdir()
    cfg = _config(tmp_path, runner_type="FlexibleRunner")
    [(note, _)] = choose_start(cfg, resume)
    assert (cfg.resume, cfg.load_from) == (True, load_from)
    assert "left to FlexibleRunner" in note and "not verified" in note
    cfg = _config(tmp_path, runner_type="FlexibleRunner")
    assert choose_start(cfg, None) == [] and not cfg.get("resume")


@pytest.mark.parametrize("kind", ["CheckpointHook", MMEngineCheckpointHook])
def test_mmengines_checkpoint_hook_is_replaced_by_ours(kind):
    cfg = Config(dict(default_hooks=dict(checkpoint=dict(type=kind, interval=3, max_keep_ckpts=2))))
    assert "mmvmamba.CheckpointHook" in use_our_checkpoint_hook(cfg)
    assert dict(cfg.default_hooks.checkpoint) == dict(type="mmvmamba.CheckpointHook", interval=3, max_keep_ckpts=2)
    assert use_our_checkpoint_hook(cfg) is None, "said once"


@pytest.mark.parametrize("entries", [{}, dict(default_hooks=dict())])
def test_the_hook_that_mmengine_adds_by_itself_is_ours_too(entries):
    cfg = Config(entries)
    use_our_checkpoint_hook(cfg)
    assert dict(cfg.default_hooks.checkpoint) == dict(type="mmvmamba.CheckpointHook", interval=1)


@pytest.mark.parametrize(
    "entries",
    [
        dict(default_hooks=dict(checkpoint=None)),
        dict(default_hooks=dict(checkpoint=dict(type="SomebodysHook"))),
        dict(default_hooks=dict(checkpoint=dict(type="mmengine.CheckpointHook"))),
        dict(default_hooks=dict(checkpoint=dict(type="CheckpointHook", backend_args=dict(backend="petrel")))),
        dict(default_hooks=dict(checkpoint=dict(type="CheckpointHook", out_dir="s3://bucket"))),
        dict(runner_type="FlexibleRunner", default_hooks=dict(checkpoint=dict(type="CheckpointHook"))),
    ],
    ids=["none", "custom", "with the scope", "backend", "remote folder", "other runner"],
)
def test_what_the_user_chose_is_left_alone(entries):
    cfg = Config(entries)
    before = cfg.default_hooks.to_dict()["checkpoint"] if cfg.default_hooks.checkpoint else None
    use_our_checkpoint_hook(cfg)
    after = cfg.default_hooks.checkpoint
    assert (after.to_dict() if after else None) == before
