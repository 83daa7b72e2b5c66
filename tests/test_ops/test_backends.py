"""The backend ladder, the loader of the extension, and what works without either a build or OpenMMLab."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import mmvmamba
from mmvmamba.errors import ConfigError
from mmvmamba.ops import available_backends, backends, extension, scan2d, use_backend
from mmvmamba.testing import requires_extension
from tests.test_ops.test_exact import scan2d_arguments

PACKAGE = Path(mmvmamba.__file__).parent
ROOT = PACKAGE.parent
# What must not be imported when only operators are asked for.
FORBIDDEN = ("mmengine", "mmcv", "mmdet", "mmseg", "mmpretrain", "triton", "torchvision")

RUN_OPERATORS = """
import warnings, torch
from mmvmamba.ops import available_backends, scan2d, selective_scan
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    args = [torch.randn(1, 3, 4, 8), torch.randn(1, 3, 4, 4, 4), torch.randn(4, 8, 2), torch.randn(4, 8),
            -torch.rand(4, 8, 1), torch.randn(4, 8)]
    args = [a.requires_grad_() for a in args]
    scan2d(*args).sum().backward()
    u = torch.randn(1, 4, 5, requires_grad=True)
    B = torch.randn(1, 2, 5)
    selective_scan(u, torch.rand(1, 4, 5), -torch.rand(4, 2), B, B).sum().backward()
assert all(a.grad is not None for a in args) and u.grad is not None
ours = [w for w in caught if "mmvmamba" in str(w.message)]
print(len(ours), available_backends()["compiled"].available, *(str(w.message) for w in ours), sep="|")
"""

FORBID = """
import sys
class Forbid:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {forbidden!r}:
            raise ImportError(f"{{name}} must not be imported")
sys.meta_path.insert(0, Forbid())
"""


def run(code: str, root: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that finds ``mmvmamba`` under ``root``."""
    variables = {key: value for key, value in os.environ.items() if not key.startswith("MMVMAMBA_")}
    variables |= {"PYTHONPATH": str(root), "PYTHONSAFEPATH": "1"} | environment
    return subprocess.run([sys.executable, "-c", code], env=variables, cwd=root, capture_output=True, text=True)


@pytest.fixture
def unbuilt(tmp_path: Path) -> Path:
    """A copy of the package without the compiled extension."""
    shutil.copytree(PACKAGE, tmp_path / "mmvmamba", ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    return tmp_path


def test_operators_run_with_torch_alone_and_warn_once(unbuilt: Path) -> None:
    done = run(FORBID.format(forbidden=FORBIDDEN) + RUN_OPERATORS, unbuilt)
    assert done.returncode == 0, done.stderr
    count, compiled, message = done.stdout.strip().split("|")
    assert (count, compiled) == ("1", "False")
    for part in ("reference", "slower", "was not built", "pip install --no-build-isolation"):
        assert part in message


def test_operators_compile_without_a_build(unbuilt: Path) -> None:
    """A trace records one operator node with the plain PyTorch kernel, not an unrolled loop."""
    code = """
import torch
from mmvmamba.ops import scan2d
args = [torch.randn(1, 3, 4, 8), torch.randn(1, 3, 4, 4, 4), torch.randn(4, 8, 2), torch.randn(4, 8),
        -torch.rand(4, 8, 1), torch.randn(4, 8)]
args = [a.requires_grad_() for a in args]
out = torch.compile(scan2d, fullgraph=True, backend="aot_eager")(*args)
eager = scan2d(*args)
assert torch.allclose(out, eager, atol=1e-5)
for a, b in zip(torch.autograd.grad(out.sum(), args), torch.autograd.grad(eager.sum(), args)):
    assert torch.allclose(a, b, atol=1e-4), (a - b).abs().max()
program = torch.export.export(type("M", (torch.nn.Module,), {"forward": lambda self, *a: scan2d(*a)})(), tuple(args))
print(sum(node.target is torch.ops.mmvmamba.scan2d.default for node in program.graph.nodes))
"""
    done = run(code, unbuilt)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "1"


@requires_extension()
@pytest.mark.ext
def test_no_warning_with_the_extension() -> None:
    done = run(FORBID.format(forbidden=FORBIDDEN) + RUN_OPERATORS, PACKAGE.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "0|True"


@requires_extension()
@pytest.mark.ext
def test_stamp_is_compared_before_the_library_is_opened(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "mmvmamba", ignore=shutil.ignore_patterns("__pycache__"))
    stamp_file = tmp_path / "mmvmamba" / extension.STAMP_NAME
    library = next((tmp_path / "mmvmamba").glob("_C.*so"))
    library.write_bytes(b"opening this would fail")
    code = "from mmvmamba.ops import available_backends as a; print(a()['compiled'].reason)"
    for field, value, reason in (
        ("version", "0.0.1", "was built for mmvmamba 0.0.1"),
        ("torch_min", "99.0", "needs torch >= 99.0"),
        ("machine", "pdp11", "was built for pdp11"),
    ):
        fields = json.loads((PACKAGE / extension.STAMP_NAME).read_text()) | {field: value}
        stamp_file.write_text(json.dumps(fields))
        done = run(code, tmp_path)
        assert done.returncode == 0, done.stderr
        assert reason in done.stdout
        assert "pip install --no-build-isolation" in done.stdout
    for text in ("{}", "[]", "not JSON", json.dumps(fields | {"torch_min": 2.10})):
        stamp_file.write_text(text)
        assert "stamp of the extension cannot be read" in run(code, tmp_path).stdout
    stamp_file.unlink()
    assert "has no stamp" in run(code, tmp_path).stdout
    shutil.copy(PACKAGE / extension.STAMP_NAME, stamp_file)
    assert "cannot be opened" in run(code, tmp_path).stdout


def test_stamp_of_an_older_torch_fits_a_newer_one() -> None:
    stamp = extension.Stamp(mmvmamba.__version__, "2.10", platform.machine(), str(extension.sources_sha256(ROOT)))
    assert extension.stamp_problem(stamp) is None
    changed = extension.stamp_problem(dataclasses.replace(stamp, sources_sha256="0"))
    assert changed is None if extension.sources_sha256(ROOT) is None else "csrc changed" in str(changed)
    assert "2.99" in str(extension.stamp_problem(dataclasses.replace(stamp, torch_min="2.99")))


def test_available_backends_gives_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "device_capability", lambda _index: None)  # a machine without a GPU
    report = available_backends("cuda")
    assert list(report) == list(backends.BACKENDS)
    assert not report["compiled"].available
    assert report["compiled"].reason
    assert report["reference"].available


def test_use_backend_is_restored_and_checks_its_argument() -> None:
    args = scan2d_arguments(2, 3)
    before = backends.choose_backend(None, "cpu")
    with use_backend("reference"):
        assert backends.choose_backend(None, "cpu") == ("reference", True)
        inside = scan2d(*args)
        with use_backend(None):
            assert backends.choose_backend(None, "cpu") == (before.name, False)
        assert backends.choose_backend(None, "cpu") == ("reference", True)
    assert backends.choose_backend(None, "cpu") == before
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert backends.choose_backend(None, "cpu") == before
    assert torch.equal(inside, scan2d(*args, backend="reference"))
    with pytest.raises(ConfigError, match="unknown backend 'refrence'.*'reference'"), use_backend("refrence"):
        pass


def test_environment_variable() -> None:
    code = (
        "import torch\nfrom mmvmamba.ops import backends\n"
        "try:\n    print(*backends.choose_backend(None, 'cpu'))\nexcept Exception as error:\n    print(error)"
    )
    said = {value: run(code, ROOT, MMVMAMBA_BACKEND=value).stdout.strip() for value in ("reference", "auto", "cudda")}
    assert said["reference"] == "reference True"
    assert said["auto"] == run(code, ROOT).stdout.strip()
    assert said["auto"].endswith("False")
    assert "unknown backend 'cudda' in the environment variable MMVMAMBA_BACKEND" in said["cudda"]


@pytest.mark.skipif(os.environ.get("MMVMAMBA_BUILD") == "0", reason="this run is meant to be without the extension")
def test_the_extension_is_in_use() -> None:
    """The tests marked ``ext`` are skipped where it is not, which must not pass for success."""
    assert extension.HAS_EXTENSION, extension.EXTENSION_PROBLEM


def test_a_pinned_backend_holds_in_a_trace() -> None:
    args = scan2d_arguments(3, 5)
    torch._dynamo.reset()
    with use_backend("reference"):
        traced = torch.compile(scan2d, fullgraph=True, backend="aot_eager")(*args)
    assert torch.equal(traced, scan2d(*args, backend="reference"))


def test_traces_warn_when_they_run_without_a_build(unbuilt: Path) -> None:
    code = """
import warnings, torch
from mmvmamba.ops import scan2d
args = [torch.randn(1, 3, 4, 8), torch.randn(1, 3, 4, 4, 4), torch.randn(4, 8, 2), torch.randn(4, 8),
        -torch.rand(4, 8, 1), torch.randn(4, 8)]
scan2d(*(a.to("meta") for a in args))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    compiled = torch.compile(scan2d, fullgraph=True, backend="aot_eager")
    compiled(*args), compiled(*args), scan2d(*args)
print(sum("mmvmamba falls back" in str(w.message) for w in caught))
"""
    done = run(code, unbuilt)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "1"
    assert run(code, unbuilt, RANK="1").stdout.strip() == "0"


@requires_extension()
@pytest.mark.ext
@pytest.mark.parametrize(
    ("capability", "limit", "messages"),
    [
        ("default", None, 1),
        ("default", "avx2", 1),
        ("default", "default", 0),
        ("neon", None, 0),
        ("avx2", None, 0),
        ("avx512", None, 0),
    ],
)
def test_an_old_processor_is_told_once(
    monkeypatch: pytest.MonkeyPatch, capability: str, limit: str | None, messages: int
) -> None:
    monkeypatch.setattr(backends, "_portable_kernels_checked", False)
    monkeypatch.setattr(extension, "CPU_CAPABILITY", capability)
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    if limit is not None:
        monkeypatch.setenv("ATEN_CPU_CAPABILITY", limit)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for backend in ("compiled", None, None):
            scan2d(*scan2d_arguments(3, 4), backend=backend)
    ours = [str(warning.message) for warning in caught if "portable CPU kernels" in str(warning.message)]
    assert len(ours) == messages


def test_the_first_use_may_be_inside_a_trace() -> None:
    """What is asked of the library once per process must not be recorded, nor fail to be."""
    code = """
import torch
from mmvmamba.ops import scan2d
args = [torch.randn(1, 3, 4, 8), torch.randn(1, 3, 4, 4, 4), torch.randn(4, 8, 2), torch.randn(4, 8),
        -torch.rand(4, 8, 1), torch.randn(4, 8)]
traced = torch.jit.trace(lambda x: scan2d(x, *args[1:]), args[0])
assert torch.equal(traced(args[0]), scan2d(*args))
"""
    assert run(code, ROOT).returncode == 0
