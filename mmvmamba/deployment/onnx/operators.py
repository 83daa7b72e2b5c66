"""Our scan operators in ONNX: routes over the map, step sizes, the recurrence, the sum on the pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from mmvmamba.deployment.onnx.scans import write_scan
from mmvmamba.deployment.onnx.writer import Value, Writer
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

    def selective_scan(
        u, delta, A, B, C, D, delta_bias, delta_softplus: bool, out_dtype: int, save_carries: bool
    ):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        del out_dtype, save_carries
        return write_selective_scan(writer, u, delta, A, B, C, D, delta_bias, delta_softplus)

    def scan2d(
        x, projections, dt_weight, dt_bias, A, D, orders: Sequence[int], permutation, delta_softplus: bool,
        out_dtype: int, save_carries: bool,
    ):  # type: ignore[no-untyped-def]  # fmt: skip  # noqa: ANN001, ANN202
        del out_dtype, save_carries
        routes = Routes(writer, x, list(orders or ()), permutation, dt_weight.shape[0])
        return write_scan2d(writer, x, projections, dt_weight, dt_bias, A, D, routes, delta_softplus), writer.zeros(0)

    def ssd(
        x, dt, decay, b_in, c_out, skip, dt_bias, initial_state, dt_softplus: bool, blocked: bool, out_dtype: int,
        save_carries: bool,
    ):  # type: ignore[no-untyped-def]  # fmt: skip  # noqa: ANN001, ANN202
        del out_dtype, save_carries
        return write_ssd(writer, x, dt, decay, b_in, c_out, skip, dt_bias, initial_state, dt_softplus, blocked)

    table: dict[Any, Translation] = {}
    for function in (selective_scan, scan2d, ssd):
        for suffix in ("", "_triton"):
            table[getattr(torch.ops.mmvmamba, function.__name__ + suffix).default] = function
    return table


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
        rows, columns = [], []
        for i, order in enumerate(self.orders):
            one = self.writer.pick(visits, i, 1)
            (columns if order in COLUMNS else rows).append(
                self.writer.flip(one, 1) if order in BACKWARDS else one
            )
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
    _, _, rank = dt_weight.shape
    states = A.shape[2]
    apart = len(x.shape) == 5
    per_visit = writer.split(routes.read(projections, True), 3, rank, states, states)
    features, b_in, c_out = per_visit
    step = op.MatMul(features, writer.transpose(dt_weight, 0, 2, 1))  # (b, k, l, d)
    if dt_bias is not None:
        step = op.Add(step, op.Unsqueeze(dt_bias, writer.integers(1)))
    step = op.Softplus(step) if delta_softplus else step
    u = routes.read(x, apart)
    y, _ = write_scan(writer, step, op.Mul(step, u), writer.transpose(A, 0, 2, 1), b_in, c_out, states)
    if D is not None:
        y = op.Add(y, op.Mul(u, op.Unsqueeze(D, writer.integers(1))))
    return routes.merge(y)


def write_selective_scan(
    writer: Writer, u: Value, delta: Value, A: Value, B: Value, C: Value, D: Value | None, delta_bias: Value | None,
    delta_softplus: bool,
) -> tuple[Value, Value, Value]:  # fmt: skip
    """Write `mmvmamba.ops.selective_scan`; returns the output (b, d, l), the last state (b, d, n) and no carries."""
    op = writer.op
    groups, states = B.shape[1], A.shape[1]
    channels = A.shape[0]

    def by_group(value: Value) -> Value:
        """(b, d, l) -> (b, g, l, d / g)."""
        split = writer.reshape(value, 0, groups, channels // groups, -1)
        return writer.transpose(split, 0, 1, 3, 2)

    step = delta if delta_bias is None else op.Add(delta, op.Unsqueeze(delta_bias, writer.integers(1)))
    step = by_group(op.Softplus(step) if delta_softplus else step)
    rate = writer.transpose(writer.reshape(A, groups, channels // groups, states), 0, 2, 1)
    projections = (writer.transpose(value, 0, 1, 3, 2) for value in (B, C))
    y, last = write_scan(writer, step, op.Mul(step, by_group(u)), rate, *projections, states)
    y = writer.reshape(writer.transpose(y, 0, 1, 3, 2), 0, channels, -1)
    if D is not None:
        y = op.Add(y, op.Mul(u, op.Unsqueeze(D, writer.integers(1))))
    last = writer.reshape(writer.transpose(last, 0, 1, 3, 2), 0, channels, states)
    return y, last, writer.zeros(0)


def write_ssd(
    writer: Writer, x: Value, dt: Value, decay: Value, b_in: Value, c_out: Value, skip: Value | None,
    dt_bias: Value | None, initial_state: Value | None, dt_softplus: bool, blocked: bool,
) -> tuple[Value, Value, Value]:  # fmt: skip
    """Write `mmvmamba.ops.ssd`; returns the output (b, l, k, p), the last state (b, k, n, p) and no carries."""
    op = writer.op
    heads, (groups, states) = x.shape[2], b_in.shape[2:]
    of_head = [head // (heads // groups) if blocked else head % groups for head in range(heads)]
    step = dt if dt_bias is None else op.Add(dt, dt_bias)
    step = op.Softplus(step) if dt_softplus else step
    step = op.Unsqueeze(writer.transpose(step, 0, 2, 1), writer.integers(3))  # (b, k, l, 1)
    u = writer.transpose(x, 0, 2, 1, 3)  # (b, k, l, p)
    indices = writer.integers(*of_head)
    projections = (writer.transpose(op.Gather(value, indices, axis=2), 0, 2, 1, 3) for value in (b_in, c_out))
    rate = writer.reshape(decay, heads, 1, 1)
    y, last = write_scan(writer, step, op.Mul(step, u), rate, *projections, states, initial_state)
    y = writer.transpose(y, 0, 2, 1, 3)
    if skip is not None:
        y = op.Add(y, op.Mul(x, op.Unsqueeze(skip, writer.integers(1))))
    return y, last, writer.zeros(0)
