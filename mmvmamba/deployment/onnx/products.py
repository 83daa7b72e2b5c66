"""Our operators that are a few products or convolutions, in ONNX.

PyTorch's exporter could translate their references as well, but only after one more trace of the whole network, which
with free sizes takes as long as all the rest.
"""

from __future__ import annotations

from collections.abc import Sequence

from mmvmamba.deployment.onnx.writer import Value, Writer
from mmvmamba.errors import ConfigError
from mmvmamba.ops.depthwise_conv.reference import ACTIVATIONS


def write_ssd_state(writer: Writer, x: Value, weight: Value | None, b_in: Value, blocked: bool) -> Value:
    """Write ``mmvmamba::ssd_state``: x (b, l, k, p), weight (b, l, k), b_in (b, l, g, n) to (b, k, n, p)."""
    op = writer.op
    heads, channels = x.shape[2:]
    groups, states = b_in.shape[2:]
    if weight is not None:
        x = op.Mul(x, op.Unsqueeze(weight, writer.integers(3)))
    # All heads of a group side by side, so that there is one product for each group.
    if blocked:
        apart = writer.transpose(writer.reshape(x, 0, 0, groups, heads // groups, channels), 0, 2, 1, 3, 4)
    else:
        apart = writer.transpose(writer.reshape(x, 0, 0, heads // groups, groups, channels), 0, 3, 1, 2, 4)
    product = op.MatMul(writer.transpose(b_in, 0, 2, 3, 1), writer.reshape(apart, 0, 0, 0, -1))
    split = writer.reshape(product, 0, 0, 0, heads // groups, channels)  # (b, g, n, k / g, p)
    ordered = writer.transpose(split, *((0, 1, 3, 2, 4) if blocked else (0, 3, 1, 2, 4)))
    return writer.reshape(ordered, 0, heads, states, channels)


def write_ssd_read(writer: Writer, state: Value, c_out: Value, blocked: bool) -> Value:
    """Write ``mmvmamba::ssd_read``: state (b, k, n, p), c_out (b, l, g, n) to (b, l, k, p)."""
    heads, states, channels = state.shape[1:]
    groups = c_out.shape[2]
    if blocked:
        split = writer.reshape(state, 0, groups, heads // groups, states, channels)
        apart = writer.transpose(split, 0, 1, 3, 2, 4)
    else:
        split = writer.reshape(state, 0, heads // groups, groups, states, channels)
        apart = writer.transpose(split, 0, 2, 3, 1, 4)
    product = writer.op.MatMul(writer.transpose(c_out, 0, 2, 1, 3), writer.reshape(apart, 0, 0, 0, -1))
    whole = writer.reshape(product, 0, 0, 0, heads // groups, channels)  # (b, g, l, k / g, p)
    ordered = writer.transpose(whole, *((0, 2, 1, 3, 4) if blocked else (0, 2, 3, 1, 4)))
    return writer.reshape(ordered, 0, 0, heads, channels)


def write_ssd_non_causal(
    writer: Writer, x: Value, weight: Value | None, b_in: Value, c_out: Value, skip: Value | None, blocked: bool
) -> tuple[Value, Value]:
    """Write ``mmvmamba::ssd_non_causal``; returns the output (b, l, k, p) and the state (b, k, n, p)."""
    op = writer.op
    state = write_ssd_state(writer, x, weight, b_in, blocked)
    # What was just written has no shape yet, which the next function asks for.
    state.shape = writer.static_shape(None, x.shape[2], b_in.shape[3], x.shape[3])
    out = write_ssd_read(writer, state, c_out, blocked)
    return (out if skip is None else op.Add(out, op.Mul(x, op.Unsqueeze(skip, writer.integers(1))))), state


def write_causal_conv1d(
    writer: Writer, x: Value, weight: Value, bias: Value | None, reverse: Sequence[int], activation: int
) -> Value:
    """Write ``mmvmamba::causal_conv1d``: x (b, l, d), weight (k, d, width), bias (k, d) to (b, l, k, d)."""
    op = writer.op
    _, channels, width = weight.shape
    sequence = writer.transpose(x, 0, 2, 1)
    directions = []
    for i, backwards in enumerate(reverse):
        kernel = op.Unsqueeze(writer.pick(weight, i, 0), writer.integers(1))  # (d, 1, width)
        kernel = writer.flip(kernel, 2) if backwards else kernel
        pads = [0, width - 1] if backwards else [width - 1, 0]
        biases = [] if bias is None else [writer.pick(bias, i, 0)]
        directions.append(op.Conv(sequence, kernel, *biases, group=channels, pads=pads))
    out = writer.transpose(writer.stack(directions, 1), 0, 3, 1, 2)  # (b, k, d, l) -> (b, l, k, d)
    return _activated(writer, out, activation)


def write_depthwise_conv2d(writer: Writer, x: Value, weight: Value, bias: Value | None, activation: int) -> Value:
    """Write ``mmvmamba::depthwise_conv2d``: x (b, h, w, d), weight (d, 1, kh, kw), bias (d) to (b, h, w, d)."""
    channels, _, rows, columns = weight.shape
    biases = [] if bias is None else [bias]
    pads = [rows // 2, columns // 2] * 2
    out = writer.op.Conv(writer.transpose(x, 0, 3, 1, 2), weight, *biases, group=channels, pads=pads)
    return _activated(writer, writer.transpose(out, 0, 2, 3, 1), activation)


def write_embedding_bag(
    writer: Writer, table: Value, indices: Value, offsets: Value, mode: int, weights: Value | None
) -> Value:
    """Write PyTorch's weighted sums of rows (m c) of a table, of which HRVMamba's deformable aggregation is made.

    The exporter's own translation is a loop over the sums, of which there are as many as pixels.

    Raises:
        ConfigError: If they are not sums of equally many rows.
    """
    op = writer.op
    start = offsets.producer()
    if mode != 0 or weights is None or start is None or start.op_type != "Range":
        raise ConfigError(
            "an embedding_bag has another mode, no weights or bags of other sizes, expected weighted sums of equally "
            "many rows. Export another part of the network."
        )
    rows = op.Mul(op.Gather(table, indices, axis=0), op.Unsqueeze(weights, writer.integers(1)))
    channels = writer.sizes(table, 1, 2)
    bags = writer.sizes(offsets, 0, 1)
    return op.ReduceSum(writer.reshape(rows, bags, -1, channels), writer.integers(1), keepdims=0)


def _activated(writer: Writer, value: Value, activation: int) -> Value:
    return writer.op.Mul(value, writer.op.Sigmoid(value)) if ACTIVATIONS[activation] == "silu" else value
