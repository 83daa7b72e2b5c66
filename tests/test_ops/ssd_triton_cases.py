"""Cases of the Triton kernels of state space duality, run by test_triton_interpreter.py with TRITON_INTERPRET=1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmvmamba.ops import ssd, ssd_non_causal, ssd_read, ssd_state
from mmvmamba.ops.ssd import operator, triton_kernels
from mmvmamba.ops.ssd.causal import operator as causal_operator
from mmvmamba.ops.ssd.causal import triton_kernels as causal_kernels
from mmvmamba.testing import FORWARD_BOUND, PARAMETER_GRAD_BOUND, STREAM_GRAD_BOUND, assert_close
from tests.test_ops.samples import ssd_non_causal_sample, ssd_sample
from tests.test_ops.test_large_offsets import spread_out

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
Tensors = list[Tensor | None]
CAUSAL_NAMES = ("x", "dt", "decay", "b_in", "c_out", "skip", "dt_bias", "initial_state")
NAMES = ("x", "weight", "b_in", "c_out", "skip")


def double(values: Tensors) -> list[Any]:
    return [None if value is None else value.double() for value in values]


def inputs(dtype=F32, b=1, length=9, k=2, p=5, g=1, n=3, options=True) -> Tensors:
    torch.manual_seed(b + length + k + p + g + n)
    return [
        torch.randn(b, length, k, p).to(dtype),
        torch.randn(b, length, k).to(dtype) if options else None,
        torch.randn(b, length, g, n).to(dtype),
        torch.randn(b, length, g, n).to(dtype),
        torch.randn(k) if options else None,
    ]


def check(values: Tensors, blocked: bool = False, out_dtype: torch.dtype | None = None) -> None:
    x = values[0]
    out_dtype = out_dtype or x.dtype
    out, state = triton_kernels.non_causal_forward(*values, blocked, out_dtype)
    want, want_state = operator._non_causal(*double(values), blocked, torch.float64)
    assert out.dtype == out_dtype
    assert state.dtype == F32
    assert_close("out", out, want, FORWARD_BOUND[x.dtype])
    assert_close("state", state, want_state, FORWARD_BOUND[F32])
    weights = torch.randn(x.shape).to(out_dtype)
    grads = triton_kernels.non_causal_backward(weights, *values, blocked, state)
    expected = operator._non_causal_backward(weights.double(), *double(values), blocked, want_state)
    for name, grad, wanted, value in zip(NAMES, grads, expected, values, strict=True):
        if value is None:
            assert grad.shape == (0,)
            continue
        assert grad.dtype == value.dtype
        assert grad.is_contiguous()
        assert_close(name, grad, wanted, (PARAMETER_GRAD_BOUND if name == "skip" else STREAM_GRAD_BOUND)[x.dtype])


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("options", [True, False], ids=["weighted", "plain"])
def test_dtypes(dtype: torch.dtype, options: bool) -> None:
    check(inputs(dtype, options=options), out_dtype=None if options else F32)


@pytest.mark.parametrize("blocked", [True, False])
@pytest.mark.parametrize(("k", "g"), [(4, 2), (3, 3)])
def test_groups(k: int, g: int, blocked: bool) -> None:
    check(inputs(k=k, g=g), blocked)


@pytest.mark.parametrize(("length", "p", "n"), [(1, 1, 1), (33, 16, 17), (20, 65, 2), (20, 2, 65)])
def test_sizes_around_tiles(length: int, p: int, n: int) -> None:
    check(inputs(length=length, p=p, n=n))


def test_long_sequences_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    check(inputs(length=70))
    monkeypatch.setattr(triton_kernels, "LONGEST_SEGMENT", 1)
    check(inputs(length=70))


@pytest.mark.parametrize("seed", range(4))
def test_samples(seed: int) -> None:
    """Random layouts; the first elements of every axis."""
    sample = ssd_non_causal_sample(seed)
    x, weight, b_in, c_out, skip = (
        value.float() if value is not None and value.dtype == torch.float64 else value
        for value in sample.tensors.values()
    )
    k, g = x.shape[2], b_in.shape[2]
    cut = (slice(1), slice(35), slice(None), slice(20))
    values = [x[cut], None if weight is None else weight[cut[:2]], b_in[cut], c_out[cut], skip]
    assert k % g == 0
    check(values, sample.options["head_groups"] == "blocked", sample.options["out_dtype"])


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_functions_and_their_halves(dtype: torch.dtype) -> None:
    """By the documented functions, through autograd, on slices of one wide map, which are read in place."""
    b, length, k, p, n = 2, 9, 2, 4, 3
    torch.manual_seed(0)
    wide = torch.randn(b, length, k * p + 2 * n + k).to(dtype).requires_grad_()
    x, B, C, weight = wide.split([k * p, n, n, k], -1)
    x, B, C = x.unflatten(-1, (k, p)), B.unsqueeze(2), C.unsqueeze(2)
    skip = torch.randn(k, requires_grad=True)
    on_out = torch.randn(b, length, k, p)
    outs, halves = {}, {}
    for backend in ("triton", "reference"):
        out = ssd_non_causal(x, weight, B, C, skip, backend=backend)
        outs[backend] = (out, *torch.autograd.grad((out * on_out).sum(), [wide, skip], retain_graph=True))
        state = ssd_state(x, weight, B, backend=backend)
        read = ssd_read(torch.sin(state), C, out_dtype=F32, backend=backend)
        halves[backend] = (state, read, *torch.autograd.grad((read * on_out).sum(), [wide], retain_graph=True))
    for found, want in ((outs["triton"], outs["reference"]), (halves["triton"], halves["reference"])):
        for value, wanted in zip(found, want, strict=True):
            assert value.dtype == wanted.dtype
            assert_close("value", value, wanted, STREAM_GRAD_BOUND[dtype])


def test_results_repeat_in_every_bit() -> None:
    values = inputs(length=70)
    weights = torch.randn(values[0].shape)
    runs = []
    for _ in range(2):
        out, state = triton_kernels.non_causal_forward(*values, False, F32)
        runs.append((out, state, *triton_kernels.non_causal_backward(weights, *values, False, state)))
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


@pytest.mark.parametrize("shape", [(0, 4, 2, 3), (2, 0, 2, 3), (2, 4, 2, 0)], ids=["batch", "length", "channels"])
def test_nothing(shape: tuple[int, int, int, int]) -> None:
    b, length, k, p = shape
    values = inputs(b=b, length=length, k=k, p=p)
    out, state = triton_kernels.non_causal_forward(*values, False, F32)
    assert out.shape == shape
    assert state.shape == (b, k, 3, p)
    assert not state.any()
    for grad, value in zip(triton_kernels.non_causal_backward(out, *values, False, state), values, strict=True):
        assert grad.shape == value.shape
        assert not grad.any()
    read = triton_kernels.read_backward(out, state, values[3], False)
    assert [grad.shape for grad in read] == [state.shape, values[3].shape]
    assert not any(grad.any() for grad in read)


def test_offsets_beyond_31_bits(tmp_path: Path) -> None:
    values = inputs(length=5, k=1, p=2, n=2)
    far = [spread_out(v, tmp_path / str(i)) if i in (0, 2, 3) else v for i, v in enumerate(values)]
    near, state = triton_kernels.non_causal_forward(*values, False, F32)
    assert torch.equal(triton_kernels.non_causal_forward(*far, False, F32)[0], near)
    want = triton_kernels.non_causal_backward(near, *values, False, state)
    found = triton_kernels.non_causal_backward(spread_out(near, tmp_path / "grad"), *far, False, state)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


def causal_inputs(dtype=F32, b=1, length=20, k=2, p=5, g=1, n=3, options=True) -> Tensors:
    x, dt, b_in, c_out, skip = inputs(dtype, b, length, k, p, g, n, options)
    dt = torch.randn(b, length, k).to(dtype) if dt is None else dt
    bias, start = (torch.randn(k), torch.randn(b, k, n, p)) if options else (None, None)
    return [x, dt, -torch.rand(k), b_in, c_out, skip, bias, start]


def check_causal(values: Tensors, softplus: bool = True, blocked: bool = False, last: bool = True) -> None:
    x = values[0]
    out, state, carries = causal_kernels.forward(*values, softplus, blocked, x.dtype, True)
    want, want_state, _ = causal_operator._forward(*double(values), softplus, blocked, torch.float64, False)
    assert out.dtype == x.dtype
    assert carries.shape == causal_operator.carries_shape(x, values[3], True)
    assert_close("out", out, want, FORWARD_BOUND[x.dtype])
    assert_close("last state", state, want_state, FORWARD_BOUND[F32])
    weights = torch.randn(x.shape).to(x.dtype)
    on_state = torch.randn(state.shape) if last else None
    grads = causal_kernels.backward(weights, on_state, *values, softplus, blocked, carries)
    given = (weights.double(), None if on_state is None else on_state.double())
    expected = causal_operator._backward(*given, *double(values), softplus, blocked, carries.double())
    for name, grad, wanted, value in zip(CAUSAL_NAMES, grads, expected, values, strict=True):
        if value is None:
            assert grad.shape == (0,)
            continue
        assert grad.dtype == value.dtype
        bounds = STREAM_GRAD_BOUND if name in ("x", "dt", "b_in", "c_out") else PARAMETER_GRAD_BOUND
        assert_close(name, grad, wanted, bounds[x.dtype])


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("options", [True, False], ids=["options", "plain"])
def test_causal_dtypes(dtype: torch.dtype, options: bool) -> None:
    check_causal(causal_inputs(dtype, options=options), last=options)


@pytest.mark.parametrize(("k", "g", "blocked"), [(4, 2, True), (4, 2, False)])
def test_causal_groups(k: int, g: int, blocked: bool) -> None:
    check_causal(causal_inputs(k=k, g=g, length=9), blocked=blocked)


@pytest.mark.parametrize(("length", "p", "n"), [(1, 1, 1), (65, 4, 17), (17, 33, 2), (17, 2, 65), (130, 2, 2)])
def test_causal_sizes_around_tiles_and_chunks(length: int, p: int, n: int) -> None:
    check_causal(causal_inputs(length=length, p=p, n=n, k=1))


@pytest.mark.parametrize("seed", range(4))
def test_causal_samples(seed: int) -> None:
    sample = ssd_sample(seed)
    x, dt, decay, b_in, c_out, skip, bias, start = (
        value.float() if value is not None and value.dtype == torch.float64 else value
        for value in sample.tensors.values()
    )
    cut = (slice(1), slice(20), slice(None), slice(20))
    start = None if start is None else start[:1, :, :20, :20]
    values = [x[cut], dt[cut[:2]], decay, b_in[cut], c_out[cut], skip, bias, start]
    check_causal(values, bool(sample.options["dt_softplus"]), sample.options["head_groups"] == "blocked")


def test_weak_decays_behind_a_strong_one_keep_their_precision() -> None:
    """Differences of sums of logarithms would be off by 1e-3 here."""
    x, dt, _, b_in, c_out, *_ = causal_inputs(length=64, k=1, p=4, n=4)
    dt = dt.abs() * 0.01
    dt[:, ::20] = 5000.0
    x[:, ::20] *= 1e-3
    check_causal([x, dt, -torch.ones(1), b_in, c_out, None, None, None], softplus=False)


def test_later_positions_change_nothing_before() -> None:
    values = causal_inputs()
    before = causal_kernels.forward(*values, True, False, F32, False)[0]
    for value in (values[0], values[1], values[3], values[4]):
        value[:, 9:] += 1
    after = causal_kernels.forward(*values, True, False, F32, False)[0]
    assert torch.equal(after[:, :9], before[:, :9])
    assert not torch.equal(after[:, 9:], before[:, 9:])


def test_the_causal_function_and_one_output_without_gradient() -> None:
    values = [value.requires_grad_() for value in causal_inputs(length=9)]
    given = dict(zip(CAUSAL_NAMES, values, strict=True))
    found = {}
    for backend in ("triton", "reference"):
        out, last = ssd(**given, dt_softplus=True, return_last_state=True, backend=backend)
        both = torch.autograd.grad(out.sin().sum() + last.sin().sum(), values, retain_graph=True)
        of_state = torch.autograd.grad(last.sin().sum(), values[:4], retain_graph=True)
        found[backend] = (out, last, *both, *of_state, *torch.autograd.grad(out.sin().sum(), values[:4]))
    for value, want in zip(found["triton"], found["reference"], strict=True):
        assert_close("value", value, want, PARAMETER_GRAD_BOUND[F32])


@pytest.mark.parametrize("shape", [(0, 4, 2, 3), (2, 0, 2, 3), (2, 4, 2, 0)], ids=["batch", "length", "channels"])
def test_nothing_causal(shape: tuple[int, int, int, int]) -> None:
    b, length, k, p = shape
    values = causal_inputs(b=b, length=length, k=k, p=p)
    out, state, carries = causal_kernels.forward(*values, True, False, F32, True)
    assert out.shape == shape
    assert torch.equal(state, values[-1]) or length > 0
    grads = causal_kernels.backward(out, state, *values, True, False, carries)
    assert [grad.shape for grad in grads] == [value.shape for value in values]


def test_causal_offsets_beyond_31_bits(tmp_path: Path) -> None:
    values = causal_inputs(length=5, k=1, p=2, n=2)
    far = [spread_out(v, tmp_path / str(i)) if i in (0, 3, 4) else v for i, v in enumerate(values)]
    near, _, carries = causal_kernels.forward(*values, True, False, F32, True)
    assert torch.equal(causal_kernels.forward(*far, True, False, F32, True)[0], near)
    want = causal_kernels.backward(near, None, *values, True, False, carries)
    found = causal_kernels.backward(spread_out(near, tmp_path / "grad"), None, *far, True, False, carries)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
