"""Our operators in ONNX: the table of all, and of the scans the routes, the step sizes and the sum on the pixels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mmvmamba.deployment.onnx.products import (
    write_causal_conv1d,
    write_depthwise_conv2d,
    write_embedding_bag,
    write_ssd_non_causal,
    write_ssd_read,
    write_ssd_state,
)
from mmvmamba.deployment.onnx.scans import Recurrence, softplus, write_scan
from mmvmamba.deployment.onnx.writer import Body, Value, Writer
from mmvmamba.ops.library import TWINS
from mmvmamba.ops.scan2d import ScanOrder

Translation = Callable[..., Any]
COLUMNS = (ScanOrder.COLUMN, ScanOrder.COLUMN_REVERSED)
BACKWARDS = (ScanOrder.ROW_REVERSED, ScanOrder.COLUMN_REVERSED)


def translations() -> dict[Any, Translation]:
    """Return what ``torch.onnx.export(custom_translation_table=...)`` needs for our scans; for one export.

    Raises:
        MissingPackage: If onnxscript is not installed.
    """
    writer = Writer()
    table: dict[Any, Translation] = {}
    for functions, suffixes in ((_scans(writer), TWINS), (_products(writer), TWINS), (_convolutions(writer), ("",))):
        for function in functions:
            for suffix in suffixes:
                table[getattr(torch.ops.mmvmamba, function.__name__ + suffix).default] = function
    table[torch.ops.aten.embedding_bag.padding_idx] = _bags(writer)
    return table


# The parameters of these functions are those of the operators' schemas, in order. The exporter takes what is annotated
# as a Python type for an attribute and the rest for tensors.


def _scans(writer: Writer) -> list[Translation]:
    def selective_scan(
        u: Value, delta: Value, A: Value, B: Value, C: Value, D: Value, delta_bias: Value, delta_softplus: bool,
        _out_dtype: int, _save_carries: bool,
    ) -> tuple[Value, ...]:  # fmt: skip
        y, last = write_selective_scan(writer, u, delta, A, B, C, D, delta_bias, delta_softplus)
        return y, last, writer.zeros(0)

    def scan2d(
        x: Value, projections: Value, dt_weight: Value, dt_bias: Value, A: Value, D: Value, orders: Sequence[int],
        permutation: Value, delta_softplus: bool, _out_dtype: int, _save_carries: bool,
    ) -> tuple[Value, ...]:  # fmt: skip
        routes = Routes(writer, x, list(orders or ()), permutation, dt_weight.shape[0])
        return write_scan2d(writer, x, projections, dt_weight, dt_bias, A, D, routes, delta_softplus), writer.zeros(0)

    def ssd(
        x: Value, dt: Value, decay: Value, b_in: Value, c_out: Value, skip: Value, dt_bias: Value,
        initial_state: Value, dt_softplus: bool, blocked: bool, _out_dtype: int, _save_carries: bool,
    ) -> tuple[Value, ...]:  # fmt: skip
        y, last = write_ssd(writer, x, dt, decay, b_in, c_out, skip, dt_bias, initial_state, dt_softplus, blocked)
        return y, last, writer.zeros(0)

    return [selective_scan, scan2d, ssd]


def _products(writer: Writer) -> list[Translation]:
    def ssd_state(x: Value, weight: Value, b_in: Value, blocked: bool) -> Value:
        return write_ssd_state(writer, x, weight, b_in, blocked)

    def ssd_read(state: Value, c_out: Value, blocked: bool, _out_dtype: int) -> Value:
        return write_ssd_read(writer, state, c_out, blocked)

    def ssd_non_causal(
        x: Value, weight: Value, b_in: Value, c_out: Value, skip: Value, blocked: bool, _out_dtype: int
    ) -> tuple[Value, Value]:
        return write_ssd_non_causal(writer, x, weight, b_in, c_out, skip, blocked)

    return [ssd_state, ssd_read, ssd_non_causal]


def _convolutions(writer: Writer) -> list[Translation]:
    def causal_conv1d(x: Value, weight: Value, bias: Value, reverse: Sequence[int], activation: int) -> Value:
        return write_causal_conv1d(writer, x, weight, bias, reverse, activation)

    def depthwise_conv2d(x: Value, weight: Value, bias: Value, activation: int) -> Value:
        return write_depthwise_conv2d(writer, x, weight, bias, activation)

    return [causal_conv1d, depthwise_conv2d]


def _bags(writer: Writer) -> Translation:
    def embedding_bag(
        table: Value, indices: Value, offsets: Value, _scale_grad: bool = False, mode: int = 0, _sparse: bool = False,
        weights: Value = None, _last: bool = False, _padding: int = -1,
    ) -> tuple[Value, ...]:  # fmt: skip
        nothing = writer.zeros(0)
        return write_embedding_bag(writer, table, indices, offsets, mode, weights), nothing, nothing, nothing

    return embedding_bag


class Routes:
    """The k routes over a map, by which sequences are read and results are put back.

    Args:
        writer: Of the export.
        x: The map (b, h, w, d), or a map for every route (b, h, w, k, d).
        orders: `ScanOrder` numbers, or nothing where ``permutation`` is given.
        permutation: Pixels (k, l) that the routes visit, int64, or None.
        k: Number of routes.
    """

    def __init__(self, writer: Writer, x: Value, orders: list[int], permutation: Value | None, k: int) -> None:
        self.writer, self.permutation, self.k = writer, permutation, k
        self.orders = [ScanOrder(order) for order in orders]
        self.size = writer.sizes(x, 0, 3)

    def read(self, value: Value, apart: bool) -> Value:
        """Read a map (b, h, w, c), or one for every route (b, h, w, k, c), along all routes: (b, k, l, c)."""
        maps = [self.writer.pick(value, i, 3) if apart else value for i in range(self.k)]
        if self.permutation is not None:
            return self.writer.stack([self._visited(m, i) for i, m in enumerate(maps)], 1)
        made: dict[tuple[int, bool], Value] = {}  # one sequence of every kind, where all routes read the same map

        def sequence(i: int) -> Value:
            order = self.orders[i]
            key = (i if apart else 0, order in COLUMNS)
            if key not in made:
                turned = self.writer.transpose(maps[i], 0, 2, 1, 3) if key[1] else maps[i]
                made[key] = self._flat(turned)
            return self.writer.flip(made[key], 1) if order in BACKWARDS else made[key]

        return self.writer.stack([sequence(i) for i in range(self.k)], 1)

    def merge(self, visits: Value) -> Value:
        """Sum what the routes leave (b, k, l, c) on the pixels of the map: (b, h, w, c)."""
        if self.permutation is not None:
            return self._scattered(visits)
        rows: list[Value] = []
        columns: list[Value] = []
        for i, order in enumerate(self.orders):
            one = self.writer.pick(visits, i, 1)
            (columns if order in COLUMNS else rows).append(self.writer.flip(one, 1) if order in BACKWARDS else one)
        b, h, w = (self._side(i) for i in range(3))
        maps = []
        if rows:
            maps.append(self.writer.reshape(self.writer.total(rows), b, h, w, -1))
        if columns:
            turned = self.writer.reshape(self.writer.total(columns), b, w, h, -1)
            maps.append(self.writer.transpose(turned, 0, 2, 1, 3))
        return self.writer.total(maps)

    def _side(self, i: int) -> Value:
        return self.writer.op.Slice(self.size, *(self.writer.integers(value) for value in (i, i + 1, 0)))

    def _flat(self, value: Value) -> Value:
        channels = self.writer.sizes(value, 3, 4)
        return self.writer.reshape(value, self._side(0), -1, channels)

    def _visited(self, value: Value, i: int) -> Value:
        return self.writer.op.Gather(self._flat(value), self.writer.pick(self.permutation, i, 0), axis=1)

    def _scattered(self, visits: Value) -> Value:
        writer = self.writer
        channels = writer.sizes(visits, 3, 4)
        places = writer.reshape(self.permutation, -1, 1)
        updates = writer.reshape(writer.transpose(visits, 1, 2, 0, 3), -1, self._side(0), channels)
        pixels = writer.op.Mul(self._side(1), self._side(2))
        nothing = writer.zeros(pixels, self._side(0), channels)
        whole = writer.op.ScatterND(nothing, places, updates, reduction="add")
        return writer.reshape(writer.transpose(whole, 1, 0, 2), self.size, channels)


def write_scan2d(
    writer: Writer, x: Value, projections: Value, dt_weight: Value, dt_bias: Value | None, A: Value, D: Value | None,
    routes: Routes, delta_softplus: bool,
) -> Value:  # fmt: skip
    """Write `mmvmamba.ops.scan2d`; returns the merged map (b, h, w, d)."""
    op = writer.op
    states, apart = A.shape[2], len(x.shape) == 5
    features, b_in, c_out = writer.split(routes.read(projections, True), 3, dt_weight.shape[2], states, states)
    weight = writer.transpose(dt_weight, 0, 2, 1)
    bias = None if dt_bias is None else op.Unsqueeze(dt_bias, writer.integers(1))  # (k, 1, d)
    finish = softplus(writer)

    def step(body: Body, value: Value) -> Value:
        value = body("MatMul", value, weight)
        value = value if bias is None else body("Add", value, bias)
        return finish(body, value) if delta_softplus else value

    u = routes.read(x, apart)
    rate, width = writer.transpose(A, 0, 2, 1), math.prod(A.shape)
    y, _ = write_scan(writer, Recurrence(features, step, u, rate, b_in, c_out, states, width))
    if D is None:
        return routes.merge(y)
    if apart or routes.permutation is not None:
        return routes.merge(op.Add(y, op.Mul(u, op.Unsqueeze(D, writer.integers(1)))))
    # Every route visits every pixel once.
    return op.Add(routes.merge(y), op.Mul(x, op.ReduceSum(D, writer.integers(0), keepdims=0)))


def write_selective_scan(
    writer: Writer, u: Value, delta: Value, A: Value, B: Value, C: Value, D: Value | None, delta_bias: Value | None,
    delta_softplus: bool,
) -> tuple[Value, Value]:  # fmt: skip
    """Write `mmvmamba.ops.selective_scan`; returns the output (b, d, l) and the last state (b, d, n)."""
    op = writer.op
    groups, (channels, states) = B.shape[1], A.shape

    def by_group(value: Value) -> Value:
        """(b, d, l) -> (b, g, l, d / g)."""
        return writer.transpose(writer.reshape(value, 0, groups, channels // groups, -1), 0, 1, 3, 2)

    if delta_bias is not None:
        delta = op.Add(delta, op.Unsqueeze(delta_bias, writer.integers(1)))
    rate = writer.transpose(writer.reshape(A, groups, channels // groups, states), 0, 2, 1)
    b_in, c_out = (writer.transpose(value, 0, 1, 3, 2) for value in (B, C))
    step, padding = _steps(writer, delta_softplus)
    scan = Recurrence(
        by_group(delta), step, by_group(u), rate, b_in, c_out, states, math.prod(A.shape), padding=padding
    )
    y, last = write_scan(writer, scan)
    y = writer.reshape(writer.transpose(y, 0, 1, 3, 2), 0, channels, -1)
    if D is not None:
        y = op.Add(y, op.Mul(u, op.Unsqueeze(D, writer.integers(1))))
    return y, writer.reshape(writer.transpose(last, 0, 1, 3, 2), 0, channels, states)


def write_ssd(
    writer: Writer, x: Value, dt: Value, decay: Value, b_in: Value, c_out: Value, skip: Value | None,
    dt_bias: Value | None, initial_state: Value | None, dt_softplus: bool, blocked: bool,
) -> tuple[Value, Value]:  # fmt: skip
    """Write `mmvmamba.ops.ssd`; returns the output (b, l, k, p) and the last state (b, k, n, p)."""
    op = writer.op
    heads, (groups, states) = x.shape[2], b_in.shape[2:]
    of_head = [head // (heads // groups) if blocked else head % groups for head in range(heads)]
    dt = dt if dt_bias is None else op.Add(dt, dt_bias)
    features = op.Unsqueeze(writer.transpose(dt, 0, 2, 1), writer.integers(3))  # (b, k, l, 1)
    indices = writer.integers(*of_head)
    b_in, c_out = (writer.transpose(op.Gather(value, indices, axis=2), 0, 2, 1, 3) for value in (b_in, c_out))
    rate = writer.reshape(decay, heads, 1, 1)
    step, padding = _steps(writer, dt_softplus)
    u = writer.transpose(x, 0, 2, 1, 3)  # (b, k, l, p)
    width = heads * states * x.shape[3]
    scan = Recurrence(features, step, u, rate, b_in, c_out, states, width, initial_state, padding)
    y, last = write_scan(writer, scan)
    y = writer.transpose(y, 0, 2, 1, 3)
    if skip is not None:
        y = op.Add(y, op.Mul(x, op.Unsqueeze(skip, writer.integers(1))))
    return y, last


def _steps(writer: Writer, delta_softplus: bool) -> tuple[Callable[[Body, Value], Value], float]:
    """Return how step sizes are made of what is given, and what makes a step size of zero."""
    if delta_softplus:
        return softplus(writer), float("-inf")
    return lambda _, value: value, 0.0
