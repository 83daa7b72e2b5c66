"""The FLOP formulas against loops over numbers that count what is done with them, and against the reference.

The loops compute the real thing: their values are compared with the reference's and autograd's, so what they count is
what is needed. By the convention, softplus, exponentials and their derivatives are free.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mmvmamba.models.layers.deformable_aggregation import deformable_aggregation
from mmvmamba.ops import flops
from mmvmamba.ops.causal_conv.reference import causal_conv1d_reference
from mmvmamba.ops.depthwise_conv.reference import depthwise_conv2d_reference
from mmvmamba.ops.scan2d.reference import scan2d_reference
from mmvmamba.ops.selective_scan.reference import selective_scan_reference
from mmvmamba.ops.ssd.reference import ssd_non_causal_reference, ssd_recurrence


class Number:
    """A number that counts additions and multiplications of its kind."""

    done = 0

    def __init__(self, value: float) -> None:
        self.value = float(value)

    def __add__(self, other: Number) -> Number:
        Number.done += 1
        return Number(self.value + other.value)

    def __mul__(self, other: Number) -> Number:
        Number.done += 1
        return Number(self.value * other.value)


def numbers(tensor: Tensor) -> np.ndarray:
    out = np.empty(tuple(tensor.shape), dtype=object)
    for index in np.ndindex(out.shape):
        out[index] = Number(float(tensor[index]))
    return out


def zeros(*shape: int) -> np.ndarray:
    return numbers(torch.zeros(shape))


def values(array: np.ndarray) -> Tensor:
    return torch.tensor([n.value for n in array.reshape(-1)], dtype=torch.float64).reshape(array.shape)


def shapes(*tensors: Tensor | None) -> list[tuple[int, ...] | None]:
    return [None if tensor is None else tuple(tensor.shape) for tensor in tensors]


class Tally:
    """What is done with numbers inside its ``with`` blocks, all together."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> None:
        self._before = Number.done

    def __exit__(self, *_error: object) -> None:
        self.count += Number.done - self._before


def free(function: Any, *arguments: Number) -> Number:
    return Number(function(*(argument.value for argument in arguments)))


def softplus(x: Number) -> Number:
    return free(lambda v: math.log1p(math.exp(v)), x)


def decay_of(rate: Number) -> Number:
    return free(math.exp, rate)


def scan_forward(u: Any, step: Any, A: Any, B: Any, C: Any, D: Any) -> tuple[np.ndarray, np.ndarray]:
    """One channel: u (l), step (l), A (n), B and C (n, l), D a number or None; the output (l) and all states."""
    length, n = len(u), len(A)
    y, states = zeros(length), zeros(length + 1, n)
    for t in range(length):
        weighted = step[t] * u[t]
        for i in range(n):
            states[t + 1, i] = decay_of(step[t] * A[i]) * states[t, i] + weighted * B[i, t]
            y[t] = y[t] + C[i, t] * states[t + 1, i]
        if D is not None:
            y[t] = y[t] + D * u[t]
    return y, states


def scan_backward(dy: Any, u: Any, step: Any, A: Any, B: Any, C: Any, D: Any, grads: dict[str, Any]) -> None:
    """Add the gradients of one channel to those in ``grads`` (du, dstep, dA, dB, dC, dD)."""
    length, n = len(u), len(A)
    decays, weighted, before = zeros(length, n), zeros(length), zeros(length + 1, n)
    for t in range(length):
        weighted[t] = step[t] * u[t]
        for i in range(n):
            decays[t, i] = decay_of(step[t] * A[i])
            before[t + 1, i] = decays[t, i] * before[t, i] + weighted[t] * B[i, t]
    q = zeros(n)
    for t in reversed(range(length)):
        of_weighted = Number(0)
        for i in range(n):
            q[i] = q[i] + C[i, t] * dy[t]
            grads["dC"][i, t] = grads["dC"][i, t] + before[t + 1, i] * dy[t]
            rate = q[i] * before[t, i] * decays[t, i]
            grads["dstep"][t] = grads["dstep"][t] + rate * A[i]
            grads["dA"][i] = grads["dA"][i] + rate * step[t]
            grads["dB"][i, t] = grads["dB"][i, t] + q[i] * weighted[t]
            of_weighted = of_weighted + q[i] * B[i, t]
            q[i] = decays[t, i] * q[i]
        du = of_weighted * step[t]
        grads["dstep"][t] = grads["dstep"][t] + of_weighted * u[t]
        if D is not None:
            du = du + D * dy[t]
            grads["dD"][()] = grads["dD"][()] + u[t] * dy[t]
        grads["du"][t] = du


def doubles(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("options", [True, False], ids=["skip and bias", "neither"])
def test_selective_scan(options):
    torch.manual_seed(0)
    b, d, length, n = 2, 4, 5, 3
    given = [doubles(b, d, length), doubles(b, d, length), -torch.rand(d, n, dtype=torch.float64)]
    given += [
        doubles(b, 2, n, length),
        doubles(b, 2, n, length),
        *((doubles(d), doubles(d)) if options else (None,) * 2),
    ]
    leaves = [leaf.requires_grad_() for leaf in given if leaf is not None]
    out, _ = selective_scan_reference(*given, True)
    weight = torch.randn_like(out)
    expected = torch.autograd.grad(out, leaves, weight)

    u, delta, A, B, C, D, bias = (None if value is None else numbers(value.detach()) for value in given)
    names = ["du", "dstep", "dA", "dB", "dC", "dD", "dbias"]
    grads = {name: zeros(*leaf.shape) for name, leaf in zip(names, leaves, strict=False)}
    y, dy = zeros(b, d, length), numbers(weight)
    forward, backward = Tally(), Tally()
    for e, c in itertools.product(range(b), range(d)):
        g = c // (d // 2)
        skip = None if D is None else D[c]
        with forward:
            raw = [value if bias is None else value + bias[c] for value in delta[e, c]]
            step = [softplus(value) for value in raw]
            y[e, c], _ = scan_forward(u[e, c], step, A[c], B[e, g], C[e, g], skip)
        one = {"du": grads["du"][e, c], "dstep": zeros(length), "dA": grads["dA"][c], "dB": grads["dB"][e, g],
               "dC": grads["dC"][e, g], "dD": grads["dD"][c : c + 1].reshape(()) if options else None}  # fmt: skip
        with backward:
            scan_backward(dy[e, c], u[e, c], step, A[c], B[e, g], C[e, g], skip, one)
            for t in range(length):
                grads["dstep"][e, c, t] = free(lambda g, r: g / (1 + math.exp(-r)), one["dstep"][t], raw[t])
                if options:
                    grads["dbias"][c] = grads["dbias"][c] + grads["dstep"][e, c, t]
    torch.testing.assert_close(values(y), out.detach())
    for found, wanted in zip(grads.values(), expected, strict=True):
        torch.testing.assert_close(values(found), wanted)
    arguments = shapes(*given)
    assert forward.count == flops.selective_scan_flops(*arguments)
    assert backward.count == flops.selective_scan_backward_flops(shapes(out)[0], None, *arguments)


def test_scan2d():
    """Two routes over 2 x 3 pixels, one backwards: step sizes, scan, sum on the pixels, and their gradients."""
    torch.manual_seed(0)
    h, w, d, k, r, n = 2, 3, 2, 2, 2, 2
    length = h * w
    given = [doubles(1, h, w, d), doubles(1, h, w, k, r + 2 * n), doubles(k, d, r), doubles(k, d)]
    given += [-torch.rand(k, d, n, dtype=torch.float64), doubles(k, d)]
    routes = torch.stack([torch.arange(length), torch.arange(length).flip(0)])
    for leaf in given:
        leaf.requires_grad_()
    out = scan2d_reference(*given, routes, True)
    weight = torch.randn_like(out)
    expected = torch.autograd.grad(out, given, weight)

    x, P, W, bias, A, D = (numbers(value.detach()) for value in given)
    x, P, dy = x.reshape(length, d), P.reshape(length, k, r + 2 * n), numbers(weight).reshape(length, d)
    dx, dP, dW, dbias, dA, dD = zeros(length, d), zeros(*P.shape), *(zeros(*v.shape) for v in (W, bias, A, D))
    y = zeros(length, d)
    forward, backward = Tally(), Tally()
    for j, c in itertools.product(range(k), range(d)):
        route = routes[j].tolist()
        features = P[route, j]
        B, C = features[:, r : r + n].T, features[:, r + n :].T
        with forward:
            raw = zeros(length)
            for t, i in itertools.product(range(length), range(r)):
                raw[t] = raw[t] + features[t, i] * W[j, c, i]
            biased = [value + bias[j, c] for value in raw]
            step = [softplus(value) for value in biased]
            scanned, _ = scan_forward(x[route, c], step, A[j, c], B, C, D[j, c])
            for t, pixel in enumerate(route):
                y[pixel, c] = y[pixel, c] + scanned[t]
        one = {"du": zeros(length), "dstep": zeros(length), "dA": dA[j, c], "dB": zeros(n, length),
               "dC": zeros(n, length), "dD": dD[j, c : c + 1].reshape(())}  # fmt: skip
        with backward:
            for t, i in itertools.product(range(length), range(r)):  # the step sizes again
                raw[t] = raw[t] + features[t, i] * W[j, c, i]
            scan_backward(dy[route, c], x[route, c], step, A[j, c], B, C, D[j, c], one)
            for t, pixel in enumerate(route):
                of_step = free(lambda g, v: g / (1 + math.exp(-v)), one["dstep"][t], biased[t])
                dbias[j, c] = dbias[j, c] + of_step
                for i in range(r):
                    dP[pixel, j, i] = dP[pixel, j, i] + of_step * W[j, c, i]
                    dW[j, c, i] = dW[j, c, i] + of_step * features[t, i]
                dx[pixel, c] = dx[pixel, c] + one["du"][t]
        for t, pixel in enumerate(route):  # a store where every channel is its own row; the scan has added them up
            for i in range(n):
                dP[pixel, j, r + i] = Number(dP[pixel, j, r + i].value + one["dB"][i, t].value)
                dP[pixel, j, r + n + i] = Number(dP[pixel, j, r + n + i].value + one["dC"][i, t].value)
    torch.testing.assert_close(values(y), out.detach().reshape(length, d))
    for found, wanted in zip((dx, dP, dW, dbias, dA, dD), expected, strict=True):
        torch.testing.assert_close(values(found), wanted.reshape(found.shape))
    arguments = (*shapes(*given), [0, 2], None)
    assert forward.count == flops.scan2d_flops(*arguments)
    assert backward.count == flops.scan2d_backward_flops(shapes(out)[0], *arguments)


def ssd_inputs() -> tuple[int, int, int, int, list[Tensor]]:
    """Length, heads, width, states and x, step sizes, decay rates, B, C, skip of one group; one entry."""
    torch.manual_seed(0)
    length, k, p, n = 4, 2, 3, 2
    given = [doubles(1, length, k, p), doubles(1, length, k).exp(), -torch.rand(k, dtype=torch.float64)]
    return length, k, p, n, [*given, doubles(1, length, 1, n), doubles(1, length, 1, n), doubles(k)]


def test_ssd():
    """One number per position and head (its decay, the gradients of step and rate) is not counted."""
    length, k, p, n, given = ssd_inputs()
    for leaf in given:
        leaf.requires_grad_()
    out, _ = ssd_recurrence(*given, None, None, False, True)
    weight = torch.randn_like(out)
    expected = torch.autograd.grad(out, given, weight)
    x, dt, rate, B, C, skip = (numbers(value.detach()).squeeze(0) if value.ndim > 1 else numbers(value.detach())
                               for value in given)  # fmt: skip
    y, dy = zeros(length, k, p), numbers(weight)[0]
    grads = [zeros(*v.shape) for v in (x, dt, rate, B, C, skip)]
    dx, ddt, drate, dB, dC, dskip = grads
    forward, backward = Tally(), Tally()
    for j, c in itertools.product(range(k), range(p)):
        keep = [Number(math.exp(dt[t, j].value * rate[j].value)) for t in range(length)]
        with forward:
            state = zeros(n)
            for t in range(length):
                stepped = dt[t, j] * x[t, j, c]
                for i in range(n):
                    state[i] = keep[t] * state[i] + B[t, 0, i] * stepped
                    y[t, j, c] = y[t, j, c] + C[t, 0, i] * state[i]
                y[t, j, c] = y[t, j, c] + skip[j] * x[t, j, c]
        of_keep = zeros(length)
        with backward:
            before = zeros(length + 1, n)
            stepped = [dt[t, j] * x[t, j, c] for t in range(length)]
            for t, i in itertools.product(range(length), range(n)):
                before[t + 1, i] = keep[t] * before[t, i] + B[t, 0, i] * stepped[t]
            q = zeros(n)
            for t in reversed(range(length)):
                of_stepped = Number(0)
                for i in range(n):
                    q[i] = q[i] + C[t, 0, i] * dy[t, j, c]
                    dC[t, 0, i] = dC[t, 0, i] + before[t + 1, i] * dy[t, j, c]
                    dB[t, 0, i] = dB[t, 0, i] + q[i] * stepped[t]
                    of_stepped = of_stepped + q[i] * B[t, 0, i]
                    of_keep[t] = of_keep[t] + q[i] * before[t, i]
                    q[i] = keep[t] * q[i]
                dx[t, j, c] = of_stepped * dt[t, j] + skip[j] * dy[t, j, c]
                ddt[t, j] = ddt[t, j] + of_stepped * x[t, j, c]
                dskip[j] = dskip[j] + x[t, j, c] * dy[t, j, c]
        for t in range(length):
            of_rate = of_keep[t].value * keep[t].value
            ddt[t, j] = Number(ddt[t, j].value + of_rate * rate[j].value)
            drate[j] = Number(drate[j].value + of_rate * dt[t, j].value)
    torch.testing.assert_close(values(y), out.detach()[0])
    for found, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(values(found), wanted.reshape(found.shape))
    arguments = shapes(*given)
    assert forward.count == flops.ssd_flops(*arguments)
    assert backward.count == flops.ssd_backward_flops(shapes(out)[0], None, *arguments)


def test_ssd_without_causality():
    """The sum over all positions and its reading, together and apart, and their gradients."""
    length, k, p, n, (x, weight, _, B, C, skip) = ssd_inputs()
    given = [x, weight, B, C, skip]
    for leaf in given:
        leaf.requires_grad_()
    out, _ = ssd_non_causal_reference(*given, True)
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(out, given, grad)
    arguments = shapes(*given)
    x, weight, B, C = (numbers(value.detach())[0] for value in given[:4])
    skip, dy = numbers(given[4].detach()), numbers(grad)[0]
    y, state, of_state = zeros(length, k, p), zeros(k, n, p), zeros(k, n, p)
    grads = [zeros(*v.shape) for v in (x, weight, B, C, skip)]
    dx, dweight, dB, dC, dskip = grads
    add, read, skipped, add_back, read_back, skip_back = (Tally() for _ in range(6))
    places = list(itertools.product(range(length), range(k), range(p)))
    weighted = zeros(length, k, p)
    for t, j, c in places:
        with add:
            weighted[t, j, c] = weight[t, j] * x[t, j, c]
            for i in range(n):
                state[j, i, c] = state[j, i, c] + B[t, 0, i] * weighted[t, j, c]
    for t, j, c in places:
        with read:
            for i in range(n):
                y[t, j, c] = y[t, j, c] + C[t, 0, i] * state[j, i, c]
        with read_back:
            for i in range(n):
                dC[t, 0, i] = dC[t, 0, i] + state[j, i, c] * dy[t, j, c]
                of_state[j, i, c] = of_state[j, i, c] + C[t, 0, i] * dy[t, j, c]
        with skipped:
            y[t, j, c] = y[t, j, c] + skip[j] * x[t, j, c]
    for t, j, c in places:
        with add_back:
            again, of_weighted = weight[t, j] * x[t, j, c], Number(0)
            for i in range(n):
                of_weighted = of_weighted + B[t, 0, i] * of_state[j, i, c]
                dB[t, 0, i] = dB[t, 0, i] + again * of_state[j, i, c]
            dx[t, j, c] = of_weighted * weight[t, j]
            dweight[t, j] = dweight[t, j] + of_weighted * x[t, j, c]
        with skip_back:
            dx[t, j, c] = dx[t, j, c] + skip[j] * dy[t, j, c]
            dskip[j] = dskip[j] + x[t, j, c] * dy[t, j, c]
    torch.testing.assert_close(values(y), out.detach()[0])
    for found, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(values(found), wanted.reshape(found.shape))
    of_x, of_weight, of_b, of_c, _ = arguments
    assert add.count == flops.ssd_state_flops(of_x, of_weight, of_b)
    assert add_back.count == flops.ssd_state_backward_flops((), of_x, of_weight, of_b)
    assert read.count == flops.ssd_read_flops((1, k, n, p), of_c)
    assert read_back.count == flops.ssd_read_backward_flops(of_x, (1, k, n, p), of_c)
    assert add.count + read.count + skipped.count == flops.ssd_non_causal_flops(*arguments)
    backward = add_back.count + read_back.count + skip_back.count
    assert backward == flops.ssd_non_causal_backward_flops((), *arguments)


def test_convolutions():
    """Taps on the padding are counted, too, as PyTorch's counter does."""
    torch.manual_seed(0)
    b, length, d, k, width = 1, 4, 2, 2, 3
    x, weight = doubles(b, length, d), doubles(k, d, width)
    out = causal_conv1d_reference(x, weight, None, [0, 1], 0)
    padded, taps = numbers(F.pad(x, (0, 0, width - 1, width - 1)))[0], numbers(weight)
    y, tally = zeros(length, k, d), Tally()
    with tally:
        for t, j, c, i in itertools.product(range(length), range(k), range(d), range(width)):
            at = t + i if j == 0 else t + 2 * (width - 1) - i
            y[t, j, c] = y[t, j, c] + padded[at, c] * taps[j, c, i]
    torch.testing.assert_close(values(y), out[0])
    assert tally.count == flops.causal_conv1d_flops(*shapes(x, weight))
    both = flops.causal_conv1d_backward_flops((), *shapes(x, weight), None, [0, 1], 0, True, True, False)
    assert both == 2 * tally.count

    x, weight = doubles(1, 3, 4, d), doubles(d, 1, 3, 5)
    out = depthwise_conv2d_reference(x, weight, None, 0)
    padded, taps = numbers(F.pad(x, (0, 0, 2, 2, 1, 1)))[0], numbers(weight)
    y, tally = zeros(3, 4, d), Tally()
    with tally:
        for h, w, c, i, j in itertools.product(range(3), range(4), range(d), range(3), range(5)):
            y[h, w, c] = y[h, w, c] + padded[h + i, w + j, c] * taps[c, 0, i, j]
    torch.testing.assert_close(values(y), out[0])
    assert tally.count == flops.depthwise_conv2d_flops(*shapes(x, weight))
    only_x = flops.depthwise_conv2d_backward_flops((), *shapes(x, weight), None, 0, True, False, False)
    assert only_x == tally.count


@pytest.mark.parametrize("operator", ["depthwise_conv2d", "causal_conv1d"])
def test_convolutions_are_registered(operator):
    if operator == "depthwise_conv2d":
        x, weight = torch.randn(1, 4, 5, 6, requires_grad=True), torch.randn(6, 1, 3, 3, requires_grad=True)
        options, forward = (None, 0), 2 * x.numel() * 9
    else:
        x, weight = torch.randn(1, 5, 6, requires_grad=True), torch.randn(2, 6, 4, requires_grad=True)
        options, forward = (None, [0, 1], 1), 2 * x.numel() * 2 * 4
    with FlopCounterMode(display=False) as counter:
        getattr(torch.ops.mmvmamba, operator)(x, weight, *options).sum().backward()
    assert counter.get_total_flops() == 3 * forward


def grouped_convolution_by_loops(groups: int, transposed: bool) -> tuple[nn.Module, Tensor, int]:
    """A convolution, its input, and how many products of an input, a weight and an output gradient there are, twice."""
    make = nn.ConvTranspose2d if transposed else nn.Conv2d
    layer = make(4, 6 if groups < 4 else 4, 3, stride=2, padding=1, groups=groups, bias=False)
    x = torch.randn(2, 4, 5, 7)
    positions = x if transposed else layer(x)
    triples = 0
    for _ in itertools.product(range(len(x)), range(positions.shape[2]), range(positions.shape[3]), range(9)):
        for c, o in itertools.product(range(4), range(layer.out_channels)):
            triples += c // (4 // groups) == o // (layer.out_channels // groups)
    return layer, x, 2 * triples


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_gradients_of_grouped_convolutions(groups, transposed):
    """PyTorch's own counter counts that of the weight as often as there are groups, or exactly as here."""
    layer, x, forward = grouped_convolution_by_loops(groups, transposed)
    counts = {}
    for name, mapping in (("ours", flops.NOT_OURS), ("PyTorch's", None)):
        with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
            layer(x.requires_grad_()).sum().backward()
        counts[name] = counter.get_total_flops()
    assert counts["ours"] == 3 * forward
    assert counts["PyTorch's"] in ((2 + groups) * forward, 3 * forward)


def test_deformable_aggregation():
    """36 weighted corners per pixel and channel, and a product for each of the two gradients."""
    b, h, w, d, groups = 1, 3, 4, 32, 2
    x, offsets = torch.randn(b, h, w, d, requires_grad=True), torch.randn(b, h, w, 27 * groups, requires_grad=True)
    corners = sum(1 for _ in itertools.product(range(b * h * w), range(d), range(9), range(4)))
    for device in ("cpu", "meta"):
        leaves = [leaf.detach().to(device).requires_grad_() for leaf in (x, offsets)]
        with FlopCounterMode(display=False, custom_mapping=flops.NOT_OURS) as counter:
            deformable_aggregation(*leaves, groups).sum().backward()
        assert counter.get_total_flops() == 3 * 2 * corners


class PerEntry(TorchDispatchMode):
    """Counts what the reference does entry by entry; a product of matrices by its sums of products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("add", "mul"):
            self.count += out.numel()
        elif name == "sum":
            self.count += args[0].numel()
        elif name == "index_add":
            self.count += args[3].numel()
        elif name in ("bmm", "mm"):
            self.count += 2 * out.numel() * args[0].shape[-1]
        return out


def test_the_references_do_as_much_entry_by_entry():
    b, d, length, n = 2, 6, 7, 3
    u, A, B = doubles(b, d, length), -torch.rand(d, n), doubles(b, 2, n, length)
    scan = (u, u, A, B, B, torch.ones(d), torch.ones(d))
    with PerEntry() as mode:
        selective_scan_reference(*scan, True)
    assert mode.count == flops.selective_scan_flops(*shapes(*scan))

    h, w, k, r = 3, 5, 4, 3
    grid = (doubles(b, h, w, d), doubles(b, h, w, k, r + 2 * n), doubles(k, d, r), doubles(k, d), -torch.rand(k, d, n),
            doubles(k, d))  # fmt: skip
    with PerEntry() as mode:
        scan2d_reference(*grid, torch.arange(h * w).expand(k, -1), True)
    assert mode.count == flops.scan2d_flops(*shapes(*grid), [0] * k, None)

    x, step, decay = doubles(b, length, 4, 3), doubles(b, length, 4), -torch.rand(4)
    C, skip = doubles(b, length, 2, n), doubles(4)
    with PerEntry() as mode:
        ssd_recurrence(x, step, decay, C, C, skip, None, None, True, True)
    # The product of step and rate is one number per position and head.
    assert mode.count == flops.ssd_flops(*shapes(x, step, decay, C, C, skip)) + step.numel()
    with PerEntry() as mode:
        ssd_non_causal_reference(x, step, C, C, skip, True)
    assert mode.count == flops.ssd_non_causal_flops(*shapes(x, step, C, C, skip))
