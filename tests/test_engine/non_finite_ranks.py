"""One of two processes of a training in which rank 1 meets NaN: ``python FILE FOLDER RANK``."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import torch
from guarded_training import PLACES, Images, Model, Poison, Snapshots, differing, make_runner, state_of
from mmengine.model import MMDistributedDataParallel

from mmvmamba.engine import NonFiniteHook
from mmvmamba.errors import NonFiniteLossError


class _Half(Images):
    """The images of one rank, under names of its own."""

    def __init__(self, rank: int, poison: Poison) -> None:
        super().__init__(16, poison if rank == 1 else None)
        self.first = 20 * rank

    def __getitem__(self, index: int):
        item = super().__getitem__(index)
        item["data_samples"].set_metainfo({"img_path": f"images/{index + self.first:03}.jpg"})
        return item


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
    (folder / f"{rank}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
