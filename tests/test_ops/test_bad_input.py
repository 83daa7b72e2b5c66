"""Bad arguments: the exception names the operator, the argument, what was found and what was expected."""

from __future__ import annotations

import re

import pytest
import torch

from mmvmamba.errors import BackendError, ConfigError, OpInputError
from mmvmamba.ops import CROSS_SCAN, ScanOrder, scan2d, selective_scan
from mmvmamba.testing import requires_extension
from tests.test_ops.test_exact import BACKENDS, scan2d_arguments

B_, D_, L_, N_ = 2, 6, 10, 3


def scan_arguments() -> dict:
    return {
        "u": torch.randn(B_, D_, L_),
        "delta": torch.rand(B_, D_, L_),
        "A": -torch.rand(D_, N_),
        "B": torch.randn(B_, 2, N_, L_),
        "C": torch.randn(B_, 2, N_, L_),
        "D": torch.randn(D_),
        "delta_bias": torch.randn(D_),
        "z": torch.randn(B_, D_, L_),
    }


SCAN_CASES = {
    "u is a list": ("u", [1.0], "is a list"),
    "u has rank 2": ("u", torch.randn(D_, L_), r"has 2 dimensions, shape \(6, 10\)"),
    "u is integer": ("u", torch.ones(B_, D_, L_, dtype=torch.int64), "dtype torch.int64"),
    "u is complex": ("u", torch.randn(B_, D_, L_, dtype=torch.complex64), "dtype torch.complex64"),
    "delta has another length": ("delta", torch.rand(B_, D_, 9), r"shape \(2, 6, 9\)"),
    "delta is float64 alone": ("delta", torch.rand(B_, D_, L_).double(), "dtype torch.float64"),
    "A has rank 1": ("A", -torch.rand(D_), "has 1 dimensions"),
    "A has other channels": ("A", -torch.rand(5, N_), r"shape \(5, 3\)"),
    "A has no states": ("A", -torch.rand(D_, 0), r"shape \(6, 0\)"),
    "A is half": ("A", -torch.rand(D_, N_).half(), "dtype torch.float16"),
    "B has rank 2": ("B", torch.randn(N_, L_), "has 2 dimensions"),
    "B has other states, not grouped": ("B", torch.randn(B_, 5, L_), r"shape \(2, 5, 10\)"),
    "delta_softplus is a number": ("delta_softplus", 1, "is 1"),
    "B has 4 groups": ("B", torch.randn(B_, 4, N_, L_), "has 4 groups"),
    "B has no groups": ("B", torch.randn(B_, 0, N_, L_), "has 0 groups"),
    "B has other states": ("B", torch.randn(B_, 2, 5, L_), r"shape \(2, 2, 5, 10\)"),
    "C has other groups": ("C", torch.randn(B_, 3, N_, L_), r"shape \(2, 3, 3, 10\)"),
    "D has other channels": ("D", torch.randn(7), r"shape \(7,\)"),
    "D has rank 2": ("D", torch.randn(D_, 1), r"shape \(6, 1\)"),
    "delta_bias is bfloat16": ("delta_bias", torch.randn(D_).bfloat16(), "dtype torch.bfloat16"),
    "z has another batch": ("z", torch.randn(1, D_, L_), r"shape \(1, 6, 10\)"),
    "z is on another device": ("z", torch.randn(B_, D_, L_, device="meta"), "is on meta"),
    "out_dtype is integer": ("out_dtype", torch.int32, "torch.int32"),
    "out_dtype is a string": ("out_dtype", "float32", "'float32'"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("argument", "value", "found"), SCAN_CASES.values(), ids=SCAN_CASES)
def test_selective_scan(argument: str, value: object, found: str, backend: str) -> None:
    with pytest.raises(OpInputError, match=rf"selective_scan: argument '{argument}' .*{found}.*; expected .+\. .+"):
        selective_scan(**(scan_arguments() | {argument: value}), backend=backend)


NAMES = ("x", "projections", "dt_weight", "dt_bias", "A", "D")
MAP_CASES = {
    "x has rank 3": ("x", torch.randn(4, 5, 20), "has 3 dimensions"),
    "x is a string": ("x", "map", "is a str"),
    "x is integer": ("x", torch.ones(2, 4, 5, 20, dtype=torch.uint8), "dtype torch.uint8"),
    "projections are float64 alone": ("projections", torch.randn(2, 4, 5, 4, 7).double(), "dtype torch.float64"),
    "A has other channels": ("A", -torch.rand(4, 21, 2), r"shape \(4, 21, 2\)"),
    "x is channel-first": ("x", torch.randn(2, 20, 4, 5), r"has 5 channels, shape \(2, 20, 4, 5\)"),
    "x is sparse": ("x", torch.randn(2, 4, 5, 20).to_sparse(), "layout torch.sparse_coo"),
    "delta_softplus is a string": ("delta_softplus", "no", "is 'no'"),
    "projections have other features": ("projections", torch.randn(2, 4, 5, 4, 8), r"shape \(2, 4, 5, 4, 8\)"),
    "projections have other routes": ("projections", torch.randn(2, 4, 5, 3, 7), r"shape \(2, 4, 5, 3, 7\)"),
    "projections are channel-first": ("projections", torch.randn(2, 4, 7, 4, 5), r"shape \(2, 4, 7, 4, 5\)"),
    "dt_weight has rank 2": ("dt_weight", torch.randn(20, 3), "has 2 dimensions"),
    "dt_weight has other routes": ("dt_weight", torch.randn(2, 20, 3), r"shape \(2, 20, 3\)"),
    "dt_weight is integer": ("dt_weight", torch.ones(4, 20, 3, dtype=torch.int64), "dtype torch.int64"),
    "dt_bias is flat": ("dt_bias", torch.randn(80), r"shape \(80,\)"),
    "dt_bias is half": ("dt_bias", torch.randn(4, 20).half(), "dtype torch.float16"),
    "A is flat": ("A", -torch.rand(80, 2), "has 2 dimensions"),
    "A has no states": ("A", -torch.rand(4, 20, 0), r"shape \(4, 20, 0\)"),
    "D is flat": ("D", torch.randn(80), r"shape \(80,\)"),
    "D is on another device": ("D", torch.randn(4, 20, device="meta"), "is on meta"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("argument", "value", "found"), MAP_CASES.values(), ids=MAP_CASES)
def test_scan2d(argument: str, value: object, found: str, backend: str) -> None:
    arguments = dict(zip(NAMES, scan2d_arguments(4, 5), strict=True)) | {argument: value}
    with pytest.raises(OpInputError, match=rf"scan2d: argument '{argument}' .*{found}.*; expected .+\. .+"):
        scan2d(**arguments, backend=backend)


ORDER_CASES = {
    "a number": (5, "is 5"),
    "None": (None, "is None"),
    "too few": (CROSS_SCAN[:3], "has 3 entries"),
    "a string": (("row",) * 4, "holds 'row'"),
    "an integer": ((0, 1, 2, 3), "holds 0"),
    "floating point": (torch.zeros(4, 20), "dtype torch.float32"),
    "rank 1": (torch.zeros(20, dtype=torch.int64), "has 1 dimensions"),
    "too few rows": (torch.zeros(3, 20, dtype=torch.int64), "has 3 rows"),
    "beyond the map": (torch.full((4, 20), 20), "pixel indices from 20 to 20"),
    "negative": (torch.full((4, 20), -1), "pixel indices from -1 to -1"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("orders", "found"), ORDER_CASES.values(), ids=ORDER_CASES)
def test_scan_orders(orders: object, found: str, backend: str) -> None:
    with pytest.raises(OpInputError, match=f"scan2d: argument 'orders' .*{re.escape(found)}.*; expected .+"):
        scan2d(*scan2d_arguments(4, 5), orders=orders, backend=backend)


def test_unknown_backend_gives_the_nearest_spelling() -> None:
    with pytest.raises(ConfigError, match="unknown backend 'compild'.*Did you mean 'compiled'"):
        scan2d(*scan2d_arguments(2, 2), backend="compild")


def test_named_backend_never_falls_back() -> None:
    args = [value.to("meta") for value in scan2d_arguments(2, 2)]
    with pytest.raises(BackendError, match="backend 'compiled' was asked for by the argument backend and cannot run"):
        scan2d(*args, backend="compiled")


def test_misspelt_keyword() -> None:
    with pytest.raises(TypeError, match="order"):
        scan2d(*scan2d_arguments(2, 2), order=(ScanOrder.ROW,) * 4)


def test_the_raw_operator_checks_what_protects_memory() -> None:
    args = scan2d_arguments(3, 4)
    beyond = torch.full((4, 12), 12)
    with pytest.raises((RuntimeError, IndexError)):
        torch.ops.mmvmamba.scan2d(*args, [], beyond, True, torch.float32, False)
    with pytest.raises((RuntimeError, IndexError, ValueError)):
        torch.ops.mmvmamba.scan2d(*args[:4], args[4][:, :10], args[5], [0, 1, 2, 3], None, True, torch.float32, False)
    with pytest.raises((RuntimeError, ValueError)):
        torch.ops.mmvmamba.scan2d(*args, [0, 1, 2, 9], None, True, torch.float32, False)


def raw_scan_arguments(d: int, n: int) -> list[torch.Tensor]:
    """Of torch.ops.mmvmamba.selective_scan, up to delta_bias."""
    streams, projections = torch.randn(2, 2, d, 9).unbind(0), torch.randn(2, 2, 1, n, 9).unbind(0)
    return [*streams, -torch.rand(d, n), *projections, torch.randn(d), torch.randn(d)]


@requires_extension()
@pytest.mark.ext
@pytest.mark.parametrize(("k", "n"), [(4, 0), (0, 1), (0, 0)])
@pytest.mark.parametrize("permuted", [False, True])
def test_the_raw_scan2d_refuses_no_states_and_no_routes(k: int, n: int, permuted: bool) -> None:
    args = scan2d_arguments(3, 4, k=k, n=n)
    routes = ([], torch.zeros(k, 12, dtype=torch.int64)) if permuted else ([0] * k, None)
    with pytest.raises(RuntimeError, match="k >= 1 and n >= 1"):
        torch.ops.mmvmamba.scan2d(*args, *routes, True, torch.float32, True)
    with pytest.raises(RuntimeError, match="k >= 1 and n >= 1"):
        torch.ops.mmvmamba.scan2d_backward(args[0], *args, *routes, True, torch.empty(0))


@requires_extension()
@pytest.mark.ext
def test_the_raw_selective_scan_refuses_no_states() -> None:
    args = raw_scan_arguments(20, 0)
    with pytest.raises(RuntimeError, match="n >= 1"):
        torch.ops.mmvmamba.selective_scan(*args, True, torch.float32, True)
    with pytest.raises(RuntimeError, match="n >= 1"):
        torch.ops.mmvmamba.selective_scan_backward(args[0], None, *args, True, torch.empty(0))
    out, _, _ = torch.ops.mmvmamba.selective_scan(*raw_scan_arguments(20, 1), True, torch.float32, True)
    assert out.isfinite().all()
