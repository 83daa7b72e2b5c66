"""Triton kernels of the scan's gradients; see `mmvmamba.ops.triton_scan` for the layout."""

# Arguments of kernels are pointers, numbers and compile-time constants; Triton reads no annotation but constexpr.
# ruff: noqa: ANN001, ANN201
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from mmvmamba.ops.triton_scan import (
    _decay2,
    _next,
    _parameters,
    _pixel,
    _previous,
    _softplus2,
    _step_inputs,
    _unpack,
    _visited,
    _walk,
)

_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=["codes", "length", "height", "width", "segment_length", "segments"])
def adjoint_kernel(
    g_ptr, gs_b, gs_k, gs_p, gs_c, dt_ptr, ds_b, ds_k, ds_p, ds_c, c_ptr, cs_b, cs_k, cs_p, cs_c,
    w_ptr, bias_ptr, a_ptr, route_ptr, starts_ptr, sums_ptr,
    codes, routes, d, n, rank, length, height, width, blocks, segments, segment_length,
    ROUTE: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr, RANK: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What a segment hands to the one before it if nothing comes from behind, and the sum of its exponents."""
    block, segment, route, batch = _unpack(tl.program_id(0), blocks, segments, routes, BLOCK_D)
    channels = block * BLOCK_D + tl.arange(0, BLOCK_D)
    states = tl.arange(0, BLOCK_N)
    mask_d, mask_n = channels < d, states < n
    A, _skip, W, bias = _parameters(w_ptr, bias_ptr, a_ptr, a_ptr, route, channels, mask_d, d, n, rank, HAS_BIAS, False,
                                    RANK, BLOCK_N, BLOCK_D)  # fmt: skip
    g_ptr += batch * gs_b + route.to(tl.int64) * gs_k
    dt_ptr += batch * ds_b + route.to(tl.int64) * ds_k
    c_ptr += batch * cs_b + route.to(tl.int64) * cs_k
    route_ptr += route.to(tl.int64) * length
    code = ((codes >> (2 * route)) & 3).to(tl.int32)
    carry = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    start = segment * segment_length
    t = tl.minimum(start + segment_length, length) - 1
    line, stride, turn = _walk(code, length, height, width, ROUTE)
    walked, in_line = _pixel(t, length, height, width, code, ROUTE)
    while t >= start:
        pixel, _place = _visited(walked, t, route_ptr, ROUTE)
        dy = tl.load(g_ptr + pixel * gs_p + channels.to(tl.int64) * gs_c, mask=mask_d, other=0.0).to(tl.float32)
        C = tl.load(c_ptr + pixel * cs_p + states.to(tl.int64) * cs_c, mask=mask_n, other=0.0).to(tl.float32)
        z, _feature = _step_inputs(dt_ptr, ds_p, ds_c, pixel, W, bias, channels, mask_d, rank, RANK)
        step = z
        if SOFTPLUS:
            step = _softplus2(z, tl.exp2(-tl.abs(z)))
        exponent = _decay2(step, A)
        carry = tl.exp2(exponent) * (C[:, None] * dy[None, :] + carry)
        total += exponent
        walked, in_line = _previous(walked, in_line, line, stride, turn, ROUTE)
        t -= 1
    inner = states[:, None].to(tl.int64) * d + channels[None, :]
    place = ((batch * routes + route) * segments + segment) * n * d + inner
    mask = mask_n[:, None] & mask_d[None, :]
    tl.store(starts_ptr + place, carry, mask=mask)
    tl.store(sums_ptr + place, total, mask=mask)


@triton.jit(do_not_specialize=["codes", "length", "height", "width", "segment_length", "segments"])
def backward_kernel(
    x_ptr, xs_b, xs_k, xs_p, xs_c, dt_ptr, ds_b, ds_k, ds_p, ds_c, b_ptr, bs_b, bs_k, bs_p, bs_c,
    c_ptr, cs_b, cs_k, cs_p, cs_c, g_ptr, gs_b, gs_k, gs_p, gs_c, w_ptr, bias_ptr, a_ptr, d_ptr, route_ptr,
    dx_ptr, dxs_b, dxs_k, dxs_p, dxs_c, ddt_ptr, dds_b, dds_k, dds_p, dds_c,
    parts_ptr, params_ptr, carries_ptr, starts_ptr, scratch_ptr,
    codes, routes, d, n, rank, length, places, height, width, chunks, blocks, segments, segment_length, batches,
    ROUTE: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_D: tl.constexpr, HAS_START: tl.constexpr,
    RANK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradients of one segment, chunk after chunk from its end.

    parts (blocks, b, k, places, r + 2 n): gradients of features, B and C, summed over the channels of a block.
    params (b, segments, k, n + 2 + r, d): gradients of A, D, bias and dt_weight, summed over the segment.
    """
    program = tl.program_id(0)
    block, segment, route, batch = _unpack(program, blocks, segments, routes, BLOCK_D)
    channels = block * BLOCK_D + tl.arange(0, BLOCK_D)
    states = tl.arange(0, BLOCK_N)
    mask_d, mask_n = channels < d, states < n
    mask = mask_n[:, None] & mask_d[None, :]
    A, skip, W, bias = _parameters(w_ptr, bias_ptr, a_ptr, d_ptr, route, channels, mask_d, d, n, rank, HAS_BIAS, HAS_D,
                                   RANK, BLOCK_N, BLOCK_D)  # fmt: skip
    x_ptr += batch * xs_b + route.to(tl.int64) * xs_k
    dt_ptr += batch * ds_b + route.to(tl.int64) * ds_k
    b_ptr += batch * bs_b + route.to(tl.int64) * bs_k
    c_ptr += batch * cs_b + route.to(tl.int64) * cs_k
    g_ptr += batch * gs_b + route.to(tl.int64) * gs_k
    dx_ptr += batch * dxs_b + route.to(tl.int64) * dxs_k
    ddt_ptr += batch * dds_b + route.to(tl.int64) * dds_k
    route_ptr += route.to(tl.int64) * length
    code = ((codes >> (2 * route)) & 3).to(tl.int32)
    chain = batch * routes + route
    width_of_part = 2 * n
    if RANK > 0:
        width_of_part = 2 * n + rank
    parts_ptr += ((block * batches + batch) * routes + route) * places * width_of_part
    inner = states[:, None].to(tl.int64) * d + channels[None, :]
    # h before every position of a chunk
    scratch = scratch_ptr + program.to(tl.int64) * 32 * BLOCK_N * BLOCK_D
    scratch_at = states[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    carry = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if HAS_START:
        carry = tl.load(starts_ptr + (chain * segments + segment) * n * d + inner, mask=mask, other=0.0)
    dA = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dD = tl.zeros([BLOCK_D], tl.float32)
    dbias = tl.zeros([BLOCK_D], tl.float32)
    dW = tl.zeros_like(W)
    segment_start = segment * segment_length
    end = tl.minimum(segment_start + segment_length, length)
    chunk_start = ((end - 1) // 32) * 32
    line, stride, turn = _walk(code, length, height, width, ROUTE)
    while chunk_start >= segment_start:
        h = tl.load(carries_ptr + (chain * chunks + chunk_start // 32) * n * d + inner, mask=mask, other=0.0)
        t = chunk_start
        walked, in_line = _pixel(t, length, height, width, code, ROUTE)
        while t < end:
            tl.store(scratch + (t - chunk_start) * BLOCK_N * BLOCK_D + scratch_at, h)
            pixel, place = _visited(walked, t, route_ptr, ROUTE)
            u = tl.load(x_ptr + pixel * xs_p + channels.to(tl.int64) * xs_c, mask=mask_d, other=0.0).to(tl.float32)
            B = tl.load(b_ptr + pixel * bs_p + states.to(tl.int64) * bs_c, mask=mask_n, other=0.0).to(tl.float32)
            z, _feature = _step_inputs(dt_ptr, ds_p, ds_c, pixel, W, bias, channels, mask_d, rank, RANK)
            step = z
            if SOFTPLUS:
                step = _softplus2(z, tl.exp2(-tl.abs(z)))
            h = tl.exp2(_decay2(step, A)) * h + (step * _LN2 * u)[None, :] * B[:, None]
            walked, in_line = _next(walked, in_line, line, stride, turn, ROUTE)
            t += 1
        tl.debug_barrier()
        t = end - 1
        walked, in_line = _pixel(t, length, height, width, code, ROUTE)
        while t >= chunk_start:
            before = tl.load(scratch + (t - chunk_start) * BLOCK_N * BLOCK_D + scratch_at)
            pixel, place = _visited(walked, t, route_ptr, ROUTE)
            u = tl.load(x_ptr + pixel * xs_p + channels.to(tl.int64) * xs_c, mask=mask_d, other=0.0).to(tl.float32)
            dy = tl.load(g_ptr + pixel * gs_p + channels.to(tl.int64) * gs_c, mask=mask_d, other=0.0).to(tl.float32)
            B = tl.load(b_ptr + pixel * bs_p + states.to(tl.int64) * bs_c, mask=mask_n, other=0.0).to(tl.float32)
            C = tl.load(c_ptr + pixel * cs_p + states.to(tl.int64) * cs_c, mask=mask_n, other=0.0).to(tl.float32)
            z, feature = _step_inputs(dt_ptr, ds_p, ds_c, pixel, W, bias, channels, mask_d, rank, RANK)
            step = z
            slope = tl.full([BLOCK_D], 1.0, tl.float32)
            if SOFTPLUS:
                e = tl.exp2(-tl.abs(z))
                step = _softplus2(z, e)
                slope = tl.where(z < 0, e, 1.0) / (1.0 + e)
            decay = tl.exp2(_decay2(step, A))
            delta = step * _LN2
            du_injected = delta * u
            decayed = decay * before
            h = decayed + du_injected[None, :] * B[:, None]
            q = C[:, None] * dy[None, :] + carry
            carry = decay * q
            grad_rate = q * decayed
            through_B = tl.sum(q * B[:, None], axis=0)
            ddelta = (tl.sum(grad_rate * A, axis=0) + u * through_B) * slope
            dA += grad_rate * delta[None, :]
            dbias += ddelta
            dx = delta * through_B
            if HAS_D:
                dx += skip * dy
                dD += dy * u
            tl.store(
                dx_ptr + place * dxs_p + channels.to(tl.int64) * dxs_c, dx.to(dx_ptr.dtype.element_ty), mask=mask_d
            )
            part = parts_ptr + place * width_of_part
            if RANK == 0:
                at = ddt_ptr + place * dds_p + channels.to(tl.int64) * dds_c
                tl.store(at, ddelta.to(ddt_ptr.dtype.element_ty), mask=mask_d)
            else:
                rows = tl.arange(0, RANK)
                dW += ddelta[None, :] * feature[:, None]
                tl.store(part + rows, tl.sum(ddelta[None, :] * W, axis=1) * _LN2, mask=rows < rank)
                part += rank
            tl.store(part + states, tl.sum(q * du_injected[None, :], axis=1), mask=mask_n)
            tl.store(part + n + states, tl.sum(h * dy[None, :], axis=1), mask=mask_n)
            walked, in_line = _previous(walked, in_line, line, stride, turn, ROUTE)
            t -= 1
        tl.debug_barrier()
        end = chunk_start
        chunk_start -= 32
    rows_of_params = n + 2
    if RANK > 0:
        rows_of_params = n + 2 + rank
    params = params_ptr + ((batch * segments + segment) * routes + route) * rows_of_params * d
    tl.store(params + inner, dA, mask=mask)
    tl.store(params + n * d + channels, dD, mask=mask_d)
    tl.store(params + (n + 1) * d + channels, dbias, mask=mask_d)
    if RANK > 0:
        rows = tl.arange(0, RANK)
        inside = mask_d[None, :] & (rows < rank)[:, None]
        tl.store(params + (n + 2 + rows)[:, None].to(tl.int64) * d + channels[None, :], dW, mask=inside)
