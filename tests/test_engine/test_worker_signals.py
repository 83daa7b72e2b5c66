"""Workers under a WorkerShield outlive what is meant for the training, and end when their main process is gone."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("mmengine")

PROGRAM = """
import sys, time
import numpy as np
from torch.utils.data import DataLoader, Dataset

from mmvmamba.engine.worker_signals import WorkerShield


class Large(Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        return np.zeros(200_000, dtype=np.uint8)  # more than a pipe holds: the worker waits for a reader


if __name__ == "__main__":
    how = dict(num_workers=2, prefetch_factor=4, multiprocessing_context=sys.argv[1])
    loader = DataLoader(Large(), 2, collate_fn=list, **how)
    WorkerShield([loader])
    batches = iter(loader)
    next(batches), next(batches)  # one of each worker: both are at work
    print(*(worker.pid for worker in batches._workers), flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("context", ["fork", "forkserver"])
def test_workers_end_after_their_main_process(tmp_path, context):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    main = subprocess.Popen(
        [sys.executable, str(program), context], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    workers = [int(pid) for pid in main.stdout.readline().split()]
    try:
        assert len(workers) == 2
        assert all(map(_lives, workers))
        main.kill()
        main.wait()
        end = time.monotonic() + 10
        while any(map(_lives, workers)) and time.monotonic() < end:
            time.sleep(0.1)
        assert not any(map(_lives, workers))
    finally:
        main.kill()
        for worker in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)


SIGNALLED_AT_BIRTH = """
import os, signal, subprocess, sys, time
import torch.utils.data._utils.signal_handling as handling
from torch.utils.data import DataLoader, Dataset

from mmvmamba.engine.worker_signals import WorkerShield


class Numbers(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return index


def slowly(original=handling._set_worker_signal_handlers):  # what a worker does first; PyTorch's SIGTERM ends it then
    original()
    open(sys.argv[2], "a").write("born ")
    time.sleep(1)  # alive without its shield


handling._set_worker_signal_handlers = slowly
number, received = getattr(signal, sys.argv[1]), []
signal.signal(number, lambda *_: received.append(1))
loader = DataLoader(Numbers(), 2, num_workers=2)
shield = WorkerShield([loader])
batches = iter(loader)
while len(open(sys.argv[2]).read().split()) < 2:
    time.sleep(0.01)
subprocess.run(["kill", "-s", sys.argv[1][3:], "--", f"-{os.getpid()}"], start_new_session=True, check=True)
assert sum(len(batch) for batch in batches) == 8
assert received
shield.lift()
assert "_get_iterator" not in vars(loader) and loader.worker_init_fn is None
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_to_a_worker_that_has_just_been_born(tmp_path, name):
    """It comes between the fork and the worker's first look at its shield."""
    program, born = tmp_path / "program.py", tmp_path / "born"
    program.write_text(SIGNALLED_AT_BIRTH)
    born.touch()
    done = subprocess.run(
        [sys.executable, str(program), name, str(born)], capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}, start_new_session=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def _lives(pid: int) -> bool:
    """Return whether a process runs; one that is dead and not yet waited for by anybody does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
