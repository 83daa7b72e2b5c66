"""Triton kernels of the causal form: a program walks over the chunks of one head and carries a tile of its state.

Every result is a sum over tiles of the state, so a state larger than one is cut over programs, whose results are added
up afterwards. Logarithms of decays are summed inside a chunk from each position on, never as differences.
"""

# Arguments of kernels are pointers, numbers and compile-time constants; Triton reads no annotation but constexpr.
# ruff: noqa: ANN001, ANN201, ANN202, SIM102
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from mmvmamba.ops.ssd.triton_products import group_of, load_tile, product, store_tile


@triton.jit
def _decays(rate, CHUNK: tl.constexpr):
    """How much of position s is left at t (t, s), of the state before the chunk at t, and of s after the chunk."""
    later = tl.arange(0, CHUNK)[:, None]
    earlier = tl.arange(0, CHUNK)[None, :]
    summed = tl.cumsum(tl.where(later > earlier, rate[:, None], 0.0), 0)
    within = tl.where(later >= earlier, tl.exp(summed), 0.0)
    from_start = tl.exp(tl.cumsum(rate, 0))
    return within, from_start, _to_end(rate, CHUNK), tl.exp(tl.sum(rate, 0))


@triton.jit
def _to_end(rate, CHUNK: tl.constexpr):
    """How much of every position is left after the chunk."""
    after = tl.arange(0, CHUNK)[:, None] > tl.arange(0, CHUNK)[None, :]
    return tl.exp(tl.sum(tl.where(after, rate[:, None], 0.0), 0))


@triton.jit
def _next_state(
    state, x_ptr, xs_l, xs_p, b_ptr, bs_l, bs_n, step_ptr, rate_ptr, first_row, heads,
    rows, length, states, n, columns, p, CHUNK: tl.constexpr,
):  # fmt: skip
    """The state after a chunk from that before it."""
    at_row = first_row + rows.to(tl.int64) * heads
    step = tl.load(step_ptr + at_row, mask=rows < length, other=0.0)
    rate = tl.load(rate_ptr + at_row, mask=rows < length, other=0.0)
    inputs = load_tile(x_ptr, rows, xs_l, length, columns, xs_p, p).to(tl.float32) * step[:, None]
    B = load_tile(b_ptr, rows, bs_l, length, states, bs_n, n).to(tl.float32) * _to_end(rate, CHUNK)[:, None]
    return product(tl.trans(B), inputs, state * tl.exp(tl.sum(rate, 0)))


@triton.jit
def _place(heads, blocks_n, blocks_p):
    """Head, batch entry, tile of states and tile of channels of a program."""
    program = tl.program_id(0)
    head = (program % heads).to(tl.int64)
    program = program // heads
    block_p = program % blocks_p
    program = program // blocks_p
    return head, (program // blocks_n).to(tl.int64), program % blocks_n, block_p


@triton.jit
def chunk_forward_kernel(
    x_ptr, xs_b, xs_l, xs_k, xs_p, b_ptr, bs_b, bs_l, bs_g, bs_n, c_ptr, cs_b, cs_l, cs_g, cs_n,
    step_ptr, rate_ptr, skip_ptr, start_ptr, y_ptr, last_ptr, carries_ptr,
    batches, length, heads, groups, n, p, blocks_n, blocks_p, chunks,
    HAS_SKIP: tl.constexpr, HAS_START: tl.constexpr, SAVE: tl.constexpr, BLOCKED: tl.constexpr, CHUNK: tl.constexpr,
    SAVED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Outputs (a part per tile of states), the last state, and the state before every SAVED chunks."""
    head, batch, block_n, block_p = _place(heads, blocks_n, blocks_p)
    group = group_of(head, heads, groups, BLOCKED)
    states = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = block_p * BLOCK_P + tl.arange(0, BLOCK_P)
    x_ptr += batch * xs_b + head * xs_k
    b_ptr += batch * bs_b + group * bs_g
    c_ptr += batch * cs_b + group * cs_g
    y_ptr += ((block_n.to(tl.int64) * batches + batch) * length * heads + head) * p
    at_head = batch * heads + head
    state = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
    if HAS_START:
        state = load_tile(start_ptr + at_head * n * p, states, p, n, columns, 1, p).to(tl.float32)
    chunk = 0
    while chunk < chunks:
        rows = chunk * CHUNK + tl.arange(0, CHUNK)
        at_row = (batch * length + rows) * heads + head
        step = tl.load(step_ptr + at_row, mask=rows < length, other=0.0)
        rate = tl.load(rate_ptr + at_row, mask=rows < length, other=0.0)
        if SAVE:
            if chunk % SAVED == 0:
                at = carries_ptr + ((batch * ((chunks + SAVED - 1) // SAVED) + chunk // SAVED) * heads + head) * n * p
                store_tile(at, state, states, p, n, columns, p)
        within, from_start, to_end, keep = _decays(rate, CHUNK)
        x = load_tile(x_ptr, rows, xs_l, length, columns, xs_p, p).to(tl.float32)
        inputs = x * step[:, None]
        C = load_tile(c_ptr, rows, cs_l, length, states, cs_n, n).to(tl.float32)
        B = load_tile(b_ptr, rows, bs_l, length, states, bs_n, n).to(tl.float32)
        y = product(C * from_start[:, None], state, tl.zeros([CHUNK, BLOCK_P], tl.float32))
        scores = product(C, tl.trans(B), tl.zeros([CHUNK, CHUNK], tl.float32))
        y = product(scores * within, inputs, y)
        state = product(tl.trans(B * to_end[:, None]), inputs, state * keep)
        if HAS_SKIP:
            y += tl.where(block_n == 0, tl.load(skip_ptr + head), 0.0) * x
        store_tile(y_ptr, y, rows, heads * p, length, columns, p)
        chunk += 1
    store_tile(last_ptr + at_head * n * p, state, states, p, n, columns, p)


@triton.jit
def _passed(pairs, read, written, CHUNK: tl.constexpr):
    """Sum what passes position u: pairs (t, s) with s < u <= t, states read at t >= u, states written at s < u."""
    later = tl.arange(0, CHUNK)[:, None]
    at = tl.arange(0, CHUNK)[None, :]
    ahead = tl.cumsum(pairs, 1) - pairs
    return tl.sum(tl.where(later >= at, ahead + read[:, None], written[:, None]), 0)


@triton.jit
def chunk_backward_kernel(
    x_ptr, xs_b, xs_l, xs_k, xs_p, b_ptr, bs_b, bs_l, bs_g, bs_n, c_ptr, cs_b, cs_l, cs_g, cs_n,
    dy_ptr, ds_b, ds_l, ds_k, ds_p, step_ptr, rate_ptr, skip_ptr, dlast_ptr, carries_ptr,
    dx_ptr, db_ptr, dc_ptr, rows_ptr, dstart_ptr,
    batches, length, heads, groups, n, p, blocks_n, blocks_p, chunks,
    HAS_SKIP: tl.constexpr, HAS_LAST: tl.constexpr, BLOCKED: tl.constexpr, CHUNK: tl.constexpr,
    SAVED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Gradients, chunk by chunk from the last; rows hold those of the rates, of the steps, and the products dy x."""
    head, batch, block_n, block_p = _place(heads, blocks_n, blocks_p)
    group = group_of(head, heads, groups, BLOCKED)
    states = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = block_p * BLOCK_P + tl.arange(0, BLOCK_P)
    x_ptr += batch * xs_b + head * xs_k
    dy_ptr += batch * ds_b + head * ds_k
    b_ptr += batch * bs_b + group * bs_g
    c_ptr += batch * cs_b + group * cs_g
    dx_ptr += ((block_n.to(tl.int64) * batches + batch) * length * heads + head) * p
    at_projection = ((block_p.to(tl.int64) * batches + batch) * length * heads + head) * n
    part = (block_n * blocks_p + block_p).to(tl.int64)
    parts = blocks_n * blocks_p
    at_head = batch * heads + head
    after = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
    if HAS_LAST:
        after = load_tile(dlast_ptr + at_head * n * p, states, p, n, columns, 1, p).to(tl.float32)
    chunk = chunks - 1
    while chunk >= 0:
        rows = chunk * CHUNK + tl.arange(0, CHUNK)
        at_row = (batch * length + rows) * heads + head
        step = tl.load(step_ptr + at_row, mask=rows < length, other=0.0)
        rate = tl.load(rate_ptr + at_row, mask=rows < length, other=0.0)
        within, from_start, to_end, keep = _decays(rate, CHUNK)
        at = carries_ptr + ((batch * ((chunks + SAVED - 1) // SAVED) + chunk // SAVED) * heads + head) * n * p
        before = load_tile(at, states, p, n, columns, 1, p).to(tl.float32)
        passed = chunk - chunk % SAVED
        while passed < chunk:
            before = _next_state(
                before, x_ptr, xs_l, xs_p, b_ptr, bs_l, bs_n, step_ptr, rate_ptr, batch * length * heads + head, heads,
                passed * CHUNK + tl.arange(0, CHUNK), length, states, n, columns, p, CHUNK,
            )  # fmt: skip
            passed += 1
        x = load_tile(x_ptr, rows, xs_l, length, columns, xs_p, p).to(tl.float32)
        dy = load_tile(dy_ptr, rows, ds_l, length, columns, ds_p, p).to(tl.float32)
        C = load_tile(c_ptr, rows, cs_l, length, states, cs_n, n).to(tl.float32)
        B = load_tile(b_ptr, rows, bs_l, length, states, bs_n, n).to(tl.float32)
        inputs = x * step[:, None]
        none = tl.zeros([CHUNK, BLOCK_N], tl.float32)
        read = product(dy, tl.trans(before), none) * from_start[:, None]
        written = product(inputs, tl.trans(after), none) * to_end[:, None]
        square = tl.zeros([CHUNK, CHUNK], tl.float32)
        scores = product(C, tl.trans(B), square)
        dscores = product(dy, tl.trans(inputs), square) * within
        drate = _passed(dscores * scores, tl.sum(C * read, 1), tl.sum(B * written, 1), CHUNK)
        drate += tl.sum(tl.sum(after * before, 1), 0) * keep
        store_tile(dc_ptr + at_projection, product(dscores, B, read), rows, heads * n, length, states, n)
        store_tile(db_ptr + at_projection, product(tl.trans(dscores), C, written), rows, heads * n, length, states, n)
        dinputs = product(B * to_end[:, None], after, tl.zeros([CHUNK, BLOCK_P], tl.float32))
        dinputs = product(tl.trans(scores * within), dy, dinputs)
        dx = dinputs * step[:, None]
        if HAS_SKIP:
            dx += tl.where(block_n == 0, tl.load(skip_ptr + head), 0.0) * dy
        store_tile(dx_ptr, dx, rows, heads * p, length, columns, p)
        at_part = rows_ptr + part * batches * length * heads + at_row
        tl.store(at_part, drate, mask=rows < length)
        at_part += parts.to(tl.int64) * batches * length * heads
        tl.store(at_part, tl.sum(dinputs * x, 1), mask=rows < length)
        at_part += parts.to(tl.int64) * batches * length * heads
        tl.store(at_part, tl.where(block_n == 0, tl.sum(dy * x, 1), 0.0), mask=rows < length)
        after = product(tl.trans(C * from_start[:, None]), dy, after * keep)
        chunk -= 1
    store_tile(dstart_ptr + at_head * n * p, after, states, p, n, columns, p)
