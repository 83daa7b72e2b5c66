"""A save that the disk refuses: the training stops with a clear message, and what was saved before is untouched."""

from __future__ import annotations

import errno
import io
import itertools
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mmengine")

from mmengine.hooks import Hook

from mmvmamba.checkpoints.resume import newest_complete, verify
from mmvmamba.errors import SaveError
from tests.test_engine.tiny_training import tiny_runner

SAVED = 2  # iterations that are saved before the disk fails


class FailAfter(Hook):
    """Let the disk fail once ``SAVED`` iterations are saved, and remember what was there."""

    priority = "VERY_HIGH"

    def __init__(self, folder: Path, fail: Callable[[], None]) -> None:
        self.folder, self.fail = folder, fail
        self.before: dict[str, bytes] = {}

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if runner.iter == SAVED:
            self.before = {path.name: path.read_bytes() for path in self.folder.iterdir() if path.is_file()}
            self.fail()


@pytest.fixture
def failing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[], None]], str]]:
    """Train with a disk that fails, look at what is left, and return the message."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def run(fail: Callable[[], None]) -> str:
        hook = FailAfter(tmp_path, fail)
        runner = tiny_runner(tmp_path, dict(interval=1), by_epoch=False, length=4, hooks=[hook])
        with pytest.raises(SaveError) as caught:
            runner.train()
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        monkeypatch.undo()
        after = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
        changed = {name for name, content in hook.before.items() if after.get(name) != content}
        assert changed == set(), "what was saved before has changed"
        assert {"iter_1.pth", "iter_2.pth", "iter_1.pth.json", "iter_2.pth.json"} <= set(after)
        assert not [name for name in after if name.startswith(".")], "an unfinished file is left"
        newest = newest_complete(tmp_path).path
        assert newest is not None
        assert newest.name in ("iter_2.pth", "iter_3.pth")
        verify(newest)
        assert (newest.name == "iter_3.pth") == ("iter_3.pth" in after), "what is there under its name is whole"
        return str(caught.value)

    yield run
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def _expect_advice(message: str) -> None:
    for words in ("could not be written", "it needs", "bytes", "are free", "as they were", "--resume"):
        assert words in message


@pytest.mark.parametrize("size", [0, 1, 100, 1000, 4096, 8192, 12000])
def test_full_at_any_byte(failing, size):
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    message = failing(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard)))
    _expect_advice(message)
    assert "File too large" in message
    assert "iter_3.pth" in message


CODES = [errno.ENOSPC, errno.EIO, errno.EDQUOT]
CALLS = [*(("open", n) for n in (1, 2, 3)), *(("fsync", n) for n in (1, 2, 4)), ("replace", 1), ("replace", 2)]


@pytest.mark.parametrize("code", CODES, ids=lambda code: errno.errorcode[code])
@pytest.mark.parametrize(("call", "number"), CALLS)
def test_refused_by_any_call(failing, monkeypatch, code, call, number):
    module = io if call == "open" else os
    real = getattr(module, call)
    counted = itertools.count(1)

    def refuse(*arguments: Any, **others: Any) -> Any:
        writing = call != "open" or any(set(str(mode)) & set("wxa+") for mode in arguments[1:2])
        if writing and next(counted) == number:
            raise OSError(code, os.strerror(code))
        return real(*arguments, **others)

    message = failing(lambda: monkeypatch.setattr(module, call, refuse))
    _expect_advice(message)
    assert os.strerror(code) in message


def test_folder_that_may_not_be_written(failing, monkeypatch):
    real = io.open

    def refuse(file: Any, mode: str = "r", *arguments: Any, **others: Any) -> Any:
        if "w" in mode:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(file))
        return real(file, mode, *arguments, **others)

    message = failing(lambda: monkeypatch.setattr(io, "open", refuse))
    _expect_advice(message)
    assert "Read-only file system" in message
