"""Build ``mmvmamba._C``, the compiled kernels, as one binary for every PyTorch >= 2.10 and CPython >= 3.10.

Everything else about the package stands in pyproject.toml. The kernels are registered with PyTorch's dispatcher through
the LibTorch stable ABI, so nothing here ties the binary to the PyTorch it is built with, except that CUDA kernels need
one for the same major version of CUDA. No network, no GPU and no CUDA toolkit are needed. Build isolation (plain ``pip
install .``) hides PyTorch; it is then looked for beside pip, so that no second one is downloaded. Where the extension
cannot be built, the package installs without it and uses the plain PyTorch path; one message says so (pip shows it with
``-v``).

Environment variables read here, and nowhere else:

| variable | values | meaning |
|---|---|---|
| ``MMVMAMBA_BUILD`` | ``auto`` (default), ``0``, ``1`` | the extension: if it can be built, never, required |
| ``MMVMAMBA_WITH_CUDA`` | ``auto`` (default), ``0``, ``1`` | the CUDA kernels: if they can be built, never, required |
| ``CXX`` | a command | the C++ compiler; else the one that Python was built with |
| ``CUDA_HOME`` | a folder | the CUDA toolkit; else that of the nvcc on PATH |
| ``TORCH_CUDA_ARCH_LIST`` | e.g. ``8.0;9.0+PTX`` | GPU generations, also by name (``Hopper``); no live GPU is asked |
| ``MAX_JOBS`` | a number >= 1 | compilations at the same time (needs ninja) |
| ``DEBUG`` | ``0`` (default), ``1`` | ``1``: no optimisation, debug symbols, asserts on |
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import setuptools
from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
NAME = "mmvmamba._C"
TORCH_MIN = "2.10"
# The same release as a number of LibTorch's stable ABI: later additions are hidden from our sources.
TORCH_TARGET_VERSION = "0x020a000000000000"
PYTHON_TAG = "cp310"  # must agree with requires-python in pyproject.toml
SETUPTOOLS_MIN = 77  # the first that reads the licence fields of pyproject.toml
DEFAULT_CUDA_ARCHS = "8.0;8.6;8.9;9.0;10.0+PTX"
OLDEST_CUDA_ARCH = 8.0  # tensor cores that read tf32, min.NaN
# PyTorch's own names of generations, which its BuildExtension replaces by numbers.
CUDA_ARCH_NAMES = "Kepler|Maxwell|Pascal|Volta|Turing|Ampere|Ada|Hopper|Blackwell"
NVCC_SECONDS = 60  # it answers in well under a second; the rest is for a slow network disk
SOURCE_SUFFIXES = (".cpp", ".cu", ".h", ".cuh")


class OptionError(ValueError):
    """An environment variable of the build has a value that means nothing."""


@dataclass(frozen=True)
class Options:
    """What the environment asks of the build; see the table at the head of this file."""

    build: str  # "auto" | "never" | "always"
    cuda: str  # "auto" | "never" | "always"
    cuda_archs: str  # as it stands in the environment: who builds no CUDA kernels may have anything there
    max_jobs: int | None
    debug: bool


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit that can compile our kernels, and the GPU generations it compiles them for."""

    home: Path
    archs: tuple[str, ...]


def _choice(env: Mapping[str, str], name: str, values: Mapping[str, Any], default: str) -> Any:
    text = env.get(name, "").strip().lower() or default
    if text not in values:
        raise OptionError(f"{name}={env[name]!r} is not understood: use one of {', '.join(map(repr, values))}")
    return values[text]


def read_options(env: Mapping[str, str]) -> Options:
    """Read the build options.

    Raises:
        OptionError: A variable has an unknown value; the message names it and the allowed ones.
    """
    jobs = env.get("MAX_JOBS", "").strip()
    if jobs and not (jobs.isascii() and jobs.isdigit() and int(jobs) >= 1):
        raise OptionError(f"MAX_JOBS={jobs!r} is not a number >= 1: unset it or set it to the number of cores to use")
    return Options(
        build=_choice(env, "MMVMAMBA_BUILD", {"auto": "auto", "0": "never", "1": "always"}, "auto"),
        cuda=_choice(env, "MMVMAMBA_WITH_CUDA", {"auto": "auto", "0": "never", "1": "always"}, "auto"),
        cuda_archs=env.get("TORCH_CUDA_ARCH_LIST", "").strip() or DEFAULT_CUDA_ARCHS,
        max_jobs=int(jobs) if jobs else None,
        debug=_choice(env, "DEBUG", {"0": False, "1": True}, "0"),
    )


def parse_cuda_archs(text: str) -> tuple[str, ...]:
    """``"8.0;Hopper"`` (or separated by spaces or commas) -> ``("8.0", "Hopper")``.

    ``All`` and ``Common``, which PyTorch's own build knows and its BuildExtension refuses, mean our default list.

    Raises:
        OptionError: A part is neither a number nor a name of a generation.
    """
    archs: list[str] = []
    for arch in filter(None, re.split(r"[;,\s]+", text)):
        if arch in ("All", "Common"):
            archs += DEFAULT_CUDA_ARCHS.split(";")
        elif re.fullmatch(rf"\d{{1,2}}\.\d[af]?(\+PTX)?|({CUDA_ARCH_NAMES})(\+Tegra|\+Tesla)?", arch):
            archs.append(arch)
        else:
            raise OptionError(
                f"TORCH_CUDA_ARCH_LIST={text!r}: {arch!r} is not a GPU generation; write them like '8.0;9.0+PTX'"
            )
    return tuple(dict.fromkeys(archs))


def supported_cuda_archs(text: str, nvcc_archs: Iterable[str]) -> tuple[str, ...]:
    """Our default list without what this nvcc does not know, the newest of the rest with PTX; any other list as it is.

    Args:
        text: As in ``TORCH_CUDA_ARCH_LIST``.
        nvcc_archs: What ``nvcc --list-gpu-arch`` prints, e.g. ``compute_90``.

    Raises:
        OptionError: A generation has not the instructions that the kernels use, or nothing is left.
    """
    archs = parse_cuda_archs(text)
    for arch in archs:
        if re.match(r"\d", arch) and float(arch.split("+")[0].rstrip("af")) < OLDEST_CUDA_ARCH:
            raise OptionError(
                f"TORCH_CUDA_ARCH_LIST={text!r}: the CUDA kernels need {OLDEST_CUDA_ARCH} (Ampere) or newer, {arch!r} "
                "is older: leave it out (the Triton backend may serve that GPU)"
            )
    if text != DEFAULT_CUDA_ARCHS:
        return archs
    known = set(nvcc_archs)
    kept = [arch.removesuffix("+PTX") for arch in archs]
    kept = [arch for arch in kept if f"compute_{arch.replace('.', '')}" in known]
    if not kept:
        raise OptionError("this nvcc knows none of the GPU generations we build for: use CUDA 12 or newer")
    return (*kept[:-1], f"{kept[-1]}+PTX")


def ask_nvcc(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the nvcc of a toolkit.

    Raises:
        OptionError: It does not start or does not end.
    """
    command = [str(home / "bin" / "nvcc"), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=NVCC_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise OptionError(f"{command[0]} cannot be run ({error}): repair the CUDA toolkit") from error


def use_toolkit(home: Path, options: Options, torch_cuda: str) -> Toolkit:
    """Return the toolkit with the GPU generations to compile for, after it has compiled an empty file for them.

    Args:
        home: Its folder.
        torch_cuda: ``torch.version.cuda``; PyTorch's BuildExtension refuses a toolkit of another major version.

    Raises:
        OptionError: It cannot compile kernels for this PyTorch or for one of the generations.
    """
    found = re.search(r"release (\d+)\.\d+", ask_nvcc(home, "--version").stdout)
    wanted = torch_cuda.split(".")[0]
    if found is None or found[1] != wanted:
        release = "does not say its release" if found is None else f"is that of CUDA {found[1]}"
        raise OptionError(
            f"the nvcc in {home} {release} and PyTorch is built for CUDA {torch_cuda}: use a toolkit of CUDA {wanted}"
        )
    archs = supported_cuda_archs(options.cuda_archs, ask_nvcc(home, "--list-gpu-arch").stdout.split())
    numbers = [re.sub(r"\.|\+PTX", "", arch) for arch in archs if re.match(r"\d", arch)]
    with tempfile.TemporaryDirectory() as folder:
        # Empty, but nvcc puts its own headers before it, which refuse a C++ compiler that is too new for them.
        source = Path(folder, "empty.cu")
        source.touch()
        codes = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers]
        answer = ask_nvcc(home, "-std=c++20", *codes, "-c", str(source), "-o", str(source.with_suffix(".o")))
    if answer.returncode != 0:
        lines = [line.strip() for line in (answer.stderr + answer.stdout).splitlines() if line.strip()]
        told = [line for line in lines if re.search(r"\b(fatal|error)\b", line)] or lines or ["it says nothing"]
        raise OptionError(f"the nvcc in {home} cannot compile for {', '.join(archs)} ({told[0]}): use another toolkit")
    return Toolkit(home, archs)


def find_cuda_home(env: Mapping[str, str]) -> Path | None:
    """Return the CUDA toolkit's folder: ``CUDA_HOME`` if set, else that of the nvcc on PATH, else None.

    The nvcc on PATH may be a wrapper script far from the toolkit, so nvcc itself is asked: ``--dryrun`` prints the
    folder as ``TOP=`` without compiling anything.

    Raises:
        OptionError: ``CUDA_HOME`` names a folder without nvcc.
    """
    if home := env.get("CUDA_HOME", "").strip():
        if not any((Path(home) / "bin" / name).is_file() for name in ("nvcc", "nvcc.exe")):
            raise OptionError(f"CUDA_HOME={home!r} has no bin/nvcc: unset it or point it to the CUDA toolkit")
        return Path(home)
    nvcc = shutil.which("nvcc", path=env.get("PATH"))
    if nvcc is None:
        return None
    try:
        answer = subprocess.run(
            [nvcc, "--dryrun", "x.cu"], capture_output=True, text=True, timeout=NVCC_SECONDS, check=False, env=dict(env)
        )
    except (OSError, subprocess.TimeoutExpired):
        return None  # an nvcc that cannot even say where it lives compiles nothing
    found = re.search(r"^#\$ TOP=(.+)$", answer.stdout + answer.stderr, re.MULTILINE)
    if found is None or not Path(found[1].strip()).is_dir():
        return None
    return Path(found[1].strip()).resolve()


def source_files(root: Path) -> list[Path]:
    """Every file of ``csrc`` that decides what the binary is, headers included, sorted."""
    return sorted(path for path in (root / "csrc").rglob("*") if path.suffix in SOURCE_SUFFIXES)


def sources_sha256(root: Path) -> str:
    """One hash over names and contents of `source_files`."""
    digest = hashlib.sha256()
    for path in source_files(root):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def wants_cuda(options: Options, cuda_sources: list[Path], torch_cuda: str | None, home: Path | None) -> bool:
    """Decide whether CUDA kernels are built.

    Args:
        torch_cuda: ``torch.version.cuda`` of the PyTorch at hand, None for its CPU build.
        home: The toolkit's folder, None where there is none.

    Raises:
        OptionError: CUDA is required but something is missing; the message says what.
    """
    if options.cuda == "never":
        return False
    missing = None
    if not cuda_sources:
        missing = "this version of mmvmamba has no CUDA sources in csrc/cuda: leave the variable unset"
    elif torch_cuda is None:
        missing = "the PyTorch at hand is built without CUDA: install one with CUDA"
    elif home is None:
        missing = "no CUDA toolkit was found: put nvcc on PATH or set CUDA_HOME"
    if missing is not None and options.cuda == "always":
        raise OptionError(f"MMVMAMBA_WITH_CUDA=1, but {missing}")
    return missing is None


def compile_args(options: Options, windows: bool) -> dict[str, list[str]]:
    """Compiler flags by compiler (``cxx`` and ``nvcc``).

    Floating point keeps its meaning (NaN and infinity included); given up are only traps and errno, which hinder
    vectorising and which nothing here reads.
    """
    define = f"TORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"
    nvcc = [f"-D{define}", "-std=c++20", *(["-O0", "-g", "-G"] if options.debug else ["-O3"])]
    if windows:
        cxx = [f"/D{define}", "/std:c++20", "/EHsc", *(["/Od", "/Zi", "/UNDEBUG"] if options.debug else ["/O2"])]
        return {"cxx": cxx, "nvcc": nvcc}
    cxx = [f"-D{define}", "-std=c++20", "-fvisibility=hidden", "-fno-trapping-math", "-fno-math-errno", "-Wall"]
    cxx += ["-O0", "-g", "-UNDEBUG"] if options.debug else ["-O3", "-g0"]
    return {"cxx": cxx, "nvcc": [*nvcc, "-Xcompiler", "-fvisibility=hidden"]}


def compiler_problem(env: Mapping[str, str]) -> str | None:
    """Return what is missing to compile C++ here, or None."""
    if os.name == "nt":
        return None  # setuptools finds MSVC through the registry; a failure is reported by the build
    command = shlex.split(env.get("CXX") or str(sysconfig.get_config_var("CXX") or "c++"))[0]
    if shutil.which(command, path=env.get("PATH")) is None:
        return f"there is no C++ compiler ({command!r}): install one (Debian: apt-get install g++) or set CXX"
    return None


def reveal_torch(places: Iterable[str]) -> str | None:
    """Make PyTorch importable where build isolation hides it.

    In pip's isolated builds `sysconfig` still names the folders of the environment that pip itself belongs to. The
    one with PyTorch goes to the end of ``sys.path``, so that the build tools remain those chosen by pip.

    Args:
        places: Folders to look in, the best first.

    Returns:
        The folder that was added, None where nothing had to be or could be done.
    """
    if importlib.util.find_spec("torch") is not None:
        return None
    for place in places:
        if place not in sys.path and (Path(place) / "torch" / "__init__.py").is_file():
            sys.path.append(place)
            importlib.invalidate_caches()
            return place
    return None


def torch_problem() -> str | None:
    """Return why the PyTorch at hand cannot be built against, or None."""
    place = reveal_torch([sysconfig.get_path("platlib"), sysconfig.get_path("purelib")])
    try:
        import torch
    except ImportError as error:
        return (
            f"PyTorch cannot be imported in the build environment ({error}): install torch >= {TORCH_MIN} and "
            "repeat with 'pip install --no-build-isolation .' (without this option the installed torch may be hidden)"
        )
    except OSError as error:
        return f"the installed PyTorch cannot be loaded ({error}): install torch >= {TORCH_MIN} again"
    if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < tuple(
        map(int, TORCH_MIN.split("."))
    ):
        return f"PyTorch {torch.__version__} is older than {TORCH_MIN}: upgrade torch"
    if place is not None:
        print(f"mmvmamba: building with PyTorch {torch.__version__} of {place}", file=sys.stderr)
    return None


def give_up(options: Options, problem: str) -> None:
    """Say that the extension is not built; an error where it was required."""
    if options.build == "always":
        raise SystemExit(f"mmvmamba: the compiled extension was required but not built: {problem}")
    line = "=" * 100
    print(
        f"{line}\nmmvmamba: installing WITHOUT the compiled extension. {problem[0].upper()}{problem[1:]}.\n"
        f"mmvmamba: the operators will use the plain PyTorch path: same results, much slower.\n{line}",
        file=sys.stderr,
    )


def find_cuda(options: Options, cuda_sources: list[Path], torch_cuda: str | None) -> Toolkit | None:
    """Return the toolkit to build the CUDA kernels with, None to build without them.

    Where they are neither required nor forbidden, one line says why they are not built.

    Raises:
        OptionError: They are required and cannot be built; the message says why.
    """
    toolkit, problem = None, "no CUDA toolkit was found"
    # A broken toolkit must not stop a build that has no use for one.
    if options.cuda != "never" and cuda_sources and torch_cuda is not None:
        try:
            home = find_cuda_home(os.environ)
            toolkit = None if home is None else use_toolkit(home, options, torch_cuda)
        except OptionError as error:
            if options.cuda == "always":
                raise
            problem = str(error)
        if toolkit is None and options.cuda == "auto":
            print(f"mmvmamba: building WITHOUT the CUDA kernels: {problem}", file=sys.stderr)
    return toolkit if wants_cuda(options, cuda_sources, torch_cuda, toolkit.home if toolkit else None) else None


def make_extension(options: Options) -> tuple[Extension, str | None]:
    """Describe the extension; returns it and the CUDA version it is built for (None: CPU only)."""
    import torch

    sources = source_files(ROOT)
    toolkit = find_cuda(options, [path for path in sources if path.suffix == ".cu"], torch.version.cuda)
    cuda = toolkit is not None
    if toolkit is not None:
        # Before cpp_extension is imported, which looks for the toolkit once; without a list it asks the live GPU.
        os.environ["CUDA_HOME"] = str(toolkit.home)
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(toolkit.archs)
    if options.max_jobs is not None:
        os.environ["MAX_JOBS"] = str(options.max_jobs)
    from torch.utils import cpp_extension

    device = "cuda" if cuda else "cpu"
    extension = Extension(
        NAME,
        [str(path.relative_to(ROOT)) for path in sources if path.suffix == ".cpp" or (cuda and path.suffix == ".cu")],
        include_dirs=[str(ROOT / "csrc"), *cpp_extension.include_paths(device)],
        library_dirs=cpp_extension.library_paths(device),
        # The C functions of the stable ABI live in these; no C++ library of PyTorch is named on purpose.
        libraries=["torch_cpu", *(["torch_cuda", "cudart"] if cuda else [])],
        extra_compile_args=compile_args(options, windows=os.name == "nt"),
        depends=[str(path.relative_to(ROOT)) for path in sources],  # headers too: most of the arithmetic is in them
        language="c++",
        # A free-threaded Python has no limited API (yet).
        py_limited_api=not sysconfig.get_config_var("Py_GIL_DISABLED"),
    )
    return extension, torch.version.cuda if cuda else None


def cuda_choice(cuda: str | None) -> dict[str, Any]:
    """The CUDA version and the GPU generations that are built for, as `supported_cuda_archs` left them."""
    return {"cuda": cuda, "cuda_archs": os.environ["TORCH_CUDA_ARCH_LIST"].split(";") if cuda else []}


def make_stamp(version: str, cuda: str | None) -> dict[str, Any]:
    """What the loader reads before it opens the library."""
    import torch

    return {
        "version": version,
        "torch_min": TORCH_MIN,
        "torch_built": torch.__version__.split("+")[0],
        "machine": platform.machine(),
        **cuda_choice(cuda),
        "sources_sha256": sources_sha256(ROOT),
    }


def make_build_ext(options: Options, cuda: str | None) -> type:
    """A ``build_ext`` that writes the stamp and survives a failure by going on without the extension."""
    from setuptools.errors import BaseError
    from torch.utils.cpp_extension import BuildExtension

    class BuildWithStamp(BuildExtension):
        def run(self) -> None:
            # Without ninja dates of files are compared: a library built with another choice would count as up to date.
            note, choice = Path(self.build_temp) / "cuda_choice.json", json.dumps(cuda_choice(cuda))
            if not note.is_file() or note.read_text(encoding="utf-8") != choice:
                self.force = True
                note.unlink(missing_ok=True)
            try:
                super().run()
            except (BaseError, OSError, RuntimeError, subprocess.SubprocessError) as error:
                give_up(options, f"the build failed, see the compiler's messages above ({error})")
                self._forget_extension()
                return
            stamp = make_stamp(self.distribution.get_version(), cuda)
            path = Path(self.get_ext_fullpath(NAME)).with_name("_C.json")
            path.write_text(json.dumps(stamp, indent=2) + "\n", encoding="utf-8")
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(choice, encoding="utf-8")

        def _forget_extension(self) -> None:
            """Turn the rest of the build into that of a pure Python package, down to the name of the wheel."""
            library = Path(self.get_ext_fullpath(NAME))
            for leftover in (library, library.with_name("_C.json")):  # of an earlier build that succeeded
                leftover.unlink(missing_ok=True)
            self.extensions: list[Extension] = []
            self.distribution.ext_modules = []
            wheel = self.distribution.get_command_obj("bdist_wheel", create=False)
            if wheel is not None:
                wheel.root_is_pure = True
                wheel.py_limited_api = False

    return BuildWithStamp


def setup_arguments(argv: list[str]) -> dict[str, Any]:
    """The arguments of `setuptools.setup` that pyproject.toml cannot hold."""
    sys.path.append(str(ROOT / "scripts"))  # a front end need not have it there
    from mim_folder import COMMANDS

    arguments = extension_arguments(argv)
    arguments.setdefault("cmdclass", {}).update(COMMANDS)
    return arguments


def extension_arguments(argv: list[str]) -> dict[str, Any]:
    """The arguments of `setuptools.setup` that build the extension; none where it is not built."""
    if int(setuptools.__version__.split(".")[0]) < SETUPTOOLS_MIN:
        raise SystemExit(
            f"mmvmamba: setuptools {setuptools.__version__} is too old to build this package: "
            f"pip install 'setuptools>={SETUPTOOLS_MIN},<82'"
        )
    commands = {"build_ext", "build", "install", "bdist_wheel", "editable_wheel"}
    try:
        options = read_options(os.environ)
    except OptionError as error:
        raise SystemExit(f"mmvmamba: {error}") from error
    if options.build == "never" and "build_ext" in argv:
        raise SystemExit("mmvmamba: MMVMAMBA_BUILD=0 forbids what 'build_ext' asks for: unset the variable")
    if options.build == "never" or not commands.intersection(argv):
        return {}  # "sdist", "egg_info", "--version" and the like compile nothing
    if "build_ext" in argv:
        # Who names build_ext asks for the extension and for nothing else: failing softly would be a lie.
        options = Options(**{**options.__dict__, "build": "always"})
    problem = torch_problem() or compiler_problem(os.environ)
    if problem is None and not source_files(ROOT):
        problem = "there are no C++ sources in csrc/: build from a complete source tree"
    if problem is not None:
        give_up(options, problem)
        return {}
    try:
        extension, cuda = make_extension(options)
    except OptionError as error:
        raise SystemExit(f"mmvmamba: {error}") from error
    arguments: dict[str, Any] = {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": make_build_ext(options, cuda)},
    }
    if extension.py_limited_api:
        arguments["options"] = {"bdist_wheel": {"py_limited_api": PYTHON_TAG}}
    return arguments


if __name__ == "__main__":
    setup(**setup_arguments(sys.argv[1:]))
