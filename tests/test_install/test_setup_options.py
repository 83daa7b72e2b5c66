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


def fake_nvcc(home: Path, release: str = "13.0", compiles: str = "exit 0") -> None:
    """A toolkit whose nvcc knows 8.0 to 9.0 and compiles by the last command."""
    write_command(
        home / "bin",
        "nvcc",
        f"""case "$1" in
--version) echo "Cuda compilation tools, release {release}, V{release}.88" ;;
--list-gpu-arch) printf 'compute_80\\ncompute_86\\ncompute_89\\ncompute_90\\n' ;;
*) {compiles} ;;
esac
""",
    )


def test_defaults(setup_py):
    options = setup_py.read_options({})
    assert (options.build, options.cuda, options.max_jobs, options.debug) == ("auto", "auto", None, False)
    assert setup_py.parse_cuda_archs(options.cuda_archs) == ("8.0", "8.6", "8.9", "9.0", "10.0+PTX")


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
    assert setup_py.parse_cuda_archs(options.cuda_archs) == ("8.0", "9.0a", "12.0+PTX")


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("MMVMAMBA_BUILD", "yes", "'auto', '0', '1'"),
        ("MMVMAMBA_WITH_CUDA", "on", "'auto', '0', '1'"),
        ("DEBUG", "2", "'0', '1'"),
        ("MAX_JOBS", "0", ">= 1"),
        ("MAX_JOBS", "-1", ">= 1"),
        ("MAX_JOBS", "many", ">= 1"),
    ],
)
def test_an_unknown_value_names_the_variable_and_what_is_allowed(setup_py, name, value, allowed):
    with pytest.raises(setup_py.OptionError, match=f"{name}='{value}'.*{allowed}"):
        setup_py.read_options({name: value})


def test_the_default_generations_are_those_that_nvcc_knows(setup_py):
    default = setup_py.DEFAULT_CUDA_ARCHS
    newest = ["compute_75", "compute_80", "compute_86", "compute_89", "compute_90", "compute_100", "compute_120"]
    assert setup_py.supported_cuda_archs(default, newest) == ("8.0", "8.6", "8.9", "9.0", "10.0+PTX")
    assert setup_py.supported_cuda_archs(default, newest[:5]) == ("8.0", "8.6", "8.9", "9.0+PTX")
    assert setup_py.supported_cuda_archs("9.0a", []) == ("9.0a",)
    with pytest.raises(setup_py.OptionError, match="knows none"):
        setup_py.supported_cuda_archs(default, ["compute_75"])
    with pytest.raises(setup_py.OptionError, match="need 8.0.*'7.5' is older"):
        setup_py.supported_cuda_archs("7.5;9.0", newest)


def test_gpu_generations_have_names_too(setup_py):
    assert setup_py.parse_cuda_archs("Ampere+Tegra, Hopper;Blackwell") == ("Ampere+Tegra", "Hopper", "Blackwell")
    assert setup_py.parse_cuda_archs("All") == ("8.0", "8.6", "8.9", "9.0", "10.0+PTX")
    assert setup_py.parse_cuda_archs("Common;8.0;12.0") == ("8.0", "8.6", "8.9", "9.0", "10.0+PTX", "12.0")


@pytest.mark.parametrize("text", ["sm_90", "8.0;hoper", "8"])
def test_an_unknown_gpu_generation_is_named_when_cuda_is_built(setup_py, text):
    options = setup_py.read_options({"TORCH_CUDA_ARCH_LIST": text})  # nobody builds CUDA kernels yet
    with pytest.raises(setup_py.OptionError, match=f"TORCH_CUDA_ARCH_LIST='{text}'.*is not a GPU generation.*8.0;9.0"):
        setup_py.parse_cuda_archs(options.cuda_archs)


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


def test_an_nvcc_that_hangs_or_cannot_start_is_no_toolkit(setup_py, tmp_path, monkeypatch):
    monkeypatch.setattr(setup_py, "NVCC_SECONDS", 0.2)
    nvcc = write_command(tmp_path, "nvcc", "exec sleep 5\n")
    env = {"PATH": f"{tmp_path}{os.pathsep}/usr/bin:/bin"}
    assert setup_py.find_cuda_home(env) is None
    nvcc.write_text("#!/no/such/interpreter\n")
    assert setup_py.find_cuda_home(env) is None


def test_a_cuda_home_without_a_toolkit_costs_only_the_cuda_kernels(setup_py, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    sources = [Path("csrc/cuda/a.cu")]
    assert setup_py.find_cuda(setup_py.read_options({}), sources, "13.0") is None
    assert "WITHOUT the CUDA kernels: CUDA_HOME=" in capsys.readouterr().err
    with pytest.raises(setup_py.OptionError, match="CUDA_HOME=.*has no bin/nvcc"):
        setup_py.find_cuda(setup_py.read_options({"MMVMAMBA_WITH_CUDA": "1"}), sources, "13.0")
    for quiet, files in (({"MMVMAMBA_WITH_CUDA": "0"}, sources), ({}, [])):
        assert setup_py.find_cuda(setup_py.read_options(quiet), files, "13.0") is None
    assert capsys.readouterr().err == ""
    fake_nvcc(tmp_path)
    assert setup_py.find_cuda(setup_py.read_options({}), sources, "13.0").home == tmp_path


@pytest.mark.parametrize(
    ("nvcc", "archs", "message"),
    [
        ({"release": "12.4"}, "", "is that of CUDA 12 and PyTorch is built for CUDA 13.0: use a toolkit of CUDA 13"),
        ({"release": "none"}, "", "does not say its release and PyTorch is built for CUDA 13.0"),
        ({"compiles": "echo note; echo \"nvcc fatal   : Unsupported gpu architecture 'compute_120'\"; exit 1"},
         "9.0;12.0", "cannot compile for 9.0, 12.0 .*Unsupported gpu architecture 'compute_120'"),
        ({"compiles": "echo 'host_config.h: error: #error -- unsupported GNU version!' >&2; exit 2"},
         "", "cannot compile for 8.0, 8.6, 8.9, 9.0.PTX .*unsupported GNU version"),
        ({"compiles": "exit 3"}, "Hopper", "cannot compile for Hopper .it says nothing"),
        ({}, "7.5;9.0", "'7.5' is older: leave it out"),
        ({}, "sm_90", "'sm_90' is not a GPU generation"),
    ],
    ids=["older-cuda", "no-release", "new-gpu", "new-compiler", "broken", "old-gpu", "typo"],
)  # fmt: skip
def test_a_toolkit_that_does_not_fit_costs_only_the_cuda_kernels(
    setup_py, tmp_path, monkeypatch, capsys, nvcc, archs, message
):
    fake_nvcc(tmp_path, **nvcc)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    sources, env = [Path("csrc/cuda/a.cu")], {"TORCH_CUDA_ARCH_LIST": archs}
    assert setup_py.find_cuda(setup_py.read_options(env), sources, "13.0") is None
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(f"mmvmamba: building WITHOUT the CUDA kernels: .*{message}", line)
    with pytest.raises(setup_py.OptionError, match=message):
        setup_py.find_cuda(setup_py.read_options(env | {"MMVMAMBA_WITH_CUDA": "1"}), sources, "13.0")
    never = setup_py.read_options(env | {"MMVMAMBA_WITH_CUDA": "0"})
    assert setup_py.find_cuda(never, sources, "13.0") is None
    assert capsys.readouterr().err == ""


def test_a_toolkit_is_tried_with_what_it_will_compile_for(setup_py, tmp_path):
    fake_nvcc(tmp_path, compiles=f'echo "$@" > {tmp_path}/said')
    options = setup_py.read_options({"TORCH_CUDA_ARCH_LIST": "8.0;9.0a+PTX;Hopper"})
    assert setup_py.use_toolkit(tmp_path, options, "13.1") == setup_py.Toolkit(tmp_path, ("8.0", "9.0a+PTX", "Hopper"))
    said = (tmp_path / "said").read_text()
    assert re.findall(r"-gencode=(\S+)", said) == ["arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a"]
    defaults = setup_py.use_toolkit(tmp_path, setup_py.read_options({}), "13.0")
    assert defaults.archs == ("8.0", "8.6", "8.9", "9.0+PTX")


def test_a_library_built_with_another_choice_is_built_again(setup_py, tmp_path, monkeypatch):
    from setuptools import Distribution
    from torch.utils.cpp_extension import BuildExtension

    forced: list[bool] = []
    monkeypatch.setattr(BuildExtension, "run", lambda self: forced.append(bool(self.force)))
    monkeypatch.setattr(setup_py, "make_stamp", lambda *args: {})

    def build(cuda: str | None, archs: str) -> bool:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", archs)
        kind = setup_py.make_build_ext(setup_py.read_options({}), cuda)
        command = kind.with_options(use_ninja=False)(Distribution())  # with ninja PyTorch always forces it
        command.build_lib, command.build_temp = str(tmp_path / "lib"), str(tmp_path / "temp")
        command.ensure_finalized()
        (tmp_path / "lib" / "mmvmamba").mkdir(parents=True, exist_ok=True)
        command.run()
        return forced.pop()

    assert [build(None, ""), build(None, "9.0"), build("13.0", "9.0")] == [True, False, True]
    assert [build("13.0", "9.0"), build("13.0", "8.0;9.0"), build(None, "")] == [False, True, True]


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
    assert f'dependencies = ["torch>={setup_py.TORCH_MIN}", ' in (root / "pyproject.toml").read_text()


def test_a_missing_compiler_is_named(setup_py, tmp_path):
    problem = setup_py.compiler_problem({"PATH": str(tmp_path), "CXX": "my-c++ -pthread"})
    assert problem is not None
    assert "'my-c++'" in problem
    assert "apt-get install g++" in problem
    write_command(tmp_path, "my-c++", "exit 0\n")
    assert setup_py.compiler_problem({"PATH": str(tmp_path), "CXX": "my-c++ -pthread"}) is None


@pytest.fixture
def hidden_torch(monkeypatch):
    """Modules and search path as in an isolated build: the torch of this environment cannot be imported."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "torch"]:
        monkeypatch.delitem(sys.modules, name)
    kept = [place for place in sys.path if not (Path(place) / "torch" / "__init__.py").is_file()]
    monkeypatch.setattr(sys, "path", kept)
    yield
    sys.modules.pop("torch", None)  # a fake one; monkeypatch puts the real one back


def fake_torch(folder: Path, text: str) -> str:
    (folder / "torch").mkdir(parents=True)
    (folder / "torch" / "__init__.py").write_text(text)
    return str(folder)


def test_a_torch_hidden_by_build_isolation_is_found(setup_py, tmp_path, monkeypatch, hidden_torch, capsys):
    empty, outer = str(tmp_path / "empty"), fake_torch(tmp_path / "outer", "__version__ = '2.10.3+cpu'\n")
    monkeypatch.setattr(setup_py.sysconfig, "get_path", {"platlib": empty, "purelib": outer}.__getitem__)
    assert setup_py.torch_problem() is None
    assert sys.path[-1] == outer  # behind the build tools that pip chose
    assert f"building with PyTorch 2.10.3+cpu of {outer}\n" in capsys.readouterr().err
    assert setup_py.reveal_torch([empty, outer]) is None  # nothing is hidden any more
    assert sys.path.count(outer) == 1


def test_without_any_torch_the_message_says_what_to_do(setup_py, tmp_path, monkeypatch, hidden_torch):
    monkeypatch.setattr(setup_py.sysconfig, "get_path", lambda name: str(tmp_path))
    path = list(sys.path)
    assert re.search(r"install torch >= 2\.10 and repeat with 'pip install --no-build-isol", setup_py.torch_problem())
    assert sys.path == path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("__version__ = '2.9.1'", r"PyTorch 2\.9\.1 is older than 2\.10: upgrade torch"),
        ("raise OSError('libtorch_cpu.so: no such file')", r"cannot be loaded \(libtorch_cpu\.so: no such file\)"),
    ],
    ids=["old", "broken"],
)
def test_a_torch_that_cannot_be_used_is_named(setup_py, tmp_path, monkeypatch, hidden_torch, text, message):
    outer = fake_torch(tmp_path, text)
    monkeypatch.setattr(setup_py.sysconfig, "get_path", lambda name: outer)
    assert re.search(message, setup_py.torch_problem())


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
        ({"MMVMAMBA_WITH_CUDA": "1", "CUDA_HOME": "/no/such"}, "CUDA_HOME='/no/such' has no bin/nvcc"),
        ({"MMVMAMBA_WITH_CUDA": "perhaps"}, "MMVMAMBA_WITH_CUDA='perhaps' is not understood"),
        ({"MMVMAMBA_BUILD": "0"}, "MMVMAMBA_BUILD=0 forbids what 'build_ext' asks for"),
        ({"CXX": "/no/such/compiler"}, "there is no C\\+\\+ compiler"),
    ],
    ids=["cuda-without-toolkit", "unknown-value", "contradiction", "no-compiler"],
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
