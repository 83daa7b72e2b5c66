"""The selective scan in ONNX: the recurrence that all our scans come down to.

ONNX has no operator for a recurrence; it has ``Scan``, a loop whose every step runs a small graph. A step for one
position would do little work for its overhead, and there would be as many as positions. So the positions are cut into
about sqrt(l) chunks of about sqrt(l) positions, and

1. one loop walks over the positions of the chunks, all chunks side by side, from states of zero,
2. a second one walks over the chunks and hands the states on,
3. what a chunk inherits is decayed and added.

That is two times sqrt(l) steps (256 for 16384 positions), memory linear in l, and no exponential but that of a
step's own rate, whose products only shrink: nothing overflows where the recurrence does not. (The usual way to do
without a loop, exponentials of differences of cumulative sums, overflows or loses all digits after one strong decay.)

With several states per channel the states of all positions would be that many times the map. There step 3 is a walk
over the positions once more, from the inherited states, that reads its states off as it goes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from mmvmamba.deployment.onnx.writer import Body, Value, Writer

LARGEST = float(torch.finfo(torch.float32).max)
LARGEST_RATE = math.log(LARGEST) - 1e-3
"""Decays saturate below infinity, as those of `mmvmamba.ops.selective_scan.reference` do: infinity times a state of
zero is not a number."""


def write_scan(
    writer: Writer, step: Value, inputs: Value, rate: Value, b_in: Value, c_out: Value, states: int,
    first: Value | None = None,
) -> tuple[Value, Value]:  # fmt: skip
    """Write ``h_t = exp(step_t rate) h_(t-1) + b_t inputs_t`` and ``y_t = <c_t, h_t>``.

    Args:
        writer: Of the export.
        step: Step sizes (b, k, l, d), or (b, k, l, 1) for all channels alike; after softplus.
        inputs: What is added, already times the step sizes (b, k, l, d).
        rate: Decay rates (k, n, d), or 1 for n and d where all are alike.
        b_in: Input projections (b, k, l, n).
        c_out: Output projections (b, k, l, n).
        states: n.
        first: The state before the first position (b, k, n, d), or None for zeros.

    Returns:
        The output (b, k, l, d) and the last state (b, k, n, d).
    """
    op = writer.op
    length = writer.sizes(inputs, 2, 3)
    root = op.Cast(op.Ceil(op.Sqrt(op.Cast(length, to=1))), to=7)
    chunk = op.Max(root, writer.integers(1))
    chunks = op.Div(op.Sub(op.Add(length, chunk), writer.integers(1)), chunk)
    missing = op.Sub(op.Mul(chunks, chunk), length)
    pads = op.Concat(writer.integers(0, 0, 0, 0, 0, 0), missing, writer.integers(0), axis=0)

    def into_chunks(value: Value) -> Value:
        """(b, k, l, c) -> (t, b, k, m, c). Positions of padding have no step and add nothing: they keep the state."""
        padded = op.Pad(value, pads)
        shape = op.Concat(writer.integers(0, 0), chunks, chunk, writer.integers(-1), axis=0)
        return writer.transpose(op.Reshape(padded, shape), 3, 0, 1, 2, 4)

    steps, inputs, b_in, c_out = (into_chunks(value) for value in (step, inputs, b_in, c_out))
    rate = op.Unsqueeze(rate, writer.integers(1))  # (k, 1, n, d)
    walk = _one_state if states == 1 else _many_states
    y, last = walk(writer, steps, inputs, rate, b_in, c_out, first)  # (t, b, k, m, d), (b, k, n, d)
    batch = writer.sizes(y, 1, 3)
    channels = writer.sizes(y, 4, 5)
    whole = writer.reshape(writer.transpose(y, 1, 2, 3, 0, 4), batch, -1, channels)
    return op.Slice(whole, writer.integers(0), length, writer.integers(2)), last


def _one_state(
    writer: Writer, step: Value, inputs: Value, rate: Value, b_in: Value, c_out: Value, first: Value | None
) -> tuple[Value, Value]:
    """With n = 1 the decays of all positions are no larger than the map: they are computed at once."""
    op = writer.op
    rate = op.Squeeze(rate, writer.integers(2))  # (k, 1, d)
    decay = op.Exp(op.Min(op.Mul(step, rate), writer.scalar(LARGEST_RATE)))  # (t, b, k, m, d)
    added = op.Mul(inputs, b_in)

    def advance(body: Body, states: Sequence[Value], streams: Sequence[Value]) -> list[Value]:
        state = body("Add", body("Mul", states[0], streams[0]), streams[1])
        kept = body("Mul", states[1], streams[0])
        return [state, kept, body("Identity", state), body("Identity", kept)]

    zero = writer.zeros(writer.sizes(added, 1, 5))
    one = op.Add(writer.zeros(writer.sizes(decay, 1, 5)), writer.scalar(1.0))
    state, kept, local, keeps = writer.loop([zero, one], [decay, added], 0, advance)
    first = None if first is None else op.Squeeze(first, writer.integers(2))
    before, last = _inherited(writer, kept, state, first)
    # A product of decays above 1 may be infinite, and the state of zero that it meets must stay zero.
    keeps = op.Min(keeps, writer.scalar(LARGEST))
    return op.Mul(op.Add(local, op.Mul(keeps, before)), c_out), op.Unsqueeze(last, writer.integers(2))


def _many_states(
    writer: Writer, step: Value, inputs: Value, rate: Value, b_in: Value, c_out: Value, first: Value | None
) -> tuple[Value, Value]:
    op = writer.op
    largest = writer.scalar(LARGEST_RATE)
    step = op.Unsqueeze(step, writer.integers(-2))  # (t, b, k, m, 1, d)
    inputs = op.Unsqueeze(inputs, writer.integers(-2))
    b_in, c_out = (op.Unsqueeze(value, writer.integers(-1)) for value in (b_in, c_out))  # (t, b, k, m, n, 1)

    def advance(body: Body, state: Value, streams: Sequence[Value]) -> Value:
        decay = body("Exp", body("Min", body("Mul", streams[0], rate), largest))
        return body("Add", body("Mul", decay, state), body("Mul", streams[2], streams[1]))

    def walk(body: Body, states: Sequence[Value], streams: Sequence[Value]) -> list[Value]:
        return [advance(body, states[0], streams)]

    def walk_and_read(body: Body, states: Sequence[Value], streams: Sequence[Value]) -> list[Value]:
        state = advance(body, states[0], streams)
        row = body("Transpose", streams[3], perm=[0, 1, 2, 4, 3])
        return [state, body("MatMul", row, state)]

    streams = [step, inputs, b_in]
    zero = writer.zeros(writer.sizes(b_in, 1, 5), writer.sizes(inputs, 5, 6))  # (b, k, m, n, d)
    (local,) = writer.loop([zero], streams, 0, walk)
    # The rates of a chunk are added up, all of one sign: no digits are lost.
    total = op.ReduceSum(step, writer.integers(0), keepdims=0)
    kept = op.Exp(op.Min(op.Mul(total, rate), largest))
    before, last = _inherited(writer, kept, local, first)
    _, y = writer.loop([before], [*streams, c_out], 0, walk_and_read)
    return op.Squeeze(y, writer.integers(-2)), last


def _inherited(writer: Writer, kept: Value, local: Value, first: Value | None) -> tuple[Value, Value]:
    """Hand states from chunk to chunk.

    Args:
        writer: Of the export.
        kept: How much of what it inherits a chunk leaves (b, k, m, ...).
        local: What a chunk leaves of its own (b, k, m, ...).
        first: What the first inherits (b, k, ...), or None for zeros.

    Returns:
        What every chunk inherits (b, k, m, ...), and what the last leaves (b, k, ...).
    """

    def hand_on(body: Body, states: Sequence[Value], streams: Sequence[Value]) -> list[Value]:
        return [body("Add", body("Mul", states[0], streams[0]), streams[1]), body("Identity", states[0])]

    if first is None:
        first = writer.zeros(writer.op.Shape(writer.pick(local, 0, 2)))
    last, before = writer.loop([first], [kept, local], 2, hand_on)
    return before, last
