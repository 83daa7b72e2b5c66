"""The checkpoint hook: what it stores, keeps, deletes and refuses."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("mmengine")

from mmengine.hooks import EMAHook, Hook

from mmvmamba.checkpoints import read_manifest
from mmvmamba.checkpoints.resume import newest_complete, training_state, verify
from mmvmamba.engine import CheckpointHook, PreparesSave
from mmvmamba.errors import ConfigError, SaveError
from tests.test_engine.tiny_training import EPOCH, tiny_runner


def _names(folder: Path, ending: str = "pth") -> list[str]:
    return sorted(path.name for path in folder.glob(f"*.{ending}"))


def _load(path: Path) -> dict[str, Any]:
    """As anybody's PyTorch loads it, with nothing allowed."""
    assert torch.serialization.get_unsafe_globals_in_checkpoint(str(path)) == []
    return torch.load(path, weights_only=True)


class At(Hook):
    """Call something at a place."""

    priority = "LOWEST"

    def __init__(self, place: str, iteration: int, what: Any) -> None:
        def call(runner, *arguments, **others):
            if runner.iter == iteration:
                self.result = what(runner)

        setattr(self, place, call)


def test_what_is_saved_loads_everywhere_and_has_a_manifest(tmp_path):
    tiny_runner(tmp_path, dict(interval=1), length=2, validate=True, ema=True).train()
    content = _load(tmp_path / "epoch_2.pth")
    assert set(content) == {
        "meta", "state_dict", "message_hub", "optimizer", "param_schedulers", "ema_state_dict", "config_text"
    }  # fmt: skip
    assert isinstance(content["config_text"], str)
    assert not {"cfg", "config"} & {*content["meta"], *content["message_hub"]["runtime_info"]}
    manifest = read_manifest(tmp_path / "epoch_2.pth")
    assert manifest is not None
    assert (manifest.iteration, manifest.epoch, manifest.seed, manifest.world_size) == (2 * EPOCH, 2, 5, 1)
    assert manifest.resumable and {"torch", "mmengine", "mmvmamba", "numpy", "python"} == set(manifest.versions)
    verify(tmp_path / "epoch_2.pth")
    assert (tmp_path / "last_checkpoint").read_text() == str(tmp_path / "epoch_2.pth")


def test_resumed_message_hub_is_the_saved_one(tmp_path):
    first = tiny_runner(tmp_path, dict(interval=1), length=2)
    first.train()
    second = tiny_runner(tmp_path, dict(interval=1), length=2, load_from=str(tmp_path / "epoch_2.pth"), resume=True)
    second.train()
    before, after = first.message_hub.log_scalars, second.message_hub.log_scalars
    assert set(before) == set(after) and "train/loss" in before
    for name in before:
        for ours, theirs in zip(before[name].data, after[name].data, strict=True):
            assert (ours.dtype, ours.tobytes()) == (theirs.dtype, theirs.tobytes()), name


@pytest.mark.parametrize(("keep", "left"), [(2, [4, 5]), (3, [3, 4, 5]), (-1, [1, 2, 3, 4, 5])])
def test_as_many_are_kept_as_asked_for(tmp_path, keep, left):
    tiny_runner(tmp_path, dict(interval=1, max_keep_ckpts=keep), by_epoch=False, length=5).train()
    assert _names(tmp_path) == [f"iter_{step}.pth" for step in left]
    assert _names(tmp_path, "json") == [f"iter_{step}.pth.json" for step in left]


def test_nothing_is_deleted_before_the_next_one_is_whole(tmp_path, monkeypatch):
    seen = []
    unlink = Path.unlink

    def note(path, missing_ok=False):
        if path.name.endswith(".pth"):
            newer = sorted(int(other.stem.split("_")[1]) for other in tmp_path.glob("iter_*.pth"))[-1]
            verify(tmp_path / f"iter_{newer}.pth")
            assert read_manifest(tmp_path / f"iter_{newer}.pth") is not None
            assert (tmp_path / "last_checkpoint").read_text().endswith(f"iter_{newer}.pth")
            seen.append((path.name, newer))
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", note)
    tiny_runner(tmp_path, dict(interval=1, max_keep_ckpts=2), by_epoch=False, length=4).train()
    assert seen == [("iter_1.pth", 3), ("iter_2.pth", 4)]


def test_best_and_published_ones(tmp_path):
    options = dict(interval=1, max_keep_ckpts=2, save_best="tiny/acc", published_keys=["meta", "state_dict"])
    tiny_runner(tmp_path, options, length=3, validate=True).train()
    best = "best_tiny_acc_epoch_3"
    published = [name for name in _names(tmp_path) if "-" in name]
    assert set(_names(tmp_path)) - set(published) == {f"{best}.pth", "epoch_2.pth", "epoch_3.pth"}
    assert [name.split("-")[0] for name in published] == [best, "epoch_3"]
    for name in _names(tmp_path):
        verify(tmp_path / name)
        assert read_manifest(tmp_path / name).resumable == (name in ("epoch_2.pth", "epoch_3.pth"))
    for name in published:
        assert set(_load(tmp_path / name)) == {"meta", "state_dict"}
        assert read_manifest(tmp_path / name).sha256.startswith(name.split("-")[1].removesuffix(".pth"))
    assert newest_complete(tmp_path) == (tmp_path / "epoch_3.pth", [])


def test_earlier_best_goes_even_without_regular_checkpoints(tmp_path):
    options = dict(interval=-1, save_last=False, save_best="tiny/acc")
    tiny_runner(tmp_path, options, length=3, validate=True).train()
    assert _names(tmp_path) == ["best_tiny_acc_epoch_3.pth"]
    assert _names(tmp_path, "json") == ["best_tiny_acc_epoch_3.pth.json"]


def test_copied_work_dir_leaves_the_first_one_alone(tmp_path):
    options = dict(interval=1, max_keep_ckpts=2, save_best="tiny/acc")
    tiny_runner(tmp_path / "a", options, length=2, validate=True).train()
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    before = _names(tmp_path / "a")
    start = dict(load_from=str(tmp_path / "b/epoch_2.pth"), resume=True)
    runner = tiny_runner(tmp_path / "b", options, length=4, validate=True, **start)
    runner.val_evaluator.metrics[0].count = 2
    runner.train()
    assert _names(tmp_path / "a") == before
    assert _names(tmp_path / "b") == ["best_tiny_acc_epoch_4.pth", "epoch_3.pth", "epoch_4.pth"]


def test_what_cannot_be_deleted_is_said_and_does_not_stop_the_training(tmp_path, monkeypatch):
    def refuse(path, missing_ok=False):
        raise PermissionError(13, "Permission denied")

    warnings = []
    runner = tiny_runner(tmp_path, dict(interval=1, max_keep_ckpts=2), by_epoch=False, length=3)
    monkeypatch.setattr(runner.logger, "warning", warnings.append)
    monkeypatch.setattr(Path, "unlink", refuse)
    runner.train()
    monkeypatch.undo()
    assert len(warnings) == 1 and "iter_1.pth is no more needed but cannot be deleted" in warnings[0]
    assert newest_complete(tmp_path).path == tmp_path / "iter_3.pth"


def test_leftovers_of_dead_trainings_are_removed(tmp_path):
    living, dead = tmp_path / ".x.pth.1.unfinished", tmp_path / ".iter_1.pth.4194999.unfinished"
    living.touch()
    dead.touch()
    tiny_runner(tmp_path, dict(interval=1), by_epoch=False, length=1).train()
    assert living.exists() and not dead.exists()


class Prepared(Hook, PreparesSave):
    def __init__(self) -> None:
        self.calls: list[int] = []

    def prepare_save(self, runner: Any) -> None:
        self.calls.append(runner.iter)

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["prepared"] = len(self.calls)


def test_hooks_prepare_before_each_checkpoint(tmp_path):
    hook = Prepared()
    at = At("after_train_iter", 5, lambda runner: _hook(runner).save_now(runner))
    tiny_runner(tmp_path, dict(interval=1, save_best="tiny/acc"), length=2, validate=True, hooks=[hook, at]).train()
    assert hook.calls == [4, 4, 5, 8, 8]
    assert _load(tmp_path / "best_tiny_acc_epoch_2.pth")["prepared"] == 5


def _hook(runner: Any) -> CheckpointHook:
    return next(hook for hook in runner.hooks if isinstance(hook, CheckpointHook))


def test_save_now_in_mid_epoch_is_of_the_last_finished_iteration(tmp_path):
    at = At("after_train_iter", 5, lambda runner: (_hook(runner).save_now(runner), _names(tmp_path)))
    tiny_runner(tmp_path, dict(interval=1, max_keep_ckpts=3), length=3, hooks=[at]).train()
    path, names = at.result
    assert names == ["epoch_1.pth", "iter_6.pth"]
    assert path == str(tmp_path / "iter_6.pth")
    assert _names(tmp_path) == ["epoch_1.pth", "epoch_2.pth", "epoch_3.pth"], "the next regular one replaces it"


def test_interruption_is_replaced_after_resuming_too(tmp_path):
    class StopError(Exception):
        pass

    def stop(runner):
        _hook(runner).save_now(runner)
        raise StopError

    for iteration in (5, 6):
        start = newest_complete(tmp_path).path
        options = dict(load_from=str(start), resume=True) if start else {}
        hooks = [At("after_train_iter", iteration, stop)]
        runner = tiny_runner(tmp_path, dict(interval=1), length=3, hooks=hooks, **options)
        with pytest.raises(StopError):
            runner.train()
        if iteration == 5:
            assert _names(tmp_path) == ["epoch_1.pth", "iter_6.pth"]
            state = training_state(tmp_path / "iter_6.pth")
            assert (state.iteration, state.epoch) == (6, 1)
    assert _names(tmp_path) == ["epoch_1.pth", "iter_7.pth"]
    options = dict(load_from=str(tmp_path / "iter_7.pth"), resume=True)
    tiny_runner(tmp_path, dict(interval=1), length=2, **options).train()
    assert _names(tmp_path) == ["epoch_1.pth", "epoch_2.pth"]


@pytest.mark.parametrize("by_epoch", [True, False])
def test_save_now_during_a_validation_has_the_weights_of_the_training(tmp_path, by_epoch):
    """EMAHook has put its averages into the model there; they go back in afterwards."""
    weights = {}

    def note(runner):
        weights["source"] = {name: value.clone() for name, value in runner.model.state_dict().items()}
        ema = next(hook for hook in runner.hooks if isinstance(hook, EMAHook))
        weights["average"] = {name: value.clone() for name, value in ema.ema_model.module.state_dict().items()}

    def save(runner):
        path = _hook(runner).save_now(runner)
        return path, {name: value.clone() for name, value in runner.model.state_dict().items()}

    at = At("after_val_iter", EPOCH, save)
    options = dict(interval=100, save_last=False)
    tiny_runner(
        tmp_path, options, by_epoch=by_epoch, length=1 if by_epoch else EPOCH, validate=True, ema=True,
        hooks=[at, At("after_train_iter", EPOCH - 1, note)],
    ).train()  # fmt: skip
    path, validated = at.result
    assert Path(path).name == f"iter_{EPOCH}.pth"
    state = training_state(Path(path))
    assert (state.iteration, state.epoch) == (EPOCH, int(by_epoch))
    content = _load(Path(path))
    name = "layers.0.weight"
    assert not torch.equal(weights["source"][name], weights["average"][name])
    assert torch.equal(content["ema_state_dict"][f"module.{name}"], weights["source"][name])
    assert torch.equal(content["state_dict"][name], weights["average"][name])
    assert torch.equal(validated[name], weights["average"][name]), "the validation goes on with other weights"


def test_save_now_writes_nothing_twice(tmp_path):
    at = At("after_val_iter", EPOCH, lambda runner: _hook(runner).save_now(runner))
    tiny_runner(tmp_path, dict(interval=1), length=1, validate=True, hooks=[at]).train()
    assert at.result == str(tmp_path / "epoch_1.pth")
    assert _names(tmp_path) == ["epoch_1.pth"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(max_keep_ckpts=1), "max_keep_ckpts is 1, expected at least 2"),
        (dict(max_keep_ckpt=3), "max_keep_ckpt is no argument.*Did you mean 'max_keep_ckpts'"),
        (dict(backend_args=dict(backend="petrel")), "backend_args is .*expected None"),
        (dict(file_client_args=dict(backend="disk")), "file_client_args is .*expected None"),
        (dict(out_dir="s3://bucket"), "out_dir is 's3://bucket', expected a local folder"),
    ],
)
def test_refused_options(options, message):
    with pytest.raises(ConfigError, match=message):
        CheckpointHook(interval=1, **options)


def test_object_without_plain_form_stops_the_training(tmp_path):
    class Adds(Hook):
        def before_save_checkpoint(self, runner, checkpoint):
            checkpoint["extra"] = object()

    with pytest.raises(SaveError, match="checkpoint entry extra is a builtins.object"):
        tiny_runner(tmp_path, dict(interval=1), length=1, hooks=[Adds()]).train()
    assert _names(tmp_path) == []
