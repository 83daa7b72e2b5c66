"""Gradients by finite differences, dispatcher registration, compile and export, determinism."""

from __future__ import annotations

import itertools

import pytest
import torch

from mmvmamba.errors import BackendError, OpInputError
from mmvmamba.ops import CROSS_SCAN, ScanOrder, scan2d, selective_scan
from mmvmamba.ops.extension import HAS_EXTENSION
from mmvmamba.testing import requires_extension
from tests.test_ops.samples import MAKERS, scan2d_sample, selective_scan_sample
from tests.test_ops.test_exact import BACKENDS, scan2d_arguments

OPTIONS = list(itertools.product((False, True), (False, True), (False, True), (False, True)))


def double(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("skip", "bias", "softplus", "gate"), OPTIONS)
def test_gradcheck_selective_scan(backend: str, skip: bool, bias: bool, softplus: bool, gate: bool) -> None:
    b, d, length, groups, n = 2, 4, 5, 2, 2
    tensors = {
        "u": double(b, d, length),
        "delta": double(b, d, length),
        "A": (-torch.rand(d, n, dtype=torch.float64)).requires_grad_(),
        "B": double(b, groups, n, length),
        "C": double(b, groups, n, length),
        "D": double(d) if skip else None,
        "delta_bias": double(d) if bias else None,
        "z": double(b, d, length) if gate else None,
    }
    names = [name for name, value in tensors.items() if value is not None]

    def call(*values: torch.Tensor) -> torch.Tensor:
        given = dict(zip(names, values, strict=True))
        return selective_scan(**given, delta_softplus=softplus, backend=backend)

    assert torch.autograd.gradcheck(call, [tensors[name] for name in names], nondet_tol=0.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("skip", "bias", "softplus", "permuted"), OPTIONS)
def test_gradcheck_scan2d(backend: str, skip: bool, bias: bool, softplus: bool, permuted: bool) -> None:
    b, h, w, d, r, n = 1, 2, 3, 3, 2, 2
    orders = torch.tensor([[5, 0, 3], [1, 1, 2]]) if permuted else CROSS_SCAN
    k = len(orders)
    x, projections, dt_weight = double(b, h, w, d), double(b, h, w, k, r + 2 * n), double(k, d, r)
    A = (-torch.rand(k, d, n, dtype=torch.float64)).requires_grad_()
    optional = {"dt_bias": double(k, d) if bias else None, "D": double(k, d) if skip else None}
    names = [name for name, value in optional.items() if value is not None]

    def call(*values: torch.Tensor) -> torch.Tensor:
        given = dict.fromkeys(optional) | dict(zip(names, values[4:], strict=True))
        return scan2d(*values[:3], given["dt_bias"], values[3], given["D"], orders=orders, delta_softplus=softplus,
                      backend=backend)  # fmt: skip

    leaves = [x, projections, dt_weight, A, *(optional[name] for name in names)]
    assert torch.autograd.gradcheck(call, leaves, nondet_tol=0.0)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_any_one_tensor_may_need_a_gradient(make) -> None:
    """Each gradient alone is what it is among all, and nothing else gets one."""
    sample = make(3)
    leaves = {name: None if v is None else v.detach() for name, v in sample.tensors.items()}
    given = [name for name, value in leaves.items() if value is not None]
    every = {name: None if value is None else value.clone().requires_grad_() for name, value in leaves.items()}
    expected = dict(
        zip(given, torch.autograd.grad(sample.run(None, every).sum(), [every[n] for n in given]), strict=True)
    )
    for wanted in given:
        alone = dict(leaves)
        alone[wanted] = leaves[wanted].clone().requires_grad_()
        sample.run(None, alone).sum().backward()
        assert torch.equal(alone[wanted].grad, expected[wanted]), wanted
        assert all(alone[name].grad is None for name in given if name != wanted)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_forward_mode_is_right_or_refused(make) -> None:
    """The automatic choice gives the derivative of the reference; the compiled backend by name refuses."""
    sample = make(2)
    name = next(iter(sample.tensors))
    primal = sample.tensors[name].detach().contiguous()
    tangent = torch.randn_like(primal)
    with torch.autograd.forward_ad.dual_level():
        for backend in (None, "reference"):
            dual = torch.autograd.forward_ad.make_dual(primal, tangent)
            out = torch.autograd.forward_ad.unpack_dual(sample.run(backend, sample.tensors | {name: dual}))
            assert out.tangent.abs().max() > 0
        if HAS_EXTENSION:
            with pytest.raises(BackendError, match="no forward-mode derivative"):
                sample.run("compiled", sample.tensors | {name: torch.autograd.forward_ad.make_dual(primal, tangent)})


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing_inside(make, backend: str) -> None:
    for seed in range(10):
        sample = make(seed)
        if sample.op is selective_scan:
            sample.tensors["z"] = None  # the gate is an ordinary product
        out, grads = sample.gradients(backend, autocast=torch.bfloat16)
        expected_out, expected = sample.gradients(backend)
        assert torch.equal(out, expected_out)
        for name, grad in grads.items():
            assert torch.equal(grad, expected[name]), name


def test_second_derivative_of_the_reference() -> None:
    args = [value.double().requires_grad_() for value in scan2d_arguments(1, 2, b=1, d=2, r=1, n=1)]
    assert torch.autograd.gradgradcheck(lambda *values: scan2d(*values, backend="reference"), args)


@requires_extension()
@pytest.mark.ext
def test_second_derivative_of_the_compiled_backend_raises() -> None:
    args = [value.requires_grad_() for value in scan2d_arguments(2, 2)]
    (grad,) = torch.autograd.grad(scan2d(*args, backend="compiled").square().sum(), args[0], create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        grad.sum().backward()


@requires_extension()
@pytest.mark.ext
def test_no_states_are_saved_where_no_gradient_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    args = [value.requires_grad_() for value in scan2d_arguments(3, 4)]
    asked = []
    operator = torch.ops.mmvmamba.scan2d

    def spy(*arguments):
        asked.append(arguments[-1])
        return operator(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(torch.ops.mmvmamba, "scan2d", spy)
        for context in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
            with context:
                scan2d(*args)
        scan2d(*(value.detach() for value in args))
    assert asked == [False, False, True, False]
    _, carries = torch.ops.mmvmamba.scan2d(*args[:4], args[4], args[5], [0, 1, 2, 3], None, True, torch.float32, True)
    assert carries.numel() > 0
    with pytest.raises(OpInputError, match="save_carries=False"):
        torch.ops.mmvmamba.scan2d(*args[:4], args[4], args[5], [0, 1, 2, 3], None, True, torch.float32, False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("permuted", [False, True])
def test_gradcheck_scan2d_with_a_map_for_every_route(backend: str, permuted: bool) -> None:
    b, h, w, k, d, r, n = 2, 2, 3, 2, 3, 2, 2
    orders = torch.tensor([[5, 0, 3], [1, 1, 2]]) if permuted else (ScanOrder.ROW, ScanOrder.COLUMN_REVERSED)
    leaves = [double(b, h, w, k, d), double(b, h, w, k, r + 2 * n), double(k, d, r), double(k, d)]
    leaves += [(-torch.rand(k, d, n, dtype=torch.float64)).requires_grad_(), double(k, d)]
    assert torch.autograd.gradcheck(
        lambda *values: scan2d(*values, orders=orders, backend=backend), leaves, nondet_tol=0.0
    )


def opcheck_samples() -> list:
    """Arguments of the raw operators: with and without optional tensors, one position, no batch, strided."""
    cases = []
    for seed in range(6):
        sample = selective_scan_sample(seed)
        tensors = [sample.tensors[name] for name in ("u", "delta", "A", "B", "C", "D", "delta_bias")]
        tensors[3:5] = [value if value.dim() == 4 else value.unsqueeze(1) for value in tensors[3:5]]
        cases.append(("selective_scan", tensors, [sample.options["delta_softplus"], sample.dtype]))
    for b, d, length in ((1, 3, 1), (0, 4, 5), (2, 17, 33)):
        u = torch.randn(b, d, length)
        B = torch.randn(b, 1, 2, length)
        tensors = [u, torch.rand(b, d, length), -torch.rand(d, 2), B, torch.randn_like(B), None, None]
        cases.append(("selective_scan", tensors, [False, torch.float32]))
    for seed in range(6):
        sample = scan2d_sample(seed)
        orders = sample.options["orders"]
        routes = [[], orders] if isinstance(orders, torch.Tensor) else [[int(order) for order in orders], None]
        out_dtype = sample.options["out_dtype"] or sample.dtype
        cases.append(("scan2d", list(sample.tensors.values()), [*routes, sample.options["delta_softplus"], out_dtype]))
    assert {case[1][0].dim() for case in cases if case[0] == "scan2d"} == {4, 5}  # shared, and a map for every route
    return cases


@pytest.mark.parametrize("needs_grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("index", range(15))
def test_opcheck_forward(index: int, needs_grad: bool) -> None:
    name, tensors, options = opcheck_samples()[index]
    tensors = [None if value is None else value.detach().requires_grad_(needs_grad) for value in tensors]
    torch.library.opcheck(getattr(torch.ops.mmvmamba, name).default, (*tensors, *options, needs_grad))


@pytest.mark.parametrize("index", range(15))
def test_opcheck_backward(index: int) -> None:
    name, tensors, options = opcheck_samples()[index]
    outputs = getattr(torch.ops.mmvmamba, name)(*tensors, *options, True)
    grad_out, carries = torch.randn_like(outputs[0]), outputs[-1]
    *routes_and_softplus, _ = options
    backward = getattr(torch.ops.mmvmamba, f"{name}_backward").default
    last_state = torch.randn_like(outputs[1]) if index % 2 else None
    states = [last_state] if name == "selective_scan" else []
    torch.library.opcheck(backward, (grad_out, *states, *tensors, *routes_and_softplus, carries))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_agrees_with_eager(dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(scan2d, fullgraph=True, dynamic=dynamic)
    for h, w in ((4, 5), (7, 3)):
        args = [value.requires_grad_() for value in scan2d_arguments(h, w)]
        eager, traced = scan2d(*args), compiled(*args)
        torch.testing.assert_close(traced, eager, rtol=0, atol=0)
        expected = torch.autograd.grad(eager.square().sum(), args)
        for grad, want in zip(torch.autograd.grad(traced.square().sum(), args), expected, strict=True):
            torch.testing.assert_close(grad, want, rtol=1e-5, atol=1e-5)


class Scan(torch.nn.Module):
    """A module around scan2d, for export."""

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        return scan2d(*args, orders=(ScanOrder.ROW, ScanOrder.COLUMN, ScanOrder.ROW, ScanOrder.COLUMN_REVERSED))


def test_export_keeps_the_operator_as_one_node() -> None:
    args = scan2d_arguments(4, 5)
    program = torch.export.export(Scan(), args)
    nodes = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert nodes.count(torch.ops.mmvmamba.scan2d.default) == 1
    torch.testing.assert_close(program.module()(*args), Scan()(*args), rtol=0, atol=0)


@requires_extension()
@pytest.mark.ext
def test_results_do_not_depend_on_the_number_of_threads() -> None:
    before = torch.get_num_threads()
    try:
        for make in MAKERS.values():
            for seed in range(10):
                results = []
                for threads in (1, 2, 3, 4):
                    torch.set_num_threads(threads)
                    out, grads = make(seed).gradients("compiled")
                    results.append([out, *grads.values()])
                for other in results[1:]:
                    assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    finally:
        torch.set_num_threads(before)


def test_low_precision_inputs_keep_a_float32_output_on_request() -> None:
    args = list(scan2d_arguments(6, 6))
    args[0], args[1], args[2] = (value.bfloat16() for value in args[:3])
    assert scan2d(*args).dtype == torch.bfloat16
    kept = scan2d(*args, out_dtype=torch.float32)
    exact = scan2d(*(value.double() for value in args), backend="reference")
    torch.testing.assert_close(kept.double(), exact, rtol=1e-5, atol=1e-5)
