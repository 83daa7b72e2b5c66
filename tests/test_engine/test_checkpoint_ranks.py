"""Two processes: both prepare a checkpoint, one writes it, and both stop if either cannot."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

pytest.importorskip("mmengine")

ROOT = Path(__file__).parents[2]


def train_on_a_full_disk(folder: Path) -> None:
    """The work of one process."""
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

    runner = tiny_runner(
        folder / "work", dict(interval=1), by_epoch=False, length=3, hooks=[Prepares()]
    )  # fmt: skip
    try:
        runner.train()
    except SaveError as error:
        print(f"rank {runner.rank}: {error}", flush=True)
        os._exit(3)
    os._exit(0)


def train_often(folder: Path) -> None:
    """The work of one process: trainings whose results go to a file."""
    import tiny_training
    import torch
    from mmengine.hooks import CheckpointHook as MMEngineCheckpointHook
    from mmengine.hooks import Hook

    from mmvmamba.checkpoints import read_checkpoint
    from mmvmamba.engine import PreparesSave, RandomStateHook
    from mmvmamba.errors import SaveError

    rank = torch.distributed.get_rank()
    answer: dict[str, Any] = {}

    class TwoScores(tiny_training.TinyMetric):
        def compute_metrics(self, results: list[Any]) -> dict[str, float]:
            return {**super().compute_metrics(results), "top": float(self.count)}

    tiny_training.TinyMetric = TwoScores  # type: ignore[misc]

    def runner_of(name: str, *hooks: Any, stock: bool = False, load_from: str | None = None, **options: Any) -> Any:
        runner = tiny_training.tiny_runner(
            folder / name, options.pop("checkpoint", dict(interval=1)), by_epoch=options.pop("by_epoch", False),
            hooks=[RandomStateHook(), *hooks], resume=load_from is not None, load_from=load_from, **options,
        )  # fmt: skip
        loop = "EpochBasedTrainLoop" if runner._train_loop.pop("by_epoch") else "IterBasedTrainLoop"
        runner._train_loop["type"] = f"mmvmamba.{loop}"
        if stock:
            runner._hooks[-1] = MMEngineCheckpointHook(interval=1, by_epoch=False)
        return runner

    best = dict(interval=1, save_best=["tiny/acc", "tiny/top"], rule="greater")
    runner_of("best", checkpoint=best, by_epoch=True, length=2, validate=True).train()
    torch.distributed.barrier()  # nothing else keeps the second from running ahead of the first, which saves
    answer["best"] = sorted(path.name for path in (folder / "best").glob("*.pth"))

    runner = runner_of("stock", stock=True, length=3)
    with mock.patch.object(runner.logger, "warning") as warning:
        runner.train()
    torch.distributed.barrier()
    answer["warnings"] = [call.args[0] for call in warning.mock_calls]
    answer["stored"] = sorted(read_checkpoint(folder / "stock/iter_2.pth")["mmvmamba"])
    runner = runner_of("resumed", length=3, load_from=str(folder / "stock/iter_2.pth"))
    runner.train()
    answer["iterations"] = runner.iter

    class Prepared(Hook):
        priority = "VERY_LOW"  # behind RandomStateHook

        def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
            if runner.iter == 0:  # the last iteration makes a step, whatever has been accumulated
                answer["gradients"] = [len(part) for part in checkpoint["mmvmamba"]["gradients"]]

    class Kept(Hook, PreparesSave):
        def prepare_save(self, runner: Any) -> None:
            hook = next(hook for hook in runner.hooks if isinstance(hook, RandomStateHook))
            if runner.iter == 0:
                answer["kept"] = [len(part) for part in hook._prepared["gradients"]]

    runner = runner_of("gradients", Prepared(), Kept(), length=2)
    runner.optim_wrapper["accumulative_counts"] = 3
    runner.train()

    class Fails(Hook, PreparesSave):
        def prepare_save(self, runner: Any) -> None:
            if rank == 1:
                raise SaveError("no room")

    try:
        runner_of("fails", Fails(), length=2).train()
    except SaveError as error:
        answer["failure"] = str(error)
    answer["of_failure"] = sorted(path.name for path in (folder / "fails").glob("*.pth"))
    (folder / f"answer{rank}.json").write_text(json.dumps(answer))
    os._exit(0)


def _two_processes(folder: Path, work: str) -> tuple[list[int], list[str]]:
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
    command = [sys.executable, "-W", "ignore", __file__, str(folder), work]
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
    codes, outputs = _two_processes(tmp_path, "train_on_a_full_disk")
    assert codes == [3, 3], outputs
    assert [(tmp_path / f"prepared{rank}").read_text() for rank in range(2)] == ["0 1 "] * 2
    assert "iter_2.pth" in outputs[0] and "could not be written" in outputs[0]
    assert "rank 1: process 0 could not save a checkpoint" in outputs[1]
    assert sorted(path.name for path in (tmp_path / "work").glob("*.pth")) == ["iter_1.pth"]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    codes, outputs = _two_processes(folder, "train_often")
    assert codes == [0, 0], outputs
    return [json.loads((folder / f"answer{rank}.json").read_text()) for rank in range(2)]


def test_several_files_are_saved_of_what_was_gathered_once(answers):
    """A best checkpoint of two scores is two files and the regular one again."""
    best = ["best_tiny_acc_epoch_2.pth", "best_tiny_top_epoch_2.pth"]
    assert answers[0]["best"] == [*best, "epoch_1.pth", "epoch_2.pth"]


def test_checkpoint_hook_of_mmengine_gets_the_place_in_the_data_and_a_warning(answers):
    for answer in answers:
        assert answer["stored"] == ["data_position", "world_size"]
        assert answer["iterations"] == 3
        [warning] = [text for text in answer["warnings"] if "random states" in text]
        assert "saves on the first of 2 processes alone" in warning


def test_gradients_of_all_are_kept_by_the_first_alone(answers):
    assert answers[0]["gradients"] == [6, 6]
    assert [answer["kept"] for answer in answers] == [[6, 6], [0, 0]]


def test_nothing_is_saved_if_one_process_cannot_prepare(answers):
    assert answers[1]["failure"] == "no room"
    assert answers[0]["failure"] == "process 1 could not prepare a checkpoint; its message says why."
    assert answers[0]["of_failure"] == []


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    from torch import distributed

    distributed.init_process_group("gloo")  # MMEngine's own launcher wants a GPU
    globals()[sys.argv[2]](Path(sys.argv[1]))
