"""The autocast rule of the scans on a GPU, on fake tensors; what autocast does on a CPU is tested elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from mmvmamba.ops import backends, scan2d, selective_scan
from mmvmamba.ops.scan_operator import autocast_arguments
from tests.test_ops.test_exact import scan2d_arguments

LOW = (torch.float16, torch.bfloat16)
BY_DEFAULT = {torch.float16: torch.float32, torch.bfloat16: torch.bfloat16}


@contextlib.contextmanager
def cuda_autocast(dtype: torch.dtype) -> Iterator[None]:
    """`torch.autocast` refuses to be on where there is no GPU; this sets what it would set."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


class Calls(TorchDispatchMode):
    """Records the dtypes that the operators' kernels are called with."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, list[torch.dtype], torch.dtype]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "mmvmamba":
            dtypes = [value.dtype for value in args if isinstance(value, torch.Tensor)]
            out_dtype = next(value for value in args if isinstance(value, torch.dtype))
            self.seen.append((func._opname, dtypes, out_dtype))
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=["compiled", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(backends, "why_not_compiled", lambda _device: None)
    monkeypatch.setattr(backends, "why_not_triton", lambda _device: None)
    return request.param


def scan_arguments() -> list[torch.Tensor]:
    u, delta, B, C = torch.randn(1, 4, 5), torch.rand(1, 4, 5), torch.randn(1, 2, 5), torch.randn(1, 2, 5)
    return [u, delta, -torch.rand(4, 2), B, C, torch.randn(4), torch.randn(4)]


@pytest.mark.parametrize("low", LOW, ids=str)
@pytest.mark.parametrize("asked", [None, torch.float32, torch.float16], ids=str)
def test_scan2d(backend: str, low: torch.dtype, asked: torch.dtype | None) -> None:
    with FakeTensorMode(), cuda_autocast(low), Calls() as calls:
        arguments = [value.to("cuda") for value in scan2d_arguments(3, 4)]
        out = scan2d(*arguments, out_dtype=asked, backend=backend)
    wanted = BY_DEFAULT[low] if asked is None else asked
    assert out.dtype == wanted
    name = "scan2d" + ("_triton" if backend == "triton" else "")
    assert calls.seen == [(name, [low, low, *[torch.float32] * 4], wanted)]


@pytest.mark.parametrize("low", LOW, ids=str)
def test_selective_scan(backend: str, low: torch.dtype) -> None:
    with FakeTensorMode(), cuda_autocast(low), Calls() as calls:
        arguments = [value.to("cuda") for value in scan_arguments()]
        out = selective_scan(*arguments, delta_softplus=True, backend=backend)
        gated = selective_scan(*arguments, z=arguments[0], backend=backend)
    assert out.dtype == gated.dtype == BY_DEFAULT[low]
    dtypes = [low, low, torch.float32, low, low, torch.float32, torch.float32]
    assert [seen[1] for seen in calls.seen] == [dtypes, dtypes]
    assert [seen[2] for seen in calls.seen] == [BY_DEFAULT[low], torch.float32]


@pytest.mark.parametrize("low", LOW, ids=str)
def test_float64_is_left_alone(backend: str, low: torch.dtype) -> None:
    with FakeTensorMode(), cuda_autocast(low), Calls() as calls:
        arguments = [value.to("cuda").double() for value in scan2d_arguments(3, 4)]
        operator = torch.ops.mmvmamba.scan2d if backend == "compiled" else torch.ops.mmvmamba.scan2d_triton
        operator(*arguments, [0, 1, 2, 3], None, True, torch.float64, False)
    assert calls.seen[0][1] == [torch.float64] * 6
    with FakeTensorMode(), cuda_autocast(low):
        arguments = [value.to("cuda").double() for value in scan2d_arguments(1, 2)]
        assert scan2d(*arguments, backend="reference").dtype == torch.float64


def test_the_rule() -> None:
    one = {dtype: torch.ones(1, dtype=dtype) for dtype in (torch.float32, torch.float64, *LOW, torch.int64)}
    arguments = (
        one[torch.float32], one[torch.bfloat16], one[torch.float16], one[torch.float64], one[torch.int64], None, [3],
        torch.float32, True,
    )  # fmt: skip
    cast = autocast_arguments((0, 1), arguments, torch.float16)
    dtypes = [value.dtype for value in cast[:5]]
    # A stream that is in half precision already stays; a parameter in half precision is widened.
    assert dtypes == [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64]
    assert cast[5:] == arguments[5:]


@pytest.mark.parametrize("low", LOW, ids=str)
def test_traces_agree_with_eager(backend: str, low: torch.dtype) -> None:
    class Scan(torch.nn.Module):
        def forward(self, *arguments: torch.Tensor) -> torch.Tensor:
            with cuda_autocast(low):
                return scan2d(*arguments, backend=backend)

    with FakeTensorMode(allow_non_fake_inputs=True):
        arguments = [value.to("cuda") for value in scan2d_arguments(3, 4)]
        exported = torch.export.export(Scan(), tuple(arguments), strict=False)
        traced = make_fx(Scan())(*arguments)
    for graph in (exported.graph, traced.graph):
        (node,) = (node for node in graph.nodes if "mmvmamba" in str(node.target))
        assert node.args[9] == BY_DEFAULT[low]
        assert node.meta["val"][0].dtype == BY_DEFAULT[low]


def test_without_autocast_nothing_changes(backend: str) -> None:
    with FakeTensorMode(), Calls() as calls:
        arguments = [value.to("cuda") for value in scan2d_arguments(3, 4)]
        arguments[0] = arguments[0].half()
        assert scan2d(*arguments, backend=backend).dtype == torch.float16
    assert calls.seen[0][1] == [torch.float16, *[torch.float32] * 5]


@pytest.mark.parametrize("low", LOW, ids=str)
def test_cpu_tensors_under_cuda_autocast_stay(low: torch.dtype) -> None:
    arguments = scan2d_arguments(3, 4)
    with cuda_autocast(low):
        out = scan2d(*arguments)
    assert out.dtype == torch.float32
    assert torch.equal(out, scan2d(*arguments))
