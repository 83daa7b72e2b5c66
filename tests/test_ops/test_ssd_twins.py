"""What state space duality hands to Triton's kernels, with plain PyTorch standing in for these."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mmvmamba.ops import backends, flops, ssd_non_causal, ssd_read, ssd_state
from mmvmamba.ops.ssd import operator
from tests.test_ops.test_ssd import non_causal_inputs


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Plain PyTorch in the place of Triton's kernels; the list says which were called."""
    names: list[str] = []
    module = types.ModuleType("mmvmamba.ops.ssd.triton_kernels")
    for mixer in ("state", "read", "non_causal"):
        for direction, plain in (("forward", f"_{mixer}"), ("backward", f"_{mixer}_backward")):

            def stand_in(*arguments: object, name: str = f"{mixer}_{direction}", plain: str = plain) -> Any:
                assert not torch.is_autocast_enabled("cpu")
                names.append(name)
                return getattr(operator, plain)(*arguments)

            setattr(module, f"{mixer}_{direction}", stand_in)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(backends, "triton_problem", lambda _kind: None)
    return names


def float_inputs() -> dict[str, Tensor]:
    return non_causal_inputs(make=lambda *shape: torch.randn(shape).requires_grad_())


def mixer(given: dict[str, Tensor], backend: str) -> Tensor:
    state = ssd_state(given["x"], given["weight"], given["b_in"], backend=backend)
    return ssd_read(torch.sin(state), given["c_out"], backend=backend) + ssd_non_causal(**given, backend=backend)


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_forward_and_backward_of_triton_go_together(called: list[str], traced: bool, autocast: bool) -> None:
    given = float_inputs()
    torch._dynamo.reset()
    run = torch.compile(mixer, fullgraph=True, backend="aot_eager") if traced else mixer
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = run(given, "triton")
        grads = torch.autograd.grad(out.square().sum(), list(given.values()))
    assert sorted(called) == sorted(
        f"{m}_{d}" for m in ("state", "read", "non_causal") for d in ("forward", "backward")
    )
    expected = mixer(given, "reference")
    torch.testing.assert_close(out, expected)
    wanted = torch.autograd.grad(expected.square().sum(), list(given.values()))
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("called")
def test_operators_of_triton_are_well_formed() -> None:
    x, weight, b_in, c_out, skip = float_inputs().values()
    operators = torch.ops.mmvmamba
    state = operators.ssd_state_triton(x, weight, b_in, False).detach().requires_grad_()
    arguments: dict[str, tuple[object, ...]] = {
        "ssd_state_triton": (x, weight, b_in, False),
        "ssd_read_triton": (state, c_out, True, torch.float32),
        "ssd_non_causal_triton": (x, weight, b_in, c_out, skip, False, torch.float32),
    }
    for name, values in arguments.items():
        torch.library.opcheck(getattr(operators, name).default, values)
    x, b_in, c_out, state = (value.detach() for value in (x, b_in, c_out, state))
    values = (x, x, None, b_in, c_out, None, True, state)
    torch.library.opcheck(operators.ssd_non_causal_triton_backward.default, values)


@pytest.mark.usefixtures("called")
def test_both_operators_count_alike() -> None:
    given = float_inputs()
    counts = []
    for suffix in ("", "_triton"):
        values = (*given.values(), False, torch.float32)
        with FlopCounterMode(display=False) as mode:
            out, _ = getattr(torch.ops.mmvmamba, "ssd_non_causal" + suffix)(*values)
            torch.autograd.grad(out.sum(), list(given.values()))
        counts.append(mode.get_total_flops())
    shapes = [tuple(value.shape) for value in given.values()]
    forward = flops.ssd_non_causal_flops(*shapes)
    assert counts == [forward + flops.ssd_non_causal_backward_flops((), *shapes)] * 2
