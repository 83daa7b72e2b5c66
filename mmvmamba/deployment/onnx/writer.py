"""What the translations write nodes with: ONNX operators, constants, and loops with bodies of their own.

`torch.onnx.export` records the operators that a translation calls, but has nothing for a ``Scan`` whose body is
written by hand; here its node goes to the same recorder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mmvmamba.optional import optional_package

Value = Any
"""A tensor of the graph that is being written (``onnx_ir.Value``; its package is optional)."""
EXTRA = "export"
OPSET = 20
"""The version of ONNX's operators that the translations are written in."""


class Writer:
    """Writes ONNX nodes into the graph that `torch.onnx.export` is making.

    One for every export: it numbers the bodies of the loops, for names must be unique in a file.

    Attributes:
        op: ONNX's operators.

    Raises:
        MissingPackage: If onnxscript is not installed.
    """

    def __init__(self) -> None:
        onnxscript = optional_package("onnxscript", EXTRA)
        self.op: Any = getattr(onnxscript, f"opset{OPSET}")
        self._ir = onnxscript.ir
        self._evaluator = optional_package("onnxscript.evaluator", EXTRA)
        self._bodies = 0

    def integers(self, *values: int) -> Value:
        """Return a constant int64 vector."""
        return self.op.Constant(value_ints=list(values))

    def scalar(self, value: float) -> Value:
        """Return a constant float32 scalar."""
        return self.op.Constant(value_float=value)

    def sizes(self, value: Value, start: int, end: int) -> Value:
        """Return the sizes of some dimensions as an int64 vector."""
        return self.op.Shape(value, start=start, end=end)

    def reshape(self, value: Value, *shape: int | Value) -> Value:
        """Reshape to sizes that are numbers (-1 for what is left, 0 for as before) or int64 vectors."""
        return self.op.Reshape(value, self._shape(shape))

    def transpose(self, value: Value, *order: int) -> Value:
        """Permute dimensions."""
        return self.op.Transpose(value, perm=list(order))

    def split(self, value: Value, axis: int, *sizes: int) -> list[Value]:
        """Cut a dimension into parts of the given sizes."""
        if len(sizes) == 1:
            return [value]
        parts = self._node("Split", [value, self.integers(*sizes)], {"axis": axis}, len(sizes))
        return list(parts)

    def pick(self, value: Value, index: int, axis: int) -> Value:
        """Return one entry of a dimension, without the dimension."""
        return self.op.Gather(value, self.op.Constant(value_int=index), axis=axis)

    def stack(self, values: Sequence[Value], axis: int) -> Value:
        """Put values side by side along a new dimension."""
        apart = [self.op.Unsqueeze(value, self.integers(axis)) for value in values]
        return self.op.Concat(*apart, axis=axis) if len(apart) > 1 else apart[0]

    def flip(self, value: Value, axis: int) -> Value:
        """Reverse a dimension."""
        ends = self.integers(-1), self.integers(-(2**63) + 1)
        return self.op.Slice(value, *ends, self.integers(axis), self.integers(-1))

    def static_shape(self, *sizes: int | None) -> Any:
        """Return a shape to be noted at a value; None for a size that is not known."""
        return self._ir.Shape(sizes)

    def zeros(self, *shape: int | Value) -> Value:
        """Return float32 zeros; sizes as in `reshape`, without -1 and 0."""
        return self.op.ConstantOfShape(self._shape(shape))

    def total(self, values: Sequence[Value]) -> Value:
        """Add values up."""
        result = values[0]
        for value in values[1:]:
            result = self.op.Add(result, value)
        return result

    def loop(
        self,
        states: Sequence[Value],
        streams: Sequence[Value],
        axis: int,
        step: Callable[[Body, Sequence[Value], Sequence[Value]], Sequence[Value]],
    ) -> list[Value]:
        """Write a ``Scan``.

        Args:
            states: What every step hands on to the next, float32.
            streams: What is read one entry at a time, float32.
            axis: Along which dimension the streams are read, and the outputs put together.
            step: Takes the body under construction, its states and its entries of the streams; returns the new states
                and then what the step puts out. It may use values from outside of the loop.

        Returns:
            The last states, and what all steps put out.
        """
        self._bodies += 1
        body = Body(self._ir, f"scan_{self._bodies}")
        inputs = [body.value() for _ in (*states, *streams)]
        outputs = list(step(body, inputs[: len(states)], inputs[len(states) :]))
        graph = self._ir.Graph(inputs, outputs, nodes=body.nodes, name=body.name)
        axes = {"scan_input_axes": [axis] * len(streams), "scan_output_axes": [axis] * (len(outputs) - len(states))}
        attributes = {"body": graph, "num_scan_inputs": len(streams)} | {k: v for k, v in axes.items() if v}
        return list(self._node("Scan", [*states, *streams], attributes, len(outputs)))

    def _shape(self, sizes: Sequence[int | Value]) -> Value:
        parts = [self.integers(size) if isinstance(size, int) else size for size in sizes]
        return self.op.Concat(*parts, axis=0) if len(parts) > 1 else parts[0]

    def _node(self, kind: str, inputs: list[Value], attributes: dict[str, Any], outputs: int) -> Sequence[Value]:
        node = self._ir.node(kind, inputs, attributes, num_outputs=outputs, version=OPSET)
        self._evaluator.default().nodes.append(node)
        return list(node.outputs)


class Body:
    """The graph of one step of a loop, under construction.

    Args:
        ir: The module ``onnxscript.ir``.
        name: What the names of its values begin with.
    """

    def __init__(self, ir: Any, name: str) -> None:
        self.name = name
        self.nodes: list[Any] = []
        self._ir = ir
        self._values = 0

    def value(self) -> Value:
        """Return a new float32 value."""
        return self._named(self._ir.DataType.FLOAT)

    def __call__(self, kind: str, *inputs: Value, **attributes: Any) -> Value:
        """Write a node with one output and return that."""
        out = self._named(self._ir.DataType.BOOL) if kind == "Equal" else self.value()
        self.nodes.append(self._ir.node(kind, list(inputs), attributes, outputs=[out]))
        return out

    def _named(self, dtype: Any) -> Value:
        self._values += 1
        return self._ir.Value(name=f"{self.name}_{self._values}", type=self._ir.TensorType(dtype))
