"""FLOP counts of the scan operators, by PyTorch's counter."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmvmamba.ops import causal_conv1d, flops, scan2d, selective_scan
from tests.test_ops.test_exact import scan2d_arguments


def counted(mode: FlopCounterMode) -> dict[str, int]:
    return {str(name).split(".")[-1]: count for name, count in mode.get_flop_counts()["Global"].items()}


def test_a_scan_of_one_position_by_hand() -> None:
    u = torch.ones(1, 1, 1)
    one = torch.ones(1, 1, 1)
    with FlopCounterMode(display=False) as mode:
        torch.ops.mmvmamba.selective_scan(
            u, u, -torch.ones(1, 1), one[None], one[None], None, None, True, u.dtype, False
        )
    # delta u; delta A; (delta u) B; decay h + injection (2); C h (2)
    assert counted(mode) == {"selective_scan": 7}


@pytest.mark.parametrize("suffix", ["", "_triton"])
def test_counts_grow_with_every_size(suffix: str) -> None:
    """The numbers written out, for the operators of both backends."""
    x, projections, dt_weight, dt_bias, A, D = scan2d_arguments(3, 5)
    k, d, n = A.shape
    b, r = x.shape[0], dt_weight.shape[2]
    leaves = [value.requires_grad_() for value in (x, projections, dt_weight, dt_bias, A, D)]
    operator = getattr(torch.ops.mmvmamba, "scan2d" + suffix)
    with FlopCounterMode(display=False) as mode:
        out, _ = operator(*leaves, [0, 1, 2, 3], None, True, torch.float32, True)
        torch.autograd.grad(out.sum(), leaves)
    positions = b * k * d * 15
    assert counted(mode) == {
        "scan2d" + suffix: positions * (6 * n + 1 + 2 + 1 + 2 * r + 1),
        f"scan2d{suffix}_backward": positions * (19 * n + 4 + 4 + 1 + 6 * r + 1),
    }


def test_a_map_for_every_route_counts_as_a_shared_one_but_for_the_sum_of_its_gradients() -> None:
    x, *others = scan2d_arguments(3, 5)
    counts = []
    for value in (x, torch.randn(*x.shape[:3], 4, x.shape[3])):
        leaves = [leaf.detach().requires_grad_() for leaf in (value, *others)]
        with FlopCounterMode(display=False) as mode:
            scan2d(*leaves, backend=None).sum().backward()
        counts.append(counted(mode))
    visits = x.numel() * 4
    assert counts[1]["scan2d"] == counts[0]["scan2d"]
    assert counts[1]["scan2d_backward"] == counts[0]["scan2d_backward"] - visits


def test_the_causal_convolution_counts_as_that_of_pytorch() -> None:
    x, weight = torch.randn(2, 9, 6, requires_grad=True), torch.randn(2, 6, 4, requires_grad=True)
    operator = torch.ops.mmvmamba.causal_conv1d
    with FlopCounterMode(display=False) as mode:
        operator(x, weight, None, [0, 1], 1).sum().backward()
    forward = 2 * x.numel() * 2 * 4
    assert mode.get_total_flops() == forward + 2 * forward
    with FlopCounterMode(display=False) as plain:
        causal_conv1d(x.detach(), weight.detach(), backend="reference")
    assert plain.get_total_flops() == forward


def test_options_and_permutations_are_counted() -> None:
    x, projections, dt_weight, _, A, _ = scan2d_arguments(3, 5)
    routes = torch.arange(6).expand(4, 6)
    with FlopCounterMode(display=False) as mode:
        scan2d(x, projections, dt_weight, None, A, None, orders=routes)
    k, d, n = A.shape
    assert mode.get_total_flops() == x.shape[0] * k * d * 6 * (6 * n + 1 + 2 * dt_weight.shape[2] + 1)


def test_grouped_scan_with_all_options() -> None:
    b, d, length, n = 2, 6, 9, 3
    u = torch.randn(b, d, length, requires_grad=True)
    B = torch.randn(b, 2, n, length)
    with FlopCounterMode(display=False) as mode:
        selective_scan(u, u, -torch.rand(d, n), B, B, torch.ones(d), torch.ones(d), True).sum().backward()
    forward = flops.selective_scan_flops(u.shape, u.shape, (d, n), B.shape, B.shape, (d,), (d,))
    backward = flops.selective_scan_backward_flops(
        u.shape, None, u.shape, u.shape, (d, n), B.shape, B.shape, (d,), (d,)
    )
    assert forward == b * d * length * (6 * n + 1 + 2 + 1)
    assert backward == b * d * length * (19 * n + 4 + 4 + 1)
    assert mode.get_total_flops() == forward + backward


def test_operators_alone_do_not_import_the_counter() -> None:
    code = (
        "import sys, mmvmamba.ops; assert 'torch.utils.flop_counter' not in sys.modules\n"
        "import mmvmamba.ops.flops, torch; from torch.utils.flop_counter import flop_registry\n"
        "print(torch.ops.mmvmamba.scan2d in flop_registry, torch.ops.mmvmamba.scan2d_triton_backward in flop_registry)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "True True", done.stderr
