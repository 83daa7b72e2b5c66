"""Set up ``.venv`` for this checkout: the pinned stack of ``requirements/lock.txt`` and the compiled extension.

Called by ``make install`` and, through it, by every other make target. Needs nothing but the standard library, and only
syntax of Python 3.7, so that an old ``python3`` can still start it and is told what to install. What was done is noted
in ``.venv/mmvmamba-setup.json``; a second call compares it with what is there and returns at once. A ``.venv`` that was
made in another folder or with another interpreter is made anew, because paths of both are written into it.

| variable | meaning |
|---|---|
| ``MMVMAMBA_PYTHON`` | the interpreter ``.venv`` must have, instead of the present one or the first suitable on PATH |
| ``CXX`` | the C++ compiler; default: g++ |
| ``MAX_JOBS`` | compilations at the same time; default: all cores, as far as memory allows |
| ``MMVMAMBA_WITH_CUDA`` | as in setup.py; default: CUDA kernels for the GPUs of this machine, if they can be built |
| ``TORCH_CUDA_ARCH_LIST`` | as in setup.py; default: the GPUs of this machine |
| ``CUDA_HOME`` | as in setup.py; default: the toolkit of the nvcc on PATH |
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Mapping, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
OLDEST = (3, 10)
# The first that suits is taken: 3.11 is what the lock file was made with.
CANDIDATES = ("python3.11", "python3.12", "python3.13", "python3.10", "python3.14", "python3")
# Measured 2026-11-20 with `du -sh .venv`: 5.8 GB; downloads and pip's cache of them need about as much again.
NEED_GB = 12.0
NEED_TEMP_GB = 4.0
GB_PER_JOB = 2.0  # memory of one compilation of onedl-mmcv, rounded up
STEPS = 6
OLDEST_GPU = (8, 0)  # must agree with OLDEST_CUDA_ARCH of setup.py
ASK_SECONDS = 30  # for nvidia-smi, which may hang with a broken driver, and nvcc
UNEXPLAINED = "the command failed, see above"
DEBIAN = "apt-get install python3 python3-venv python3-dev"

PROBE = """
import json, sys, sysconfig, os
missing = []
for name in ("venv", "ensurepip"):
    try:
        __import__(name)
    except ImportError:
        missing.append(name)
header = os.path.join(sysconfig.get_paths()["include"], "Python.h")
print(json.dumps({
    "version": list(sys.version_info[:3]),
    "home": os.path.realpath(sys.base_prefix),
    # not one inside a virtual environment, which may be the .venv that is about to be cleared
    "executable": getattr(sys, "_base_executable", None) or sys.executable,
    "missing": missing,
    "header": os.path.isfile(header),
}))
"""
# The same facts as `Interpreter.identity`, of the Python in .venv; without site, whose .pth files may be slow.
IDENTITY = """
import os, sys
print("{}.{} in {}".format(*sys.version_info[:2], os.path.realpath(sys.base_prefix)))
"""


class SetupError(Exception):
    """The set-up cannot go on; the message is one line that says what to do."""


class Interpreter(NamedTuple):
    """A Python that can make the environment."""

    path: str
    version: tuple[int, ...]
    home: str

    @property
    def identity(self) -> str:
        """What must not change under a virtual environment made with it (a bug-fix release may)."""
        return "{}.{} in {}".format(*self.version[:2], self.home)


def say(step: int, text: str) -> None:
    """Print one progress line."""
    print("[setup {}/{}] {}".format(step, STEPS, text), flush=True)


# --- what the machine offers ---------------------------------------------------------------------------------------


def probe(command: str) -> tuple[Interpreter | None, str | None]:
    """Ask an interpreter for its version and parts.

    Returns:
        The interpreter if it suits, else None and why not (None and None: there is no such interpreter).
    """
    path = shutil.which(command)
    if path is None:
        return None, None
    answer = subprocess.run([path, "-c", PROBE], capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        return None, None  # e.g. a pyenv shim of a version that is not installed
    facts = json.loads(answer.stdout)
    version = tuple(facts["version"])
    name = "{} (Python {})".format(path, ".".join(map(str, version)))
    minor = "python{}.{}".format(*version[:2])
    if version < OLDEST:
        return None, "{} is older than Python {}.{}: {}".format(name, *OLDEST, DEBIAN)
    if facts["missing"]:
        return None, "{} has no {}: apt-get install {}-venv".format(name, " and no ".join(facts["missing"]), minor)
    if not facts["header"]:
        return None, "{} has no Python.h, which compiling needs: apt-get install {}-dev".format(name, minor)
    return Interpreter(facts["executable"], version, facts["home"]), None


def find_python(chosen: str | None) -> Interpreter:
    """Return the interpreter named by ``chosen``, or the first suitable one on PATH.

    Raises:
        SetupError: There is none; the message names the most promising one and what it lacks.
    """
    problems = []
    for command in (chosen,) if chosen else CANDIDATES:
        interpreter, problem = probe(command)
        if interpreter is not None:
            return interpreter
        if problem is not None:
            problems.append(problem)
    if chosen:
        raise SetupError(problems[0] if problems else "MMVMAMBA_PYTHON={!r} cannot be started".format(chosen))
    # One that lacks a part is closer to the goal than one that is too old.
    problems.sort(key=lambda problem: "is older" in problem)
    raise SetupError(problems[0] if problems else "no Python was found on PATH: " + DEBIAN)


def check_compiler(path: str | None = None) -> None:
    """Raise `SetupError` unless there is a C++ compiler on ``path`` (default: PATH)."""
    for command in (shlex.split(os.environ.get("CXX", "")) or ["g++"])[:1]:
        if shutil.which(command, path=path) is None:
            raise SetupError(
                "there is no C++ compiler ({}): apt-get install g++ (or set CXX to the one you have)".format(command)
            )


def check_disk(place: Path, need_gb: float) -> None:
    """Raise `SetupError` if the file system of ``place`` has less than ``need_gb`` free."""
    free = shutil.disk_usage(str(place)).free / 1e9
    if free < need_gb:
        raise SetupError(
            "{:.1f} GB are free under {}, but about {:.0f} GB are needed: make room there{}".format(
                free, place, need_gb, "" if place == ROOT else " or set TMPDIR to a larger place"
            )
        )


def compile_jobs(environ: Mapping[str, str]) -> int:
    """Compilations at the same time: ``MAX_JOBS``, or all cores as far as memory allows."""
    text = environ.get("MAX_JOBS", "").strip()
    if text:
        if not text.isdigit() or int(text) < 1:
            raise SetupError("MAX_JOBS={!r} is not a number >= 1".format(text))
        return int(text)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        meminfo = Path("/proc/meminfo").read_text()
    except OSError:
        return cores
    found = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo, re.MULTILINE)
    if found is None:
        return cores
    return max(1, min(cores, int(int(found.group(1)) / 1e6 / GB_PER_JOB)))


# --- what was done before ------------------------------------------------------------------------------------------


def hash_files(paths: list[Path]) -> str:
    """One hash over names and contents."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def venv_identity(venv: Path) -> str:
    """`Interpreter.identity` of the Python in ``venv``; empty where it cannot be started."""
    try:
        answer = subprocess.run(
            [str(venv / "bin" / "python"), "-I", "-S", "-c", IDENTITY],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            universal_newlines=True,
            check=False,
        )
    except OSError:
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""


def wanted_state(identity: str) -> dict[str, str]:
    """What must be noted as done for the set-up not to be repeated.

    Args:
        identity: `Interpreter.identity` of the Python that ``.venv`` shall have.
    """
    csrc = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    build = [ROOT / "setup.py", ROOT / "pyproject.toml", ROOT / "mmvmamba" / "version.py"]
    return {
        "folder": str(ROOT),
        "python": identity,
        "environment": hash_files([ROOT / "requirements" / "lock.txt"]),
        "extension": "{} {}".format(hash_files([*csrc, *build]), cuda_choice(os.environ)),
    }


def read_state(venv: Path) -> dict[str, str]:
    """What is noted as done in ``venv``; only what is still there counts."""
    try:
        state = json.loads((venv / "mmvmamba-setup.json").read_text())
    except (OSError, ValueError):
        return {}
    package = ROOT / "mmvmamba"
    if not ((package / "_C.json").is_file() and any(package.glob("_C.*.so"))):
        state.pop("extension", None)
    return state


def note_state(venv: Path, state: dict[str, str]) -> None:
    """Write down what was done, in one step so that an interruption leaves no half a note."""
    draft = venv / "mmvmamba-setup.json.new"
    draft.write_text(json.dumps(state, indent=2) + "\n")
    draft.replace(venv / "mmvmamba-setup.json")


def outdated(venv: Path, present: str, done: dict[str, str], wanted: dict[str, str]) -> str | None:
    """Return why ``venv`` cannot be brought up to date in place, or None.

    Args:
        present: `venv_identity` of it.
        done: What is noted in it; nothing is, where somebody else made it.
        wanted: What shall be noted.
    """
    if not present:
        return "its Python cannot be started"
    if not (venv / "bin" / "pip").exists():  # comes last when a virtual environment is made
        return "it is not complete"
    if done.get("folder", wanted["folder"]) != wanted["folder"]:
        return "it was made in {}".format(done["folder"])
    for python in (done.get("python", present), present):
        if python != wanted["python"]:
            return "it was made with Python {}, wanted is {}".format(python, wanted["python"])
    return None


# --- the work ------------------------------------------------------------------------------------------------------


def explain_failure(log: str) -> str:
    """Turn the end of a log into one line that says what to do."""
    if "No space left on device" in log or "Disk quota exceeded" in log:
        return "the disk is full: free about {:.0f} GB, or set TMPDIR to a larger place, and repeat".format(NEED_GB)
    network = r"Retrying \(Retry|NewConnectionError|NameResolutionError|Name or service not known|ReadTimeoutError"
    if re.search(network, log):
        return "the package index cannot be reached: check the network (or pip's index and proxy settings) and repeat"
    if "internal compiler error: Killed" in log or "Killed signal terminated program" in log:
        return "the compiler ran out of memory: repeat with MAX_JOBS=1"
    missing = re.search(r"No matching distribution found for (\S+)", log)
    if missing:
        return (
            "the package index has no {} for this Python and machine: try another Python (MMVMAMBA_PYTHON=...)".format(
                missing.group(1)
            )
        )
    return UNEXPLAINED


def run_logged(step: int, command: list[str], log: Path, extra_env: dict[str, str]) -> str:
    """Run a command with its output in ``log``, printing a sign of life every half minute; return the output.

    Raises:
        SetupError: The command failed; where the reason is not clear, the last lines of its output were printed.
    """
    start = sign = time.monotonic()
    with log.open("a+", encoding="utf-8", errors="replace") as out:
        out.seek(0, os.SEEK_END)
        begin = out.tell()
        out.write("$ {}\n".format(" ".join(command)))
        out.flush()
        process = subprocess.Popen(
            command, cwd=str(ROOT), env={**os.environ, **extra_env}, stdout=out, stderr=subprocess.STDOUT
        )
        try:
            while process.poll() is None:
                time.sleep(0.1)
                if time.monotonic() - sign >= 30:
                    sign = time.monotonic()
                    say(step, "... {:.0f} s (details: {})".format(sign - start, log))
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            raise
        out.seek(begin)
        text = out.read()
    if process.returncode != 0:
        reason = explain_failure(text)
        if reason == UNEXPLAINED:
            print("\n".join(text.splitlines()[-15:]), file=sys.stderr)
        raise SetupError("step {} of {}: {} (log: {})".format(step, STEPS, reason, log))
    return text


def cuda_environment(torch_cuda: str) -> dict[str, str]:
    """Hide the GPU from onedl-mmcv's build unless there is an nvcc of PyTorch's CUDA; else it would stop half-way.

    Args:
        torch_cuda: ``torch.version.cuda``, e.g. ``"13.0"``.
    """
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        answer = subprocess.run([nvcc, "--version"], stdout=subprocess.PIPE, universal_newlines=True, check=False)
        release = re.search(r"release (\d+)\.", answer.stdout)
        if release is not None and release.group(1) == torch_cuda.split(".")[0]:
            return {}
    return {"CUDA_VISIBLE_DEVICES": ""}


def kernel_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Which CUDA kernels this checkout compiles: for the GPUs at hand, and none where there is no GPU to run them.

    A checkout is for the machine it is on; wheels are built for many GPUs by setup.py itself, which never asks one.
    GPUs older than our kernels are left out; one newer than nvcc knows gets the newest code that nvcc can make.
    ``MMVMAMBA_WITH_CUDA`` or ``TORCH_CUDA_ARCH_LIST`` in the environment decide instead.
    """
    if environ.get("MMVMAMBA_WITH_CUDA", "").strip() or environ.get("TORCH_CUDA_ARCH_LIST", "").strip():
        return {}
    smi = shutil.which("nvidia-smi", path=environ.get("PATH"))
    answer = "" if smi is None else answer_of([smi, "--query-gpu=compute_cap", "--format=csv,noheader"])
    gpus = {(int(a), int(b)) for a, b in re.findall(r"^(\d+)\.(\d)\s*$", answer, re.MULTILINE)}
    gpus = {gpu for gpu in gpus if gpu >= OLDEST_GPU}
    if not gpus:
        return {"MMVMAMBA_WITH_CUDA": "0"}
    nvcc = find_nvcc(environ)
    listed = "" if nvcc is None else answer_of([nvcc, "--list-gpu-arch"])
    known = [(int(a), int(b)) for a, b in re.findall(r"^compute_(\d+)(\d)\s*$", listed, re.MULTILINE)]
    newest = max(known) if known else max(gpus)
    archs = ["{}.{}".format(*gpu) for gpu in sorted(gpus) if gpu <= newest]
    if max(gpus) > newest:  # the driver compiles the intermediate form for it
        archs = [*(arch for arch in archs if arch != "{}.{}".format(*newest)), "{}.{}+PTX".format(*newest)]
    return {"TORCH_CUDA_ARCH_LIST": ";".join(archs)}


def answer_of(command: list[str]) -> str:
    """What a command prints; nothing where it fails or hangs."""
    try:
        return subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            universal_newlines=True,
            check=True,
            timeout=ASK_SECONDS,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def find_nvcc(environ: Mapping[str, str]) -> str | None:
    """The nvcc that setup.py will use, None where there is none."""
    home = environ.get("CUDA_HOME", "").strip()
    return shutil.which("nvcc", path=str(Path(home) / "bin") if home else environ.get("PATH"))


def cuda_choice(environ: Mapping[str, str]) -> str:
    """What decides about the CUDA kernels, as a text: another one means another extension."""
    variables = {name: environ.get(name, "").strip() for name in ("MMVMAMBA_WITH_CUDA", "TORCH_CUDA_ARCH_LIST")}
    variables.update(kernel_environment(environ))
    if variables["MMVMAMBA_WITH_CUDA"] == "0":
        return "without CUDA"
    # One installed after a set-up that found none counts.
    variables["nvcc"] = find_nvcc(environ) or ""
    return " ".join("{}={}".format(name, value) for name, value in sorted(variables.items()))


def make_environment(venv: Path, interpreter: Interpreter, log: Path) -> None:
    """Step 2, first half: an empty virtual environment; one that is there is deleted."""
    say(2, "creating {} with {}".format(venv, interpreter.path))
    run_logged(2, [interpreter.path, "-m", "venv", "--clear", str(venv)], log, {})
    # At once, so that an interrupted set-up goes on in this environment.
    note_state(venv, {"folder": str(ROOT), "python": interpreter.identity})


def install_environment(venv: Path, log: Path) -> None:
    """Steps 2 to 5: every package of the lock file; what is there in another version is replaced."""
    lock = str(ROOT / "requirements" / "lock.txt")
    python = str(venv / "bin" / "python")
    path = {"PATH": "{}{}{}".format(venv / "bin", os.pathsep, os.environ.get("PATH", ""))}
    jobs = compile_jobs(os.environ)
    pip = [python, "-m", "pip", "install", "--no-build-isolation", "--constraint", lock]

    say(2, "installing the build tools")
    run_logged(2, [*pip[:4], "--constraint", lock, "pip", "setuptools", "wheel", "ninja", "psutil"], log, path)
    say(3, "installing PyTorch (about 3 GB to fetch the first time)")
    run_logged(3, [*pip, "torch", "torchvision"], log, path)
    say(4, "compiling onedl-mmcv with {} job(s): about 8 minutes on 2 cores, once; pip keeps it".format(jobs))
    build = {"MMCV_WITH_OPS": "1", "FORCE_CUDA": "0", "MAX_JOBS": str(jobs), **path}
    build.update(cuda_environment(ask(python, "import torch; print(torch.version.cuda)")))
    run_logged(4, [*pip, "onedl-mmcv"], log, build)
    say(5, "installing the rest of requirements/lock.txt")
    run_logged(5, [*pip, "--requirement", lock], log, path)
    folder = Path(ask(python, "import sysconfig; print(sysconfig.get_paths()['platlib'])"))
    if "headless = True" not in (folder / "cv2" / "version.py").read_text(encoding="utf-8"):
        # Two wheels share the folder cv2 and the last one wins; only this one runs without X libraries.
        headless = [*pip, "--force-reinstall", "--no-deps", "opencv-python-headless"]
        run_logged(5, headless, log, path)
    run_logged(5, [python, "-m", "pip", "check"], log, path)


def ask(python: str, code: str) -> str:
    """What ``code`` prints under the interpreter ``python``."""
    return subprocess.run(
        [python, "-c", code], stdout=subprocess.PIPE, universal_newlines=True, check=True
    ).stdout.strip()


def install_package(venv: Path, log: Path) -> None:
    """Step 6: the extension beside the sources, and mmvmamba in ``.venv`` pointing to this folder."""
    python = str(venv / "bin" / "python")
    path = {"PATH": "{}{}{}".format(venv / "bin", os.pathsep, os.environ.get("PATH", ""))}
    say(6, "compiling and installing mmvmamba")
    # Not left to pip, which compiles in a fresh folder each time: this one recompiles only what changed.
    build = {"MAX_JOBS": str(compile_jobs(os.environ)), **kernel_environment(os.environ), **path}
    told = run_logged(6, [python, "setup.py", "build_ext", "--inplace"], log, build)
    for line in re.findall(r"^mmvmamba: (building WITHOUT .*)$", told, re.MULTILINE):
        say(6, line)
    editable = [python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e", "."]
    run_logged(6, editable, log, {"MMVMAMBA_BUILD": "0", **path})


def set_up(venv: Path) -> None:
    """Do what is not done yet.

    Raises:
        SetupError: Something is missing or failed.
    """
    chosen = os.environ.get("MMVMAMBA_PYTHON", "").strip()
    interpreter = find_python(chosen) if chosen else None
    present = venv_identity(venv)
    wanted = wanted_state(interpreter.identity if interpreter else present)
    done = read_state(venv)
    reason = outdated(venv, present, done, wanted)
    if reason is None and all(done.get(key) == value for key, value in wanted.items()):
        return
    start = time.monotonic()
    say(1, "checking Python, compiler and disk")
    check_compiler()
    log = ROOT / ".setup.log"
    log.write_text("")
    if reason is not None:
        interpreter = interpreter or find_python(None)
        wanted = wanted_state(interpreter.identity)
        done = {}
    if done.get("environment") != wanted["environment"]:
        if not list(venv.glob("lib/*/site-packages/torch")):
            check_disk(ROOT, NEED_GB)
            check_disk(Path(tempfile.gettempdir()), NEED_TEMP_GB)
        if interpreter is not None and reason is not None:
            if venv.exists():
                say(2, "{} is made anew: {}".format(venv, reason))
            make_environment(venv, interpreter, log)
        install_environment(venv, log)
        note_state(venv, {key: wanted[key] for key in ("folder", "python", "environment")})
    install_package(venv, log)
    note_state(venv, wanted)
    say(6, "done in {:.0f} s".format(time.monotonic() - start))


def main() -> int:
    """Set up; returns the exit code."""
    if not sys.platform.startswith("linux"):
        print("mmvmamba setup: only Linux is set up automatically; see README.md for pip", file=sys.stderr)
        return 1
    try:
        with (ROOT / ".setup.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print("[setup] another set-up of this folder is running; waiting for it", flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
            set_up(ROOT / ".venv")
    except SetupError as error:
        print("mmvmamba setup: {}".format(error), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("mmvmamba setup: interrupted; the next call goes on from here", file=sys.stderr)
        return 130
    except OSError as error:
        print("mmvmamba setup: {}: check the disk and the permissions of {}".format(error, ROOT), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
