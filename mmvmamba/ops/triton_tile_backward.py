"""Triton kernels of the gradients of the scan of maps with one state per channel; see `mmvmamba.ops.triton_tile`."""

# Arguments of kernels are pointers, numbers and compile-time constants; Triton reads no annotation but constexpr.
# ruff: noqa: ANN001, ANN201, ANN202, ARG001
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from mmvmamba.ops.triton_scan import _LARGEST, _LN2, _log2_1p, _softplus2, _unpack
from mmvmamba.ops.triton_tile import _after, _load_parameters, _load_tile, _pixels, _raw_steps, _row, _times


@triton.jit
def _before(a, e, b, q, a_earlier, e_earlier, b_earlier, q_earlier):
    """Two stretches of positions, the later one first.

    Where c comes from behind, e + a c goes on to earlier positions and q + b c is the gradient of the first state.
    """
    return a_earlier * a, a_earlier * e + e_earlier, b_earlier * a, b_earlier * e + q_earlier


@triton.jit
def _adjoint(decay, q, rows, TILE: tl.constexpr, BLOCK_D: tl.constexpr):
    """Gradients of the states from those through their own outputs, and what goes on to earlier positions.

    Flipped by hand: the reverse scan of Triton sends every value through a shuffle, a flip only renames registers.
    """
    decay, q = tl.flip(decay, 0), tl.flip(q, 0)
    one = tl.full([TILE, BLOCK_D], 1.0, tl.float32)
    _a, handed, _b, q = tl.associative_scan((decay, decay * q, one, q), 0, _before)
    return tl.flip(q, 0), _row(handed, rows == TILE - 1)


@triton.jit(
    do_not_specialize=["codes", "length", "height", "width", "segment_length", "segments"],
    do_not_specialize_on_alignment=["xs_b", "xs_k", "xs_p", "gs_b", "gs_k", "gs_p", "dxs_b", "dxs_k", "dxs_p"],
)
def tile_backward_kernel(
    x_ptr, xs_b, xs_k, xs_p, row_ptr, rs_b, rs_k, rs_p, g_ptr, gs_b, gs_k, gs_p,
    w_ptr, bias_ptr, a_ptr, d_ptr, route_ptr,
    dx_ptr, dxs_b, dxs_k, dxs_p, parts_ptr, params_ptr, carries_ptr, starts_ptr,
    codes, routes, d, length, places, height, width, chunks, blocks, segments, segment_length, batches,
    ROUTE: tl.constexpr, SHORT: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_D: tl.constexpr,
    HAS_START: tl.constexpr, RANK: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr, BLOCK_D: tl.constexpr,
    PAIR: tl.constexpr, WIDE: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Gradients of one segment, chunk after chunk and tile after tile from its end; a chunk is two tiles.

    parts (blocks, b, k, places, r + 2): gradients of features, B and C, summed over the channels of a block.
    params (b, segments, k, 3 + r, d): gradients of A, D, bias and dt_weight, summed over the segment.
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
    g_ptr += _times(batch, gs_b, PAIR, True) + _times(route, gs_k, PAIR, True)
    dx_ptr += _times(batch, dxs_b, PAIR, True) + _times(route, dxs_k, PAIR, True)
    row_ptr += batch * rs_b + route * rs_k
    route_ptr += route * length
    code = ((codes >> (2 * route)) & 3).to(tl.int32)
    chain = batch * routes + route
    parts_ptr += ((block * batches + batch) * routes + route) * places * (RANK + 2)
    rows = tl.arange(0, TILE)
    columns = tl.arange(0, PADDED)
    is_feature = (columns < RANK)[None, :]
    at = ((route * RANK + columns) * d)[None, :] + channels[:, None]
    W = tl.load(w_ptr + at, mask=is_feature & mask_d[:, None], other=0.0)
    dW = tl.zeros([BLOCK_D, PADDED], tl.float32)
    dA = tl.zeros([BLOCK_D], tl.float32)
    dD = tl.zeros([BLOCK_D], tl.float32)
    dbias = tl.zeros([BLOCK_D], tl.float32)
    carry = tl.zeros([BLOCK_D], tl.float32)
    if HAS_START:
        carry = tl.load(starts_ptr + (chain * segments + segment) * d + channels, mask=mask_d, other=0.0)
    segment_start = segment * segment_length
    end = tl.minimum(segment_start + segment_length, length)
    chunk = ((end - 1) // 32) * 32
    while chunk >= segment_start:
        first_half = tl.load(carries_ptr + (chain * chunks + chunk // 32) * d + channels, mask=mask_d, other=0.0)
        # The state in the middle of the chunk
        pixel, _place = _pixels(chunk, tl.minimum(rows, length - 1 - chunk), length, height, width, code, route_ptr,
                                ROUTE, SHORT)  # fmt: skip
        u = _load_tile(x_ptr, pixel, xs_p, channels, mask_d[None, :], PAIR, WIDE)
        row = row_ptr + _times(pixel, rs_p, 1, WIDE)
        step = _raw_steps(row, weights, bias, RANK)
        if SOFTPLUS:
            step = _softplus2(step, tl.exp2(-tl.abs(step)))
        B = tl.load(row + RANK).to(tl.float32)
        decay = tl.exp2(tl.minimum(step * A[None, :], _LARGEST, propagate_nan=tl.PropagateNan.ALL))
        injected = step * (u * (B * _LN2)[:, None])
        left = tl.where((rows == 0)[:, None], decay * first_half[None, :], 0.0)
        _decay, left, _injected = tl.associative_scan((decay, left, injected), 0, _after)
        second_half = _row(left + injected, rows == TILE - 1)
        start = chunk + ((tl.minimum(chunk + 32, end) - 1 - chunk) // TILE) * TILE
        while start >= chunk:
            # Barriers keep the compiler from starting so many loads that registers spill
            tl.debug_barrier()
            h = tl.where(start > chunk, second_half, first_half)
            last = tl.minimum(end - start, TILE) - 1
            inside = rows <= last
            mask = inside[:, None] & mask_d[None, :]
            pixel, place = _pixels(start, tl.minimum(rows, last), length, height, width, code, route_ptr, ROUTE, SHORT)
            u = _load_tile(x_ptr, pixel, xs_p, channels, mask_d[None, :], PAIR, WIDE)
            row = row_ptr + _times(pixel, rs_p, 1, WIDE)
            z = _raw_steps(row, weights, bias, RANK)
            B = tl.load(row + RANK).to(tl.float32)
            step = z
            if SOFTPLUS:
                above = _log2_1p(tl.exp2(-tl.abs(z)))
                step = tl.maximum(z, 0.0) + above
            exponent = tl.minimum(step * A[None, :], _LARGEST, propagate_nan=tl.PropagateNan.ALL)
            decay = tl.exp2(tl.where(inside[:, None], exponent, 0.0))
            delta = step * _LN2
            injected = delta * u * B[:, None]
            left = tl.where((rows == 0)[:, None], decay * h[None, :], 0.0)
            _decay, left, _injected = tl.associative_scan((decay, left, injected), 0, _after)
            tl.debug_barrier()
            dy = _load_tile(g_ptr, pixel, gs_p, channels, mask, PAIR, WIDE)
            C = tl.load(row + RANK + 1).to(tl.float32)
            part = parts_ptr + place.to(tl.int64) * (RANK + 2)
            tl.store(part + RANK + 1, tl.sum((left + injected) * dy, 1), mask=inside)
            q = C[:, None] * dy + tl.where((rows == last)[:, None], carry[None, :], 0.0)
            q, carry = _adjoint(decay, q, rows, TILE, BLOCK_D)
            tl.store(part + RANK, tl.sum(q * (delta * u), 1), mask=inside)
            grad_rate = tl.where(inside[:, None], q * left, 0.0)
            through_B = q * B[:, None]
            ddelta = grad_rate * A[None, :] + u * through_B
            if SOFTPLUS:
                ddelta *= tl.exp2(tl.minimum(z, 0.0) - above)  # the slope of softplus
            dA += tl.sum(grad_rate * delta, 0)
            dbias += tl.sum(ddelta, 0)
            dx = delta * through_B
            if HAS_D:
                dx += skip[None, :] * dy
                dD += tl.sum(dy * u, 0)
            at_map = _times(place, dxs_p, PAIR, WIDE)[:, None] + channels[None, :]
            tl.store(dx_ptr + at_map, dx.to(dx_ptr.dtype.element_ty), mask=mask)
            features = tl.load(row[:, None] + columns[None, :], mask=is_feature & inside[:, None], other=0.0)
            dW = tl.dot(tl.trans(ddelta), features.to(tl.float32), dW, input_precision="tf32x3")
            dfeatures = tl.dot(ddelta, W, input_precision="tf32x3")
            tl.store(part[:, None] + columns[None, :], dfeatures, mask=inside[:, None] & is_feature)
            start -= TILE
        chunk -= 32
    params = params_ptr + ((batch * segments + segment) * routes + route) * (RANK + 3) * d
    tl.store(params + channels, dA, mask=mask_d)
    tl.store(params + d + channels, dD, mask=mask_d)
    tl.store(params + 2 * d + channels, dbias, mask=mask_d)
    at = ((3 + columns) * d)[None, :] + channels[:, None]
    tl.store(params + at, dW, mask=mask_d[:, None] & is_feature)
