"""Cases of the Triton kernels, run by test_triton_interpreter.py with TRITON_INTERPRET=1 (and by hand on a GPU)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmvmamba.ops import triton_launch
from mmvmamba.ops.scan2d import triton_kernels as scan2d_triton
from mmvmamba.ops.scan2d.operator import routes_as_permutation
from mmvmamba.ops.scan2d.reference import scan2d_backward_reference, scan2d_reference
from mmvmamba.ops.selective_scan import triton_kernels as selective_scan_triton
from mmvmamba.ops.selective_scan.reference import selective_scan_backward_reference, selective_scan_reference
from mmvmamba.testing import FORWARD_BOUND, PARAMETER_GRAD_BOUND, STREAM_GRAD_BOUND, assert_close
from tests.test_ops.samples import MAKERS
from tests.test_ops.test_large_offsets import spread_out

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
Tensors = list[Tensor | None]


def double(values: Tensors) -> list[Any]:
    return [None if value is None else value.double() for value in values]


def map_inputs(dtype=F32, b=1, h=5, w=7, d=5, k=2, n=1, r=3, options=True, softplus=True, per_route=False) -> Tensors:
    torch.manual_seed(b + h * w + d + k + n + r)
    scale = 1.0 if softplus else 0.3
    return [
        torch.randn(b, h, w, *((k,) if per_route else ()), d).to(dtype),
        (torch.randn(b, h, w, k, r + 2 * n) * scale).to(dtype),
        torch.randn(k, d, r) * scale * r**-0.5,
        torch.randn(k, d) * 0.5 * scale if options else None,
        -torch.rand(k, d, n) * 2,
        torch.randn(k, d) if options else None,
    ]


def sequence_inputs(dtype=F32, b=1, d=6, length=35, n=2, groups=2, options=True) -> Tensors:
    torch.manual_seed(d + length + n)
    return [
        torch.randn(b, d, length).to(dtype), torch.rand(b, d, length).to(dtype), -torch.rand(d, n) * 2,
        torch.randn(b, groups, n, length).to(dtype), torch.randn(b, groups, n, length).to(dtype),
        torch.randn(d) if options else None, torch.randn(d) * 0.5 if options else None,
    ]  # fmt: skip


def check_all(names: str, grads: tuple[Tensor, ...], expected: tuple[Any, ...], values: Tensors, streams: str) -> None:
    dtype = values[0].dtype
    for name, grad, want, value in zip(names.split(), grads, expected, values, strict=True):
        if value is None:
            assert grad.shape == (0,)
            continue
        assert grad.dtype == value.dtype
        bounds = STREAM_GRAD_BOUND if name in streams.split() else PARAMETER_GRAD_BOUND
        assert_close(name, grad, want, bounds[dtype])


def check_map(values: Tensors, orders: list[int], permutation: Tensor | None = None, softplus: bool = True) -> None:
    x = values[0]
    pixels = routes_as_permutation(x, orders, permutation)
    out, carries = scan2d_triton.forward(*values, orders, permutation, softplus, x.dtype, True)
    assert out.dtype == x.dtype
    assert_close("out", out, scan2d_reference(*double(values), pixels, softplus), FORWARD_BOUND[x.dtype])
    weights = torch.randn(out.shape).to(x.dtype)
    grads = scan2d_triton.backward(weights, *values, orders, permutation, softplus, carries)
    expected = scan2d_backward_reference(weights.double(), *double(values), pixels, softplus)
    check_all("x projections dt_weight dt_bias A D", grads, expected, values, "x projections")


def check_sequence(values: Tensors, softplus: bool = True, last: bool = True) -> None:
    u, A = values[0], values[2]
    out, state, carries = selective_scan_triton.forward(*values, softplus, u.dtype, True)
    want, want_state = selective_scan_reference(*double(values), softplus)
    assert_close("out", out, want, FORWARD_BOUND[u.dtype])
    assert_close("last_state", state, want_state, FORWARD_BOUND[F32])
    weights = torch.randn(u.shape).to(u.dtype)
    on_state = torch.randn(u.shape[0], *A.shape) if last else None
    grads = selective_scan_triton.backward(weights, on_state, *values, softplus, carries)
    on_state = None if on_state is None else on_state.double()
    expected = selective_scan_backward_reference(weights.double(), on_state, *double(values), softplus)
    check_all("u delta A B C D delta_bias", grads, expected, values, "u delta B C")


@pytest.fixture(params=[1, 3], ids=["whole", "segmented"])
def segments(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    if request.param > 1:
        monkeypatch.setattr(triton_launch, "SHORTEST_SEGMENT", 1)
    assert triton_launch.plan(2, 5, 70).segments == request.param
    return request.param


@pytest.mark.parametrize(("dtype", "n"), [(F32, 1), (F16, 1), (BF16, 1), (F32, 2), (BF16, 2), (F16, 16)])
def test_map_dtypes_and_states(dtype: torch.dtype, n: int) -> None:
    check_map(map_inputs(dtype, n=n), [1, 2])


def test_map_segments(segments: int) -> None:
    check_map(map_inputs(h=7, w=10, d=2, n=1 if segments > 1 else 2), [0, 3])


@pytest.mark.parametrize("orders", [[0], [1], [2], [3], [0, 0, 2]])
def test_map_orders(orders: list[int]) -> None:
    check_map(map_inputs(h=4, w=3, k=len(orders)), orders)


@pytest.mark.parametrize(("dtype", "n"), [(F32, 1), (F16, 1), (F32, 2), (BF16, 16)])
@pytest.mark.parametrize("length", [None, 3, 12, 20], ids=["named", "partial", "whole", "repeats"])
def test_a_map_for_every_route(length: int | None, dtype: torch.dtype, n: int) -> None:
    values = map_inputs(dtype, b=2, h=4, w=3, k=3, n=n, per_route=True)
    if length is None:
        check_map(values, [0, 2, 1])
    else:
        check_map(values, [], torch.randint(12, (3, length)))


def test_a_map_for_every_route_in_segments(segments: int) -> None:
    check_map(map_inputs(h=7, w=10, d=2, n=1 if segments > 1 else 2, per_route=True), [0, 3])


@pytest.mark.parametrize("length", [3, 12, 20], ids=["partial", "whole", "repeats"])
@pytest.mark.parametrize(("dtype", "n"), [(F32, 1), (F16, 1), (BF16, 2)])
def test_map_permutations(length: int, dtype: torch.dtype, n: int) -> None:
    values = map_inputs(dtype, h=4, w=3, n=n)
    routes = torch.stack([torch.randperm(12) for _ in range(2)])[:, :length]
    check_map(values, [], routes if length <= 12 else torch.randint(12, (2, length)))


@pytest.mark.parametrize("softplus", [True, False])
def test_map_without_options(softplus: bool) -> None:
    check_map(map_inputs(h=4, w=3, options=False, softplus=softplus), [0, 1], None, softplus)


@pytest.mark.parametrize(("d", "r"), [(1, 17), (33, 1), (65, 3), (3, 49)])
def test_map_blocks_of_channels_and_wide_rank(d: int, r: int) -> None:
    check_map(map_inputs(h=2, w=3, d=d, r=r), [0, 1])


def test_lines_as_long_as_a_tile() -> None:
    """Columns of 17 pixels: a tile crosses from one into the next by a step, not by a division."""
    check_map(map_inputs(h=17, w=16, d=2, k=1, r=1), [3])


def test_more_orders_than_one_number_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_launch, "LARGEST_CODED", 2)
    monkeypatch.setattr(scan2d_triton, "LARGEST_CODED", 2)
    assert scan2d_triton._routes(torch.zeros(1, 1, 2, 2), [0, 2, 1], None).kind == 2
    check_map(map_inputs(h=3, w=2, d=2, k=3, r=1), [0, 2, 1])


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("n", [1, 16])
def test_sequence_dtypes_and_states(dtype: torch.dtype, n: int) -> None:
    check_sequence(sequence_inputs(dtype, n=n))


def test_sequence_segments(segments: int) -> None:
    check_sequence(sequence_inputs(length=70))


@pytest.mark.parametrize("softplus", [True, False])
def test_sequence_without_options(softplus: bool) -> None:
    check_sequence(sequence_inputs(length=9, groups=1, options=False), softplus, last=False)


def test_strided_inputs() -> None:
    values = sequence_inputs(length=9)
    check_sequence([None if v is None else v.transpose(0, -1).contiguous().transpose(0, -1) for v in values])
    values = map_inputs(h=2, w=3)
    check_map([v.transpose(0, -1).contiguous().transpose(0, -1) for v in values], [0, 1])


@pytest.mark.parametrize("shape", [{"b": 0}, {"h": 0}, {"d": 0}], ids=str)
def test_empty_maps(shape: dict[str, int]) -> None:
    values = map_inputs(**shape)
    out, carries = scan2d_triton.forward(*values, [0, 1], None, True, F32, True)
    assert out.shape == values[0].shape
    grads = scan2d_triton.backward(out, *values, [0, 1], None, True, carries)
    assert all(grad.shape == value.shape and not grad.any() for grad, value in zip(grads, values, strict=True))


@pytest.mark.parametrize("shape", [{"b": 0}, {"length": 0}, {"d": 0}], ids=str)
def test_empty_sequences(shape: dict[str, int]) -> None:
    check_sequence(sequence_inputs(**shape), last=False)


def test_repeats_bitwise(segments: int) -> None:
    values = map_inputs(h=7, w=10, d=2, k=1, n=1 if segments > 1 else 2)

    def run() -> tuple[Tensor, ...]:
        out, carries = scan2d_triton.forward(*values, [1], None, True, F32, True)
        return (out, carries, *scan2d_triton.backward(out, *values, [1], None, True, carries))

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_nan_stays_where_it_must(segments: int) -> None:
    """A NaN of one channel at one position reaches that channel's later positions and nothing else."""
    values = sequence_inputs(b=2, d=2, groups=1, length=70)
    clean = selective_scan_triton.forward(*values, True, F32, False)[0]
    values[0][0, 1, 40] = float("nan")
    out = selective_scan_triton.forward(*values, True, F32, False)[0]
    hit = torch.zeros_like(out, dtype=torch.bool)
    hit[0, 1, 40:] = True
    assert out[hit].isnan().all() and torch.equal(out[~hit], clean[~hit])


def test_decay_beyond_float32_times_zero_is_zero(segments: int) -> None:
    values = sequence_inputs(length=70)
    values[0].zero_()
    values[2].fill_(1000.0)
    out, state, _ = selective_scan_triton.forward(*values, True, F32, False)
    assert not out.any() and not state.any()


def test_plan_fills_a_gpu_with_few_chains() -> None:
    cut = triton_launch.plan(4, 96, 1 << 20)
    assert 4 * cut.blocks * cut.segments >= triton_launch.TARGET_PROGRAMS // 2
    assert triton_launch.plan(128 * 4, 96, 3136).segments == 1
    make: Callable[..., Any] = triton_launch.plan
    assert all(make(2, d, ln).segment_length % 32 == 0 for d in (1, 99) for ln in (1, 33, 5000))


def cut(value: Tensor | None, *sizes: int) -> Tensor | None:
    """The first elements along every axis, in the same layout."""
    return None if value is None else value[tuple(slice(size) for size in sizes[: value.dim()])]


@pytest.mark.parametrize("seed", range(8))
def test_samples_of_maps(seed: int) -> None:
    sample = MAKERS["scan2d"](seed)
    x, projections, weight, bias, A, D = sample.tensors.values()
    orders, pixels = sample.options["orders"], None
    k = min(2, A.shape[0])
    x = cut(x, 1, 5, 4, *((k, 3) if x.dim() == 5 else (3,)))
    x = x.float() if sample.dtype == torch.float64 else x
    h, w = x.shape[1:3]
    if isinstance(orders, Tensor):
        pixels, orders = orders[:k, : h * w + 3] % (h * w), []
    r = weight.shape[2]
    values = [x, projections[:1, :h, :w, :k].to(x.dtype), *(cut(v, k, 3) for v in (weight, bias, A, D))]
    values = [v.float() if v is not None and v.dtype == torch.float64 else v for v in values]
    assert values[1].shape[-1] == r + 2 * A.shape[2]
    check_map(values, [int(order) for order in orders[:k]], pixels, bool(sample.options["delta_softplus"]))


@pytest.mark.parametrize("seed", range(6))
def test_samples_of_sequences(seed: int) -> None:
    sample = MAKERS["selective_scan"](seed)
    u, delta, A, B, C, D, bias, _z = sample.tensors.values()
    B, C = (v if v.dim() == 4 else v[:, None] for v in (B, C))
    d, n = min(4, u.shape[1]), min(8, A.shape[1])
    values = [
        cut(u, 1, d, 20), cut(delta, 1, d, 20), cut(A, d, n), cut(B, 1, 1, n, 20), cut(C, 1, 1, n, 20),
        cut(D, d), cut(bias, d),
    ]  # fmt: skip
    values = [v.float() if v is not None and v.dtype == torch.float64 else v for v in values]
    check_sequence(values, bool(sample.options["delta_softplus"]))


@pytest.mark.parametrize(("n", "h", "w"), [(1, 7, 10), (2, 2, 5)], ids=["segmented", "whole"])
def test_nan_in_a_map_stays_where_it_must(n: int, h: int, w: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A NaN of one channel at one pixel reaches that channel's later pixels; its gradient the earlier ones."""
    monkeypatch.setattr(triton_launch, "SHORTEST_SEGMENT", 1)
    values = map_inputs(b=2, h=h, w=w, d=2, k=1, n=n)
    length, t = h * w, h * w // 2
    rest = ([0], None, True)
    clean, carries = scan2d_triton.forward(*values, *rest, F32, True)
    poisoned = [values[0].clone(), *values[1:]]
    poisoned[0].view(2, length, 2)[0, t, 1] = float("nan")
    out = scan2d_triton.forward(*poisoned, *rest, F32, False)[0].view(2, length, 2)
    hit = torch.zeros(2, length, 2, dtype=torch.bool)
    hit[0, t:, 1] = True
    assert torch.equal(out.isnan(), hit) and torch.equal(out[~hit], clean.view(2, length, 2)[~hit])
    grad = torch.randn(clean.shape)
    expected = scan2d_triton.backward(grad, *values, *rest, carries)
    grad.view(2, length, 2)[0, t, 1] = float("nan")
    dx, dprojections, dweight, dbias, dA, dD = scan2d_triton.backward(grad, *values, *rest, carries)
    hit = hit.zero_().view(dx.shape)
    hit.view(2, length, 2)[0, : t + 1, 1] = True
    assert torch.equal(dx.isnan(), hit) and torch.equal(dx[~hit], expected[0][~hit])
    hit = torch.zeros(2, length, values[1].shape[-1], dtype=torch.bool)
    hit[0, : t + 1, :-n] = True
    hit[0, t, -n:] = True
    hit = hit.view(dprojections.shape)
    assert torch.equal(dprojections.isnan(), hit) and torch.equal(dprojections[~hit], expected[1][~hit])
    for value, want in zip((dweight, dbias, dA, dD), expected[2:], strict=True):
        assert value[:, 1].isnan().all() and torch.equal(value[:, 0], want[:, 0])


def test_offsets_beyond_31_bits_in_sequences(tmp_path: Path) -> None:
    values = sequence_inputs(d=2, groups=1, length=5)
    far = [spread_out(v, tmp_path / str(i)) if i in (0, 1, 3, 4) else v for i, v in enumerate(values)]
    near = selective_scan_triton.forward(*values, True, F32, True)
    assert all(
        torch.equal(a, b) for a, b in zip(selective_scan_triton.forward(*far, True, F32, True), near, strict=True)
    )
    want = selective_scan_triton.backward(near[0], None, *values, True, near[2])
    found = selective_scan_triton.backward(spread_out(near[0], tmp_path / "grad"), None, *far, True, near[2])
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


def test_offsets_beyond_31_bits_in_maps(tmp_path: Path) -> None:
    values = map_inputs(h=1, w=5, d=2, k=1)
    problem = scan2d_triton._problem(*values, [0], None, True)
    far = dataclasses.replace(problem, x=spread_out(problem.x, tmp_path / "x"))
    assert far.x.stride(2) * 4 > 2**30
    outs = [torch.zeros(1, 1, 5, 2), spread_out(torch.zeros(1, 1, 5, 2), tmp_path / "y")]
    grads = []
    for given, out in zip((problem, far), outs, strict=True):
        carries = torch.zeros(1, 1, 1, 1, 2)
        triton_launch.scan_forward(given, out, carries, None)
        dx = torch.zeros(1, 1, 5, 2) if given is problem else spread_out(torch.zeros(1, 1, 5, 2), tmp_path / "dx")
        grads.append((dx, *triton_launch.scan_backward(given, out, None, carries, dx, None)))
    assert outs[0].any() and torch.equal(*outs)
    assert all(torch.equal(near, distant) for near, distant in zip(*grads, strict=True))
