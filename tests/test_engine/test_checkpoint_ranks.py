"""Two processes: both prepare a checkpoint, one writes it, and both stop if it cannot."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mmengine")

ROOT = Path(__file__).parents[2]


def train(folder: Path) -> None:
    """The work of one process."""
    sys.path.insert(0, str(Path(__file__).parent))
    import torch
    from mmengine.hooks import Hook
    from tiny_training import tiny_runner

    from mmvmamba.engine import PreparesSave
    from mmvmamba.errors import SaveError

    class Prepares(Hook, PreparesSave):
        def prepare_save(self, runner: Any) -> None:
            with (folder / f"prepared{runner.rank}").open("a") as file:
                file.write(f"{runner.iter} ")
            if runner.rank == 0 and runner.iter == 1:
                _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))

    torch.distributed.init_process_group("gloo")  # MMEngine's own launcher wants a GPU
    runner = tiny_runner(
        folder / "work", dict(interval=1), by_epoch=False, length=3, hooks=[Prepares()]
    )  # fmt: skip
    try:
        runner.train()
    except SaveError as error:
        print(f"rank {runner.rank}: {error}", flush=True)
        os._exit(3)
    os._exit(0)


def _two_processes(folder: Path) -> tuple[list[int], list[str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-W", "ignore", __file__, str(folder)]
    started = [
        subprocess.Popen(
            command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=folder,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": str(ROOT)},
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=120)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    return [process.returncode for process in started], outputs


@pytest.mark.slow
def test_both_processes_prepare_and_both_stop_if_the_first_cannot_save(tmp_path):
    codes, outputs = _two_processes(tmp_path)
    assert codes == [3, 3], outputs
    assert [(tmp_path / f"prepared{rank}").read_text() for rank in range(2)] == ["0 1 "] * 2
    assert "iter_2.pth" in outputs[0] and "could not be written" in outputs[0]
    assert "rank 1: process 0 could not save a checkpoint" in outputs[1]
    assert sorted(path.name for path in (tmp_path / "work").glob("*.pth")) == ["iter_1.pth"]


if __name__ == "__main__":
    train(Path(sys.argv[1]))
