"""The selective scan in ONNX: the recurrence that all our scans come down to.

ONNX has no operator for a recurrence; it has ``Scan``, a loop whose every step runs a small graph. A step for one
position would do little work for its overhead, and there would be as many as positions. So the positions are cut into
about sqrt(l) chunks of about sqrt(l) positions, and

1. one loop walks over the positions of the chunks, all chunks side by side, from states of zero, and leaves their last
   states and the sums of their step sizes,
2. a second one walks over the chunks and hands the states on,
3. a third one walks over the positions as the first does, from the states that the chunks inherit, and reads them.

These are three times sqrt(l) steps (384 for 16384 positions), memory linear in l whatever the number of states, and no
exponential but that of one rate times one step or a sum of steps: where states decay it is at most 1, so nothing
overflows where the recurrence does not. (The usual way to do without loops, exponentials of differences of cumulative
sums, overflows or loses all digits after one strong decay.) Walking twice costs less than keeping what the first walk
knew: one step's numbers fit in a processor's cache, those of all positions do not. That they do, wide maps with many
states have fewer and longer chunks. ``python -m benchmarks.onnx_scan`` times it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from mmvmamba.deployment.onnx.writer import Body, Value, Writer

LARGEST_RATE = math.log(torch.finfo(torch.float32).max) - 1e-3
"""Decays saturate below infinity, as those of `mmvmamba.ops.selective_scan.reference` do: infinity times a state of
zero is not a number."""
LARGEST_STEP = 2**17
"""How many numbers the states of all chunks may be (half a megabyte), unless there are fewer chunks than the next."""
FEWEST_CHUNKS = 8


@dataclass(frozen=True)
class Recurrence:
    """``h_t = exp(step_t rate) h_(t-1) + step_t b_t u_t`` and ``y_t = <c_t, h_t>``.

    Attributes:
        features: What step sizes are made of (b, k, l, r).
        step: Writes the step sizes (b, k, m, d), or (b, k, m, 1) for all channels alike, from features (b, k, m, r)
            into the body of a loop.
        u: Input (b, k, l, d).
        rate: Decay rates (k, n, d), or 1 for n and d where all are alike.
        b_in: Input projections (b, k, l, n).
        c_out: Output projections (b, k, l, n).
        states: n.
        first: The state before the first position (b, k, n, d), or None for zeros.
        width: k n d.
        padding: Features of positions behind the last: such that their step sizes are zero where the last state is
            wanted.
    """

    features: Value
    step: Callable[[Body, Value], Value]
    u: Value
    rate: Value
    b_in: Value
    c_out: Value
    states: int
    width: int
    first: Value | None = None
    padding: float = 0.0


def write_scan(writer: Writer, scan: Recurrence) -> tuple[Value, Value]:
    """Write a recurrence; returns the output (b, k, l, d) and the last state (b, k, n, d)."""
    op = writer.op
    length = writer.sizes(scan.u, 2, 3)
    chunk, chunks, pads = _chunks(writer, length, max(LARGEST_STEP // scan.width, FEWEST_CHUNKS))

    def cut(value: Value, padding: float = 0.0) -> Value:
        """(b, k, l, c) -> (t, b, k, m, c), position t of all chunks together."""
        padded = op.Pad(value, pads, writer.scalar(padding))
        shape = op.Concat(writer.integers(0, 0), chunks, chunk, writer.integers(-1), axis=0)
        return writer.transpose(op.Reshape(padded, shape), 3, 0, 1, 2, 4)

    features = cut(scan.features, scan.padding)
    u, b_in, c_out = (cut(value) for value in (scan.u, scan.b_in, scan.c_out))
    walks = _Walks(writer, scan)
    zeros = writer.zeros(writer.sizes(b_in, 1, 5), writer.sizes(u, 4, 5))  # (b, k, m, n, d)
    no_time = writer.zeros(writer.sizes(u, 1, 4), 1, writer.sizes(scan.rate, 2, 3))  # (b, k, m, 1, d or 1)
    local, time = writer.loop([zeros, no_time], [features, u, b_in], 0, walks.leave)
    kept = op.Exp(op.Min(op.Mul(time, walks.rate), walks.largest))
    before, last = _inherited(writer, kept, local, scan.first)
    _, y = writer.loop([before], [features, u, b_in, c_out], 0, walks.read)  # (t, b, k, m, 1, d)
    y = writer.transpose(op.Squeeze(y, writer.integers(-2)), 1, 2, 3, 0, 4)
    whole = writer.reshape(y, writer.sizes(y, 0, 2), -1, writer.sizes(y, 4, 5))
    return op.Slice(whole, writer.integers(0), length, writer.integers(2)), last


def _chunks(writer: Writer, length: Value, most: int) -> tuple[Value, Value, Value]:
    """Return positions of a chunk, how many chunks, and the pads that fill the last: (b, k, l, c) at its third side."""
    op = writer.op
    one = writer.integers(1)
    root = op.Cast(op.Ceil(op.Sqrt(op.Cast(length, to=1))), to=7)
    wanted = op.Max(op.Min(root, writer.integers(most)), one)

    def cover(size: Value) -> Value:
        """How many parts of a size have all positions."""
        return op.Div(op.Sub(op.Add(length, size), one), size)

    chunk = op.Max(cover(wanted), one)
    chunks = cover(chunk)
    missing = op.Sub(op.Mul(chunks, chunk), length)
    return chunk, chunks, op.Concat(writer.integers(0, 0, 0, 0, 0, 0), missing, writer.integers(0), axis=0)


class _Walks:
    """The bodies of the two walks over the positions of all chunks."""

    def __init__(self, writer: Writer, scan: Recurrence) -> None:
        self.scan = scan
        self.rate = writer.op.Unsqueeze(scan.rate, writer.integers(1))  # (k, 1, n, d)
        self.largest = writer.scalar(LARGEST_RATE)
        self.before_last, self.behind = writer.integers(-2), writer.integers(-1)

    def leave(self, body: Body, states: Sequence[Value], streams: Sequence[Value]) -> list[Value]:
        """From a state (b, k, m, n, d) and the time that passed (b, k, m, 1, d) to those after one position."""
        state, step = self._advance(body, states[0], streams)
        return [state, body("Add", states[1], step)]

    def read(self, body: Body, states: Sequence[Value], streams: Sequence[Value]) -> list[Value]:
        """From a state (b, k, m, n, d) to the next one and what is read off it (b, k, m, 1, d)."""
        state, _ = self._advance(body, states[0], streams)
        if self.scan.states == 1:
            return [state, body("Mul", body("Unsqueeze", streams[3], self.behind), state)]
        return [state, body("MatMul", body("Unsqueeze", streams[3], self.before_last), state)]

    def _advance(self, body: Body, state: Value, streams: Sequence[Value]) -> tuple[Value, Value]:
        features, u, b_in = streams[:3]
        step = self.scan.step(body, features)
        added = body("Unsqueeze", body("Mul", step, u), self.before_last)
        step = body("Unsqueeze", step, self.before_last)
        decay = body("Exp", body("Min", body("Mul", step, self.rate), self.largest))
        injected = body("Mul", body("Unsqueeze", b_in, self.behind), added)
        return body("Add", body("Mul", decay, state), injected), step


def softplus(writer: Writer) -> Callable[[Body, Value], Value]:
    """Return what writes ``log(1 + exp(x))`` into the body of a loop.

    It is ``max(x, 0) + log1p(e)`` with ``e = exp(-|x|)``, as ONNX has no log1p and onnxruntime's own Softplus computes
    one number at a time (five times as slow). ``log1p(e)`` is ``e log(s) / (s - 1)`` with ``s = 1 + e`` rounded: both
    are of the same rounded number, so that no digits are lost for small e (Kahan); where s is 1 it is e.
    """
    one = writer.scalar(1.0)

    def write(body: Body, x: Value) -> Value:
        e = body("Exp", body("Neg", body("Abs", x)))
        s = body("Add", e, one)
        log1p = body("Mul", e, body("Div", body("Log", s), body("Sub", s, one)))
        return body("Add", body("Relu", x), body("Where", body("Equal", s, one), e, log1p))

    return write


def _inherited(writer: Writer, kept: Value, local: Value, first: Value | None) -> tuple[Value, Value]:
    """Hand states from chunk to chunk.

    Args:
        writer: Of the export.
        kept: How much of what it inherits a chunk leaves (b, k, m, n, d).
        local: What a chunk leaves of its own (b, k, m, n, d).
        first: What the first inherits (b, k, n, d), or None for zeros.

    Returns:
        What every chunk inherits (b, k, m, n, d), and what the last leaves (b, k, n, d).
    """

    def hand_on(body: Body, states: Sequence[Value], streams: Sequence[Value]) -> list[Value]:
        return [body("Add", body("Mul", states[0], streams[0]), streams[1]), body("Identity", states[0])]

    if first is None:
        first = writer.zeros(writer.sizes(local, 0, 2), writer.sizes(local, 3, 5))
    last, before = writer.loop([first], [kept, local], 2, hand_on)
    return before, last
