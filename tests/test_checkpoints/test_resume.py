"""Which checkpoint a training goes on from: by content, with a reason for each file that is passed over."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from mmvmamba.checkpoints import manifest_path, read_manifest
from mmvmamba.checkpoints.atomic import remove_leftovers, replacing
from mmvmamba.checkpoints.resume import newest_complete, training_state
from mmvmamba.checkpoints.writer import write_checkpoint
from mmvmamba.errors import CheckpointError, CorruptCheckpoint, HashMismatch


def _content(iteration: int, **others: Any) -> bytes:
    file = io.BytesIO()
    meta = dict(iter=iteration, epoch=0, seed=3)
    torch.save(dict(meta=meta, state_dict={"w": torch.ones(9)}, optimizer={}) | others, file)
    return file.getvalue()


def _save(path: Path, iteration: int, *, resumable: bool = True, epoch: int = 0, seed: int | None = 3) -> Path:
    write_checkpoint(path, _content(iteration), iteration=iteration, epoch=epoch, seed=seed, resumable=resumable)
    return path


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_most_iterations_win_whatever_name_time_and_pointer_say(tmp_path):
    newest = _save(tmp_path / "a.pth", 30)
    _save(tmp_path / "iter_99.pth", 20)
    _save(tmp_path / "b.pth", 10)
    (tmp_path / "last_checkpoint").write_text(str(tmp_path / "b.pth"))
    assert newest_complete(tmp_path) == (newest, [])


def test_same_iteration_more_epochs_win(tmp_path):
    _save(tmp_path / "iter_10.pth", 10, epoch=0)
    epoch = _save(tmp_path / "epoch_1.pth", 10, epoch=1)
    assert newest_complete(tmp_path).path == epoch


def test_damaged_ones_are_passed_over_with_the_reason(tmp_path):
    whole = _save(tmp_path / "iter_1.pth", 1)
    flipped, cut = _save(tmp_path / "iter_3.pth", 3), _save(tmp_path / "iter_2.pth", 2)
    bad = _save(tmp_path / "iter_4.pth", 4)
    _flip(flipped)
    cut.write_bytes(cut.read_bytes()[:-10])
    manifest_path(bad).write_text("{")
    path, passed_over = newest_complete(tmp_path)
    assert path == whole
    reasons = {skipped.name: reason for skipped, reason in passed_over}
    assert "cannot be understood" in reasons["iter_4.pth"]
    assert "has the sha256" in reasons["iter_3.pth"] and read_manifest(flipped).sha256 in reasons["iter_3.pth"]
    size = len(_content(2))
    assert f"has {size - 10:,} bytes, its manifest says {size:,}" in reasons["iter_2.pth"]
    assert len(reasons) == 3
    with pytest.raises(HashMismatch):
        training_state(flipped)
    with pytest.raises(CorruptCheckpoint):
        training_state(cut)


def test_file_without_manifest_counts_if_all_of_it_can_be_read(tmp_path):
    _save(tmp_path / "iter_1.pth", 1)
    (tmp_path / "iter_2.pth").write_bytes(_content(2))
    (tmp_path / "iter_3.pth").write_bytes(_content(3)[:-100])
    (tmp_path / "iter_4.pth").write_bytes(b"")
    path, passed_over = newest_complete(tmp_path)
    assert path == tmp_path / "iter_2.pth"
    assert [skipped.name for skipped, _ in passed_over] == ["iter_3.pth", "iter_4.pth"]
    state = training_state(path)
    assert (state.iteration, state.epoch, state.seed, state.world_size) == (2, 0, 3, None)


def test_weights_alone_are_no_state_of_a_training(tmp_path):
    best = _save(tmp_path / "best_acc.pth", 9, resumable=False)
    (tmp_path / "weights.pth").write_bytes(_content(8, meta={}))
    path, passed_over = newest_complete(tmp_path)
    assert path is None
    assert {skipped.name for skipped, _ in passed_over} == {"best_acc.pth", "weights.pth"}
    with pytest.raises(CheckpointError, match="not the state of a training .*load_from"):
        training_state(best)
    state = _save(tmp_path / "iter_1.pth", 1)
    assert newest_complete(tmp_path) == (state, [])


def test_nothing_there(tmp_path):
    assert newest_complete(tmp_path) == newest_complete(tmp_path / "absent") == (None, [])
    with pytest.raises(CheckpointError, match="is no file"):
        training_state(tmp_path / "absent.pth")


def test_failing_block_leaves_the_old_file(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")

    def fail() -> None:
        with replacing(path) as unfinished:
            unfinished.write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [(found.name, found.read_text()) for found in tmp_path.iterdir()] == [("x", "old")]


def test_leftovers_of_living_processes_stay(tmp_path):
    other = os.getppid()
    names = [
        ".a.pth.4194999.unfinished",
        f".b.pth.{os.getpid()}.unfinished",
        f".c.pth.{other}.unfinished",
        ".d.unfinished",
    ]
    for name in [*names, "e.unfinished", f".{10**30}.unfinished"]:
        (tmp_path / name).touch()
    removed = remove_leftovers(tmp_path)
    assert [path.name for path in removed] == sorted([names[0], names[1], f".{10**30}.unfinished"])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([names[2], names[3], "e.unfinished"])
