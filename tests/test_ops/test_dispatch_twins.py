"""What the Triton operators hand to Triton's kernels, with plain PyTorch standing in for these."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mmvmamba.ops import backends, scan2d, selective_scan
from mmvmamba.ops.library import chunk_count
from mmvmamba.ops.scan2d import operator as scan2d_operator
from mmvmamba.ops.selective_scan import operator as selective_scan_operator
from tests.test_ops.test_exact import scan2d_arguments

MARK = 7.0
OPERATORS = {"scan2d": scan2d_operator, "selective_scan": selective_scan_operator}


def arguments_of(op: str) -> list[Tensor]:
    if op == "scan2d":
        return scan2d_arguments(5, 9)
    b, d, n, length = 2, 6, 3, 45
    values = [torch.randn(b, d, length), torch.randn(b, d, length), -torch.rand(d, n)]
    return [*values, torch.randn(b, n, length), torch.randn(b, n, length), torch.randn(d), torch.randn(d)]


@pytest.fixture(params=OPERATORS)
def stand_in(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, list[str]]:
    """A module in the place of an operator's Triton kernels; the list says which were called."""
    op = request.param
    called: list[str] = []

    def forward(*arguments: object) -> tuple[Tensor, ...]:
        called.append("forward")
        *outputs, carries = OPERATORS[op]._fallback_forward(*arguments)
        return (*outputs, torch.full_like(carries, MARK))

    def backward(*arguments: object) -> tuple[Tensor, ...]:
        called.append("backward")
        carries = arguments[-1]
        assert isinstance(carries, Tensor)
        assert carries.numel() > 0
        assert (carries == MARK).all()  # those of its own forward
        return OPERATORS[op]._fallback_backward(*arguments)

    module = types.ModuleType(f"mmvmamba.ops.{op}.triton_kernels")
    module.forward, module.backward = forward, backward  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(backends, "triton_problem", lambda _kind: None)
    return op, called


def call(op: str) -> Callable[..., Tensor]:
    if op == "scan2d":
        return lambda *arguments, backend: scan2d(*arguments, backend=backend)
    return lambda *arguments, backend: selective_scan(*arguments, True, backend=backend)


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "compiled"])
def test_forward_and_backward_of_triton_go_together(stand_in: tuple[str, list[str]], traced: bool) -> None:
    op, called = stand_in
    run = call(op)
    leaves = [value.requires_grad_() for value in arguments_of(op)]
    torch._dynamo.reset()
    scan = torch.compile(run, fullgraph=True, backend="aot_eager") if traced else run
    out = scan(*leaves, backend="triton")
    grads = torch.autograd.grad(out.square().sum(), leaves)
    assert called == ["forward", "backward"]
    expected = run(*leaves, backend="reference")
    assert torch.allclose(out, expected, atol=1e-5)
    for grad, want in zip(grads, torch.autograd.grad(expected.square().sum(), leaves), strict=True):
        assert torch.allclose(grad, want, atol=2e-4, rtol=1e-4)


def test_no_states_are_asked_for_without_gradients(stand_in: tuple[str, list[str]]) -> None:
    op, called = stand_in
    operator = getattr(torch.ops.mmvmamba, f"{op}_triton")
    arguments = arguments_of(op)
    if op == "selective_scan":
        arguments[3:5] = (value.unsqueeze(1) for value in arguments[3:5])
        rest: tuple[object, ...] = (True, torch.float32)
        shape: tuple[int, ...] = (2, chunk_count(45), 3, 6)
    else:
        rest = ([0, 1, 2, 3], None, True, torch.float32)
        x, A = arguments[0], arguments[4]
        shape = (x.shape[0], A.shape[0], chunk_count(45), A.shape[2], x.shape[3])
    assert operator(*arguments, *rest, False)[-1].shape == (0,)
    assert operator(*arguments, *rest, True)[-1].shape == shape
    assert called == ["forward", "forward"]


def test_autocast_is_off_inside(stand_in: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """A backward may be called under autocast, which would run the kernels' own products in half precision."""
    op, _ = stand_in
    kernels = sys.modules[f"mmvmamba.ops.{op}.triton_kernels"]
    seen: list[bool] = []
    for name in ("forward", "backward"):
        inner = getattr(kernels, name)

        def watching(*arguments: object, inner: Callable[..., object] = inner) -> object:
            seen.append(torch.is_autocast_enabled("cpu"))
            return inner(*arguments)

        monkeypatch.setattr(kernels, name, watching)
    leaves = [value.requires_grad_() for value in arguments_of(op)]
    with torch.autocast("cpu", torch.bfloat16):
        out = call(op)(*leaves, backend="triton")
        torch.autograd.grad(out.sum(), leaves)
    assert seen == [False, False]
