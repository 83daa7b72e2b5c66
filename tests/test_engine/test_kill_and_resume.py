"""``tools/train.py``, killed at any moment and resumed, ends bit for bit where the uninterrupted training ends (D2)."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mmpretrain")

from mmvmamba.checkpoints import read_checkpoint
from tests.test_engine.random_training import CLOCKS, config, differences, flatten

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
EPOCHS = 4
LAST = "iter_20.pth"


class Server:
    """Starts trainings; see ``training_server.py``."""

    def __init__(self, folder):
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(HERE / "training_server.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
            env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        self._answer()

    def _answer(self):
        line = self.process.stdout.readline()
        assert line, "the server of trainings ended"
        return json.loads(line)

    def train(self, work_dir, *arguments, kill_after=None):
        order = dict(
            arguments=[str(self.folder / "config.py"), "--work-dir", str(work_dir), *arguments],
            log=str(self.folder / f"{work_dir.name}.log"),
            kill_after=kill_after,
        )
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def log(self, work_dir):
        return (self.folder / f"{work_dir.name}.log").read_text()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    cfg = config("unused", length=EPOCHS, workers=2)
    cfg.default_scope = "mmpretrain"
    cfg.custom_imports = dict(imports=["random_training"], allow_failed_imports=False)
    cfg.model.vmamba = True
    cfg.train_dataloader.dataset.size = cfg.val_dataloader.dataset.size = 34
    # The stock types, which tools/train.py replaces.
    cfg.train_cfg = dict(by_epoch=True, max_epochs=EPOCHS, val_interval=2)
    cfg.default_hooks.checkpoint = dict(type="CheckpointHook", interval=2, by_epoch=False, max_keep_ckpts=2)
    cfg.custom_hooks = [hook for hook in cfg.custom_hooks if hook.type != "mmvmamba.RandomStateHook"]
    cfg.log_level = "INFO"
    cfg.dump(str(folder / "config.py"))
    server = Server(folder)
    yield server
    server.process.stdin.close()
    server.process.wait(30)


def final_state(work_dir):
    """Return everything in the last checkpoint that does not depend on the clock or the folder."""
    content = read_checkpoint(work_dir / LAST)
    scalars = content["message_hub"]["log_scalars"]
    content["scalars"] = {name: value for name, value in scalars.items() if name.rpartition("/")[2] not in CLOCKS}
    wanted = ("state_dict", "ema_state_dict", "optimizer", "param_schedulers", "scalars", "mmvmamba")
    flat = {}
    for name in wanted:
        flatten(name, content[name], flat)
    flat["meta"] = [content["meta"][key] for key in ("epoch", "iter", "seed")]
    return flat


@pytest.fixture(scope="module")
def uninterrupted(server):
    """The final state, and the seconds that the training took."""
    work_dir = server.folder / "uninterrupted"
    answer = server.train(work_dir)
    assert answer["status"] == 0, server.log(work_dir)
    assert "mmvmamba.EpochBasedTrainLoop in place of" in server.log(work_dir)
    return final_state(work_dir), answer["seconds"]


@pytest.mark.parametrize("trials", [3, pytest.param(50, marks=pytest.mark.soak)])
def test_killed_and_resumed_training_is_bitwise_equal(server, uninterrupted, trials):
    expected, seconds = uninterrupted
    times = random.Random(trials)
    done = kills = wrong = attempt = 0
    while done < trials:
        attempt += 1
        work_dir, killed = server.folder / f"trial_{trials}_{attempt}", 0
        while True:
            # Up to now and then beyond the end, so that saving the last checkpoint is hit as well.
            kill_after = times.uniform(0, 1.1) * seconds if killed < 3 else None
            answer = server.train(work_dir, "--resume", "auto-or-start", kill_after=kill_after)
            if answer["status"] != -9:
                break
            killed += 1
        assert answer["status"] == 0, server.log(work_dir)
        assert attempt < 4 * trials, "the training ends before it can be killed"
        wrong += bool(differences(expected, final_state(work_dir)))
        done, kills = done + bool(killed), kills + killed
        if not killed:
            seconds = min(seconds, answer["seconds"])  # the first training is the slowest
    print(f"{done} trainings, killed {kills} times: {wrong} differ from the uninterrupted one ({attempt} were started)")
    assert not wrong
