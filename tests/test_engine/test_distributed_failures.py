"""D8: ``tools/dist_train.sh`` with two processes of gloo; one is killed. Nothing hangs, and a restart loses nothing."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("mmpretrain")

from mmvmamba.checkpoints import read_checkpoint
from tests.test_engine.random_training import CLOCKS, config, differences, flatten

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
LENGTH = 10
LIMIT = 60.0  # seconds between a kill and the end (D8)


def _write_config(folder: Path, *kills: dict[str, object]) -> Path:
    """Write a config of ``LENGTH`` iterations with a checkpoint after each second one, on stock hooks and loop.

    Each of ``kills`` happens once, however often the training is started.
    """
    cfg = config("unused", by_epoch=False, length=LENGTH, val_interval=4)
    cfg.default_scope = "mmpretrain"
    cfg.custom_imports = dict(imports=["random_training", "killed_ranks"], allow_failed_imports=False)
    cfg.train_cfg = dict(by_epoch=False, max_iters=LENGTH, val_interval=4)
    cfg.default_hooks.checkpoint = dict(type="CheckpointHook", interval=2, by_epoch=False)
    cfg.custom_hooks = [hook for hook in cfg.custom_hooks if hook.type != "mmvmamba.RandomStateHook"]
    for number, kill in enumerate(kills):
        mark = str(folder / f"killed-{number}")
        cfg.custom_hooks = [*cfg.custom_hooks, dict(type="mmengine.KillRank", mark=mark, **kill)]
    cfg.randomness.diff_rank_seed = True
    cfg.work_dir = str(folder / "work")
    cfg.log_level = "INFO"
    folder.mkdir(parents=True, exist_ok=True)
    cfg.dump(str(folder / "config.py"))
    return folder / "config.py"


def _train(path: Path, *arguments: str, **environment: str) -> tuple[int, str, float]:
    """Return the exit code, the output, and the seconds from the last kill, if there was one, to the end."""
    process = subprocess.Popen(
        ["bash", str(ROOT / "tools/dist_train.sh"), str(path), "2", *arguments],
        cwd=path.parent, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        env={**os.environ, "PYTHON": sys.executable, "PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}",
             "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=240)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    last = max((mark.stat().st_mtime for mark in path.parent.glob("killed-*")), default=time.time())
    return process.returncode, output, time.time() - last


def _final_state(folder: Path) -> dict[str, object]:
    content = read_checkpoint(folder / "work" / f"iter_{LENGTH}.pth")
    scalars = content["message_hub"]["log_scalars"]
    content["scalars"] = {name: value for name, value in scalars.items() if name.rpartition("/")[2] not in CLOCKS}
    flat: dict[str, object] = {}
    for name in ("state_dict", "ema_state_dict", "optimizer", "param_schedulers", "scalars", "mmvmamba"):
        flatten(name, content[name], flat)
    flat["meta"] = [content["meta"][key] for key in ("epoch", "iter", "seed")]
    return flat


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    code, output, _ = _train(_write_config(folder))
    assert code == 0, output
    return _final_state(folder)


def _restarted(folder: Path, expected: dict[str, object], *kills: dict[str, object]) -> None:
    code, output, seconds = _train(_write_config(folder, *kills), MAX_RESTARTS=str(len(kills)))
    assert len(list(folder.glob("killed-*"))) == len(kills), output
    assert code == 0 and seconds < 2 * LIMIT, output  # and the rest of the training
    assert "Resuming from" in output
    assert differences(expected, _final_state(folder)) == []


@pytest.mark.slow
def test_a_killed_process_ends_the_training(tmp_path):
    code, output, seconds = _train(_write_config(tmp_path, dict(rank=1, iteration=5)))
    assert (tmp_path / "killed-0").exists(), output
    assert code != 0 and seconds < LIMIT, output
    assert "Signal 9 (SIGKILL)" in output  # torchrun names who failed first
    assert read_checkpoint(tmp_path / "work" / "iter_4.pth")["meta"]["iter"] == 4
    assert not (tmp_path / "work" / "iter_6.pth").exists()


@pytest.mark.slow
def test_restarts_end_where_the_undisturbed_training_ends(tmp_path, undisturbed):
    """Two trials in one training: process 0 while it saves, then process 1 in an iteration."""
    _restarted(tmp_path, undisturbed, dict(rank=0, iteration=4, saving=True), dict(rank=1, iteration=8))


@pytest.mark.soak
@pytest.mark.parametrize("trial", range(10))
def test_many_restarts(tmp_path, undisturbed, trial):
    draw = random.Random(trial)
    saving = trial % 3 == 0
    iteration = 2 * draw.randint(2, LENGTH // 2) if saving else draw.randint(3, LENGTH)
    _restarted(tmp_path, undisturbed, dict(rank=0 if saving else trial % 2, iteration=iteration, saving=saving))


#: Stand-ins of Slurm's programs: sbatch runs the job at once, srun its tasks on this machine; a job that is queued
#: again runs again when it has ended.
_SBATCH = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
export SLURM_JOB_ID=$RANDOM SLURM_JOB_NODELIST=node1 SLURM_JOB_NUM_NODES=1 SLURM_CPUS_PER_TASK=1
"$@"
echo "job ended with $?" >&2
if [[ -e $STATE/requeued ]]; then
  rm "$STATE/requeued"
  exec "$@"
fi
"""
_SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
code=0 tasks=()
for rank in 0 1; do
  SLURM_PROCID=$rank SLURM_NTASKS=2 SLURM_LOCALID=$rank "$@" & tasks+=($!)
done
for task in "${tasks[@]}"; do wait "$task" || { this=$?; (( this > code )) && code=$this; }; done
exit "$code"
"""
_SCONTROL = """#!/usr/bin/env bash
if [[ $1 == requeue ]]; then touch "$STATE/requeued"; else echo node1; fi
"""


@pytest.mark.slow
def test_a_slurm_job_whose_time_is_up_saves_and_goes_on(tmp_path, undisturbed):
    """SIGUSR1 reaches one task; both save and end with 138, the job is queued again and ends as if nothing had been."""
    path = _write_config(tmp_path, dict(rank=1, iteration=6, number=int(signal.SIGUSR1)))
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("sbatch", _SBATCH), ("srun", _SRUN), ("scontrol", _SCONTROL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("MASTER_", "SLURM_", "RANK"))}
    result = subprocess.run(
        ["bash", str(ROOT / "tools/slurm_train.sh"), "part", "name", str(path), str(tmp_path / "work")],
        cwd=tmp_path, capture_output=True, text=True, timeout=240,
        env={**clean, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "STATE": str(tmp_path), "GPUS": "2",
             "PYTHON": sys.executable, "PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}", "PYTHONWARNINGS": "ignore"},
    )  # fmt: skip
    output = result.stdout + result.stderr
    assert result.returncode == 0, output
    assert "SIGUSR1 has ended the training after iteration 6; its checkpoint is" in output
    assert "job ended with 138" in output and "queued again to go on" in output
    assert f"Resuming from {tmp_path / 'work' / 'iter_6.pth'}" in output
    assert differences(undisturbed, _final_state(tmp_path)) == []
