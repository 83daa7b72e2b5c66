"""Decisions of setup.py that need no compiler."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest


def write_command(folder: Path, name: str, text: str) -> Path:
    """Write an executable shell script."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_defaults(setup_py):
    options = setup_py.read_options({})
    assert (options.build, options.cuda, options.max_jobs, options.debug) == ("auto", "auto", None, False)
    assert options.cuda_archs == ("7.5", "8.0", "8.6", "9.0+PTX")


def test_every_option_is_read(setup_py):
    env = {
        "MMVMAMBA_BUILD": "1",
        "MMVMAMBA_WITH_CUDA": "0",
        "TORCH_CUDA_ARCH_LIST": "8.0 9.0a;12.0+PTX",
        "MAX_JOBS": "3",
        "DEBUG": "1",
    }
    options = setup_py.read_options(env)
    assert (options.build, options.cuda, options.max_jobs, options.debug) == ("always", "never", 3, True)
    assert options.cuda_archs == ("8.0", "9.0a", "12.0+PTX")


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("MMVMAMBA_BUILD", "yes", "'auto', '0', '1'"),
        ("MMVMAMBA_WITH_CUDA", "on", "'auto', '0', '1'"),
        ("DEBUG", "2", "'0', '1'"),
        ("MAX_JOBS", "0", ">= 1"),
        ("MAX_JOBS", "-1", ">= 1"),
        ("MAX_JOBS", "many", ">= 1"),
        ("TORCH_CUDA_ARCH_LIST", "sm_90", "'8.0;9.0\\+PTX'"),
        ("TORCH_CUDA_ARCH_LIST", "8.0;Hopper", "'Hopper'"),
    ],
)
def test_an_unknown_value_names_the_variable_and_what_is_allowed(setup_py, name, value, allowed):
    with pytest.raises(setup_py.OptionError, match=f"{name}='{value}'.*{allowed}"):
        setup_py.read_options({name: value})


def test_cuda_home_is_what_nvcc_says_not_where_it_lies(setup_py, tmp_path):
    toolkit = tmp_path / "toolkit"
    (toolkit / "bin").mkdir(parents=True)
    say = f'echo "#$ _HERE_=x" >&2; echo "#$ TOP={toolkit}/bin/.." >&2; echo "#$ gcc" >&2\n'
    write_command(tmp_path / "wrappers", "nvcc", f'[ "$1" = --dryrun ] || exit 9\n{say}')
    found = setup_py.find_cuda_home({"PATH": f"{tmp_path / 'wrappers'}{os.pathsep}/usr/bin:/bin"})
    assert found == toolkit


@pytest.mark.parametrize("output", ["exit 1", "echo nonsense", 'echo "#$ TOP=/no/such/folder"'])
def test_an_nvcc_that_does_not_say_is_no_toolkit(setup_py, tmp_path, output):
    write_command(tmp_path, "nvcc", output + "\n")
    assert setup_py.find_cuda_home({"PATH": f"{tmp_path}{os.pathsep}/usr/bin:/bin"}) is None


def test_no_nvcc_is_no_toolkit(setup_py, tmp_path):
    assert setup_py.find_cuda_home({"PATH": str(tmp_path)}) is None


def test_cuda_home_variable_wins_and_is_checked(setup_py, tmp_path):
    write_command(tmp_path / "cuda" / "bin", "nvcc", "exit 0\n")
    assert setup_py.find_cuda_home({"CUDA_HOME": str(tmp_path / "cuda"), "PATH": ""}) == tmp_path / "cuda"
    with pytest.raises(setup_py.OptionError, match="CUDA_HOME=.*has no bin/nvcc"):
        setup_py.find_cuda_home({"CUDA_HOME": str(tmp_path), "PATH": ""})


def test_cuda_is_built_where_everything_is_there(setup_py, tmp_path):
    sources, home = [Path("csrc/cuda/a.cu")], tmp_path
    auto = setup_py.read_options({})
    never = setup_py.read_options({"MMVMAMBA_WITH_CUDA": "0"})
    assert setup_py.wants_cuda(auto, sources, "13.0", home)
    assert not setup_py.wants_cuda(never, sources, "13.0", home)
    assert not setup_py.wants_cuda(auto, [], "13.0", home)
    assert not setup_py.wants_cuda(auto, sources, None, home)
    assert not setup_py.wants_cuda(auto, sources, "13.0", None)


def test_required_cuda_says_what_is_missing(setup_py, tmp_path):
    sources, home = [Path("csrc/cuda/a.cu")], tmp_path
    always = setup_py.read_options({"MMVMAMBA_WITH_CUDA": "1"})
    with pytest.raises(setup_py.OptionError, match="MMVMAMBA_WITH_CUDA=1, but this version .* no CUDA sources"):
        setup_py.wants_cuda(always, [], "13.0", home)
    with pytest.raises(setup_py.OptionError, match="MMVMAMBA_WITH_CUDA=1, but the PyTorch .* without CUDA"):
        setup_py.wants_cuda(always, sources, None, home)
    with pytest.raises(setup_py.OptionError, match="MMVMAMBA_WITH_CUDA=1, but no CUDA toolkit"):
        setup_py.wants_cuda(always, sources, "13.0", None)


def test_flags_keep_nan_and_hide_newer_torch(setup_py):
    release = setup_py.compile_args(setup_py.read_options({}), windows=False)["cxx"]
    debug = setup_py.compile_args(setup_py.read_options({"DEBUG": "1"}), windows=False)["cxx"]
    assert "-DTORCH_TARGET_VERSION=0x020a000000000000" in release
    assert "-O3" in release
    assert "-ffast-math" not in release
    assert {"-O0", "-g", "-UNDEBUG"} <= set(debug)
    assert "-O3" not in debug
    windows = setup_py.compile_args(setup_py.read_options({}), windows=True)["cxx"]
    assert "/O2" in windows
    assert not [flag for flag in windows if flag.startswith("-")]


def test_target_version_is_the_oldest_torch(setup_py, root):
    number = int(setup_py.TORCH_TARGET_VERSION, 16)
    assert f"{number >> 56}.{number >> 48 & 255}" == setup_py.TORCH_MIN
    assert f'dependencies = ["torch>={setup_py.TORCH_MIN}"]' in (root / "pyproject.toml").read_text()


def test_a_missing_compiler_is_named(setup_py, tmp_path):
    problem = setup_py.compiler_problem({"PATH": str(tmp_path), "CXX": "my-c++ -pthread"})
    assert problem is not None
    assert "'my-c++'" in problem
    assert "apt-get install g++" in problem
    write_command(tmp_path, "my-c++", "exit 0\n")
    assert setup_py.compiler_problem({"PATH": str(tmp_path), "CXX": "my-c++ -pthread"}) is None


def test_going_on_without_the_extension_is_said_once(setup_py, capsys):
    setup_py.give_up(setup_py.read_options({}), "there is no compiler: install g++")
    message = capsys.readouterr().err
    assert message.count("WITHOUT the compiled extension. There is no compiler: install g++.") == 1
    assert "plain PyTorch path" in message
    with pytest.raises(SystemExit, match="required but not built: there is no compiler"):
        setup_py.give_up(setup_py.read_options({"MMVMAMBA_BUILD": "1"}), "there is no compiler: install g++")


def test_the_hash_covers_headers_and_names(setup_py, tmp_path):
    folder = tmp_path / "csrc" / "cpu"
    folder.mkdir(parents=True)
    (folder / "a.cpp").write_text("1")
    first = setup_py.sources_sha256(tmp_path)
    (folder / "notes.txt").write_text("not compiled")
    assert setup_py.sources_sha256(tmp_path) == first
    (folder / "a.h").write_text("2")
    second = setup_py.sources_sha256(tmp_path)
    (folder / "a.h").rename(folder / "b.h")
    assert len({first, second, setup_py.sources_sha256(tmp_path)}) == 3


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"MMVMAMBA_WITH_CUDA": "1"}, "MMVMAMBA_WITH_CUDA=1, but this version of mmvmamba has no CUDA sources"),
        ({"MMVMAMBA_WITH_CUDA": "perhaps"}, "MMVMAMBA_WITH_CUDA='perhaps' is not understood"),
        ({"MMVMAMBA_BUILD": "0"}, "MMVMAMBA_BUILD=0 forbids what 'build_ext' asks for"),
        ({"CXX": "/no/such/compiler"}, "there is no C\\+\\+ compiler"),
    ],
    ids=["cuda-without-sources", "unknown-value", "contradiction", "no-compiler"],
)
def test_build_ext_stops_with_one_line(root, tmp_path, environment, message):
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path)]
    answer = subprocess.run(
        command, cwd=root, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    lines = [line for line in answer.stderr.splitlines() if line.startswith("mmvmamba:")]
    assert answer.returncode == 1, answer.stderr
    assert len(lines) == 1
    assert re.search(message, lines[0]), lines[0]
    assert "Traceback" not in answer.stderr
