"""The set-up script: what it asks of a machine, what it says, when it has nothing to do."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.test_install.test_setup_options import write_command


def fake_python(folder: Path, name: str, version: tuple[int, ...], missing: tuple[str, ...] = (), header: bool = True):
    """A command that answers the probe with these facts."""
    facts = json.dumps(
        {
            "version": list(version),
            "home": "/usr",
            "executable": str(folder / name),
            "missing": list(missing),
            "header": header,
        }
    )
    return write_command(folder, name, f"echo '{facts}'\n")


def test_it_can_be_read_by_an_old_python(root):
    ast.parse((root / "scripts" / "bootstrap.py").read_text(), feature_version=(3, 7))


def test_the_first_suitable_python_is_taken(bootstrap, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    fake_python(tmp_path, "python3.12", (3, 12, 1))
    write_command(tmp_path, "python3.11", "echo 'pyenv: python3.11: command not found' >&2; exit 127\n")
    assert bootstrap.find_python(None) == (str(tmp_path / "python3.12"), (3, 12, 1), "/usr")
    fake_python(tmp_path, "python3.11", (3, 11, 7))
    assert bootstrap.find_python(None) == (str(tmp_path / "python3.11"), (3, 11, 7), "/usr")


@pytest.mark.parametrize(
    ("name", "facts", "message"),
    [
        ("python3", {"version": (3, 9, 2)}, r"Python 3\.9\.2\) is older than Python 3\.10: apt-get install python3"),
        ("python3.11", {"version": (3, 11, 2), "missing": ("ensurepip",)}, r"no ensurepip.*python3\.11-venv"),
        ("python3.11", {"version": (3, 11, 2), "header": False}, r"no Python\.h.*apt-get install python3\.11-dev"),
    ],
    ids=["too-old", "no-venv", "no-headers"],
)
def test_an_unsuitable_python_is_told_what_it_lacks(bootstrap, tmp_path, monkeypatch, name, facts, message):
    monkeypatch.setenv("PATH", f"{tmp_path}")
    monkeypatch.setattr(bootstrap, "CANDIDATES", (name,))
    fake_python(tmp_path, name, **facts)
    with pytest.raises(bootstrap.SetupError, match=message):
        bootstrap.find_python(None)


def test_the_most_promising_python_is_reported(bootstrap, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    fake_python(tmp_path, "python3", (3, 9, 2))
    fake_python(tmp_path, "python3.10", (3, 10, 4), missing=("venv", "ensurepip"))
    with pytest.raises(bootstrap.SetupError, match=r"no venv and no ensurepip: apt-get install python3\.10-venv"):
        bootstrap.find_python(None)


def test_a_chosen_python_is_not_replaced_by_another(bootstrap, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    fake_python(tmp_path, "python3.11", (3, 11, 7))
    with pytest.raises(bootstrap.SetupError, match="MMVMAMBA_PYTHON='python3.12' cannot be started"):
        bootstrap.find_python("python3.12")


def test_no_python_at_all(bootstrap, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(bootstrap.SetupError, match=r"no Python was found on PATH: apt-get install python3"):
        bootstrap.find_python(None)


def test_a_missing_compiler_is_named(bootstrap, tmp_path, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(bootstrap.SetupError, match=r"no C\+\+ compiler \(g\+\+\): apt-get install g\+\+"):
        bootstrap.check_compiler(path=str(tmp_path))
    monkeypatch.setenv("CXX", "clang++-19 -pthread")
    with pytest.raises(bootstrap.SetupError, match=r"\(clang\+\+-19\)"):
        bootstrap.check_compiler(path=str(tmp_path))


def test_a_full_disk_is_told_before_anything_starts(bootstrap, tmp_path, monkeypatch):
    monkeypatch.setattr(bootstrap.shutil, "disk_usage", lambda path: SimpleNamespace(free=3.2e9))
    with pytest.raises(bootstrap.SetupError, match=r"3\.2 GB are free under .*about 12 GB are needed: make room"):
        bootstrap.check_disk(bootstrap.ROOT, bootstrap.NEED_GB)
    with pytest.raises(bootstrap.SetupError, match="or set TMPDIR"):
        bootstrap.check_disk(tmp_path, bootstrap.NEED_TEMP_GB)
    bootstrap.check_disk(tmp_path, 3.0)


def test_jobs_follow_the_variable(bootstrap):
    assert bootstrap.compile_jobs({"MAX_JOBS": "7"}) == 7
    assert bootstrap.compile_jobs({}) >= 1
    with pytest.raises(bootstrap.SetupError, match="MAX_JOBS='all'"):
        bootstrap.compile_jobs({"MAX_JOBS": "all"})


@pytest.mark.parametrize(
    ("capabilities", "listed", "wanted"),
    [
        (None, "90", {"MMVMAMBA_WITH_CUDA": "0"}),
        ("", "90", {"MMVMAMBA_WITH_CUDA": "0"}),
        ("No devices were found", "90", {"MMVMAMBA_WITH_CUDA": "0"}),
        ("9.0 9.0 8.6", "80 86 90", {"TORCH_CUDA_ARCH_LIST": "8.6;9.0"}),
        ("10.0 9.0", "90 100", {"TORCH_CUDA_ARCH_LIST": "9.0;10.0"}),
        ("7.5 6.1", "75 80", {"MMVMAMBA_WITH_CUDA": "0"}),
        ("7.5 8.9", "75 80 89", {"TORCH_CUDA_ARCH_LIST": "8.9"}),
        ("12.0", "80 90 100", {"TORCH_CUDA_ARCH_LIST": "10.0+PTX"}),
        ("8.0 9.0 12.0", "80 90", {"TORCH_CUDA_ARCH_LIST": "8.0;9.0+PTX"}),
        ("9.0 12.0", None, {"TORCH_CUDA_ARCH_LIST": "9.0;12.0"}),
    ],
)
def test_cuda_kernels_are_those_of_the_gpus_at_hand(bootstrap, tmp_path, capabilities, listed, wanted):
    def says(name: str, lines: list[str]) -> None:
        write_command(tmp_path, name, "".join(f"echo {line}\n" for line in lines))

    if capabilities is not None:
        says("nvidia-smi", [capabilities] if "found" in capabilities else capabilities.split())
    if listed is not None:
        says("nvcc", [f"compute_{number}" for number in listed.split()])
    environ = {"PATH": str(tmp_path)}
    assert bootstrap.kernel_environment(environ) == wanted
    assert bootstrap.kernel_environment(environ | {"MMVMAMBA_WITH_CUDA": "1"}) == {}
    assert bootstrap.kernel_environment(environ | {"TORCH_CUDA_ARCH_LIST": "8.0"}) == {}


def test_an_nvidia_smi_that_hangs_or_fails_means_no_gpu(bootstrap, tmp_path, monkeypatch):
    monkeypatch.setattr(bootstrap, "ASK_SECONDS", 0.2)
    for text in ("exec /bin/sleep 5\n", "echo 9.0; exit 9\n"):
        write_command(tmp_path, "nvidia-smi", text)
        assert bootstrap.kernel_environment({"PATH": str(tmp_path)}) == {"MMVMAMBA_WITH_CUDA": "0"}


def test_the_oldest_gpu_is_that_of_setup_py(bootstrap, setup_py):
    assert ".".join(map(str, bootstrap.OLDEST_GPU)) == str(setup_py.OLDEST_CUDA_ARCH)


def test_another_choice_of_cuda_kernels_makes_another_extension(bootstrap, checkout, calls, tmp_path, monkeypatch):
    tools = tmp_path / "tools"
    tools.mkdir()
    monkeypatch.setenv("PATH", f"{tools}:/bin")
    monkeypatch.delenv("MMVMAMBA_WITH_CUDA", raising=False)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.delenv("CUDA_HOME", raising=False)

    def taken() -> list[str]:
        calls.clear()
        bootstrap.set_up(checkout / ".venv")
        first = list(calls)
        bootstrap.set_up(checkout / ".venv")
        assert calls == first  # the second time nothing
        return first

    taken()
    write_command(tools, "nvcc", "echo compute_90\n")  # of no use without a GPU
    assert taken() == []
    write_command(tools, "nvidia-smi", "echo 9.0\n")
    assert taken() == ["extension"]
    (tools / "nvcc").unlink()
    assert taken() == ["extension"]
    for name, value in (("TORCH_CUDA_ARCH_LIST", "8.0"), ("MMVMAMBA_WITH_CUDA", "1"), ("MMVMAMBA_WITH_CUDA", "0")):
        monkeypatch.setenv(name, value)
        assert taken() == ["extension"]


def test_missing_cuda_kernels_are_told_on_the_screen(bootstrap, tmp_path, monkeypatch, capfd):
    line = "mmvmamba: building WITHOUT the CUDA kernels: the nvcc in /cuda is that of CUDA 12"
    write_command(tmp_path / "bin", "python", f'[ "$1" != setup.py ] || echo "noise\n{line}\nnoise"\n')
    bootstrap.install_package(tmp_path, tmp_path / "log")
    said = capfd.readouterr().out
    assert f"[setup 6/6] {line.removeprefix('mmvmamba: ')}\n" in said and "noise" not in said


@pytest.mark.parametrize(
    ("log", "message"),
    [
        ("ERROR: Could not install: [Errno 28] No space left on device", "the disk is full"),
        ("WARNING: Retrying (Retry(total=4)) after ... No matching distribution found for torch==2.11.0", "network"),
        ("ERROR: No matching distribution found for torch==2.11.0", "has no torch==2.11.0 for this Python"),
        ("g++: fatal error: Killed signal terminated program cc1plus", "MAX_JOBS=1"),
        ("error: expected ';'", "the command failed"),
    ],
)
def test_a_failure_is_explained(bootstrap, log, message):
    assert message in bootstrap.explain_failure(log)


def test_output_goes_to_the_log_and_a_failure_to_the_screen(bootstrap, tmp_path, capfd):
    log = tmp_path / "log"
    bootstrap.run_logged(2, [sys.executable, "-c", "import os; print(os.environ['X'])"], log, {"X": "quiet"})
    assert capfd.readouterr() == ("", "")
    with pytest.raises(bootstrap.SetupError, match=r"step 5 of 6: the command failed, see above"):
        bootstrap.run_logged(5, [sys.executable, "-c", "raise SystemExit('something odd')"], log, {})
    assert "something odd" in capfd.readouterr().err
    with pytest.raises(bootstrap.SetupError, match=r"step 5 of 6: the disk is full"):
        bootstrap.run_logged(5, [sys.executable, "-c", "raise SystemExit('No space left on device')"], log, {})
    assert capfd.readouterr() == ("", "")
    assert "quiet" in log.read_text()


@pytest.fixture
def checkout(bootstrap, tmp_path, monkeypatch):
    """A small checkout with a finished set-up."""
    files = {
        "requirements/lock.txt": "torch==2.11.0\n",
        "setup.py": "",
        "pyproject.toml": "",
        "mmvmamba/version.py": "",
        "csrc/a.cpp": "1",
        "mmvmamba/_C.json": "{}",
        "mmvmamba/_C.abi3.so": "",
        ".venv/bin/pip": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    write_command(tmp_path / ".venv" / "bin", "python", "echo 3.11 in /usr\n")
    monkeypatch.setattr(bootstrap, "ROOT", tmp_path)
    monkeypatch.delenv("MMVMAMBA_PYTHON", raising=False)
    bootstrap.note_state(tmp_path / ".venv", bootstrap.wanted_state("3.11 in /usr"))
    return tmp_path


@pytest.fixture
def calls(bootstrap, checkout, monkeypatch):
    """The large steps that a set-up takes, by name; they do nothing."""
    taken = []

    def make_environment(venv, interpreter, log):
        taken.append("new")
        write_command(venv / "bin", "python", f"echo {interpreter.identity}\n")

    interpreters = {None: ("python3.11", (3, 11, 7)), "python3.11": ("python3.11", (3, 11, 9))}
    interpreters["python3.12"] = ("python3.12", (3, 12, 1))
    monkeypatch.setattr(
        bootstrap, "find_python", lambda chosen: bootstrap.Interpreter(*interpreters[chosen], home="/usr")
    )
    monkeypatch.setattr(bootstrap, "check_disk", lambda place, need: None)
    monkeypatch.setattr(bootstrap, "check_compiler", lambda: None)
    monkeypatch.setattr(bootstrap, "make_environment", make_environment)
    monkeypatch.setattr(bootstrap, "install_environment", lambda *args: taken.append("environment"))
    monkeypatch.setattr(bootstrap, "install_package", lambda *args: taken.append("extension"))
    return taken


@pytest.mark.parametrize(
    ("change", "stale"),
    [
        (None, set()),
        ("csrc/a.cpp", {"extension"}),
        ("csrc/new.h", {"extension"}),
        ("setup.py", {"extension"}),
        ("requirements/lock.txt", {"environment"}),
        ("README.md", set()),
    ],
)
def test_only_what_changed_is_done_again(bootstrap, checkout, calls, change, stale):
    if change is not None:
        (checkout / change).write_text("changed")
    done, wanted = bootstrap.read_state(checkout / ".venv"), bootstrap.wanted_state("3.11 in /usr")
    assert {key for key in wanted if done.get(key) != wanted[key]} == stale
    bootstrap.set_up(checkout / ".venv")
    assert calls == (["environment", "extension"] if "environment" in stale else sorted(stale))
    calls.clear()
    bootstrap.set_up(checkout / ".venv")
    assert calls == []


def test_a_moved_checkout_gets_a_new_environment(bootstrap, checkout, calls, tmp_path_factory, monkeypatch, capsys):
    """Installed scripts and the editable install name the old folder, which may still be there."""
    moved = tmp_path_factory.mktemp("moved") / "copy"
    shutil.copytree(checkout, moved)
    monkeypatch.setattr(bootstrap, "ROOT", moved)
    bootstrap.set_up(moved / ".venv")
    assert calls == ["new", "environment", "extension"]
    assert f"{moved / '.venv'} is made anew: it was made in {checkout}\n" in capsys.readouterr().out
    calls.clear()
    bootstrap.set_up(moved / ".venv")
    assert calls == []


def test_another_chosen_python_gets_a_new_environment(bootstrap, checkout, calls, monkeypatch, capsys):
    monkeypatch.setenv("MMVMAMBA_PYTHON", "python3.11")  # only a later bug-fix release
    bootstrap.set_up(checkout / ".venv")
    assert calls == []
    monkeypatch.setenv("MMVMAMBA_PYTHON", "python3.12")
    bootstrap.set_up(checkout / ".venv")
    assert calls == ["new", "environment", "extension"]
    said = capsys.readouterr().out
    assert "is made anew: it was made with Python 3.11 in /usr, wanted is 3.12 in /usr\n" in said
    calls.clear()
    monkeypatch.delenv("MMVMAMBA_PYTHON")  # without a wish the one at hand is kept
    bootstrap.set_up(checkout / ".venv")
    assert calls == []


@pytest.mark.parametrize(
    ("python", "pip", "reason"),
    [
        ("echo 3.13 in /usr\n", True, "it was made with Python 3.11 in /usr, wanted is 3.13 in /usr"),
        ("exit 127\n", True, "its Python cannot be started"),
        ("echo 3.11 in /usr\n", False, "it is not complete"),
    ],
    ids=["replaced-by-the-system", "broken", "interrupted"],
)
def test_a_broken_environment_is_made_anew(bootstrap, checkout, calls, capsys, python, pip, reason):
    write_command(checkout / ".venv" / "bin", "python", python)
    if not pip:
        (checkout / ".venv" / "bin" / "pip").unlink()
    bootstrap.set_up(checkout / ".venv")
    assert calls == ["new", "environment", "extension"]
    assert f"is made anew: {reason}\n" in capsys.readouterr().out


def test_an_interrupted_set_up_goes_on_in_its_environment(bootstrap, checkout, calls):
    bootstrap.note_state(checkout / ".venv", {"folder": str(checkout), "python": "3.11 in /usr"})
    bootstrap.set_up(checkout / ".venv")
    assert calls == ["environment", "extension"]


def test_the_identity_of_an_environment_is_that_of_its_interpreter(bootstrap, tmp_path):
    """Asked in two ways: before a virtual environment is made, and of the one made."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    (tmp_path / "pyvenv.cfg").write_text(f"home = {Path(sys.base_prefix) / 'bin'}\n")
    interpreter, _ = bootstrap.probe(sys.executable)
    assert bootstrap.venv_identity(tmp_path) == interpreter.identity
    assert not Path(interpreter.path).is_relative_to(Path(sys.prefix)) or sys.prefix == sys.base_prefix
    assert bootstrap.venv_identity(tmp_path / "nothing") == ""


@pytest.mark.parametrize(
    ("remove", "left"),
    [
        ("mmvmamba/_C.abi3.so", {"folder", "python", "environment"}),
        ("mmvmamba/_C.json", {"folder", "python", "environment"}),
        (".venv/mmvmamba-setup.json", set()),
    ],
)
def test_a_note_does_not_count_where_its_thing_is_gone(bootstrap, checkout, remove, left):
    (checkout / remove).unlink()
    assert set(bootstrap.read_state(checkout / ".venv")) == left


def test_a_broken_note_is_no_note(bootstrap, checkout):
    (checkout / ".venv" / "mmvmamba-setup.json").write_text('{"environment": ')
    assert bootstrap.read_state(checkout / ".venv") == {}


@pytest.mark.parametrize(
    ("version", "header", "message"),
    [
        ((3, 9, 2), True, r"is older than Python 3\.10: apt-get install .*"),
        ((3, 11, 2), False, r"has no Python\.h, which compiling needs: apt-get install python3\.11-dev"),
    ],
    ids=["too-old", "no-headers"],
)
def test_the_command_ends_with_one_line_and_exit_code_1(root, tmp_path, version, header, message):
    """A whole run where no suitable Python exists: it ends before anything is made or fetched.

    The checkout is a copy, so nothing here is touched.
    """
    for name in ("scripts/bootstrap.py", "requirements/lock.txt", "setup.py", "pyproject.toml", "mmvmamba/version.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((root / name).read_bytes())
    commands = tmp_path / "commands"
    fake_python(commands, "python3", version, header=header)
    write_command(commands, "g++", "exit 0\n")
    answer = subprocess.run(
        [sys.executable, str(tmp_path / "scripts" / "bootstrap.py")],
        env={"PATH": f"{commands}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 1
    assert re.fullmatch(rf"mmvmamba setup: .*{message}\n", answer.stderr)
    assert not (tmp_path / ".venv").exists()


def test_ci_fails_where_one_of_its_commands_does(root, tmp_path):
    for failing, called in (
        ("lint", "lint\n"),
        ("test", "lint\ntest\n"),
        ("docs", "lint\ntest\ndocs\n"),
        ("check-gpu-code", "lint\ntest\ndocs\ncheck-gpu-code\n"),
        ("bench-gate", "lint\ntest\ndocs\ncheck-gpu-code\nbench-gate\n"),
        ("nothing", "lint\ntest\ndocs\ncheck-gpu-code\nbench-gate\n"),
    ):
        write_command(tmp_path, "chromium", "exit 0\n")  # one is there, so that none is installed
        log = tmp_path / failing
        write_command(tmp_path, "make", f'echo "$1" >> {log}\n[ "$1" != {failing} ]\n')
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
        answer = subprocess.run([str(root / ".ci" / "run")], env=environment, check=False)
        assert (answer.returncode != 0) == (failing != "nothing")
        assert log.read_text() == called


def test_every_line_of_the_lock_is_exact(root):
    pattern = re.compile(r"[A-Za-z0-9_.-]+==[A-Za-z0-9_.!+-]+( ; .+)?")
    lines = [line for line in (root / "requirements" / "lock.txt").read_text().splitlines() if line[:1] != "#"]
    assert not [line for line in lines if not pattern.fullmatch(line)]
    pinned = {line.split("==")[0].lower() for line in lines}
    assert {"torch", "onedl-mmcv", "onedl-mmdetection", "onedl-mmsegmentation", "onedl-mmpretrain", "pip"} <= pinned


def test_extras_and_lock_agree(root):
    lock = (root / "requirements" / "lock.txt").read_text()
    metadata = (root / "pyproject.toml").read_text()
    exact = re.findall(r'"([A-Za-z0-9-]+==[0-9.]+)"', metadata)
    assert len(exact) >= 8  # five packages of the stack, three linters
    assert not [line for line in exact if f"{line}\n" not in lock]
