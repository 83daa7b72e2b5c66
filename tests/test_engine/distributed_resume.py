"""One of several processes: train, resume from the iterations named on the command line, print what differs as JSON."""

import json
import os
import sys
from pathlib import Path

from random_training import config, differences, state, train
from torch import distributed as dist


def main():
    folder, iterations = Path(sys.argv[1]), [int(number) for number in sys.argv[2:]]

    def settings(name):
        cfg = config(folder / name, length=3, optim=dict(type="OptimWrapper", accumulative_counts=3))
        cfg.launcher = "pytorch"
        cfg.randomness.diff_rank_seed = True
        cfg.model_wrapper_cfg = dict(type="MMDistributedDataParallel", device_ids=None)
        return cfg

    dist.init_process_group("gloo")  # MMEngine asks for a GPU first

    def shared(runner):
        # The log of other processes than the first is neither shown nor stored.
        own = state(runner)
        return (
            own if dist.get_rank() == 0 else {name: own[name] for name in own if not name.startswith("scalar train/")}
        )

    expected = shared(train(settings("uninterrupted")))
    found = {}
    for iteration in iterations:
        checkpoint = folder / "uninterrupted" / f"iter_{iteration}.pth"
        found[iteration] = differences(expected, shared(train(settings(f"resumed_{iteration}"), checkpoint)))
    answer = dict(found=found, counters=expected["counters"], random=expected["torch"].sum().item())
    (folder / f"answer_{os.environ['RANK']}.json").write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
