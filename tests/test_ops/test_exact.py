"""Cases whose result is known in closed form, causality, isolation, memory layouts and empty tensors."""

from __future__ import annotations

import pytest
import torch

from mmvmamba.ops import CROSS_SCAN, ScanOrder, order_to_permutation, scan2d, selective_scan
from mmvmamba.testing import assert_close, requires_extension
from tests.test_ops.samples import MAKERS, Sample, scan2d_sample, selective_scan_sample

BACKENDS = [pytest.param("compiled", marks=(requires_extension(), pytest.mark.ext)), "reference"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("d", [1, 5, 16, 33, 96])
@pytest.mark.parametrize("length", [1, 31, 32, 33, 100])
def test_no_decay_is_a_cumulative_sum(backend: str, d: int, length: int) -> None:
    u = torch.randn(2, d, length, dtype=torch.float64)
    ones = torch.ones_like(u)
    projection = torch.ones(2, 1, length, dtype=torch.float64)
    A = torch.zeros(d, 1, dtype=torch.float64)
    out = selective_scan(u, ones, A, projection, projection, backend=backend)
    assert_close("out", out, u.cumsum(-1), 1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_impulse_decays_geometrically(backend: str) -> None:
    length, rate = 50, -0.3
    u = torch.zeros(1, 3, length, dtype=torch.float64)
    u[..., 7] = 2.0
    ones = torch.ones(1, 3, length, dtype=torch.float64)
    A = torch.full((3, 1), rate, dtype=torch.float64)
    out = selective_scan(u, ones, A, ones[:, :1], ones[:, :1], backend=backend)
    expected = torch.zeros(length, dtype=torch.float64)
    expected[7:] = 2 * torch.exp(rate * torch.arange(length - 7, dtype=torch.float64))
    assert_close("out", out, expected.expand(1, 3, length), 1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_skip_alone(backend: str) -> None:
    u, D = torch.randn(2, 6, 9), torch.randn(6)
    zeros = torch.zeros(2, 1, 9)
    out = selective_scan(u, torch.ones_like(u), -torch.ones(6, 1), zeros, zeros, D, backend=backend)
    torch.testing.assert_close(out, D[:, None] * u, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gate_and_last_state(backend: str) -> None:
    u, delta, z = torch.randn(3, 2, 4, 40, dtype=torch.float64).unbind(0)
    A = -torch.rand(4, 3, dtype=torch.float64)
    B, C = torch.randn(2, 2, 3, 40, dtype=torch.float64).unbind(0)
    args = (u, delta.abs(), A, B, C)
    plain, state = selective_scan(*args, return_last_state=True, backend=backend)
    gated, _ = selective_scan(*args, z=z, return_last_state=True, backend=backend)
    assert_close("gated", gated, plain * torch.nn.functional.silu(z), 1e-14)
    # The state after the last position is what a scan over one more step starts from.
    more = torch.cat([u, torch.zeros_like(u[..., :1])], -1)
    one_step = torch.cat([delta.abs(), torch.ones_like(u[..., :1])], -1)
    readout = torch.cat([C, torch.ones_like(C[..., :1])], -1)
    longer = selective_scan(more, one_step, A, torch.cat([B, B[..., :1]], -1), readout, backend=backend)
    assert_close("state", (state * torch.exp(A)).sum(-1), longer[..., -1], 1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_last_state_is_differentiable(backend: str) -> None:
    inputs = [torch.randn(1, 2, 5, dtype=torch.float64) for _ in range(2)]
    A = -torch.rand(2, 2, dtype=torch.float64)
    B = torch.randn(1, 2, 5, dtype=torch.float64)
    leaves = [value.requires_grad_() for value in (*inputs, A, B)]

    def last_state(*leaves: torch.Tensor) -> torch.Tensor:
        return selective_scan(*leaves, B, delta_softplus=True, return_last_state=True, backend=backend)[1]

    assert torch.autograd.gradcheck(last_state, leaves)


@pytest.mark.parametrize("order", list(ScanOrder), ids=lambda order: order.name)
@pytest.mark.parametrize("size", [(1, 1), (1, 6), (5, 1), (4, 7), (9, 9)], ids=str)
def test_named_orders_are_their_permutations(order: ScanOrder, size: tuple[int, int]) -> None:
    h, w = size
    expected = [(i, j) for i in range(h) for j in range(w)]
    if order in (ScanOrder.COLUMN, ScanOrder.COLUMN_REVERSED):
        expected = [(i, j) for j in range(w) for i in range(h)]
    if order in (ScanOrder.ROW_REVERSED, ScanOrder.COLUMN_REVERSED):
        expected.reverse()
    assert order_to_permutation(order, h, w).tolist() == [i * w + j for i, j in expected]


@requires_extension()
@pytest.mark.ext
@pytest.mark.parametrize("size", [(1, 1), (3, 50), (50, 3), (16, 16)], ids=str)
def test_compiled_named_orders_equal_permutations_bitwise(size: tuple[int, int]) -> None:
    h, w = size
    args = scan2d_arguments(h, w)
    permutation = torch.stack([order_to_permutation(order, h, w) for order in CROSS_SCAN])
    named = scan2d(*args, orders=CROSS_SCAN, backend="compiled")
    assert torch.equal(named, scan2d(*args, orders=permutation, backend="compiled"))


def scan2d_arguments(h: int, w: int, b: int = 2, d: int = 20, k: int = 4, r: int = 3, n: int = 2) -> tuple:
    return (
        torch.randn(b, h, w, d),
        torch.randn(b, h, w, k, r + 2 * n),
        torch.randn(k, d, r),
        torch.randn(k, d),
        -torch.rand(k, d, n),
        torch.randn(k, d),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_causality_is_bitwise(backend: str) -> None:
    """Changing position t changes nothing before t, and something from t on."""
    for seed in range(100):
        sample = selective_scan_sample(seed)
        length = sample.tensors["u"].shape[-1]
        t = seed % length
        for name in ("u", "delta", "B", "C"):
            sample.tensors[name] = sample.tensors[name].contiguous()
        changed = dict(sample.tensors)
        for name in ("u", "delta", "B", "C"):
            changed[name] = sample.tensors[name].clone()
            changed[name][..., t:] += 1
        before, after = sample.run(backend), sample.run(backend, changed)
        assert torch.equal(before[..., :t], after[..., :t])
        assert not torch.equal(before[..., t:], after[..., t:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_stays_in_its_channel_and_after_its_position(backend: str) -> None:
    """One bad element of u touches its own batch entry, channel and later positions; all else is bitwise equal."""
    for seed in range(100):
        sample = selective_scan_sample(seed)
        u = sample.tensors["u"]
        at = (seed % u.shape[0], (7 * seed) % u.shape[1], (5 * seed) % u.shape[2])
        poisoned = dict(sample.tensors, u=u.clone())
        poisoned["u"][at] = float("nan")
        clean, dirty = sample.run(backend), sample.run(backend, poisoned)
        assert dirty[at].isnan()
        touched = torch.zeros_like(clean, dtype=torch.bool)
        touched[at[0], at[1], at[2] :] = True
        assert torch.equal(clean[~touched], dirty[~touched])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_gradient_stays_in_its_channel_and_before_its_position(backend: str) -> None:
    for seed in range(100):
        sample = selective_scan_sample(seed)
        if sample.tensors["z"] is not None:
            sample.tensors["z"] = None
        u = sample.tensors["u"]
        at = (seed % u.shape[0], (7 * seed) % u.shape[1], (5 * seed) % u.shape[2])
        grads = []
        for value in (1.0, float("nan")):
            leaf = u.detach().requires_grad_()
            weights = torch.ones_like(u)
            weights[at] = value
            out = sample.run(backend, dict(sample.tensors, u=leaf))
            grads.append(torch.autograd.grad(out, leaf, weights.to(out.dtype))[0])
        touched = torch.zeros_like(u, dtype=torch.bool)
        touched[at[0], at[1], : at[2] + 1] = True
        assert torch.equal(grads[0][~touched], grads[1][~touched])
        assert grads[1][at].isnan()


@pytest.mark.parametrize("backend", BACKENDS)
def test_guard_bands_around_the_inputs_are_never_read(backend: str) -> None:
    for make in MAKERS.values():
        for seed in range(50):
            sample = make(seed)
            for name, value in sample.tensors.items():
                # Copied: PyTorch's own arithmetic in the reference may depend on where memory begins, too.
                sample.tensors[name] = None if value is None else value.clone(memory_format=torch.contiguous_format)
            guarded = {name: _inside_nans(value) for name, value in sample.tensors.items()}
            out, grads = sample.gradients(backend)
            inside = Sample(sample.op, guarded, sample.options, sample.streams, sample.dtype)
            out_inside, grads_inside = inside.gradients(backend)
            assert torch.equal(out, out_inside)
            for name, grad in grads.items():
                assert torch.equal(grad, grads_inside[name]), name


def single_route_sample(seed: int) -> tuple[Sample, torch.Tensor]:
    """A sample of scan2d with one route that visits every pixel once, and the pixels in order."""
    sample = scan2d_sample(seed)
    x, projections = sample.tensors["x"], sample.tensors["projections"]
    route = torch.randperm(x.shape[1] * x.shape[2], generator=torch.Generator().manual_seed(seed))
    for name, value in sample.tensors.items():
        if value is not None and name not in ("x", "projections"):
            sample.tensors[name] = value[:1]
    sample.tensors["projections"] = projections[..., :1, :]
    if x.dim() == 5:  # a map for every route
        sample.tensors["x"] = x[..., :1, :]
    sample.options["orders"] = route[None]
    return sample, route


@pytest.mark.parametrize("backend", BACKENDS)
def test_scan2d_is_causal_along_its_route_bitwise(backend: str) -> None:
    """Changing the pixels from position t of the route on changes no pixel visited before."""
    for seed in range(100):
        sample, route = single_route_sample(seed)
        t = seed % len(route)
        changed = dict(sample.tensors)
        for name in ("x", "projections"):
            sample.tensors[name] = sample.tensors[name].contiguous()
            changed[name] = sample.tensors[name].clone()
            changed[name].view(*changed[name].shape[:1], -1, *changed[name].shape[3:])[:, route[t:]] += 1
        before, after = (sample.run(backend, tensors).flatten(1, 2) for tensors in (sample.tensors, changed))
        assert torch.equal(before[:, route[:t]], after[:, route[:t]])


@pytest.mark.parametrize("backend", BACKENDS)
def test_scan2d_isolates_a_nan(backend: str) -> None:
    """One bad element of x touches its batch entry and channel only, from its position on."""
    for seed in range(100):
        sample, route = single_route_sample(seed)
        x = sample.tensors["x"].contiguous()
        b, pixels, d = seed % x.shape[0], x.shape[1] * x.shape[2], (7 * seed) % x.shape[-1]
        t = (5 * seed) % pixels
        poisoned = x.clone()
        poisoned.view(x.shape[0], pixels, -1)[b, route[t], d] = float("nan")
        clean = sample.run(backend, dict(sample.tensors, x=x)).flatten(1, 2)
        dirty = sample.run(backend, dict(sample.tensors, x=poisoned)).flatten(1, 2)
        touched = torch.zeros_like(clean, dtype=torch.bool)
        touched[b, route[t:], d] = True
        assert dirty[b, route[t], d].isnan()
        assert torch.equal(clean[~touched], dirty[~touched])


def _inside_nans(value: torch.Tensor | None) -> torch.Tensor | None:
    """The same numbers, contiguous, with NaN before and after them in memory."""
    if value is None:
        return None
    guard = value.new_full((64,), float("nan"))
    return torch.cat([guard, value.reshape(-1), guard])[64:-64].view(value.shape)


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_tensors_give_the_values_of_their_copies(backend: str) -> None:
    u = torch.randn(1, 8, 40).expand(3, 8, 40)
    delta = torch.randn(3, 1, 40).expand(3, 8, 40)
    B = torch.randn(1, 2, 1).expand(3, 2, 40)
    A = -torch.rand(8, 1).expand(8, 2)
    expanded = selective_scan(u, delta, A, B, B, delta_softplus=True, backend=backend)
    copies = [value.contiguous() for value in (u, delta, A, B, B)]
    # PyTorch's own exp may take another path for another memory layout; the kernel copies and is exact.
    assert_close("out", expanded, selective_scan(*copies, delta_softplus=True, backend=backend),
                 0.0 if backend == "compiled" else 1e-6)  # fmt: skip


EMPTY = {"batch": (0, 4, 5), "channels": (2, 0, 5), "length": (2, 4, 0)}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", EMPTY.values(), ids=EMPTY)
def test_selective_scan_of_nothing(backend: str, shape: tuple[int, int, int]) -> None:
    b, d, length = shape
    leaves = [
        torch.randn(shape), torch.randn(shape), -torch.rand(d, 2), torch.randn(b, 2, length), torch.randn(b, 2, length),
        torch.randn(d), torch.randn(d),
    ]  # fmt: skip
    leaves = [leaf.requires_grad_() for leaf in leaves]
    out, state = selective_scan(*leaves, delta_softplus=True, return_last_state=True, backend=backend)
    assert out.shape == shape
    assert state.shape == (b, d, 2)
    assert not state.any()
    grads = torch.autograd.grad(out.sum() + state.sum(), leaves)
    for leaf, grad in zip(leaves, grads, strict=True):
        assert grad.shape == leaf.shape
        assert not grad.any()


EMPTY_MAPS = {"batch": (0, 3, 4, 5), "rows": (2, 0, 4, 5), "columns": (2, 3, 0, 5), "channels": (2, 3, 4, 0)}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", EMPTY_MAPS.values(), ids=EMPTY_MAPS)
def test_scan2d_of_nothing(backend: str, shape: tuple[int, int, int, int]) -> None:
    b, h, w, d = shape
    leaves = [leaf.requires_grad_() for leaf in scan2d_arguments(h, w, b=b, d=d)]
    out = scan2d(*leaves, backend=backend)
    assert out.shape == shape
    for leaf, grad in zip(leaves, torch.autograd.grad(out.sum(), leaves), strict=True):
        assert grad.shape == leaf.shape
        assert not grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("d", [16, 20, 64])  # whole vectors, and not
def test_a_route_that_visits_nothing(backend: str, d: int) -> None:
    leaves = [leaf.requires_grad_() for leaf in scan2d_arguments(3, 4, d=d, k=2)]
    out = scan2d(*leaves, orders=torch.empty(2, 0, dtype=torch.int64), backend=backend)
    assert out.shape == leaves[0].shape
    assert not out.any()
    for leaf, grad in zip(leaves, torch.autograd.grad(out.sum(), leaves), strict=True):
        assert grad.shape == leaf.shape
        assert not grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_step_sizes_are_finite_where_float64_is(backend: str) -> None:
    deltas = torch.tensor([-1e4, -200.0, -88.0, -20.0, -1e-3, 0.0, 1e-3, 19.9, 20.1, 88.0, 200.0, 1e4])
    for rate in (-1e4, -100.0, -1.0, -1e-3, -1e-8, 0.0, 1e-3):
        for softplus in (True, False):
            length = 6
            u = torch.randn(1, 12, length)
            delta = deltas[None, :, None].expand(1, 12, length)
            A = torch.full((12, 1), rate)
            B = torch.randn(1, 1, length)
            args = (u, delta, A, B, B)
            out = selective_scan(*args, delta_softplus=softplus, backend=backend)
            exact = selective_scan(*(value.double() for value in args), delta_softplus=softplus, backend="reference")
            should_be_finite = exact.abs() < 1e38
            per_channel = (out.double() - exact).abs().amax(-1) / exact.abs().amax(-1).clamp(min=1e-30)
            # Decays beyond float32 (exp of more than 88) times a zero state are not covered here.
            finite_channels = should_be_finite.all(-1) & (deltas * rate < 80)
            assert out[finite_channels].isfinite().all(), (rate, softplus)
            assert per_channel[finite_channels].max() < 2e-5, (rate, softplus)
