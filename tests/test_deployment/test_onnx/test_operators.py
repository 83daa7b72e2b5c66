"""Every operator in onnxruntime equals its reference in float64, at sizes that the export did not know."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from mmvmamba import ops
from mmvmamba.deployment.onnx.exporting import _quiet
from mmvmamba.deployment.onnx.operators import translations
from mmvmamba.models.layers.deformable_aggregation import deformable_aggregation
from mmvmamba.ops import BIDIRECTIONAL_SCAN, CROSS_SCAN
from mmvmamba.ops.depthwise_conv import depthwise_conv2d
from mmvmamba.testing import relative_error

pytest.importorskip("onnxscript")
ort = pytest.importorskip("onnxruntime")

BOUND = 5e-6
"""float32 against float64: sums over thousands of positions, in another order than the kernels'."""
FREE = torch.export.Dim.DYNAMIC


class Call(nn.Module):
    """One operator with its options."""

    def __init__(self, function, names, **options):
        super().__init__()
        self.function, self.names, self.options = function, names, options

    def forward(self, *tensors):
        out = self.function(**dict(zip(self.names, tensors, strict=True)), **self.options)
        return out if isinstance(out, tuple) else (out,)


def session(module, tensors, free, folder):
    """An onnxruntime session of a module that takes tensors, of which the dimensions ``free`` may change."""
    shapes = tuple(dict.fromkeys(axes, FREE) for axes in free)
    with torch.no_grad(), _quiet():
        program = torch.export.export(module, tuple(tensors), dynamic_shapes=(shapes,), strict=False)
        written = torch.onnx.export(program, custom_translation_table=translations(), verbose=False)
    file = folder / "operator.onnx"
    written.save(str(file))
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def run(opened, tensors):
    """What a session makes of tensors, in order; those that the network does not read have no input."""
    feed = {}
    inputs = {value.name for value in opened.get_inputs()}
    for i, value in enumerate(tensors):
        if (name := f"tensors_{i}") in inputs:
            feed[name] = value.numpy()
    assert len(feed) == len(inputs)
    return [torch.from_numpy(value) for value in opened.run(None, feed)]


def check(module, make, free, sizes, folder, reference=None):
    """Export with the first of ``sizes``; compare at the others with the operator in float64."""
    opened = session(module, make(*sizes[0]), free, folder)
    for size in sizes[1:]:
        tensors = make(*size)
        wide = [value.double() if value.is_floating_point() else value for value in tensors]
        expected = (reference or module)(*wide)
        for found, value in zip(run(opened, tensors), expected, strict=True):
            assert found.dtype == torch.float32
            assert relative_error(found, value) < BOUND, size


def random(*shape, low=None):
    return torch.randn(shape) if low is None else torch.rand(shape) + low


def scan2d_tensors(k, d, n, r, per_route=False):
    torch.manual_seed(k * 100 + n)
    parameters = [random(k, d, r), random(k, d), -random(k, d, n, low=0.01), random(k, d)]

    def make(b, h, w):
        torch.manual_seed(h * 100 + w)
        x = random(b, h, w, k, d) if per_route else random(b, h, w, d)
        return [x, random(b, h, w, k, r + 2 * n), *parameters]

    return make


SCAN2D = ("x", "projections", "dt_weight", "dt_bias", "A", "D")
MAP = (0, 1, 2)
#: The first is what is recorded; then a pixel, a row, odd sides, and 16384 positions.
SIZES = [(2, 5, 6), (1, 1, 1), (1, 1, 7), (3, 13, 4), (2, 31, 29), (1, 128, 128)]


@pytest.mark.parametrize(("orders", "n"), [(CROSS_SCAN, 1), (CROSS_SCAN, 3), (BIDIRECTIONAL_SCAN, 1)])
def test_scan2d(orders, n, tmp_path):
    module = Call(ops.scan2d, SCAN2D, orders=orders)
    make = scan2d_tensors(4, 8, n, 3)
    check(module, make, [MAP, MAP, (), (), (), ()], SIZES, tmp_path)


def test_scan2d_of_a_map_for_every_route(tmp_path):
    module = Call(ops.scan2d, SCAN2D, orders=(ops.ScanOrder.ROW, ops.ScanOrder.ROW_REVERSED))
    check(module, scan2d_tensors(2, 6, 4, 2, per_route=True), [MAP, MAP, (), (), (), ()], SIZES[:-1], tmp_path)


def test_scan2d_along_permutations_that_leave_pixels_out(tmp_path):
    make_scan = scan2d_tensors(2, 4, 2, 2)

    def make(b, h, w):
        torch.manual_seed(h * 10 + w)
        kept = max(h * w * 2 // 3, 1)
        routes = torch.stack([torch.randperm(h * w)[:kept] for _ in range(2)])
        return [*make_scan(b, h, w), routes]

    module = Call(ops.scan2d, (*SCAN2D, "orders"))
    check(module, make, [MAP, MAP, (), (), (), (), (1,)], SIZES[:-1], tmp_path)


def test_without_bias_skip_and_softplus(tmp_path):
    make_scan = scan2d_tensors(4, 8, 1, 3)

    def make(b, h, w):
        x, projections, weight, _, A, _ = make_scan(b, h, w)
        return [x, projections.abs(), weight.abs(), A]  # step sizes stay positive, so that nothing grows

    module = Call(lambda x, projections, dt_weight, A: ops.scan2d(
        x, projections, dt_weight, None, A, delta_softplus=False
    ), ("x", "projections", "dt_weight", "A"))  # fmt: skip
    check(module, make, [MAP, MAP, (), ()], SIZES[:-1], tmp_path)


@pytest.mark.parametrize("softplus", [True, False])
def test_selective_scan_with_groups_and_its_last_state(softplus, tmp_path):
    d, g, n = 6, 2, 3
    torch.manual_seed(0)
    A, D, bias = -random(d, n, low=0.1), random(d), random(d)

    def make(b, length):
        torch.manual_seed(length)
        delta = random(b, d, length) if softplus else random(b, d, length, low=0.0)
        own = [bias if softplus else bias.abs()]
        return [random(b, d, length), delta, A, random(b, g, n, length), random(b, g, n, length), D, *own]

    names = ("u", "delta", "A", "B", "C", "D", "delta_bias")
    module = Call(ops.selective_scan, names, delta_softplus=softplus, return_last_state=True)
    free = [(0, 2), (0, 2), (), (0, 3), (0, 3), (), ()]
    check(module, make, free, [(2, 5), (1, 1), (3, 2), (1, 97), (1, 4097)], tmp_path)


@pytest.mark.parametrize("groups", ["interleaved", "blocked"])
def test_ssd_from_a_state(groups, tmp_path):
    k, p, g, n = 4, 3, 2, 5
    torch.manual_seed(0)
    decay, skip, bias = -random(k, low=0.1), random(k), random(k)

    def make(b, length):
        torch.manual_seed(length)
        own = [random(b, length, g, n), random(b, length, g, n)]
        return [random(b, length, k, p), random(b, length, k), decay, *own, skip, bias, random(b, k, n, p)]

    names = ("x", "dt", "decay", "b_in", "c_out", "skip", "dt_bias", "initial_state")
    module = Call(ops.ssd, names, dt_softplus=True, head_groups=groups, return_last_state=True)
    free = [(0, 1), (0, 1), (), (0, 1), (0, 1), (), (), (0,)]
    check(module, make, free, [(2, 5), (1, 1), (3, 2), (1, 97), (1, 1025)], tmp_path)


@pytest.mark.parametrize("groups", ["interleaved", "blocked"])
def test_the_products_without_an_order(groups, tmp_path):
    k, p, g, n = 6, 3, 2, 5
    torch.manual_seed(0)
    skip = random(k)

    def make(b, length):
        torch.manual_seed(length)
        own = [random(b, length, g, n), random(b, length, g, n)]
        return [random(b, length, k, p), random(b, length, k), *own, skip]

    def apart(x, weight, b_in, c_out, skip):
        state = ops.ssd_state(x, weight, b_in, head_groups=groups)
        whole = ops.ssd_non_causal(x, weight, b_in, c_out, skip, head_groups=groups)
        plain = ops.ssd_non_causal(x, None, b_in, c_out, None, head_groups=groups)
        return state, ops.ssd_read(state, c_out, head_groups=groups), whole, plain

    module = Call(apart, ("x", "weight", "b_in", "c_out", "skip"))
    free = [(0, 1), (0, 1), (0, 1), (0, 1), ()]
    check(module, make, free, [(2, 5), (1, 1), (3, 2), (1, 97)], tmp_path)


def test_convolutions(tmp_path):
    d, k = 6, 2
    torch.manual_seed(0)
    weight, bias, square, own = random(k, d, 4), random(k, d), random(d, 1, 3, 5), random(d)

    def make(b, h, w):
        torch.manual_seed(h * 10 + w)
        return [random(b, h, w, d)]

    def both(x):
        weights = [value.to(x.dtype) for value in (weight, bias, square, own)]
        sequence = x.flatten(1, 2)
        return (
            ops.causal_conv1d(sequence, *weights[:2], reverse=(False, True), activation="silu"),
            ops.causal_conv1d(sequence, weights[0], None, reverse=(True, False)),
            depthwise_conv2d(x, *weights[2:], activation="silu"),
            depthwise_conv2d(x, weights[2]),
        )

    check(Call(both, ("x",)), make, [MAP], SIZES[:-1], tmp_path)


@pytest.mark.parametrize("n", [1, 4])
def test_strong_and_weak_decays_lose_no_digits(n, tmp_path):
    """Rates of -1e4 beside -1e-4 and step sizes from 1e-8 to 100: cumulative sums would reach -1e8."""
    k, d, r = 1, 4, 1
    torch.manual_seed(3)
    A = -torch.logspace(-4, 4, d * n).view(1, d, n)
    parameters = [torch.ones(k, d, r), torch.zeros(k, d), A, torch.zeros(k, d)]

    def make(b, h, w):
        torch.manual_seed(h)
        projections = random(b, h, w, k, r + 2 * n)
        projections[..., 0] = torch.rand(b, h, w, k) * 120 - 20
        return [random(b, h, w, d), projections, *parameters]

    module = Call(ops.scan2d, SCAN2D, orders=(ops.ScanOrder.ROW,))
    check(module, make, [MAP, MAP, (), (), (), ()], [(2, 5, 6), (1, 9, 9), (1, 40, 50)], tmp_path)


def test_small_step_sizes_keep_their_digits(tmp_path):
    """Where softplus is exp: its small values must not be rounded beside 1."""
    make_scan = scan2d_tensors(1, 4, 1, 1)

    def make(b, h, w):
        x, projections, weight, bias, A, D = make_scan(b, h, w)
        return [x, projections, weight * 0.1, bias * 0.1 - 18, A, D * 0]  # about 1e-8, below what 1 can hold

    module = Call(ops.scan2d, SCAN2D, orders=(ops.ScanOrder.ROW,))
    check(module, make, [MAP, MAP, (), (), (), ()], [(2, 5, 6), (1, 9, 9)], tmp_path)


def test_later_pixels_do_not_reach_earlier_ones(tmp_path):
    module = Call(ops.scan2d, SCAN2D, orders=(ops.ScanOrder.ROW,))
    make = scan2d_tensors(1, 4, 2, 2)
    opened = session(module, make(2, 5, 6), [MAP, MAP, (), (), (), ()], tmp_path)
    tensors = make(1, 7, 9)
    (before,) = run(opened, tensors)
    tensors[0] = tensors[0].clone()
    tensors[0][:, 3, 4] = float("nan")
    (after,) = run(opened, tensors)
    before, after = before.flatten(1, 2), after.flatten(1, 2)
    at = 3 * 9 + 4
    assert torch.equal(before[:, :at], after[:, :at])
    assert after[:, at:].isnan().all()


def test_deformable_aggregation_is_no_loop(tmp_path):
    """PyTorch's exporter writes a loop over the pixels: HRVMamba at 224 took 9 s."""
    import onnx

    groups = 2

    def make(b, h, w):
        torch.manual_seed(h * 10 + w)
        return [random(b, h, w, 16), random(b, h, w, 27 * groups)]

    module = Call(lambda x, offset_mask: deformable_aggregation(x, offset_mask, groups), ("x", "offset_mask"))
    check(module, make, [MAP, MAP], SIZES[:-1], tmp_path)
    assert not [n for n in onnx.load(tmp_path / "operator.onnx").graph.node if n.op_type in ("Loop", "Scan")]


PEAK = """
import resource, sys
import numpy as np, onnxruntime as ort
options = ort.SessionOptions()
options.intra_op_num_threads, options.enable_cpu_mem_arena = 1, False
opened = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
def peak(side):
    shapes = [[s if isinstance(s, int) else (1 if i == 0 else side) for i, s in enumerate(v.shape)]
              for v in opened.get_inputs()]
    opened.run(None, {v.name: np.zeros(s, np.float32) for v, s in zip(opened.get_inputs(), shapes)})
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(peak(8), peak(128))
"""


def test_memory_does_not_grow_with_the_states(tmp_path):
    """At 16384 positions the states of all would be 134 MB for each value that held them; the map is 2 MB."""
    k, d, n = 4, 32, 16
    module = Call(ops.scan2d, SCAN2D, orders=CROSS_SCAN)
    session(module, scan2d_tensors(k, d, n, 3)(2, 5, 6), [MAP, MAP, (), (), (), ()], tmp_path)
    command = [sys.executable, "-c", PEAK, str(tmp_path / "operator.onnx")]
    before, after = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    assert after - before < 128**2 * k * n * d * 4
