"""Memory does not grow over many calls, refused ones included (reliability matrix A13)."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from mmvmamba.errors import OpInputError
from mmvmamba.ops import causal_conv1d, depthwise_conv2d, scan2d, selective_scan
from mmvmamba.testing import requires_extension
from tests.test_ops.test_exact import scan2d_arguments

CALLS = 2000
MOST_GROWTH = 2**20  # bytes

Call = Callable[[], None]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small calls wait for other threads more than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def resident_bytes() -> int:
    """Memory of this process that is in RAM (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def tensors_alive() -> int:
    gc.collect()
    # isinstance would ask every object for its __class__, and some modules answer with a warning.
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def scan_arguments() -> list[torch.Tensor]:
    u, delta = torch.randn(2, 2, 8, 40).unbind(0)
    B, C = torch.randn(2, 2, 1, 2, 40).unbind(0)
    return [u, delta, -torch.rand(8, 2), B, C, torch.randn(8), torch.randn(8)]


def call_selective_scan() -> None:
    leaves = [value.requires_grad_() for value in scan_arguments()]
    out, state = selective_scan(*leaves, delta_softplus=True, return_last_state=True, backend="compiled")
    torch.autograd.grad(out.sum() + state.sum(), leaves)


def call_scan2d() -> None:
    leaves = [value.requires_grad_() for value in scan2d_arguments(6, 7)]
    torch.autograd.grad(scan2d(*leaves, backend="compiled").sum(), leaves)


def call_scan2d_along_a_permutation() -> None:
    leaves = [value.requires_grad_() for value in scan2d_arguments(6, 7)]
    routes = torch.stack([torch.randperm(42) for _ in range(4)])
    torch.autograd.grad(scan2d(*leaves, orders=routes, backend="compiled").sum(), leaves)


def call_depthwise_conv2d() -> None:
    leaves = [value.requires_grad_() for value in (torch.randn(2, 6, 7, 20), torch.randn(20, 1, 3, 3), torch.randn(20))]
    torch.autograd.grad(depthwise_conv2d(*leaves, activation="silu", backend="compiled").sum(), leaves)


def call_causal_conv1d() -> None:
    leaves = [value.requires_grad_() for value in (torch.randn(2, 70, 20), torch.randn(2, 20, 4), torch.randn(2, 20))]
    torch.autograd.grad(causal_conv1d(*leaves, activation="silu", backend="compiled").sum(), leaves)


def refused_in_python() -> None:
    u, *others = scan_arguments()
    with pytest.raises(OpInputError):
        selective_scan(u[..., :-1], *others, backend="compiled")


def refused_in_the_kernel() -> None:
    """Past the checks in Python: the compiled function throws after it has taken hold of its arguments."""
    x, projections, dt_weight, dt_bias, A, D = scan2d_arguments(6, 7)
    arguments = (x, projections, dt_weight, dt_bias, A, D[:1], [0, 1, 2, 3], None, True, torch.float32, True)
    with pytest.raises(RuntimeError, match="do not belong together"):
        torch.ops.mmvmamba.scan2d(*arguments)


@requires_extension()
@pytest.mark.ext
@pytest.mark.parametrize(
    "call",
    [
        call_selective_scan,
        call_scan2d,
        call_scan2d_along_a_permutation,
        call_depthwise_conv2d,
        call_causal_conv1d,
        refused_in_python,
        refused_in_the_kernel,
    ],
)
def test_memory_stays(call: Call, one_thread: None) -> None:
    # The allocator of the C library and PyTorch's caches reach their final size first.
    for _ in range(CALLS // 4):
        call()
    tensors, resident = tensors_alive(), resident_bytes()
    for _ in range(CALLS):
        call()
    assert tensors_alive() <= tensors  # fewer is what earlier tests had left behind
    growth = resident_bytes() - resident
    assert growth < MOST_GROWTH, f"{growth} bytes more after {CALLS} calls"
