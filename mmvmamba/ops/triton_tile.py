"""Triton kernels of the scan of maps with one state per channel: a warp works on tiles of positions times channels.

All loads of a tile are under way together, which hides their latency. Compilers keep the rows of a tile in registers
of one lane, so a scan over rows is plain arithmetic (scripts/check_triton.py prints the instructions).
A row of the projections holds the features of the step size, then B, then C. Logarithms have base 2.
"""

# Arguments of kernels are pointers, numbers and compile-time constants; Triton reads no annotation but constexpr.
# ruff: noqa: ANN001, ANN201, ANN202, RUF005, SIM102
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

from mmvmamba.ops.triton_scan import _LARGEST, _LN2, _LOG2E, _pixel, _softplus2, _unpack, _walk


@triton.jit
def _after(a, left, last, a_next, left_next, last_next):
    """Two stretches of positions, one after the other: decay, what is left of earlier inputs, last input."""
    return a * a_next, a_next * (left + last) + left_next, last_next


@triton.jit
def _marked(mark, value, mark_next, value_next):
    return mark | mark_next, tl.where(mark, value, value_next)


@triton.jit
def _row(tile, is_row):
    """The marked row of a tile; which row a register holds is known to the compiler, so nothing is computed."""
    return tl.reduce((tl.broadcast_to(is_row[:, None], tile.shape), tile), 0, _marked)[1]


@triton.jit
def _pixels(start, rows, length, height, width, code, route_ptr, ROUTE: tl.constexpr, SHORT: tl.constexpr):
    """Pixels of the positions start + rows, and where their results go."""
    t = start + rows
    pixel = t
    place = t
    if ROUTE == 1:
        if SHORT:  # lines shorter than a tile, which may end several times in one
            pixel, _in_line = _pixel(t, length, height, width, code, ROUTE)
        else:
            line, stride, turn = _walk(code, length, height, width, ROUTE)
            first, in_line = _pixel(start, length, height, width, code, ROUTE)
            pixel = first + rows * stride + tl.where(in_line + rows >= line, turn, 0)
        place = pixel
    if ROUTE == 2:
        pixel = tl.load(route_ptr + t).to(tl.int32)
    return pixel, place


@triton.jit
def _times(index, stride, PAIR: tl.constexpr, WIDE: tl.constexpr):
    """Offsets; the compiler learns that a stride is a multiple of PAIR and nothing more, which settles the layout."""
    if WIDE:
        index = index.to(tl.int64)
    return index * ((stride // PAIR) * PAIR)


@triton.jit
def _load_tile(ptr, index, stride, channels, mask, PAIR: tl.constexpr, WIDE: tl.constexpr):
    at = _times(index, stride, PAIR, WIDE)[:, None] + channels[None, :]
    return tl.load(ptr + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_parameters(
    w_ptr, bias_ptr, a_ptr, d_ptr, route, channels, mask_d, d,
    HAS_BIAS: tl.constexpr, HAS_D: tl.constexpr, RANK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A, D, and the bias and the weights of the features in units of ln 2, each (d,)."""
    lanes = route * d + channels
    A = tl.load(a_ptr + lanes, mask=mask_d, other=0.0)
    bias = tl.zeros([BLOCK_D], tl.float32)
    skip = tl.zeros([BLOCK_D], tl.float32)
    if HAS_D:
        skip = tl.load(d_ptr + lanes, mask=mask_d, other=0.0)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + lanes, mask=mask_d, other=0.0) * _LOG2E
    weights = ()
    for i in tl.static_range(RANK):
        weights = weights + (tl.load(w_ptr + (route * RANK + i) * d + channels, mask=mask_d, other=0.0) * _LOG2E,)
    return A, skip, bias, weights


@triton.jit
def _raw_steps(row_ptr, weights, bias, RANK: tl.constexpr):
    """Step sizes before softplus, in units of ln 2 (positions, channels)."""
    z = tl.load(row_ptr).to(tl.float32)[:, None] * weights[0][None, :] + bias[None, :]
    for i in tl.static_range(1, RANK):
        z += tl.load(row_ptr + i).to(tl.float32)[:, None] * weights[i][None, :]
    return z


@triton.jit(
    do_not_specialize=["codes", "length", "height", "width", "segment_length", "segments"],
    do_not_specialize_on_alignment=["xs_b", "xs_k", "xs_p", "ys_b", "ys_k", "ys_p"],
)
def tile_forward_kernel(
    x_ptr, xs_b, xs_k, xs_p, row_ptr, rs_b, rs_k, rs_p, w_ptr, bias_ptr, a_ptr, d_ptr, route_ptr,
    y_ptr, ys_b, ys_k, ys_p, carries_ptr, starts_ptr, sums_ptr,
    codes, routes, d, length, height, width, chunks, blocks, segments, segment_length,
    ROUTE: tl.constexpr, SHORT: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_D: tl.constexpr,
    AGGREGATE: tl.constexpr, SEGMENTED: tl.constexpr, SAVE: tl.constexpr, RANK: tl.constexpr, TILE: tl.constexpr,
    BLOCK_D: tl.constexpr, PAIR: tl.constexpr, WIDE: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Scan one segment; AGGREGATE: only its end state from a zero start, and the sum of its exponents.

    Beyond the end of the sequence the last position is repeated: nobody reads the state after it.
    """
    block, segment, route, batch = _unpack(tl.program_id(0), blocks, segments, routes, BLOCK_D)
    route = route.to(tl.int64)
    channels = block * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = channels < d
    if FULL:
        mask_d = channels >= 0
    A, skip, bias, weights = _load_parameters(w_ptr, bias_ptr, a_ptr, d_ptr, route, channels, mask_d, d,
                                              HAS_BIAS, HAS_D, RANK, BLOCK_D)  # fmt: skip
    x_ptr += _times(batch, xs_b, PAIR, True) + _times(route, xs_k, PAIR, True)
    y_ptr += _times(batch, ys_b, PAIR, True) + _times(route, ys_k, PAIR, True)
    row_ptr += batch * rs_b + route * rs_k
    route_ptr += route * length
    code = ((codes >> (2 * route)) & 3).to(tl.int32)
    chain = batch * routes + route
    at_segment = (chain * segments + segment) * d + channels
    rows = tl.arange(0, TILE)
    h = tl.zeros([BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_D], tl.float32)
    if SEGMENTED and not AGGREGATE:
        h = tl.load(starts_ptr + at_segment, mask=mask_d, other=0.0)
    start = segment * segment_length
    end = tl.minimum(start + segment_length, length)
    while start < end:
        last = end - start - 1
        pixel, place = _pixels(start, tl.minimum(rows, last), length, height, width, code, route_ptr, ROUTE, SHORT)
        u = _load_tile(x_ptr, pixel, xs_p, channels, mask_d[None, :], PAIR, WIDE)
        row = row_ptr + _times(pixel, rs_p, 1, WIDE)
        step = _raw_steps(row, weights, bias, RANK)
        if SOFTPLUS:
            step = _softplus2(step, tl.exp2(-tl.abs(step)))
        B = tl.load(row + RANK).to(tl.float32)
        if SAVE:
            if start % 32 == 0:
                tl.store(carries_ptr + (chain * chunks + start // 32) * d + channels, h, mask=mask_d)
        exponent = tl.minimum(step * A[None, :], _LARGEST, propagate_nan=tl.PropagateNan.ALL)
        decay = tl.exp2(exponent)
        injected = step * (u * (B * _LN2)[:, None])
        left = tl.where((rows == 0)[:, None], decay * h[None, :], 0.0)
        _decay, left, _injected = tl.associative_scan((decay, left, injected), 0, _after)
        state = left + injected
        h = _row(state, rows == TILE - 1)
        if AGGREGATE:
            total += tl.sum(exponent, 0)
        else:
            y = state * tl.load(row + RANK + 1).to(tl.float32)[:, None]
            if HAS_D:
                y += skip[None, :] * u
            at = _times(place, ys_p, PAIR, WIDE)[:, None] + channels[None, :]
            tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=(rows <= last)[:, None] & mask_d[None, :])
        start += TILE
    if AGGREGATE:
        tl.store(starts_ptr + at_segment, h, mask=mask_d)
        tl.store(sums_ptr + at_segment, total, mask=mask_d)
