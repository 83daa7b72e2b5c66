"""Operation counts of all operators of this package for `torch.utils.flop_counter.FlopCounterMode`.

Importing this module registers the counts. It is not imported with `mmvmamba.ops`, because PyTorch's counter imports
Triton and complains where there is none. Convention: an addition or a multiplication counts 1, a multiply-add so 2, as
PyTorch counts its products; exponentials, softplus and their derivatives count nothing. Counted is what the recurrence
needs, whatever the backend does on top (kernels may compute states twice).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from mmvmamba.ops.library import TWINS, twin

FORWARD_STATE = 6
"""Per state and position: delta A, (delta u) B, h = decay h + injection (2), y += C h (2)."""
BACKWARD_STATE = 4 + 15
"""The forward without y, then: q += C dy (2), dC += h dy (2), the gradient of the rate q h decay (2), of delta
through A (2), dA (2), dB (2), of delta u (2), q = decay q (1)."""
FORWARD_CHANNEL = 1
"""Per channel and position: delta u."""
BACKWARD_CHANNEL = 1 + 3
"""delta u again, du (1), the gradient of delta through u (2)."""
SKIP = 2
"""Forward: y += D u."""
BACKWARD_SKIP = 4
"""du += D dy, dD += u dy."""
BIAS = 1
"""Forward: delta + bias; backward: the sum of its gradient."""
STEP = 2
"""Per channel, position and rank: one product for the step sizes; the backward takes three (again, two gradients)."""

Shape = tuple[int, ...]


def _scan_flops(positions: int, n: int, skip: bool, bias: bool, backward: bool) -> int:
    """Count a scan over ``positions``, which is entries times channels times length."""
    state, channel = (BACKWARD_STATE, BACKWARD_CHANNEL) if backward else (FORWARD_STATE, FORWARD_CHANNEL)
    return positions * (n * state + channel + skip * (BACKWARD_SKIP if backward else SKIP) + bias * BIAS)


def selective_scan_flops(
    u: Shape, delta: Shape, A: Shape, B: Shape, C: Shape, D: Shape | None, delta_bias: Shape | None, *_rest: Any,
    **_options: Any,
) -> int:  # fmt: skip
    """Count a 1D scan from the shapes of its arguments: u (b, d, l), A (d, n)."""
    b, d, length = u
    return _scan_flops(b * d * length, A[1], D is not None, delta_bias is not None, backward=False)


def selective_scan_backward_flops(
    grad_out: Shape, grad_last_state: Shape | None, u: Shape, delta: Shape, A: Shape, B: Shape, C: Shape,
    D: Shape | None, delta_bias: Shape | None, *_rest: Any, **_options: Any,
) -> int:  # fmt: skip
    """Count the backward of a 1D scan."""
    b, d, length = u
    return _scan_flops(b * d * length, A[1], D is not None, delta_bias is not None, backward=True)


def scan2d_flops(
    x: Shape, projections: Shape, dt_weight: Shape, dt_bias: Shape | None, A: Shape, D: Shape | None,
    orders: list[int], permutation: Shape | None, *_rest: Any, **_options: Any,
) -> int:  # fmt: skip
    """Count a 2D scan with its step sizes and its sum on the pixels: x (b, h, w, d) or (b, h, w, k, d), A (k, d, n)."""
    positions, r = _visits(x, dt_weight, permutation), dt_weight[2]
    merge = positions
    return (
        _scan_flops(positions, A[2], D is not None, dt_bias is not None, backward=False) + positions * STEP * r + merge
    )


def scan2d_backward_flops(
    grad_out: Shape, x: Shape, projections: Shape, dt_weight: Shape, dt_bias: Shape | None, A: Shape, D: Shape | None,
    orders: list[int], permutation: Shape | None, *_rest: Any, **_options: Any,
) -> int:  # fmt: skip
    """Count the backward of a 2D scan."""
    positions, r = _visits(x, dt_weight, permutation), dt_weight[2]
    merge = positions if len(x) == 4 else 0  # a map of every route has a gradient of its own
    scan = _scan_flops(positions, A[2], D is not None, dt_bias is not None, backward=True)
    return scan + positions * 3 * STEP * r + merge


def _visits(x: Shape, dt_weight: Shape, permutation: Shape | None) -> int:
    """Entries times routes times channels times length."""
    b, h, w = x[:3]
    return b * dt_weight[0] * dt_weight[1] * (h * w if permutation is None else permutation[1])


def _ssd_products(heads: Shape, projection: Shape) -> int:
    """One product of a state with every position: heads (b, l, k, p), projection (b, l, g, n)."""
    return 2 * math.prod(heads) * projection[3]


def ssd_state_flops(x: Shape, weight: Shape | None, b_in: Shape, *_rest: Any, **_options: Any) -> int:
    """Count a sum over positions: one product, and the weights."""
    return _ssd_products(x, b_in) + (weight is not None) * math.prod(x)


def ssd_state_backward_flops(
    grad_state: Shape, x: Shape, weight: Shape | None, b_in: Shape, *_rest: Any, **_options: Any
) -> int:
    """Count two products, and with weights: weight x, dx (1), the gradient of the weight (2)."""
    return 2 * _ssd_products(x, b_in) + (weight is not None) * 4 * math.prod(x)


def ssd_read_flops(state: Shape, c_out: Shape, *_rest: Any, **_options: Any) -> int:
    """Count one product."""
    b, k, _, p = state
    return _ssd_products((b, c_out[1], k, p), c_out)


def ssd_read_backward_flops(grad_out: Shape, state: Shape, c_out: Shape, *_rest: Any, **_options: Any) -> int:
    """Count two products."""
    return 2 * _ssd_products(grad_out, c_out)


def ssd_non_causal_flops(
    x: Shape, weight: Shape | None, b_in: Shape, c_out: Shape, skip: Shape | None, *_rest: Any, **_options: Any
) -> int:
    """Count both products, the weights and the skip."""
    return ssd_state_flops(x, weight, b_in) + _ssd_products(x, c_out) + (skip is not None) * SKIP * math.prod(x)


def ssd_non_causal_backward_flops(
    grad_out: Shape, x: Shape, weight: Shape | None, b_in: Shape, c_out: Shape, skip: Shape | None, *_rest: Any,
    **_options: Any,
) -> int:  # fmt: skip
    """Count four products, the weights and the skip."""
    products = ssd_state_backward_flops((), x, weight, b_in) + 2 * _ssd_products(x, c_out)
    return products + (skip is not None) * BACKWARD_SKIP * math.prod(x)


def ssd_flops(
    x: Shape, dt: Shape, decay: Shape, b_in: Shape, c_out: Shape, skip: Shape | None, *_rest: Any, **_options: Any
) -> int:
    """Count the recurrence: dt x, the decay of the state, B x (2), C h (2); fewer than the products of its chunks."""
    return 5 * math.prod(x) * b_in[3] + math.prod(x) + (skip is not None) * SKIP * math.prod(x)


def ssd_backward_flops(
    grad_out: Shape | None, grad_last_state: Shape | None, x: Shape, dt: Shape, decay: Shape, b_in: Shape,
    c_out: Shape, skip: Shape | None, *_rest: Any, **_options: Any,
) -> int:  # fmt: skip
    """Count the states again (3), their gradients (3), dC, dB, dx and the gradient of the decay (2 each)."""
    elements = math.prod(x)
    return 14 * elements * b_in[3] + 4 * elements + (skip is not None) * BACKWARD_SKIP * elements


def causal_conv1d_flops(x: Shape, weight: Shape, *_rest: Any, **_options: Any) -> int:
    """Count one product per tap, as PyTorch counts convolutions: x (b, l, d), weight (k, d, width)."""
    return 2 * x[0] * x[1] * math.prod(weight)


def causal_conv1d_backward_flops(
    grad_out: Shape, x: Shape, weight: Shape, bias: Shape | None, reverse: list[int], activation: int, need_x: bool,
    need_weight: bool, *_rest: Any, **_options: Any,
) -> int:  # fmt: skip
    """Count one product per tap for each gradient."""
    return (need_x + need_weight) * causal_conv1d_flops(x, weight)


def depthwise_conv2d_flops(x: Shape, weight: Shape, *_rest: Any, **_options: Any) -> int:
    """Count one product per tap, those on the padding too, as PyTorch counts: x (b, h, w, d), weight (d, 1, kh, kw)."""
    return 2 * math.prod(x[:3]) * math.prod(weight)


def depthwise_conv2d_backward_flops(
    grad_out: Shape, x: Shape, weight: Shape, bias: Shape | None, activation: int, need_x: bool, need_weight: bool,
    *_rest: Any, **_options: Any,
) -> int:  # fmt: skip
    """Count one product per tap for each gradient."""
    return (need_x + need_weight) * depthwise_conv2d_flops(x, weight)


def embedding_bag_flops(
    table: Shape, rows: Shape, offsets: Shape, scale_grad_by_freq: bool = False, mode: int = 0, sparse: bool = False,
    weights: Shape | None = None, *_rest: Any, **_options: Any,
) -> int:  # fmt: skip
    """Count one addition per row and channel, with weights one product: table (m, c), rows of any shape."""
    return (1 if weights is None else 2) * math.prod(rows) * table[1]


def embedding_bag_weights_backward_flops(
    grad_out: Shape, table: Shape, rows: Shape, *_rest: Any, **_options: Any
) -> int:
    """Count one product per row and channel, which is the gradient of the weights."""
    return 2 * math.prod(rows) * table[1]


def embedding_bag_backward_flops(
    grad_out: Shape, rows: Shape, offsets: Shape, bags: Shape, sizes: Shape, maxima: Shape, num_weights: int,
    scale_grad_by_freq: bool, mode: int, sparse: bool, weights: Shape | None, *_rest: Any, **_options: Any,
) -> int:  # fmt: skip
    """Count one addition per row and channel, with weights one product, which is the gradient of the table."""
    return (1 if weights is None else 2) * math.prod(rows) * grad_out[-1]


def embedding_bag_dense_backward_flops(
    grad_out: Shape, rows: Shape, bags: Shape, sizes: Shape, maxima: Shape, num_weights: int,
    scale_grad_by_freq: bool, mode: int, weights: Shape | None, *_rest: Any, **_options: Any,
) -> int:  # fmt: skip
    """Count the same for the operator that the one above is made of on some devices."""
    return (1 if weights is None else 2) * math.prod(rows) * grad_out[-1]


def convolution_backward_flops(
    grad_out: Shape, x: Shape, weight: Shape, bias_sizes: list[int] | None, stride: list[int], padding: list[int],
    dilation: list[int], transposed: bool, output_padding: list[int], groups: int, output_mask: list[bool],
    *_rest: Any, **_options: Any,
) -> int:  # fmt: skip
    """Count as many operations as the forward has for each gradient: of the input, of the weight.

    Without groups this is PyTorch's number. With g groups, PyTorch 2.11 counts the gradient of the weight g times
    (https://github.com/pytorch/pytorch/pull/183405), so for a depthwise convolution of 96 channels 96 times too much.
    """
    positions = x if transposed else grad_out
    return (output_mask[0] + output_mask[1]) * 2 * math.prod(positions) * math.prod(weight[1:])


NOT_OURS = {
    torch.ops.aten.convolution_backward: convolution_backward_flops,
    torch.ops.aten._embedding_bag: embedding_bag_flops,
    torch.ops.aten._embedding_bag_forward_only: embedding_bag_flops,
    torch.ops.aten._embedding_bag_per_sample_weights_backward: embedding_bag_weights_backward_flops,
    torch.ops.aten._embedding_bag_backward: embedding_bag_backward_flops,
    torch.ops.aten._embedding_bag_dense_backward: embedding_bag_dense_backward_flops,
}
"""PyTorch's own operators that its counter counts wrongly or not at all, for ``FlopCounterMode(custom_mapping=...)``.

They are not registered for everyone: other models in the same process may use them, and PyTorch may mend its count. The
bags are what HRVMamba's deformable aggregation is made of: 36 corners per pixel and channel, so 72 operations.
"""


def _register() -> None:
    formulas: dict[str, Any] = {
        "selective_scan": selective_scan_flops,
        "selective_scan_backward": selective_scan_backward_flops,
        "scan2d": scan2d_flops,
        "scan2d_backward": scan2d_backward_flops,
        "ssd_state": ssd_state_flops,
        "ssd_state_backward": ssd_state_backward_flops,
        "ssd_read": ssd_read_flops,
        "ssd_read_backward": ssd_read_backward_flops,
        "ssd_non_causal": ssd_non_causal_flops,
        "ssd_non_causal_backward": ssd_non_causal_backward_flops,
        "ssd": ssd_flops,
        "ssd_backward": ssd_backward_flops,
    }
    for name, formula in formulas.items():
        operators = [getattr(torch.ops.mmvmamba, twin(name, suffix)) for suffix in TWINS]
        register_flop_formula(operators)(formula)
    register_flop_formula(torch.ops.mmvmamba.causal_conv1d)(causal_conv1d_flops)
    register_flop_formula(torch.ops.mmvmamba.causal_conv1d_backward)(causal_conv1d_backward_flops)
    register_flop_formula(torch.ops.mmvmamba.depthwise_conv2d)(depthwise_conv2d_flops)
    register_flop_formula(torch.ops.mmvmamba.depthwise_conv2d_backward)(depthwise_conv2d_backward_flops)


_register()
