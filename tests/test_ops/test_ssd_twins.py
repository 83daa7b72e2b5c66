"""What state space duality hands to Triton's kernels, with plain PyTorch standing in for these."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mmvmamba.ops import backends, flops, ssd, ssd_non_causal, ssd_read, ssd_state
from mmvmamba.ops.ssd import operator
from mmvmamba.ops.ssd.causal import operator as causal_operator
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
    causal = types.ModuleType("mmvmamba.ops.ssd.causal.triton_kernels")
    for direction in ("forward", "backward"):

        def causal_stand_in(*arguments: object, direction: str = direction) -> Any:
            assert not torch.is_autocast_enabled("cpu")
            names.append(f"causal_{direction}")
            return getattr(causal_operator, f"_{direction}")(*arguments)

        setattr(causal, direction, causal_stand_in)
    monkeypatch.setitem(sys.modules, causal.__name__, causal)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(backends, "triton_problem", lambda _kind: None)
    return names


def float_inputs() -> dict[str, Tensor]:
    return non_causal_inputs(make=lambda *shape: torch.randn(shape).requires_grad_())


def mixer(given: dict[str, Tensor], backend: str) -> Tensor:
    state = ssd_state(given["x"], given["weight"], given["b_in"], backend=backend)
    return ssd_read(torch.sin(state), given["c_out"], backend=backend) + ssd_non_causal(**given, backend=backend)


def causal_mixer(given: dict[str, Tensor], backend: str) -> Tensor:
    values = (given["x"], given["weight"], -given["skip"].exp(), given["b_in"], given["c_out"])
    out, state = ssd(*values, dt_softplus=True, return_last_state=True, backend=backend)
    return out * state.sum()


MIXERS = {mixer: ("state", "read", "non_causal"), causal_mixer: ("causal",)}


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("mix", MIXERS, ids=["non_causal", "causal"])
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_forward_and_backward_of_triton_go_together(called: list[str], mix: Any, traced: bool, autocast: bool) -> None:
    given = float_inputs()
    torch._dynamo.reset()
    run = torch.compile(mix, fullgraph=True, backend="aot_eager") if traced else mix
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = run(given, "triton")
        grads = torch.autograd.grad(out.square().sum(), list(given.values()))
    for name in MIXERS[mix]:
        assert [entry for entry in called if entry.startswith(name)] == [f"{name}_forward", f"{name}_backward"]
    expected = mix(given, "reference")
    torch.testing.assert_close(out, expected)
    wanted = torch.autograd.grad(expected.square().sum(), list(given.values()))
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("called")
def test_operators_of_triton_are_well_formed() -> None:
    x, weight, b_in, c_out, skip = float_inputs().values()
    operators = torch.ops.mmvmamba
    state = operators.ssd_state_triton(x, weight, b_in, False).detach().requires_grad_()
    decay = -torch.rand(x.shape[2])
    arguments: dict[str, tuple[object, ...]] = {
        "ssd_state_triton": (x, weight, b_in, False),
        "ssd_read_triton": (state, c_out, True, torch.float32),
        "ssd_non_causal_triton": (x, weight, b_in, c_out, skip, False, torch.float32),
        "ssd_triton": (x, weight, decay, b_in, c_out, skip, None, None, True, False, torch.float32, True),
    }
    for name, values in arguments.items():
        torch.library.opcheck(getattr(operators, name).default, values)
    x, weight, b_in, c_out, state = (value.detach() for value in (x, weight, b_in, c_out, state))
    values = (x, x, None, b_in, c_out, None, True, state)
    torch.library.opcheck(operators.ssd_non_causal_triton_backward.default, values)
    causal = (x, weight, decay, b_in, c_out, None, None, None)
    _, last, carries = operators.ssd_triton(*causal, True, False, torch.float32, True)
    torch.library.opcheck(operators.ssd_triton_backward.default, (x, last, *causal, True, False, carries))


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
