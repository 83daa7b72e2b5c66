"""The ladder on a GPU: what is chosen, refused and said, with GPUs, builds and Triton faked.

What a call would do is asked of the function that decides; that GPU tensors exist is not needed for it.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mmvmamba.errors import BackendError, ConfigError, OpInputError
from mmvmamba.ops import available_backends, backends, extension, scan2d, selective_scan, use_backend
from mmvmamba.ops.cuda_archs import covers
from mmvmamba.ops.scan_operator import _kernel
from mmvmamba.testing import requires_extension
from tests.test_ops.test_exact import scan2d_arguments

CUDA = torch.device("cuda", 0)
# What is in the binary: (loaded, CUDA version, archs), and a text of the reason why it does not serve a GPU of 8.6.
BUILDS = {
    "ok": (True, "13.0", ("8.0", "9.0+PTX"), None),
    "missing": (False, None, (), "was not built"),
    "stamp": (False, None, (), "built for mmvmamba 0.0.1"),
    "cpu_only": (True, None, (), "built without CUDA kernels: run 'MMVMAMBA_WITH_CUDA=1 pip install"),
    "arch": (True, "13.0", ("9.0", "10.0+PTX"), "has code for the GPU generations 9.0, 10.0+PTX and this GPU is 8.6"),
}


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """Let every test warn for itself."""
    before = set(backends._warned)
    backends._warned.clear()
    yield
    backends._warned.clear()
    backends._warned.update(before)


def fake(monkeypatch: pytest.MonkeyPatch, build: str, triton: bool, gpu: tuple[int, int] | None = (8, 6)) -> None:
    loaded, version, archs, problem = BUILDS[build]
    monkeypatch.setattr(extension, "HAS_EXTENSION", loaded)
    monkeypatch.setattr(extension, "EXTENSION_PROBLEM", None if loaded else f"the extension {problem}: pip install .")
    monkeypatch.setattr(extension, "CUDA_VERSION", version)
    monkeypatch.setattr(extension, "CUDA_ARCHS", archs)
    monkeypatch.setattr(backends, "device_capability", lambda _index: gpu)
    monkeypatch.setattr(backends, "triton_problem", lambda _kind: None if triton else "Triton is not installed")


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("triton", [True, False], ids=["triton", "no_triton"])
@pytest.mark.parametrize("asked", [None, "compiled", "triton", "reference", "tritn"])
@pytest.mark.parametrize("rank", ["0", "1"])
def test_the_whole_matrix(
    monkeypatch: pytest.MonkeyPatch, build: str, triton: bool, asked: str | None, rank: str
) -> None:
    fake(monkeypatch, build, triton)
    monkeypatch.setenv("RANK", rank)
    problem = BUILDS[build][3]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            if asked == "tritn":
                with pytest.raises(ConfigError, match="unknown backend 'tritn'.*compiled, triton, reference.*'triton'"):
                    backends.choose_backend(asked, CUDA)
            elif asked == "compiled" and problem is not None:
                with pytest.raises(BackendError) as error:
                    backends.choose_backend(asked, CUDA)
                assert problem in str(error.value)
                assert "pip install" in str(error.value)
            elif asked == "triton" and not triton:
                with pytest.raises(BackendError, match="'triton' was asked for by the argument.*Triton is not install"):
                    backends.choose_backend(asked, CUDA)
            elif asked is not None:
                assert backends.choose_backend(asked, CUDA) == (asked, True)
            else:
                best = "compiled" if problem is None else "triton" if triton else "reference"
                assert backends.choose_backend(None, CUDA) == (best, False)
    falls_back = asked is None and problem is not None and not triton
    assert len(caught) == int(falls_back and rank == "0")
    for warning in caught:
        assert str(problem) in str(warning.message)
        assert "Triton is not installed" in str(warning.message)


def test_an_arch_that_is_not_in_the_binary_tells_how_to_add_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, "arch", triton=True)
    reason = available_backends("cuda")["compiled"].reason
    assert 'MMVMAMBA_WITH_CUDA=1 TORCH_CUDA_ARCH_LIST="9.0;10.0+PTX;8.6" pip install' in reason


def test_a_machine_without_a_gpu_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, "ok", triton=True, gpu=None)
    report = available_backends("cuda")
    assert [report[name].available for name in backends.BACKENDS] == [False, False, True]
    assert report["compiled"].reason == report["triton"].reason == "PyTorch finds no GPU on this machine"


@pytest.mark.parametrize("asked", ["compiled", "triton"])
def test_float64_has_no_gpu_kernel(monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    fake(monkeypatch, "ok", triton=True)
    with pytest.raises(BackendError, match=f"{asked}.*float64 tensors have no GPU kernel.*float()"):
        backends.choose_backend(asked, CUDA, torch.float64)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            assert backends.choose_backend(None, CUDA, torch.float64) == ("reference", False)
    assert len(caught) == 1
    assert str(caught[0].message).count("float64 tensors") == 1
    assert backends.choose_backend(asked, CUDA, torch.float32) == (asked, True)


def test_an_operator_for_the_cpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, "ok", triton=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.choose_backend(None, CUDA, cpu_only=True) == ("reference", False)
    for name in ("compiled", "triton"):
        with pytest.raises(BackendError, match="compiled kernels on the CPU and no others"):
            backends.choose_backend(name, CUDA, cpu_only=True)


def test_an_operator_without_cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's on a GPU, else PyTorch's own, which nobody need be warned of; the process's wish for others is void."""
    options = {"cuda_kernels": False}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for triton in (True, False):
            fake(monkeypatch, "ok", triton=triton)
            assert backends.choose_backend(None, CUDA, **options).name == ("triton" if triton else "reference")
        assert backends.choose_backend(None, CUDA, torch.float64, **options) == ("reference", False)
        fake(monkeypatch, "ok", triton=True)
        assert backends.choose_backend(None, "cpu", **options) == ("compiled", False)
        monkeypatch.setattr(backends, "_default", backends._Default("compiled", "use_backend"))
        assert backends.choose_backend(None, CUDA, **options) == ("triton", False)
        assert backends.choose_backend(None, "cpu", **options) == ("compiled", True)
        monkeypatch.setattr(backends, "_default", backends._Default("triton", "use_backend"))
        assert backends.choose_backend(None, CUDA, **options) == ("triton", True)
    with pytest.raises(BackendError, match="on the CPU alone; on a GPU it has Triton's"):
        backends.choose_backend("compiled", CUDA, **options)
    fake(monkeypatch, "ok", triton=False)
    with pytest.raises(BackendError, match="'triton' was asked for by the argument"):
        backends.choose_backend("triton", CUDA, **options)


@pytest.mark.parametrize("build", ["ok", "cpu_only"])
@pytest.mark.parametrize("origin", ["use_backend", "the environment variable MMVMAMBA_BACKEND"])
def test_a_wish_for_the_whole_process_does_not_stop_such_an_operator(
    monkeypatch: pytest.MonkeyPatch, build: str, origin: str
) -> None:
    """It is meant for the scans; PyTorch's own convolution runs beside whatever kernels they have."""
    fake(monkeypatch, build, triton=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("compiled", "triton", "reference"):
            monkeypatch.setattr(backends, "_default", backends._Default(name, origin))
            assert backends.choose_backend(None, CUDA, cpu_only=True) == ("reference", name == "reference")
            on_cpu = "reference" if name == "reference" else "compiled"
            assert backends.choose_backend(None, "cpu", cpu_only=True).name == on_cpu
        monkeypatch.setattr(backends, "_default", backends._Default("cudda", origin))
        with pytest.raises(ConfigError, match=f"unknown backend 'cudda' in {origin}"):
            backends.choose_backend(None, CUDA, cpu_only=True)


def test_the_interpreter_runs_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, "missing", triton=True)
    with pytest.raises(BackendError, match="TRITON_INTERPRET=1"):
        backends.choose_backend("triton", "cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backends.choose_backend("triton", "cpu") == ("triton", True)
    with use_backend("triton"):
        assert backends.choose_backend(None, "cpu") == ("triton", True)
    with pytest.warns(UserWarning, match="was not built"):
        assert backends.choose_backend(None, "cpu") == ("reference", False)


@pytest.mark.parametrize(
    ("archs", "gpu", "runs"),
    [
        (("8.0",), (8, 0), True),
        (("8.0",), (8, 9), True),
        (("8.6",), (8, 0), False),
        (("8.0",), (9, 0), False),
        (("8.0+PTX",), (9, 0), True),
        (("8.0+PTX",), (12, 1), True),
        (("8.0+PTX",), (7, 5), False),
        (("9.0a",), (9, 0), True),
        (("9.0a+PTX",), (10, 0), False),
        (("10.0f",), (10, 3), True),
        (("10.0",), (12, 0), False),
        (("Ampere",), (8, 9), True),
        (("Ampere",), (9, 0), True),
        (("Hopper", "Ampere+Tegra"), (8, 7), True),
        (("Ampere+Tegra",), (9, 0), False),
        (("7.5", "8.0"), (8, 6), True),
        (("nonsense",), (8, 0), False),
        ((), (8, 0), False),
    ],
)
def test_which_gpus_a_binary_runs_on(archs: tuple[str, ...], gpu: tuple[int, int], runs: bool) -> None:
    assert covers(archs, gpu) is runs


def test_stamps_old_and_new(tmp_path: Path) -> None:
    old = {"version": "1", "torch_min": "2.10", "machine": "x86_64", "sources_sha256": "0"}
    path = tmp_path / "stamp.json"

    def read(**fields: object) -> extension.Stamp:
        path.write_text(json.dumps(old | fields))
        return extension.read_stamp(path)

    assert (read().cuda, read().cuda_archs) == (None, ())
    assert (read(cuda=None, cuda_archs=[]).cuda, read(cuda=None, cuda_archs=[]).cuda_archs) == (None, ())
    assert read(cuda="13.0", cuda_archs=["8.0", "9.0+PTX"]).cuda_archs == ("8.0", "9.0+PTX")
    for bad in ({"cuda": 13.0}, {"cuda_archs": "8.0"}, {"cuda_archs": [8.0]}):
        with pytest.raises(ValueError, match="cuda_archs"):
            read(**bad)


def test_devices_that_nothing_is_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, "ok", triton=True)
    assert not available_backends("mps")["compiled"].available
    assert "on mps" in available_backends("mps")["triton"].reason
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.choose_backend(None, "meta") == ("reference", False)


def fake_gpu_arguments() -> list[torch.Tensor]:
    return [value.to("cuda") for value in scan2d_arguments(3, 4)]


class Scan(torch.nn.Module):
    def __init__(self, backend: str | None) -> None:
        super().__init__()
        self.backend = backend

    def forward(self, *arguments: torch.Tensor) -> torch.Tensor:
        return scan2d(*arguments, backend=self.backend)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    ("build", "triton", "backend", "operator"),
    [
        ("ok", True, None, "scan2d"),
        ("ok", True, "triton", "scan2d_triton"),
        ("ok", True, "compiled", "scan2d"),
        ("cpu_only", True, None, "scan2d_triton"),
        ("cpu_only", False, None, "scan2d"),  # finds CUDA kernels where it runs, if there are any
        ("arch", False, None, "scan2d_triton"),  # the kernels in the binary cannot run here
    ],
)
def test_what_a_trace_on_a_gpu_records(
    monkeypatch: pytest.MonkeyPatch, build: str, triton: bool, backend: str | None, operator: str, strict: bool
) -> None:
    fake(monkeypatch, build, triton)
    torch._dynamo.reset()
    with FakeTensorMode(allow_non_fake_inputs=True):
        program = torch.export.export(Scan(backend), tuple(fake_gpu_arguments()), strict=strict)
    wanted = getattr(torch.ops.mmvmamba, operator).default
    ours = [node.target for node in program.graph.nodes if "mmvmamba" in str(node.target)]
    assert ours == [wanted]


@pytest.mark.parametrize("pin", ["argument", "use_backend"])
def test_triton_stays_pinned_in_a_compiled_function(monkeypatch: pytest.MonkeyPatch, pin: str) -> None:
    fake(monkeypatch, "missing", triton=True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    seen: list[str] = []

    def record(graph: torch.fx.GraphModule, _inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        seen.extend(str(node.target) for node in graph.graph.nodes if "mmvmamba" in str(node.target))
        raise KeyboardInterrupt  # what it would compute is not asked

    torch._dynamo.reset()
    compiled = torch.compile(Scan("triton" if pin == "argument" else None), backend=record, fullgraph=True)
    with use_backend("triton" if pin == "use_backend" else None), pytest.raises(KeyboardInterrupt):
        compiled(*scan2d_arguments(2, 3))
    assert seen == ["mmvmamba.scan2d_triton"]


def test_the_kernel_of_last_resort_prefers_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator that finds no CUDA kernel runs Triton's, else plain PyTorch with one warning."""
    import sys
    import types

    kernels = types.ModuleType("mmvmamba.ops.scan2d.triton_kernels")
    kernels.forward = lambda *_arguments: "triton forward"  # type: ignore[attr-defined]
    kernels.backward = lambda *_arguments: "triton backward"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, kernels.__name__, kernels)
    with FakeTensorMode():
        on_gpu = torch.empty(1, device="cuda")
        double = torch.empty(1, device="cuda", dtype=torch.float64)
    on_cpu = torch.empty(1)

    def plain(*_arguments: object) -> str:
        return "plain"

    parts: Any = types.SimpleNamespace(
        forward=plain, backward=plain, gradients=1, package="", prefix="", plain_is_good=False
    )

    def run(suffix: str, *arguments: object) -> object:
        forward = _kernel("scan2d", parts, False, suffix)(*arguments)
        backward = _kernel("scan2d", parts, True, suffix)(None, *arguments)
        assert str(backward).replace("backward", "forward") == forward
        return forward

    fake(monkeypatch, "cpu_only", triton=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run("", on_gpu) == run("_triton", on_gpu) == "triton forward"
    with pytest.warns(UserWarning, match="float64") as caught:
        assert run("", double) == run("_triton", double) == "plain"
    assert len(caught) == 1
    fake(monkeypatch, "cpu_only", triton=False)
    with pytest.warns(UserWarning, match="without CUDA kernels.*Triton is not installed") as caught:
        assert run("", on_gpu) == run("_triton", on_gpu) == "plain"
    assert len(caught) == 1
    fake(monkeypatch, "missing", triton=True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.warns(UserWarning, match="was not built"):
        assert run("", on_cpu) == "plain"
    assert run("_triton", on_cpu) == "triton forward"


@requires_extension()
@pytest.mark.ext
def test_cuda_kernels_may_be_registered_later() -> None:
    """As the binary does it from C++, over the kernels of last resort; autocast stays above them."""
    import subprocess
    import sys

    code = """
import torch, warnings
import mmvmamba.ops
warnings.simplefilter("ignore")  # where the binary has CUDA kernels, these here override them
later = torch.library.Library("mmvmamba", "FRAGMENT")
for name in ("scan2d", "scan2d_backward", "selective_scan", "selective_scan_backward"):
    later.impl(name, lambda *a: None, "CUDA")
    full = "mmvmamba::" + name
    table = torch._C._dispatch_dump_table(full)
    rows = dict(line.split(": ", 1) for line in table.splitlines() if ": " in line)
    assert "[kernel]" in rows["CUDA"], rows["CUDA"]
    assert "default backend kernel" not in rows["CUDA"]
    if not name.endswith("backward"):
        assert "[kernel]" in rows["AutocastCUDA"], rows["AutocastCUDA"]
    twin = name.replace("_backward", "_triton_backward") if "backward" in name else name + "_triton"
    rows = dict(l.split(": ", 1) for l in torch._C._dispatch_dump_table("mmvmamba::" + twin).splitlines() if ": " in l)
    assert "default backend kernel" in rows["CUDA"], rows["CUDA"]
print("fine")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "fine", done.stderr


@pytest.mark.parametrize("suffix", ["", "_triton"])
def test_both_operators_have_the_same_schema(suffix: str) -> None:
    for name in ("scan2d", "selective_scan", "ssd_state", "ssd_read", "ssd_non_causal", "ssd"):
        for end in ("", "_backward"):
            plain = str(getattr(torch.ops.mmvmamba, name + end).default._schema)
            other = str(getattr(torch.ops.mmvmamba, name + suffix + end).default._schema)
            assert other.replace(suffix, "") == plain if suffix else other == plain


def test_the_twin_without_triton_is_plain_and_differentiable() -> None:
    arguments = [value.requires_grad_() for value in scan2d_arguments(3, 4)]
    with pytest.warns(UserWarning, match="TRITON_INTERPRET=1|was not built"):
        out, _ = torch.ops.mmvmamba.scan2d_triton(*arguments, [0, 1, 2, 3], None, True, torch.float32, True)
    expected = scan2d(*arguments, backend="reference")
    assert torch.equal(out, expected)
    grads = torch.autograd.grad(out.sum(), arguments)
    for grad, want in zip(grads, torch.autograd.grad(expected.sum(), arguments), strict=True):
        assert torch.allclose(grad, want, atol=1e-5)
    torch.library.opcheck(
        torch.ops.mmvmamba.scan2d_triton.default, (*arguments, [0, 1, 2, 3], None, True, torch.float32, True)
    )


def test_the_twin_has_no_second_derivative() -> None:
    arguments = [value.requires_grad_() for value in scan2d_arguments(2, 2)]
    out, _ = torch.ops.mmvmamba.scan2d_triton(*arguments, [0, 1, 2, 3], None, True, torch.float32, True)
    (grad,) = torch.autograd.grad(out.square().sum(), arguments[:1], create_graph=True)
    with pytest.raises(BackendError, match="scan2d_triton has no second derivative"):
        torch.autograd.grad(grad.sum(), arguments[1:2])


def test_tensors_on_two_devices_are_refused() -> None:
    with FakeTensorMode():
        x, projections, *others = scan2d_arguments(2, 3)
        with pytest.raises(OpInputError, match="'projections' is on cuda:0; expected cpu.*to.'cpu'"):
            scan2d(x, projections.to("cuda"), *others)
        on_gpu = [value.to("cuda") for value in (x, projections, *others)]
        with pytest.raises(OpInputError, match="'orders' is on cpu; expected cuda:0"):
            scan2d(*on_gpu, orders=torch.arange(6).expand(4, 6))
        u, B = torch.randn(1, 4, 5), torch.randn(1, 2, 5)
        with pytest.raises(OpInputError, match="'A' is on cuda:0; expected cpu"):
            selective_scan(u, u, torch.rand(4, 2, device="cuda"), B, B)
        u, a = u.to("cuda:0"), torch.rand(4, 2, device="cuda:0")
        with pytest.raises(OpInputError, match="'B' is on cuda:1; expected cuda:0"):
            selective_scan(u, u, a, B.to("cuda:1"), B.to("cuda:0"))
