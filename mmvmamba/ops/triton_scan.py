"""Triton kernels of the scan, shared by `scan2d` and `selective_scan`.

Both operators are seen as k routes over p pixels with d channels: tensors (b, k, p, c) given by their strides. For
`scan2d` the routes share the map (stride 0) unless each has its own; for `selective_scan` a route is a group of
channels and the step sizes are read as they are (RANK 0). Channels are the lanes of one warp, and a program walks over
the positions of its segment, so the recurrence is plain register arithmetic. Logarithms have base 2: rates in units of
ln 2 need no factor.
"""

# Arguments of kernels are pointers, numbers and compile-time constants; Triton reads no annotation but constexpr.
# ruff: noqa: ANN001, ANN201, ANN202, ARG001, SIM102
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
# Largest exponent of a decay: finite, so that a decay beyond float32 times a zero state is zero.
_LARGEST = tl.constexpr(127.998)


@triton.jit
def _walk(code, length, height, width, ROUTE: tl.constexpr):
    """How a route goes on: positions in a line, pixels to the next position, and what the next line adds to that."""
    line = length
    stride = 1
    turn = 0
    if ROUTE == 1:
        sign = tl.where(code >= 2, -1, 1)
        column = code % 2 == 1
        line = tl.where(column, height, length)
        stride = sign * tl.where(column, width, 1)
        turn = sign * tl.where(column, 1 - height * width, 0)
    return line, stride, turn


@triton.jit
def _pixel(t, length, height, width, code, ROUTE: tl.constexpr):
    """Pixel of position t and its place in the line; divides, so it is for the start of a walk."""
    pixel = t
    place = t
    if ROUTE == 1:
        walked = tl.where(code >= 2, length - 1 - t, t)
        pixel = tl.where(code % 2 == 1, (walked % height) * width + walked // height, walked)
        place = tl.where(code % 2 == 1, t % height, t)
    return pixel, place


@triton.jit
def _next(pixel, place, line, stride, turn, ROUTE: tl.constexpr):
    pixel += stride
    if ROUTE == 1:
        last = place == line - 1
        pixel += tl.where(last, turn, 0)
        place = tl.where(last, 0, place + 1)
    return pixel, place


@triton.jit
def _previous(pixel, place, line, stride, turn, ROUTE: tl.constexpr):
    pixel -= stride
    if ROUTE == 1:
        first = place == 0
        pixel -= tl.where(first, turn, 0)
        place = tl.where(first, line - 1, place - 1)
    return pixel, place


@triton.jit
def _visited(walked, t, route_ptr, ROUTE: tl.constexpr):
    """Pixel to read, and where to write: a route given as a list may visit a pixel twice, so its visits have places."""
    pixel = walked.to(tl.int64)
    place = pixel
    if ROUTE == 2:
        pixel = tl.load(route_ptr + t).to(tl.int64)
        place = t.to(tl.int64)
    return pixel, place


@triton.jit
def _log2_1p(e):
    """log2(1 + e) for e in [0, 1]; the polynomial is that of csrc/cpu/vec.h."""
    p = 7.549172733e-3 * e - 4.256702587e-2
    p = p * e + 1.128561348e-1
    p = p * e - 1.971189231e-1
    p = p * e + 2.756413817e-1
    p = p * e - 3.584084809e-1
    p = p * e + 4.806928729e-1
    p = p * e - 7.213401794e-1
    p = p * e + 1.442695022
    return p * e


@triton.jit
def _softplus2(z, e):
    """log2(1 + 2^z), given e = 2^-|z|."""
    return tl.maximum(z, 0.0) + _log2_1p(e)


@triton.jit
def _decay2(step, A):
    """Exponent of the decay, saturated; NaN stays NaN."""
    return tl.minimum(step[None, :] * A, _LARGEST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _unpack(program, blocks, segments, routes, BLOCK_D: tl.constexpr):
    block = program % blocks
    rest = program // blocks
    segment = rest % segments
    rest = rest // segments
    return block, segment, rest % routes, (rest // routes).to(tl.int64)


@triton.jit
def _step_inputs(
    dt_ptr, ds_p, ds_c, pixel, W, bias, channels, mask_d, rank, RANK: tl.constexpr
):  # fmt: skip
    """Raw step size in units of ln 2 (d,) and the features (r,) that it was made of."""
    if RANK == 0:
        feature = tl.zeros([1], tl.float32)
        z = (
            tl.load(dt_ptr + pixel * ds_p + channels.to(tl.int64) * ds_c, mask=mask_d, other=0.0).to(tl.float32)
            * _LOG2E
            + bias
        )
    else:
        rows = tl.arange(0, RANK)
        feature = tl.load(dt_ptr + pixel * ds_p + rows.to(tl.int64) * ds_c, mask=rows < rank, other=0.0).to(tl.float32)
        z = tl.sum(feature[:, None] * W, axis=0) + bias
    return z, feature


@triton.jit
def _parameters(
    w_ptr, bias_ptr, a_ptr, d_ptr, route, channels, mask_d, d, n, rank,
    HAS_BIAS: tl.constexpr, HAS_D: tl.constexpr, RANK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A (n, d), D (d,), and the weights (r, d) and bias (d,) of the step size in units of ln 2."""
    lanes = route.to(tl.int64) * d + channels
    # (k, n, d) and (k, r, d): neighbouring lanes read neighbouring channels, and a lane keeps all of its rows
    first = route.to(tl.int64) * d
    states = tl.arange(0, BLOCK_N)
    A = tl.load(
        a_ptr + (first * n + channels)[None, :] + states[:, None] * d,
        mask=mask_d[None, :] & (states < n)[:, None],
        other=0.0,
    )
    skip = tl.zeros([BLOCK_D], tl.float32)
    bias = tl.zeros([BLOCK_D], tl.float32)
    if HAS_D:
        skip = tl.load(d_ptr + lanes, mask=mask_d, other=0.0)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + lanes, mask=mask_d, other=0.0) * _LOG2E
    if RANK == 0:
        W = tl.zeros([1, BLOCK_D], tl.float32)
    else:
        rows = tl.arange(0, RANK)
        inside = mask_d[None, :] & (rows < rank)[:, None]
        W = tl.load(w_ptr + (first * rank + channels)[None, :] + rows[:, None] * d, mask=inside, other=0.0) * _LOG2E
    return A, skip, W, bias


@triton.jit(do_not_specialize=["codes", "length", "height", "width", "segment_length", "segments"])
def forward_kernel(
    x_ptr, xs_b, xs_k, xs_p, xs_c, dt_ptr, ds_b, ds_k, ds_p, ds_c, b_ptr, bs_b, bs_k, bs_p, bs_c,
    c_ptr, cs_b, cs_k, cs_p, cs_c, w_ptr, bias_ptr, a_ptr, d_ptr, route_ptr,
    y_ptr, ys_b, ys_k, ys_p, ys_c, carries_ptr, starts_ptr, sums_ptr, last_ptr,
    codes, routes, d, n, rank, length, height, width, chunks, blocks, segments, segment_length,
    ROUTE: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_D: tl.constexpr, AGGREGATE: tl.constexpr,
    SEGMENTED: tl.constexpr, SAVE: tl.constexpr, HAS_LAST: tl.constexpr, RANK: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Scan one segment; AGGREGATE: only its end state from a zero start, and the sum of its exponents."""
    block, segment, route, batch = _unpack(tl.program_id(0), blocks, segments, routes, BLOCK_D)
    channels = block * BLOCK_D + tl.arange(0, BLOCK_D)
    states = tl.arange(0, BLOCK_N)
    mask_d, mask_n = channels < d, states < n
    A, skip, W, bias = _parameters(w_ptr, bias_ptr, a_ptr, d_ptr, route, channels, mask_d, d, n, rank, HAS_BIAS, HAS_D,
                                   RANK, BLOCK_N, BLOCK_D)  # fmt: skip
    x_ptr += batch * xs_b + route.to(tl.int64) * xs_k
    dt_ptr += batch * ds_b + route.to(tl.int64) * ds_k
    b_ptr += batch * bs_b + route.to(tl.int64) * bs_k
    c_ptr += batch * cs_b + route.to(tl.int64) * cs_k
    y_ptr += batch * ys_b + route.to(tl.int64) * ys_k
    route_ptr += route.to(tl.int64) * length
    code = ((codes >> (2 * route)) & 3).to(tl.int32)
    chain = batch * routes + route
    inner = states[:, None].to(tl.int64) * d + channels[None, :]
    mask = mask_n[:, None] & mask_d[None, :]
    at_segment = (chain * segments + segment) * n * d + inner
    h = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if SEGMENTED:
        if not AGGREGATE:
            h = tl.load(starts_ptr + at_segment, mask=mask, other=0.0)
    t = segment * segment_length
    end = tl.minimum(t + segment_length, length)
    line, stride, turn = _walk(code, length, height, width, ROUTE)
    walked, in_line = _pixel(t, length, height, width, code, ROUTE)
    while t < end:
        pixel, place = _visited(walked, t, route_ptr, ROUTE)
        u = tl.load(x_ptr + pixel * xs_p + channels.to(tl.int64) * xs_c, mask=mask_d, other=0.0).to(tl.float32)
        B = tl.load(b_ptr + pixel * bs_p + states.to(tl.int64) * bs_c, mask=mask_n, other=0.0).to(tl.float32)
        z, _feature = _step_inputs(dt_ptr, ds_p, ds_c, pixel, W, bias, channels, mask_d, rank, RANK)
        step = z
        if SOFTPLUS:
            step = _softplus2(z, tl.exp2(-tl.abs(z)))
        if SAVE:
            if t % 32 == 0:
                at = (chain * chunks + t // 32) * n * d + inner
                tl.store(carries_ptr + at, h, mask=mask)
        exponent = _decay2(step, A)
        h = tl.exp2(exponent) * h + (step * _LN2 * u)[None, :] * B[:, None]
        if AGGREGATE:
            total += exponent
        else:
            C = tl.load(c_ptr + pixel * cs_p + states.to(tl.int64) * cs_c, mask=mask_n, other=0.0).to(tl.float32)
            y = tl.sum(h * C[:, None], axis=0)
            if HAS_D:
                y += skip * u
            tl.store(y_ptr + place * ys_p + channels.to(tl.int64) * ys_c, y.to(y_ptr.dtype.element_ty), mask=mask_d)
        walked, in_line = _next(walked, in_line, line, stride, turn, ROUTE)
        t += 1
    if AGGREGATE:
        tl.store(starts_ptr + at_segment, h, mask=mask)
        tl.store(sums_ptr + at_segment, total, mask=mask)
    elif HAS_LAST:
        if segment == segments - 1:
            # (b, k d, n)
            at = (chain * d + channels[None, :]) * n + states[:, None]
            tl.store(last_ptr + at, h, mask=mask)


@triton.jit(do_not_specialize=["segments"])
def carry_kernel(
    starts_ptr, sums_ptr, init_ptr, d, n, count, segments,
    REVERSE: tl.constexpr, HAS_INIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Turn the segments' own end states (chain, segments, n, d) into the states they start from, in place."""
    blocks = tl.cdiv(count, BLOCK)
    chain = (tl.program_id(0) // blocks).to(tl.int64)
    at = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    h = tl.zeros([BLOCK], tl.float32)
    if HAS_INIT:
        h = tl.load(init_ptr + chain * count + (at % d) * n + at // d, mask=mask, other=0.0)
    i = 0
    while i < segments:
        segment = i
        if REVERSE:
            segment = segments - 1 - i
        place = (chain * segments + segment) * count + at
        own = tl.load(starts_ptr + place, mask=mask, other=0.0)
        total = tl.load(sums_ptr + place, mask=mask, other=0.0)
        tl.store(starts_ptr + place, h, mask=mask)
        h = tl.exp2(tl.minimum(total, _LARGEST, propagate_nan=tl.PropagateNan.ALL)) * h + own
        i += 1


@triton.jit(do_not_specialize=["pixels", "length"])
def merge_kernel(
    visits_ptr, sorted_ptr, first_ptr, out_ptr, pixels, length, routes, c, groups, blocks,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum the visits (b, routes, length, c) of every pixel, route after route: (b, pixels, groups, c).

    A group is all routes (groups 1) or one route (groups = routes).
    """
    program = tl.program_id(0).to(tl.int64)
    block = program % blocks
    group = (program // blocks) % groups
    pixel = (program // blocks // groups) % pixels
    batch = program // blocks // groups // pixels
    at = block * BLOCK + tl.arange(0, BLOCK)
    mask = at < c
    total = tl.zeros([BLOCK], tl.float32)
    route = group
    while route < routes:
        i = tl.load(first_ptr + route * (pixels + 1) + pixel)
        end = tl.load(first_ptr + route * (pixels + 1) + pixel + 1)
        while i < end:
            visit = tl.load(sorted_ptr + route * length + i)
            total += tl.load(visits_ptr + ((batch * routes + route) * length + visit) * c + at, mask=mask, other=0.0)
            i += 1
        route += groups
    place = ((batch * pixels + pixel) * groups + group) * c + at
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=mask)
