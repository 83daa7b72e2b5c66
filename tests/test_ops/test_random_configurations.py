"""Random configurations against the reference in float64 (reliability matrix A1), outputs and every gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mmvmamba.ops import CROSS_SCAN, scan2d
from mmvmamba.testing import FORWARD_BOUND, PARAMETER_GRAD_BOUND, STREAM_GRAD_BOUND, assert_close, requires_extension
from tests.test_ops.samples import MAKERS, Sample
from tests.test_ops.test_exact import scan2d_arguments

COUNT = 200
FEW_CHANNELS = (1, 2, 3, 5, 7, 9)


def check(sample: Sample, backend: str) -> None:
    expected_out, expected_grads = sample.gradients("reference", double=True)
    out, grads = sample.gradients(backend)
    assert out.dtype == (sample.options.get("out_dtype") or sample.dtype)
    assert_close("out", out, expected_out, FORWARD_BOUND[sample.dtype])
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        assert grad.dtype == sample.tensors[name].dtype
        bounds = STREAM_GRAD_BOUND if name in sample.streams else PARAMETER_GRAD_BOUND
        assert_close(f"gradient of {name}", grad, expected_grads[name], bounds[sample.dtype])


@requires_extension()
@pytest.mark.ext
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("seed", range(COUNT))
def test_compiled(make: Callable[[int], Sample], seed: int) -> None:
    check(make(seed), "compiled")


@requires_extension()
@pytest.mark.ext
@pytest.mark.parametrize("d", FEW_CHANNELS)
@pytest.mark.parametrize("orders", ["named", "permutation"])
def test_fewer_channels_than_a_vector_has(d: int, orders: str) -> None:
    """In float32, which the random samples give to wider maps only."""
    routes = torch.stack([torch.randperm(42) for _ in range(4)]) if orders == "permutation" else CROSS_SCAN
    names = ("x", "projections", "dt_weight", "dt_bias", "A", "D")
    tensors = dict(zip(names, scan2d_arguments(6, 7, d=d), strict=True))
    options = {"orders": routes, "delta_softplus": True, "out_dtype": None}
    check(Sample(scan2d, tensors, options, ("x", "projections"), torch.float32), "compiled")


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("seed", range(20))
def test_reference_in_the_dtype_of_its_inputs(make: Callable[[int], Sample], seed: int) -> None:
    check(make(seed), "reference")


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("seed", range(20))
def test_hand_written_gradients_of_the_plain_kernels(make: Callable[[int], Sample], seed: int) -> None:
    """The kernels used by the dispatcher where nothing is compiled, against autograd through the reference."""
    sample = make(seed)
    leaves = {
        name: None if value is None else value.detach().double().requires_grad_()
        for name, value in sample.tensors.items()
        if name != "z"
    }
    options = {name: value for name, value in sample.options.items() if name != "out_dtype"}
    out = sample.op(**leaves, **options, backend="reference")
    weights = torch.randn(out.shape, dtype=out.dtype)
    wanted = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    expected = torch.autograd.grad(out, list(wanted.values()), weights)
    grads = _plain_backward(sample, leaves, weights)
    for (name, want), grad in zip(zip(wanted, expected, strict=True), grads, strict=True):
        assert_close(f"gradient of {name}", grad.reshape(want.shape), want, 1e-11)


def _plain_backward(sample: Sample, leaves: dict, weights: torch.Tensor) -> list[torch.Tensor]:
    from mmvmamba.ops.scan2d import operator as scan2d_operator
    from mmvmamba.ops.selective_scan import operator as selective_scan_operator

    inputs = [None if value is None else value.detach() for value in leaves.values()]
    if sample.op.__name__.startswith("ssd"):
        return _plain_backward_of_ssd(sample, inputs, weights)
    softplus = sample.options["delta_softplus"]
    nothing = weights.new_empty(0)
    if sample.op.__name__ == "selective_scan":
        for at in (3, 4):
            inputs[at] = inputs[at] if inputs[at].dim() == 4 else inputs[at].unsqueeze(1)
        grads = selective_scan_operator._fallback_backward(weights, None, *inputs, softplus, nothing)
    else:
        orders = sample.options["orders"]
        named = not isinstance(orders, torch.Tensor)
        routes = ([int(order) for order in orders], None) if named else ([], orders)
        grads = scan2d_operator._fallback_backward(weights, *inputs, *routes, softplus, nothing)
    return [grad for grad, value in zip(grads, inputs, strict=True) if value is not None]


def _plain_backward_of_ssd(sample: Sample, inputs: list, weights: torch.Tensor) -> list[torch.Tensor]:
    from mmvmamba.ops.ssd import operator
    from mmvmamba.ops.ssd.causal import operator as causal_operator
    from mmvmamba.ops.ssd.reference import ssd_state_reference

    blocked = sample.options["head_groups"] == "blocked"
    if sample.op.__name__ == "ssd":
        softplus = sample.options["dt_softplus"]
        grads = causal_operator._backward(weights, None, *inputs, softplus, blocked, weights.new_empty(0))
    else:
        grads = operator._non_causal_backward(weights, *inputs, blocked, ssd_state_reference(*inputs[:3], blocked))
    return [grad for grad, value in zip(grads, inputs, strict=True) if value is not None]
