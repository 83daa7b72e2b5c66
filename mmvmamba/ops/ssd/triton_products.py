"""Triton kernels of the non-causal form: sums over positions, reads of a state, and the gradients of projections.

Tensors are given by their strides, so slices of a wider projection are read in place. Sums are float32: products of
16-bit values are exact, all others take three passes of tf32 over values cut in two, never one alone.
Loops have lengths known at compile time, which lets the compiler fetch the next tile during a product.
"""

# Arguments of kernels are pointers, numbers and compile-time constants; Triton reads no annotation but constexpr.
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def group_of(head, heads, groups, BLOCKED: tl.constexpr):
    """The group of projections a head uses."""
    group = head % groups
    if BLOCKED:
        group = head // (heads // groups)
    return group


@triton.jit
def _head_of(group, i, heads, groups, BLOCKED: tl.constexpr):
    """The i-th head of a group."""
    head = i * groups + group
    if BLOCKED:
        head = group * (heads // groups) + i
    return head


@triton.jit
def load_tile(ptr, rows, row_stride, row_end, columns, column_stride, column_end):
    """A tile (rows, columns) in its own dtype, zero beyond the ends."""
    at = rows.to(tl.int64)[:, None] * row_stride + columns.to(tl.int64)[None, :] * column_stride
    return tl.load(ptr + at, mask=(rows < row_end)[:, None] & (columns < column_end)[None, :], other=0.0)


@triton.jit
def store_tile(ptr, value, rows, row_stride, row_end, columns, column_end):
    """Store a tile (rows, columns) with contiguous columns."""
    at = rows.to(tl.int64)[:, None] * row_stride + columns[None, :]
    mask = (rows < row_end)[:, None] & (columns < column_end)[None, :]
    tl.store(ptr + at, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def product(a, b, acc):
    """Add a b to acc in float32, whatever the factors are."""
    return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="tf32x3")


@triton.jit
def state_kernel(
    x_ptr, xs_b, xs_l, xs_k, xs_p, w_ptr, ws_b, ws_l, ws_k, b_ptr, bs_b, bs_l, bs_g, bs_n, out_ptr,
    batches, length, heads, groups, n, p, blocks_n, blocks_p, segments,
    WEIGHTED: tl.constexpr, BLOCKED: tl.constexpr, EXACT: tl.constexpr, STEPS: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Sum over the positions of a segment: projections (positions, n) turned, times weighted rows (positions, p).

    EXACT: both are 16-bit values of one dtype, whose products float32 holds.
    """
    program = tl.program_id(0)
    head = program % heads
    program = program // heads
    columns = (program % blocks_p) * BLOCK_P + tl.arange(0, BLOCK_P)
    program = program // blocks_p
    states = (program % blocks_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    program = program // blocks_n
    segment = program % segments
    batch = (program // segments).to(tl.int64)
    group = group_of(head, heads, groups, BLOCKED)
    x_ptr += batch * xs_b + head.to(tl.int64) * xs_k
    w_ptr += batch * ws_b + head.to(tl.int64) * ws_k
    b_ptr += batch * bs_b + group.to(tl.int64) * bs_g
    total = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
    for i in range(STEPS):
        rows = (segment * STEPS + i) * BLOCK_L + tl.arange(0, BLOCK_L)
        value = load_tile(x_ptr, rows, xs_l, length, columns, xs_p, p)
        if WEIGHTED:
            weight = tl.load(w_ptr + rows.to(tl.int64) * ws_l, mask=rows < length, other=0.0)
            value = value.to(tl.float32) * weight.to(tl.float32)[:, None]
        projection = load_tile(b_ptr, rows, bs_l, length, states, bs_n, n)
        if EXACT:
            total = tl.dot(tl.trans(projection), value, total)
        else:
            total = product(tl.trans(projection), value, total)
    out_ptr += ((segment * batches + batch) * heads + head) * n * p
    store_tile(out_ptr, total, states, p, n, columns, p)


@triton.jit
def _read(
    c_ptr, cs_l, cs_n, s_ptr, ss_n, ss_p, rows, length, columns, n, p,
    STEPS_N: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Projections (rows, n) times a state (n, columns)."""
    total = tl.zeros([BLOCK_L, BLOCK_P], tl.float32)
    for i in range(STEPS_N):
        states = i * BLOCK_N + tl.arange(0, BLOCK_N)
        projection = load_tile(c_ptr, rows, cs_l, length, states, cs_n, n)
        total = product(projection, load_tile(s_ptr, states, ss_n, n, columns, ss_p, p), total)
    return total


@triton.jit
def read_kernel(
    c_ptr, cs_b, cs_l, cs_g, cs_n, s_ptr, ss_b, ss_k, ss_n, ss_p, x_ptr, xs_b, xs_l, xs_k, xs_p, skip_ptr, y_ptr,
    length, heads, groups, n, p, blocks_l, blocks_p,
    HAS_SKIP: tl.constexpr, BLOCKED: tl.constexpr, STEPS_N: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Read a state at the positions of a block, and add the skip."""
    program = tl.program_id(0)
    head = program % heads
    program = program // heads
    columns = (program % blocks_p) * BLOCK_P + tl.arange(0, BLOCK_P)
    program = program // blocks_p
    rows = (program % blocks_l) * BLOCK_L + tl.arange(0, BLOCK_L)
    batch = (program // blocks_l).to(tl.int64)
    group = group_of(head, heads, groups, BLOCKED).to(tl.int64)
    head = head.to(tl.int64)
    y = _read(
        c_ptr + batch * cs_b + group * cs_g, cs_l, cs_n, s_ptr + batch * ss_b + head * ss_k, ss_n, ss_p,
        rows, length, columns, n, p, STEPS_N, BLOCK_L, BLOCK_N, BLOCK_P,
    )  # fmt: skip
    if HAS_SKIP:
        x = load_tile(x_ptr + batch * xs_b + head * xs_k, rows, xs_l, length, columns, xs_p, p)
        y += tl.load(skip_ptr + head).to(tl.float32) * x.to(tl.float32)
    y_ptr += (batch * length * heads + head) * p
    store_tile(y_ptr, y, rows, heads * p, length, columns, p)


@triton.jit
def input_gradient_kernel(
    b_ptr, bs_b, bs_l, bs_g, bs_n, s_ptr, ss_b, ss_k, ss_n, ss_p, x_ptr, xs_b, xs_l, xs_k, xs_p,
    w_ptr, ws_b, ws_l, ws_k, dy_ptr, ds_b, ds_l, ds_k, ds_p, skip_ptr, dx_ptr, dw_ptr, dskip_ptr,
    length, heads, groups, n, p, blocks_l,
    WEIGHTED: tl.constexpr, HAS_SKIP: tl.constexpr, BLOCKED: tl.constexpr, STEPS_N: tl.constexpr,
    STEPS_P: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Gradients of x, its weights and skip (a part per block of positions) from the gradient of the state."""
    program = tl.program_id(0)
    head = (program % heads).to(tl.int64)
    program = program // heads
    block = program % blocks_l
    rows = block * BLOCK_L + tl.arange(0, BLOCK_L)
    batch = (program // blocks_l).to(tl.int64)
    group = group_of(head, heads, groups, BLOCKED)
    b_ptr += batch * bs_b + group * bs_g
    s_ptr += batch * ss_b + head * ss_k
    x_ptr += batch * xs_b + head * xs_k
    dy_ptr += batch * ds_b + head * ds_k
    dx_ptr += (batch * length * heads + head) * p
    weight = tl.zeros([BLOCK_L], tl.float32)
    dweight = tl.zeros([BLOCK_L], tl.float32)
    dskip = tl.zeros([BLOCK_L], tl.float32)
    if WEIGHTED:
        at = w_ptr + batch * ws_b + head * ws_k + rows.to(tl.int64) * ws_l
        weight = tl.load(at, mask=rows < length, other=0.0).to(tl.float32)
    for j in range(STEPS_P):
        columns = j * BLOCK_P + tl.arange(0, BLOCK_P)
        dx = _read(b_ptr, bs_l, bs_n, s_ptr, ss_n, ss_p, rows, length, columns, n, p,
                   STEPS_N, BLOCK_L, BLOCK_N, BLOCK_P)  # fmt: skip
        if WEIGHTED or HAS_SKIP:
            x = load_tile(x_ptr, rows, xs_l, length, columns, xs_p, p).to(tl.float32)
            if WEIGHTED:
                dweight += tl.sum(dx * x, 1)
                dx *= weight[:, None]
            if HAS_SKIP:
                dy = load_tile(dy_ptr, rows, ds_l, length, columns, ds_p, p).to(tl.float32)
                dx += tl.load(skip_ptr + head).to(tl.float32) * dy
                dskip += tl.sum(dy * x, 1)
        store_tile(dx_ptr, dx, rows, heads * p, length, columns, p)
    if WEIGHTED:
        at = dw_ptr + (batch * length + rows) * heads + head
        tl.store(at, dweight.to(dw_ptr.dtype.element_ty), mask=rows < length)
    if HAS_SKIP:
        tl.store(dskip_ptr + (batch * blocks_l + block) * heads + head, tl.sum(dskip, 0))


@triton.jit
def projection_gradient_kernel(
    x_ptr, xs_b, xs_l, xs_k, xs_p, w_ptr, ws_b, ws_l, ws_k, s_ptr, ss_b, ss_k, ss_n, ss_p, out_ptr,
    length, heads, groups, n, p, blocks_l, blocks_n,
    WEIGHTED: tl.constexpr, BLOCKED: tl.constexpr, HEADS: tl.constexpr, STEPS_P: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Weighted rows (positions, p) times states (n, p) turned, added up over the heads of a group in their order."""
    program = tl.program_id(0)
    group = program % groups
    program = program // groups
    states = (program % blocks_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    program = program // blocks_n
    rows = (program % blocks_l) * BLOCK_L + tl.arange(0, BLOCK_L)
    batch = (program // blocks_l).to(tl.int64)
    total = tl.zeros([BLOCK_L, BLOCK_N], tl.float32)
    for i in range(HEADS * STEPS_P):
        head = _head_of(group, i // STEPS_P, heads, groups, BLOCKED).to(tl.int64)
        columns = (i % STEPS_P) * BLOCK_P + tl.arange(0, BLOCK_P)
        value = load_tile(x_ptr + batch * xs_b + head * xs_k, rows, xs_l, length, columns, xs_p, p)
        if WEIGHTED:
            at = w_ptr + batch * ws_b + head * ws_k + rows.to(tl.int64) * ws_l
            weight = tl.load(at, mask=rows < length, other=0.0)
            value = value.to(tl.float32) * weight.to(tl.float32)[:, None]
        state = load_tile(s_ptr + batch * ss_b + head * ss_k, states, ss_n, n, columns, ss_p, p)
        total = product(value, tl.trans(state), total)
    out_ptr += (batch * length * groups + group) * n
    store_tile(out_ptr, total, rows, groups * n, length, states, n)
