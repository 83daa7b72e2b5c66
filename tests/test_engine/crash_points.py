"""Kill a training at every call that changes the disk while it saves, and see what is left (run as a program).

``python crash_points.py FOLDER`` prints one JSON object. A program of its own because PyTorch cannot train in a fork of
a process that has trained before.

- Crash points: a fork dies just before the k-th opening for writing, fsync, rename or deletion, for every k, or in the
  middle of a write (``RLIMIT_FSIZE``). What is on the disk stays, as after ``kill -9``.
- Lost writes: the calls of one training are recorded and replayed on a model of a disk that loses power between any two
  of them. A file holds what was there at its last fsync; a creation, rename or deletion that no fsync of the folder
  followed is there or not, in every combination.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook

from mmvmamba.checkpoints import read_checkpoint
from mmvmamba.checkpoints.resume import newest_complete, training_state, verify
from mmvmamba.errors import CheckpointError

sys.path.insert(0, str(Path(__file__).parent))
from tiny_training import EPOCH, tiny_runner

STATES: dict[str, dict[str, Any]] = {
    "first": dict(checkpoint=dict(interval=1), by_epoch=False, length=1),
    "keep 2": dict(checkpoint=dict(interval=1, max_keep_ckpts=2), by_epoch=False, length=3),
    "keep 3": dict(checkpoint=dict(interval=1, max_keep_ckpts=3), by_epoch=False, length=4),
    "best": dict(
        checkpoint=dict(interval=1, max_keep_ckpts=2, save_best="tiny/acc"), by_epoch=True, length=2, validate=True
    ),
}
DIED = 77
Event = tuple[str, ...]


class Progress(Hook):
    """Write the number of finished iterations to a pipe before anything is saved."""

    priority = "VERY_HIGH"

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        os.write(self.pipe, bytes([runner.iter + 1]))


def on_each_change(folder: Path, tell: Callable[[Event], None]) -> None:
    """Call ``tell`` before this process changes anything in a folder; never to be undone, so only for forks."""
    inside = str(folder) + os.sep
    fsync = os.fsync

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and str(arguments[0]).startswith(inside) and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
            tell(("open", str(arguments[0])))
        elif event == "os.rename" and str(arguments[1]).startswith(inside):
            tell(("rename", str(arguments[0]), str(arguments[1])))
        elif event == "os.remove" and str(arguments[0]).startswith(inside):
            tell(("remove", str(arguments[0])))

    def told_fsync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if (str(path) + os.sep).startswith(inside):
            tell(("fsync", str(path)))
        fsync(descriptor)

    os.fsync = told_fsync
    sys.addaudithook(audit)


def in_fork(work: Callable[[int], None]) -> tuple[int, int]:
    """Run ``work`` in a fork; return its wait status and the last number it wrote to the pipe (or 0)."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        try:
            work(writing)
        finally:
            os._exit(1 if sys.exc_info()[0] else 0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        told = pipe.read()
    _, status = os.waitpid(child, 0)
    return status, told[-1] if told else 0


def train(folder: Path, state: dict[str, Any], pipe: int, before: Callable[[], None] | None = None) -> None:
    start = newest_complete(folder).path
    runner = tiny_runner(
        folder, **state, hooks=[Progress(pipe)], **(dict(load_from=str(start), resume=True) if start else {})
    )
    if before is not None:
        before()
    runner.train()


def reference(folder: Path, state: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Return the weights after each saved iteration of a training that nobody kills."""
    every = {**state, "checkpoint": {**state["checkpoint"], "max_keep_ckpts": -1}}
    status, _ = in_fork(lambda pipe: train(folder, every, pipe))
    assert status == 0, "the training without a crash failed"
    found = {}
    for path in folder.glob("*.pth"):
        if not path.name.startswith("best"):
            found[training_state(path).iteration] = read_checkpoint(path)["state_dict"]
    return found


Verdict = tuple[str | None, int]


def judge(folder: Path, state: dict[str, Any], weights: dict[int, dict[str, Any]], finished: int) -> Verdict:
    """Return what is wrong with what a crash left, or None, and the iteration that a training would go on from."""
    path, _ = newest_complete(folder)
    if path is None:
        interval = EPOCH if state["by_epoch"] else 1
        return f"no checkpoint after {finished} iterations" if finished > interval else None, 0
    return _judge(folder, path, state, weights, finished), training_state(path).iteration


def _judge(
    folder: Path, path: Path, state: dict[str, Any], weights: dict[int, dict[str, Any]], finished: int
) -> str | None:
    interval = EPOCH if state["by_epoch"] else 1
    content = read_checkpoint(path)
    iteration = content["meta"]["iter"]
    if iteration <= finished - 2 * interval:
        return f"{finished} iterations were finished, {path.name} has {iteration}"
    expected = weights[iteration]
    options = state["checkpoint"]
    expected_files = min(options.get("max_keep_ckpts", 1), finished // interval - 1)
    if _whole(folder, "*_*.pth") < expected_files:
        return f"{finished} iterations were finished, fewer than {expected_files} checkpoints are whole"
    if "save_best" in options and finished > interval and _whole(folder, "best_*.pth") == 0:
        return f"{finished} iterations were finished, no best checkpoint is whole"
    same = all(torch.equal(content["state_dict"][name], tensor) for name, tensor in expected.items())
    return None if same else f"{path.name} has other weights than the training without a crash"


def _whole(folder: Path, pattern: str) -> int:
    """Return how many checkpoints have the sha256 of their manifest, or are whole without one."""
    count = 0
    for path in folder.glob(pattern):
        if pattern == "best_*.pth" or not path.name.startswith("best"):
            with contextlib.suppress(CheckpointError):
                verify(path)
                read_checkpoint(path)
                count += 1
    return count


def crash_points(base: Path, name: str, state: dict[str, Any]) -> dict[str, Any]:
    weights = reference(base / "reference", state)
    last = max(weights)
    problems, resumed, reached, k = [], 0, 0, 0
    while True:
        k += 1
        folder = base / str(k)

        def die_at(folder: Path = folder, k: int = k) -> None:
            count = itertools.count(1)
            on_each_change(folder, lambda _: os._exit(DIED) if next(count) == k else None)

        status, finished = in_fork(lambda pipe, f=folder, die=die_at: train(f, state, pipe, die))
        if os.waitstatus_to_exitcode(status) == 0:
            break
        if os.waitstatus_to_exitcode(status) != DIED:
            problems.append(f"{name}, point {k}: ended with {status}")
        else:
            problem, found = judge(folder, state, weights, finished)
            if found < reached:
                problem = f"iteration {found} is found, but {reached} was whole at an earlier point"
            reached = max(reached, found)
            if problem:
                problems.append(f"{name}, point {k}: {problem}")
        if k % 10 == 0:  # and the training really goes on to the same end
            status, _ = in_fork(lambda pipe, f=folder: train(f, state, pipe))
            end = newest_complete(folder).path
            left = [path.name for path in folder.glob(".*")]
            if status or end is None or training_state(end).iteration != last or left:
                problems.append(f"{name}, point {k}: resumed with status {status} to {end}, left {left}")
            resumed += 1
        shutil.rmtree(folder, ignore_errors=True)
    return {"points": k - 1, "resumed": resumed, "problems": problems}


def torn_writes(base: Path, name: str, state: dict[str, Any]) -> dict[str, Any]:
    """Let the system kill the training when a file reaches a size, once it has finished half of its iterations."""
    interval = EPOCH if state["by_epoch"] else 1
    weights = reference(base / "reference", state)
    sizes = [0, 1, 100, 1000, 4096, 10000]
    problems = []
    for number, size in enumerate(sizes):
        folder = base / f"torn{number}"

        class Tear(Progress):
            def after_train_iter(self, runner: Any, *arguments: Any, limit: int = size, **others: Any) -> None:
                super().after_train_iter(runner, *arguments, **others)
                if runner.iter + 1 == (max(weights) // 2 // interval + 1) * interval:
                    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
                    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        def work(pipe: int, folder: Path = folder, tear: type[Tear] = Tear) -> None:
            tiny_runner(folder, **state, hooks=[tear(pipe)]).train()

        status, finished = in_fork(work)
        if not os.WIFSIGNALED(status):
            problems.append(f"{name}, {size} bytes: nothing was torn, status {status}")
        elif problem := judge(folder, state, weights, finished)[0]:
            problems.append(f"{name}, {size} bytes: {problem}")
    return {"points": len(sizes), "problems": problems}


class Disk:
    """What may be in a folder after a power failure."""

    def __init__(self) -> None:
        self.names: dict[str, int] = {}  # as they are for sure
        self.pending: list[tuple[str, ...]] = []  # changes of names since the folder's last fsync
        self.contents: dict[int, bytes] = {}  # by inode, as of its last fsync
        self.live: dict[str, int] = {}  # the names that the running system sees

    def states(self) -> set[tuple[tuple[str, int], ...]]:
        """Return every possible set of names, each with its inode."""
        found = set()
        for chosen in itertools.product([False, True], repeat=len(self.pending)):
            names = dict(self.names)
            for change in itertools.compress(self.pending, chosen):
                _apply(names, change)
            found.add(tuple(sorted(names.items())))
        return found


def _apply(names: dict[str, int], change: tuple[Any, ...]) -> None:
    kind, name, *rest = change
    if kind == "create":
        names[name] = rest[0]
    elif kind == "remove":
        names.pop(name, None)
    elif name in names:
        names[rest[0]] = names.pop(name)


def lost_writes(base: Path, name: str, state: dict[str, Any]) -> dict[str, Any]:
    weights = reference(base / "reference", state)
    folder, log = base / "recorded", base / "log"
    log.mkdir()

    def record() -> None:
        count = itertools.count()

        def note(event: Event) -> None:
            if event[0] == "fsync" and event[1] != str(folder):
                shutil.copyfile(event[1], log / f"{next(count)}.data")  # outside the folder, so not noted
                event = (*event, f"{next(count) - 1}.data")
            with (log / "events").open("a") as file:
                file.write(json.dumps(event) + "\n")

        on_each_change(folder, note)

    class Mark(Progress):
        def after_train_iter(self, runner: Any, *arguments: Any, **others: Any) -> None:
            with (log / "events").open("a") as file:
                file.write(json.dumps(("finished", runner.iter + 1)) + "\n")

    def work(pipe: int) -> None:
        runner = tiny_runner(folder, **state, hooks=[Mark(pipe)])
        record()
        runner.train()

    status, _ = in_fork(work)
    assert status == 0, f"the recorded training failed: {status}"
    disk, inodes, finished = Disk(), itertools.count(), 0
    judged: dict[tuple[Any, ...], Verdict] = {}
    problems, reached = [], 0
    for line in (log / "events").read_text().splitlines():
        kind, *arguments = json.loads(line)
        if kind == "finished":
            finished = arguments[0]
        else:
            _replay(disk, kind, arguments, folder, log, inodes)
        if len(disk.pending) > 12:
            problems.append(f"{name}, after {kind} {arguments}: {len(disk.pending)} changes, no fsync of the folder")
            break
        least = []
        for names in disk.states():
            key = (names, tuple(disk.contents.get(inode, b"") for _, inode in names), finished)
            if key not in judged:
                judged[key] = judge(_materialise(base / "model", names, disk), state, weights, finished)
                if judged[key][0]:
                    problems.append(f"{name}, after {kind} {arguments}: {judged[key][0]} with {[n for n, _ in names]}")
            least.append(judged[key][1])
        if min(least) < reached:
            problems.append(f"{name}, after {kind} {arguments}: {min(least)} may be found, {reached} was safe before")
        reached = max(reached, min(least))
    return {"points": len(judged), "problems": problems}


def _replay(disk: Disk, kind: str, arguments: list[str], folder: Path, log: Path, inodes: Any) -> None:
    path = Path(arguments[0])
    if path == folder:  # fsync of the folder: the names are safe
        for change in disk.pending:
            _apply(disk.names, change)
        disk.pending.clear()
    elif path.parent != folder:
        return
    elif kind == "open":
        inode = next(inodes)
        disk.live[path.name] = inode
        disk.pending.append(("create", path.name, inode))
    elif kind == "fsync":
        disk.contents[disk.live[path.name]] = (log / arguments[1]).read_bytes()
    elif kind == "rename":
        target = Path(arguments[1]).name
        disk.live[target] = disk.live.pop(path.name)
        disk.pending.append(("rename", path.name, target))
    else:
        disk.live.pop(path.name)
        disk.pending.append(("remove", path.name))


def _materialise(folder: Path, names: tuple[tuple[str, int], ...], disk: Disk) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, inode in names:
        (folder / name).write_bytes(disk.contents.get(inode, b""))
    return folder


def warm_up(base: Path) -> None:
    """Do once what every fork would do again, such as importing, but no backward pass."""
    backward, torch.Tensor.backward = torch.Tensor.backward, lambda *_, **__: None
    try:
        tiny_runner(base / "warm", **STATES["best"]).train()
    finally:
        torch.Tensor.backward = backward


def main() -> None:
    base = Path(sys.argv[1]).resolve()
    warm_up(base)
    results: dict[str, Any] = {}
    for what in (crash_points, torn_writes, lost_writes):
        results[what.__name__] = {}
        for name, state in STATES.items():
            if what is torn_writes and name == "first":
                continue
            folder = base / what.__name__ / name.replace(" ", "")
            folder.mkdir(parents=True)
            results[what.__name__][name] = what(folder, name, state)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
