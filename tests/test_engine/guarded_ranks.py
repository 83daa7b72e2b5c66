"""One of two processes of trainings in which rank 1 meets NaN or a signal: ``python FILE FOLDER RANK``."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from pathlib import Path

import torch
from guarded_training import PLACES, Images, Model, Poison, Snapshots, differing, make_runner, state_of
from mmengine.hooks import Hook
from mmengine.model import MMDistributedDataParallel

from mmvmamba.apis import train
from mmvmamba.engine import CheckpointHook, InterruptHook, NonFiniteHook
from mmvmamba.errors import NonFiniteLossError, TrainingInterrupted


class _Half(Images):
    """The images of one rank, under names of its own."""

    def __init__(self, rank: int, poison: Poison) -> None:
        super().__init__(16, poison if rank == 1 else None)
        self.first = 20 * rank

    def __getitem__(self, index: int):
        item = super().__getitem__(index)
        item["data_samples"].set_metainfo({"img_path": f"images/{index + self.first:03}.jpg"})
        return item


class _Signal(Hook):
    """Send SIGTERM to rank 1 in the fourth iteration or in the validation before it; count batches of validation."""

    def __init__(self, rank: int, in_training: bool) -> None:
        self.rank, self.in_training, self.validated = rank, in_training, 0

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if self.in_training and self.rank == 1 and runner.iter == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.validated += 1
        if not self.in_training and self.rank == 1 and self.validated == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def _runner(folder: Path, rank: int, hooks: list, poison: Poison):
    model = Model(poison if rank == 1 else None)
    return make_runner(folder, hooks, model=MMDistributedDataParallel(model), dataset=_Half(rank, poison))


def main(folder: Path, rank: int) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    results = {}
    for place in (*PLACES, "constant"):
        for value in ("nan", "inf"):
            snapshots = Snapshots()
            runner = _runner(folder, rank, [snapshots, NonFiniteHook()], Poison(place, float(value), 5))
            try:
                runner.train()
                message = "it went on"
            except NonFiniteLossError as error:
                message = str(error)
            results[f"{place}-{value}"] = {
                "message": message,
                "differing": differing(snapshots.before[4], state_of(runner)),
            }
    runner = _runner(folder, rank, [NonFiniteHook(max_skipped=1)], Poison("loss", float("nan"), 3))
    runner.train()
    weights = [value.detach() for value in runner.model.parameters()]
    results["skipped"] = {
        "iter": runner.iter,
        "finite": all(bool(value.isfinite().all()) for value in weights),
        "weights": hashlib.sha256(b"".join(value.numpy().tobytes() for value in weights)).hexdigest(),
    }
    for case, lengths in (
        ("training", (16, 16)),
        ("validation", (16, 16)),
        ("validations of different lengths", (16, 12)),
    ):
        hook = _Signal(rank, in_training=case == "training")
        runner = make_runner(
            folder / case,
            [hook, InterruptHook()],
            model=MMDistributedDataParallel(Model()),
            dataset=_Half(rank, Poison("none", 0.0)),
            validation=lengths[rank],
            default_hooks={"checkpoint": CheckpointHook(interval=100, by_epoch=False)},
        )
        try:
            train(runner)
            results[case] = {"message": "it went on"}
        except TrainingInterrupted as stop:
            results[case] = {"message": str(stop), "number": stop.signal_number, "validated": hook.validated}
        results[case]["folder"] = str(folder / case)
    (folder / f"{rank}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
