"""The launchers ``tools/*.sh``: what they start, with any name as an argument (F2), and who can reach it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.test_tools.hostile_names import CANARY, HOSTILE

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / "tools"
SCRIPTS = sorted(TOOLS.glob("*.sh"))

#: A program that writes how it was called, each argument with a zero byte behind it.
_RECORDER = """#!/usr/bin/env bash
printf '%s\\0' "${0##*/}" "$@" >> "$RECORD"
"""
_HOSTS = """#!/usr/bin/env bash
[[ $1 == show ]] && printf 'node1\\nnode2\\n'
exit 0
"""


def _program(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def sandbox(tmp_path):
    """A folder whose programs only record how they are called."""
    programs = tmp_path / "bin"
    for name in ("recording-python", "sbatch", "srun", "salloc"):
        _program(programs, name, _RECORDER)
    _program(programs, "scontrol", _HOSTS)
    (tmp_path / "here").mkdir()
    return tmp_path


def _call(sandbox, script, *arguments, **environment):
    """Return the exit code, the error output and the recorded calls, split into words."""
    record = sandbox / "record"
    record.unlink(missing_ok=True)
    result = subprocess.run(
        ["bash", str(TOOLS / script), *arguments], cwd=sandbox / "here", capture_output=True, text=True, timeout=30,
        env={"PATH": f"{sandbox / 'bin'}:/usr/bin:/bin", "HOME": str(sandbox), "PYTHON": "recording-python",
             "RECORD": str(record), **environment},
    )  # fmt: skip
    words = record.read_bytes().decode().split("\0")[:-1] if record.exists() else []
    return result.returncode, result.stderr, words


def _as_path(name):
    return f"./{name}" if name.startswith("-") else name


def test_shellcheck_finds_nothing():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    assert len(SCRIPTS) == 7
    result = subprocess.run(
        ["shellcheck", "--external-sources", "--source-path", str(ROOT), *map(str, SCRIPTS)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_stop_at_errors(script):
    text = script.read_text()
    sourced = script.name.endswith("_common.sh")
    assert sourced or "\nset -euo pipefail\n" in text
    assert sourced == (not script.stat().st_mode & stat.S_IXUSR)
    assert "eval" not in text.split()


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_reach_the_tools_as_they_are(sandbox, name):
    options = ["--work-dir", name, "--cfg-options", f"a.b={name}", name]
    launched = ["recording-python", "-m", "mmvmamba.loopback", "--nproc-per-node", "2", "--max-restarts", "0",
                "--rdzv-endpoint", "127.0.0.1:0"]  # fmt: skip
    path = _as_path(name)

    code, errors, words = _call(sandbox, "dist_train.sh", name, "2", *options)
    assert (code, errors) == (0, "")
    assert words == [*launched, str(TOOLS / "train.py"), path, "--launcher", "pytorch", *options]

    code, errors, words = _call(sandbox, "dist_test.sh", name, name, "2", *options)
    assert (code, errors) == (0, "")
    assert words == [*launched, str(TOOLS / "test.py"), path, path, "--launcher", "pytorch", *options]

    code, errors, words = _call(sandbox, "slurm_train.sh", name, name, name, name, *options)
    assert (code, errors) == (0, "")
    job = [str(TOOLS / "slurm_job.sh"), "recording-python", "-u", str(TOOLS / "train.py"), path, "--work-dir", path,
           "--launcher", "slurm", "--resume", "auto-or-start", *options]  # fmt: skip
    assert words[0] == "sbatch" and words[-len(job) :] == job
    assert {f"--partition={name}", f"--job-name={name}", f"--output={path}/slurm-%j.log"} < set(words[: -len(job)])

    code, errors, words = _call(sandbox, "slurm_test.sh", name, name, name, name, *options)
    assert (code, errors) == (0, "")
    job = [str(TOOLS / "slurm_job.sh"), "recording-python", "-u", str(TOOLS / "test.py"), path, path,
           "--launcher", "slurm", *options]  # fmt: skip
    assert words[0] == "salloc" and words[-len(job) :] == job

    code, errors, words = _call(sandbox, "slurm_job.sh", name, *options, SLURM_JOB_ID="7", SLURM_JOB_NODELIST=name)
    assert (code, errors) == (0, "")
    assert words == ["srun", "--kill-on-bad-exit=1", "--cpus-per-task=1", "--", name, *options]
    assert not list(sandbox.rglob(CANARY)), f"{name!r} was run"


@pytest.mark.parametrize(
    "name", [*HOSTILE, f"1+a[$(touch {CANARY})]", "2 3", "08", "-1", "1e3", "99999999999999999999"]
)
def test_hostile_values_in_the_environment_run_nothing(sandbox, name):
    for variable in ("NNODES", "NODE_RANK", "PORT", "MAX_RESTARTS"):
        code, errors, words = _call(sandbox, "dist_train.sh", "c.py", "2", **{variable: name})
        assert (code, words) == (2, []) and f"error: {variable} is '{name}'" in errors
    code, errors, words = _call(sandbox, "dist_train.sh", "c.py", name)
    assert (code, words) == (2, []) and "expected a whole number" in errors
    for variable in ("GPUS", "GPUS_PER_NODE", "TASKS_PER_NODE", "CPUS_PER_TASK", "SAVE_BEFORE", "PORT"):
        code, errors, words = _call(sandbox, "slurm_train.sh", "p", "j", "c.py", "w", **{variable: name})
        assert (code, words) == (2, []) and f"error: {variable} is '{name}'" in errors
    for variable in ("SLURM_JOB_ID", "SLURM_JOB_NUM_NODES", "PORT"):
        settings = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n", variable: name}
        code, errors, words = _call(sandbox, "slurm_job.sh", "true", **settings)
        assert (code, words) == (2, []) and f"error: {variable} is '{name}'" in errors
    code, _, words = _call(sandbox, "dist_train.sh", "c.py", "2", NNODES="2", MASTER_ADDR=name)
    assert code == 0 and words[words.index("--master-addr") + 1] == name
    code, _, words = _call(sandbox, "slurm_train.sh", "p", "j", "c.py", "w", SLURM_ARGS=name)
    assert code == 0 and all(word in words for word in name.splitlines()[0].split())
    assert not list(sandbox.rglob(CANARY)), f"{name!r} was run"


def test_too_few_arguments_say_what_is_expected(sandbox):
    for script, arguments in (
        ("dist_train.sh", ["c.py"]),
        ("dist_test.sh", ["c.py", "x.pth"]),
        ("slurm_train.sh", ["p", "j", "c.py"]),
        ("slurm_test.sh", ["p", "j", "c.py"]),
    ):
        code, errors, words = _call(sandbox, script, *arguments)
        assert (code, words) == (2, [])
        assert errors.startswith(f"error: found {len(arguments)} arguments, expected tools/{script} ")


def test_several_nodes(sandbox):
    code, errors, words = _call(sandbox, "dist_train.sh", "c.py", "8", NNODES="4")
    assert (code, words) == (2, []) and "MASTER_ADDR is not set" in errors
    code, errors, words = _call(sandbox, "dist_train.sh", "c.py", "8", NNODES="4", NODE_RANK="4", MASTER_ADDR="n")
    assert (code, words) == (2, []) and "NODE_RANK is '4', expected a whole number from 0 to 3" in errors
    settings = dict(NNODES="4", NODE_RANK="3", MASTER_ADDR="10.0.0.1", PORT="12345")
    _, _, words = _call(sandbox, "dist_train.sh", "c.py", "8", **settings)
    assert words[1:] == ["-m", "torch.distributed.run", "--nproc-per-node", "8", "--max-restarts", "0", "--nnodes", "4",
                         "--node-rank", "3", "--master-addr", "10.0.0.1", "--master-port", "12345",
                         str(TOOLS / "train.py"), "c.py", "--launcher", "pytorch"]  # fmt: skip
    _, _, words = _call(sandbox, "dist_train.sh", "c.py", "8", MAX_RESTARTS="2", LOCAL_ADDR="10.0.0.4", **settings)
    assert words[1:] == ["-m", "torch.distributed.run", "--nproc-per-node", "8", "--max-restarts", "2", "--nnodes", "4",
                         "--local-addr", "10.0.0.4", "--rdzv-backend", "c10d", "--rdzv-id", "mmvmamba",
                         "--rdzv-endpoint", "10.0.0.1:12345", "--rdzv-conf", "is_host=0", str(TOOLS / "train.py"),
                         "c.py", "--launcher", "pytorch", "--resume", "auto-or-start"]  # fmt: skip


@pytest.mark.parametrize("given", [["--resume"], ["--resume", "x.pth"], ["--resume=auto"]])
def test_a_restarted_training_resumes_by_itself(sandbox, given):
    code, errors, words = _call(sandbox, "dist_train.sh", "c.py", "8", *given, MAX_RESTARTS="1")
    assert (code, words) == (2, []) and "leave --resume away" in errors
    code, errors, words = _call(sandbox, "slurm_train.sh", "p", "j", "c.py", "w", *given)
    assert (code, words) == (2, []) and "expected to be left away" in errors


def test_what_slurm_is_asked_for(sandbox):
    _, _, words = _call(sandbox, "slurm_train.sh", "gpu", "vmamba", "c.py", "w", GPUS="16",
                        SLURM_ARGS="--time=12:00:00  --account=vision")  # fmt: skip
    wanted = ["sbatch", "--partition=gpu", "--job-name=vmamba", "--nodes=2", "--ntasks=16", "--ntasks-per-node=8",
              "--cpus-per-task=5", "--gres=gpu:8", "--time=12:00:00", "--account=vision", "--requeue",
              "--open-mode=append", "--signal=USR1@180", "--output=w/slurm-%j.log"]  # fmt: skip
    assert words[: len(wanted)] == wanted
    _, _, words = _call(sandbox, "slurm_test.sh", "gpu", "vmamba", "c.py", "x.pth", GPUS="2")
    assert words[1:7] == ["--partition=gpu", "--job-name=vmamba", "--nodes=1", "--ntasks=2", "--ntasks-per-node=2",
                          "--cpus-per-task=5"]  # fmt: skip
    assert "--gres=gpu:2" in words
    _, _, words = _call(sandbox, "slurm_test.sh", "cpu", "vmamba", "c.py", "x.pth", GPUS="2", GPUS_PER_NODE="0")
    assert "--ntasks-per-node=2" in words and not any(word.startswith("--gres") for word in words)
    code, errors, words = _call(sandbox, "slurm_test.sh", "gpu", "vmamba", "c.py", "x.pth", GPUS="12")
    assert (code, words) == (2, []) and "GPUS is 12, expected a multiple of 8" in errors
    # In an allocation, the test is a step of it.
    _, _, words = _call(sandbox, "slurm_test.sh", "gpu", "vmamba", "c.py", "x.pth", SLURM_JOB_ID="7",
                        SLURM_JOB_NODELIST="n")  # fmt: skip
    assert words[0] == "srun" and words[4:] == ["recording-python", "-u", str(TOOLS / "test.py"), "c.py", "x.pth",
                                                "--launcher", "slurm"]  # fmt: skip


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (1, False), (138, True), (143, False)])
def test_a_job_whose_time_is_up_is_queued_again(sandbox, code, requeued):
    _program(sandbox / "bin", "srun", f"#!/usr/bin/env bash\nexit {code}\n")
    _program(sandbox / "bin", "scontrol", _HOSTS.replace("exit 0", f"{_RECORDER.splitlines()[1]}\nexit $BROKEN"))
    arguments = dict(SLURM_JOB_ID="41", SLURM_JOB_NODELIST="node[1-2]", SLURM_JOB_NUM_NODES="2")
    found, _, words = _call(sandbox, "slurm_job.sh", "train", **arguments, BROKEN="0")
    assert found == code
    assert words[4:] == (["scontrol", "requeue", "41"] if requeued else [])
    assert words[:4] == ["scontrol", "show", "hostnames", "node[1-2]"]
    if requeued:
        broken = _program(sandbox / "bin", "scontrol", "#!/usr/bin/env bash\n[[ $1 == show ]]\n")
        found, errors, _ = _call(sandbox, "slurm_job.sh", "train", **arguments)
        assert broken.exists() and found == 1 and "could not be queued again" in errors


_JOB_STEP = '#!/usr/bin/env bash\nprintf "%s %s %s\\n" "$MASTER_ADDR" "$MASTER_PORT" "$GLOO_SOCKET_IFNAME" >&2\n'


def test_a_job_tells_where_its_processes_meet(sandbox):
    _program(sandbox / "bin", "srun", _JOB_STEP)
    job = dict(SLURM_JOB_ID="40007", SLURM_JOB_NODELIST="node[1-2]", GLOO_SOCKET_IFNAME="")
    assert _call(sandbox, "slurm_job.sh", "x", **job, SLURM_JOB_NUM_NODES="2")[1] == "node1 20007 \n"
    assert _call(sandbox, "slurm_job.sh", "x", **job, SLURM_JOB_NUM_NODES="1")[1] == "127.0.0.1 20007 lo\n"
    assert _call(sandbox, "slurm_job.sh", "x", **job, PORT="300")[1] == "127.0.0.1 300 lo\n"


#: Takes the place of tools/train.py: the processes meet as in a training, and the first says who listens where.
_PROBE = """
import os, sys
from pathlib import Path
import torch.distributed as dist
dist.init_process_group("gloo")
rank = dist.get_rank()
restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT")
if "killed" in sys.argv and restarts == "0" and rank == 1:
    os.kill(os.getpid(), 9)
if "raising" in sys.argv and rank == 1:
    from mmvmamba.apis import run_command
    def main():
        raise LookupError("nothing was found")
    run_command(main)
dist.barrier()
if rank == 0:
    print("world", dist.get_world_size(), "port", os.environ["MASTER_PORT"], "restarts", restarts)
    own = {p.readlink().name for pid in {os.getpid(), os.getppid()} for p in Path(f"/proc/{pid}/fd").iterdir()
           if p.is_symlink() and str(p.readlink()).startswith("socket:")}
    for family in ("tcp", "tcp6"):
        for line in Path("/proc/net", family).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in own:
                print("listens", fields[1].split(":")[0])
if "sleeping" in sys.argv:
    import signal, time
    signal.signal(signal.SIGTERM, lambda *_: (print("saved", rank, flush=True), os._exit(143)))
    print("asleep", flush=True)
    time.sleep(60)
dist.barrier()
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def probes(tmp_path_factory):
    """A folder with the launchers and the probe."""
    folder = tmp_path_factory.mktemp("probe")
    for name in ("dist_train.sh", "dist_common.sh"):
        shutil.copy(TOOLS / name, folder)
    (folder / "train.py").write_text(_PROBE)
    return folder


def _start(probes, *arguments, **environment):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MASTER_", "GLOO_", "NCCL_"))}
    return subprocess.Popen(
        ["bash", str(probes / "dist_train.sh"), "config.py", *arguments],
        env={**clean, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def _end(process, code=0):
    try:
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code, errors
    return output, errors


def test_one_node_is_reached_from_this_machine_alone(probes):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        wanted = str(free.getsockname()[1])
    first, second = _start(probes, "2"), _start(probes, "2", PORT=wanted)  # at once
    (one, _), (other, _) = _end(first), _end(second)
    assert f"port {wanted} " in other and f"port {wanted} " not in one
    for output in (one, other):
        assert "world 2 " in output
        assert {line for line in output.splitlines() if line.startswith("listens")} == {"listens 0100007F"}


def test_the_first_failure_is_shown_with_its_traceback(probes):
    pytest.importorskip("mmengine")
    began = time.monotonic()
    _, errors = _end(_start(probes, "2", "raising"), code=1)
    summary = errors.rpartition("Root Cause")[2]
    assert "LookupError: nothing was found" in summary and "rank      : 1 " in summary
    assert time.monotonic() - began < 60


def test_a_signal_to_the_launcher_reaches_the_processes(probes):
    process = _start(probes, "2", "sleeping")
    output = ""
    while output.count("asleep") < 2:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        output += line
    process.send_signal(signal.SIGTERM)
    output, errors = _end(process, code=128 + signal.SIGTERM)
    assert sorted(output.split()) == ["0", "1", "saved", "saved"]
    assert "interrupted: SIGTERM has ended the launcher" in errors and "Traceback" not in errors


@pytest.mark.slow
@pytest.mark.parametrize("restarts", ["0", "1"])
def test_two_nodes_meet(probes, restarts):
    """Both on this machine; with restarts, a killed process brings both nodes' processes back."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    nodes = [
        _start(probes, "1", *(["killed"] if restarts == "1" else []), NNODES="2", NODE_RANK=str(node), PORT=port,
               MASTER_ADDR="127.0.0.1", LOCAL_ADDR="127.0.0.1", MAX_RESTARTS=restarts)
        for node in range(2)
    ]  # fmt: skip
    ends = [_end(node) for node in nodes]
    assert "".join(output for output, _ in ends).count("world 2 ") == 1
    assert ("failed (exitcode: -9)" in "".join(errors for _, errors in ends)) == (restarts == "1")
