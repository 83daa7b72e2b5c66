"""The numbers of the CUDA kernels, on the CPU: csrc/cuda compiled for the emulator of csrc/check.

What only a GPU can show (speed, its own rounding of exp2 and of tensor-core sums, that nvcc's program is right) is left
to tests/test_gpu.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mmvmamba import ops
from mmvmamba.ops import BIDIRECTIONAL_SCAN, CROSS_SCAN, UNIDIRECTIONAL_SCAN, ScanOrder
from mmvmamba.testing import FORWARD_BOUND, PARAMETER_GRAD_BOUND, STREAM_GRAD_BOUND, assert_close
from tests import cuda_emulation
from tests.cuda_emulation import emulated
from tests.test_ops import samples, test_exact, test_extremes
from tests.test_ops.samples import SCANS, Sample
from tests.test_ops.test_determinism import differing
from tests.test_ops.test_random_configurations import check

COUNT = 60  # random samples of each operator
LARGEST_STATE = 30_000
SCHEDULES = ("forward", "reverse", "random:1", "random:2")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# One multiprocessor has work enough with few blocks; 1000 make the host cut maps into bands; with little shared memory
# it must do so, or do without the map in there.
PLANS = {
    "one multiprocessor": {"SM_COUNT": "1", "SHARED_BYTES": "232448"},
    "eight": {"SM_COUNT": "8"},
    "a thousand": {"SM_COUNT": "1000"},
    "little shared memory": {"SM_COUNT": "8", "SHARED_BYTES": "81920"},
}


@pytest.fixture(autouse=True)
def _emulator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "LARGEST_STATE", LARGEST_STATE)
    for name in ("SCHEDULE", "SM_COUNT", "SHARED_BYTES", "THREADS"):
        monkeypatch.delenv(f"MMVMAMBA_EMULATED_{name}", raising=False)
    cuda_emulation.load()


def use_plan(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for variable, value in PLANS[name].items():
        monkeypatch.setenv(f"MMVMAMBA_EMULATED_{variable}", value)


def maker(make: Callable[[int], Sample]) -> Callable[[int], Sample]:
    """The seed-th sample whose dtype the CUDA kernels have, on the emulated kernels."""
    found: list[Sample] = []
    numbers = itertools.count()

    def nth(seed: int) -> Sample:
        while len(found) <= seed:
            sample = make(next(numbers))
            if sample.dtype in DTYPES:
                found.append(sample)
        return emulated(found[seed])

    return nth


def results(sample: Sample) -> list[Tensor]:
    out, grads = sample.gradients(None)
    return [out, *grads.values()]


@pytest.mark.parametrize("name", SCANS)
def test_random_configurations(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make = maker(SCANS[name])
    for seed in range(COUNT):
        use_plan(monkeypatch, list(PLANS)[seed % len(PLANS)])
        try:
            check(make(seed), "emulated")
        except AssertionError as error:
            raise AssertionError(f"sample {seed}: {error}") from error


STATES, RANKS, CHANNELS = (1, 2, 16), (1, 2, 4, 6, 8, 12, 24, 48), (1, 31, 32, 33, 64, 96, 100)
LENGTHS = (1, 15, 16, 17, 31, 32, 33, 200)
ORDERS = {
    "row": (ScanOrder.ROW,),
    "column": (ScanOrder.COLUMN,),
    "row reversed": (ScanOrder.ROW_REVERSED,),
    "column reversed": (ScanOrder.COLUMN_REVERSED,),
    "cross": CROSS_SCAN,
    "bidirectional": BIDIRECTIONAL_SCAN,
    "unidirectional": UNIDIRECTIONAL_SCAN,
    "three": (ScanOrder.COLUMN_REVERSED, ScanOrder.ROW, ScanOrder.COLUMN),
    "permutation": None,
    "partial": None,
    "repeats": None,
}


def routes(kind: str, length: int) -> tuple[tuple[ScanOrder, ...] | Tensor, int, int]:
    """Orders of that kind with routes of ``length``, and the size of a map for them."""
    orders = ORDERS[kind]
    if orders is not None:
        h = next(h for h in (33, 8, 5, 3, 31, 1) if length % h == 0)
        return orders, h, length // h
    if kind == "repeats":
        h, w = (2, length // 3) if length >= 3 else (1, 1)
        return torch.randint(h * w, (3, length)), h, w
    h, w = (2, length) if kind == "partial" else (1, length)
    return torch.stack([torch.randperm(h * w)[:length] for _ in range(2)]), h, w


def scan2d_of(kind: str, length: int, d: int, n: int, r: int, dtype: torch.dtype, with_options: bool) -> Sample:
    orders, h, w = routes(kind, length)
    k = len(orders)
    tensors = {
        "x": torch.randn(2, h, w, d).to(dtype),
        "projections": torch.randn(2, h, w, k, r + 2 * n).to(dtype),
        "dt_weight": torch.randn(k, d, r) * r**-0.5,
        "dt_bias": torch.randn(k, d) * 0.5 if with_options else None,
        "A": -2 * torch.rand(k, d, n),
        "D": torch.randn(k, d) if with_options else None,
    }
    options = {"orders": orders, "delta_softplus": True, "out_dtype": None}
    return Sample(cuda_emulation.scan2d, tensors, options, ("x", "projections"), dtype)


SHAPES = list(enumerate(itertools.product(DTYPES, RANKS, STATES)))


@pytest.mark.parametrize("part", range(6))
def test_shapes_of_scan2d(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every type with every rank and every number of states; all lengths, channels, orders and plans among them."""
    for i, (dtype, r, n) in SHAPES[part::6]:
        use_plan(monkeypatch, list(PLANS)[i // 8 % len(PLANS)])
        kind, length, d = list(ORDERS)[i % len(ORDERS)], LENGTHS[i % len(LENGTHS)], CHANNELS[i % len(CHANNELS)]
        sample = scan2d_of(kind, length, d, n, r, dtype, with_options=i % 5 != 0)
        try:
            check(sample, "emulated")
        except AssertionError as error:
            raise AssertionError(f"{dtype}, r {r}, n {n}, {kind}, l {length}, d {d}: {error}") from error


# Channels, states and rank: of models, with two channels a lane or one and a small even rank or any, and the rest.
VARIANTS = {
    "pairs, small rank": (64, 1, 6),
    "pairs": (64, 1, 12),
    "singles, small rank": (32, 1, 6),
    "singles": (32, 1, 5),
    "pairs and singles, small rank": (96, 1, 6),
    "pairs and singles": (96, 1, 8),
    "part of a tile": (40, 1, 6),
    "states": (20, 3, 6),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ORDERS)
def test_every_order_and_variant_on_every_plan(kind: str, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A map so long that it is cut into bands where there are more multiprocessors than blocks."""
    dtype = DTYPES[(list(ORDERS).index(kind) + list(VARIANTS).index(variant)) % len(DTYPES)]
    sample = scan2d_of(kind, 1122, *VARIANTS[variant], dtype, with_options=True)
    expected_out, expected_grads = sample.gradients("reference", double=True)
    for plan in PLANS:
        use_plan(monkeypatch, plan)
        out, grads = sample.gradients(None)
        assert_close(f"out, {plan}", out, expected_out, FORWARD_BOUND[dtype])
        for name, grad in grads.items():
            bounds = STREAM_GRAD_BOUND if name in sample.streams else PARAMETER_GRAD_BOUND
            assert_close(f"gradient of {name}, {plan}", grad, expected_grads[name], bounds[dtype])


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_last_state_and_its_gradient(dtype: torch.dtype, plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_plan(monkeypatch, plan)
    for i, (n, length) in enumerate(itertools.product(STATES, LENGTHS)):
        groups, per_group = 1 + i % 2, CHANNELS[i % len(CHANNELS)]
        d = groups * per_group
        tensors = {
            "u": torch.randn(2, d, length).to(dtype),
            "delta": torch.randn(2, d, length).to(dtype),
            "A": -2 * torch.rand(d, n),
            "B": torch.randn(2, groups, n, length).to(dtype),
            "C": torch.randn(2, groups, n, length).to(dtype),
            "D": torch.randn(d) if i % 3 else None,
            "delta_bias": torch.randn(d) * 0.5 if i % 5 else None,
        }
        weights = torch.randn(2, d, length), torch.randn(2, d, n)
        used = ((True, True), (False, True), (True, False))[i % 3]
        found = scan_results(tensors, weights, used, double=False)
        expected = scan_results(tensors, weights, used, double=True)
        for name, value in found.items():
            stream = name in ("u", "delta", "B", "C")
            bounds = FORWARD_BOUND if "out" in name else STREAM_GRAD_BOUND if stream else PARAMETER_GRAD_BOUND
            assert_close(f"{name} of n {n}, l {length}, d {d}", value, expected[name], bounds[dtype])


def scan_results(
    tensors: dict[str, Tensor | None], weights: tuple[Tensor, Tensor], used: tuple[bool, bool], double: bool
) -> dict[str, Tensor]:
    """Output, last state and gradients of the weighted sum of those of the two that are ``used``."""
    leaves = {
        name: (value.double() if double else value).requires_grad_()
        for name, value in ((name, value.detach()) for name, value in tensors.items() if value is not None)
    }
    results = cuda_emulation.selective_scan(
        **({"D": None} | leaves), delta_softplus=True, return_last_state=True, backend="reference" if double else None
    )
    total = sum((value * weight).sum() for value, weight, use in zip(results, weights, used, strict=True) if use)
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    out, state = (value.detach() for value in results)
    return {"out": out, "state (out)": state} | {
        name: torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True)
    }


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", SCANS)
def test_results_do_not_depend_on_the_schedule(name: str, plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In no bit: where a barrier is missing, the order of warps and lanes shows."""
    use_plan(monkeypatch, plan)
    make = maker(SCANS[name])
    for seed in range(100, 106):
        found = []
        for schedule in (*SCHEDULES, SCHEDULES[0]):
            monkeypatch.setenv("MMVMAMBA_EMULATED_SCHEDULE", schedule)
            found.append(results(make(seed)))
        for schedule, other in zip(SCHEDULES[1:], found[1:], strict=False):
            assert differing(found[0], other) == [], f"sample {seed}, {schedule}"
        assert differing(found[0], found[-1]) == [], f"sample {seed}, repeated"


@pytest.mark.parametrize("name", SCANS)
def test_saving_states_changes_no_output(name: str) -> None:
    make = maker(SCANS[name])
    for seed in range(200, 210):
        sample = make(seed)
        assert torch.equal(sample.run(None), sample.gradients(None)[0])


REUSED = {
    "causality": (test_exact.test_causality_is_bitwise, {}),
    "nan": (test_exact.test_a_nan_stays_in_its_channel_and_after_its_position, {}),
    "nan gradient": (test_exact.test_a_nan_gradient_stays_in_its_channel_and_before_its_position, {}),
    "guard bands": (test_exact.test_guard_bands_around_the_inputs_are_never_read, {}),
    "causality of scan2d": (test_exact.test_scan2d_is_causal_along_its_route_bitwise, {}),
    "nan of scan2d": (test_exact.test_scan2d_isolates_a_nan, {}),
    "skip": (test_exact.test_skip_alone, {}),
    "expanded": (test_exact.test_expanded_tensors_give_the_values_of_their_copies, {}),
    "no visits": (test_exact.test_a_route_that_visits_nothing, {"d": 20}),
    "step sizes": (test_exact.test_extreme_step_sizes_are_finite_where_float64_is, {}),
    **{
        f"no {name}": (test_exact.test_selective_scan_of_nothing, {"shape": shape})
        for name, shape in test_exact.EMPTY.items()
    },
    **{
        f"no {name} of a map": (test_exact.test_scan2d_of_nothing, {"shape": shape})
        for name, shape in test_exact.EMPTY_MAPS.items()
    },
}


@pytest.mark.parametrize("case", REUSED)
def test_what_every_backend_promises(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests of exact properties, on the emulated kernels and samples of their types."""
    makers = {name: maker(make) for name, make in SCANS.items()}
    monkeypatch.setattr(test_exact, "MAKERS", makers)
    for name, make in makers.items():
        monkeypatch.setattr(test_exact, name, getattr(cuda_emulation, name))
        monkeypatch.setattr(test_exact, f"{name}_sample", make)
    test, arguments = REUSED[case]
    test("compiled", **arguments)


@pytest.mark.parametrize("name", test_extremes.OPERATORS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softplus", [True, False], ids=["softplus", "plain"])
def test_extremes_on_every_plan(name: str, dtype: torch.dtype, softplus: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for operator in test_extremes.OPERATORS:
        monkeypatch.setattr(test_extremes, operator, getattr(cuda_emulation, operator))
    if dtype != torch.float32:
        # Its kernels cut parameters' gradients to what half precision has, which shows in sums that cancel: finite they
        # must be, and their numbers are compared elsewhere.
        monkeypatch.setattr(test_extremes, "ERROR", float("inf"))
    for plan in PLANS:
        use_plan(monkeypatch, plan)
        torch.manual_seed(0)  # a sum that cancels has a large error whoever computes it: the numbers of the other test
        test_extremes.test_grid_of_step_sizes_and_rates(name, dtype, softplus, "compiled")
        test_extremes.test_a_state_that_is_zero_stays_so_under_any_growth(name, softplus, "compiled")


@pytest.mark.parametrize("length", [32, 33, 40, 200])
@pytest.mark.parametrize("plan", PLANS)
def test_infinite_inputs_do_not_leave_their_positions(length: int, plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows behind the end of a sequence repeat its last position: they must not turn infinity into NaN."""
    use_plan(monkeypatch, plan)
    u, delta = torch.ones(1, 3, length), torch.ones(1, 3, length)
    u[0, 0, -1] = float("inf")
    A = torch.tensor([[-1.0], [-float("inf")], [-1.0]])
    B = C = torch.ones(1, 1, length)
    expected, expected_state = ops.selective_scan(u, delta, A, B, C, backend="reference", return_last_state=True)
    out, last_state = cuda_emulation.selective_scan(u, delta, A, B, C, return_last_state=True)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(last_state, expected_state)


def test_many_states_in_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    use_plan(monkeypatch, "a thousand")
    n, length = 128, 1100
    u, delta, A = torch.randn(1, 5, length), torch.rand(1, 5, length) * 0.1, -torch.rand(5, n)
    B, C = torch.randn(1, n, length), torch.randn(1, n, length)
    expected = ops.selective_scan(*(t.double() for t in (u, delta, A, B, C)), backend="reference")
    out = cuda_emulation.selective_scan(u, delta, A, B, C)
    assert_close("out", out, expected, FORWARD_BOUND[torch.float32])


def test_too_many_routes_are_refused() -> None:
    k, d = 65, 2
    x, projections = torch.randn(1, 2, 2, d), torch.randn(1, 2, 2, k, 3)
    parameters = torch.randn(k, d, 1), None, -torch.rand(k, d, 1), None
    with pytest.raises(RuntimeError, match="1 <= k <= 64"):
        cuda_emulation.scan2d(x, projections, *parameters, orders=(ScanOrder.ROW,) * k)
