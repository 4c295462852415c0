"""A small writer of ONNX graphs: values with Python's operators, constants made once, nested bodies.

Everything is appended in program order with counted names, so that two builds are byte-identical.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Union

import numpy as np
import onnx
from onnx import helper, numpy_helper

Operand = Union["Value", int, float]


class Value:
    """A tensor of the graph being written. Python ints become int64 constants, floats float32 ones."""

    def __init__(self, graph: Graph, name: str) -> None:
        self.graph = graph
        self.name = name

    def __add__(self, other: Operand) -> Value:
        return self.graph.op("Add", self, other)

    def __sub__(self, other: Operand) -> Value:
        return self.graph.op("Sub", self, other)

    def __rsub__(self, other: Operand) -> Value:
        return self.graph.op("Sub", other, self)

    def __mul__(self, other: Operand) -> Value:
        return self.graph.op("Mul", self, other)

    def __floordiv__(self, other: Operand) -> Value:
        """Integer division; ONNX truncates, so both operands must not be negative."""
        return self.graph.op("Div", self, other)

    def __mod__(self, other: Operand) -> Value:
        """Integer remainder with the sign of the divisor, as in Python."""
        return self.graph.op("Mod", self, other)

    def __lt__(self, other: Operand) -> Value:
        return self.graph.op("Less", self, other)

    def __le__(self, other: Operand) -> Value:
        return self.graph.op("LessOrEqual", self, other)

    def __gt__(self, other: Operand) -> Value:
        return self.graph.op("Greater", self, other)

    def __ge__(self, other: Operand) -> Value:
        return self.graph.op("GreaterOrEqual", self, other)

    def __and__(self, other: Value) -> Value:
        return self.graph.op("And", self, other)

    def __or__(self, other: Value) -> Value:
        return self.graph.op("Or", self, other)

    def cast(self, dtype: int) -> Value:
        """dtype: a member of onnx.TensorProto.DataType."""
        return self.graph.op("Cast", self, to=dtype)

    def dim(self, axis: int) -> Value:
        """Length along an axis, int64 [1]."""
        return self.graph.op("Shape", self, start=axis, end=axis + 1)

    def reshape(self, *dims: Operand) -> Value:
        """dims: ints and int64 [1] values; the int 0 copies the input's, -1 is what remains.

        Only with all dims spelled out may the tensor be empty: else ONNX Runtime's fusion puts in a -1.
        """
        parts = [self.graph.ints(d) if isinstance(d, int) else d for d in dims]
        spelled_out = not any(isinstance(d, int) and d <= 0 for d in dims)
        return self.graph.op("Reshape", self, self.graph.op("Concat", *parts, axis=0), allowzero=int(spelled_out))

    def transpose(self, *perm: int) -> Value:
        return self.graph.op("Transpose", self, perm=perm)

    def unsqueeze(self, *axes: int) -> Value:
        return self.graph.op("Unsqueeze", self, self.graph.ints(*axes))

    def slice(self, axis: int, start: Operand, end: Operand, step: Operand = 1) -> Value:
        bounds = [self.graph.ints(b) if isinstance(b, int) else b for b in (start, end, axis, step)]
        return self.graph.op("Slice", self, *bounds)

    def rows(self, index: Value) -> Value:
        """Rows of axis 1, chosen for each batch row: self [B, n, ...], index [B, m] -> [B, m, ...]."""
        return self.graph.op("GatherND", self, index.unsqueeze(-1), batch_dims=1)


class Graph:
    """The nodes written so far; the innermost list is the body that is being written."""

    def __init__(self) -> None:
        self._bodies: list[list[onnx.NodeProto]] = [[]]
        self._constants: dict[bytes, Value] = {}
        self._count = 0

    @property
    def nodes(self) -> list[onnx.NodeProto]:
        return self._bodies[0]

    def value(self, name: str) -> Value:
        """A value that the graph does not make: an input."""
        return Value(self, name)

    def op(self, op_type: str, *inputs: Operand, name: str = "", **attributes: object) -> Value:
        """One node with one output; ``name`` makes it an output of the function."""
        made = Value(self, name or self._name(op_type))
        self._append(op_type, inputs, [made], attributes)
        return made

    def multi(self, op_type: str, outputs: int, *inputs: Operand, **attributes: object) -> list[Value]:
        """One node with several outputs."""
        made = [Value(self, self._name(op_type)) for _ in range(outputs)]
        self._append(op_type, inputs, made, attributes)
        return made

    def _append(
        self, op_type: str, inputs: Sequence[Operand], made: list[Value], attributes: dict[str, object]
    ) -> None:
        operands = [self._operand(x).name for x in inputs]
        self._bodies[-1].append(helper.make_node(op_type, operands, [v.name for v in made], **attributes))

    def attribute(self, name: str, kind: type) -> Value:
        """An attribute of the function as a scalar: int64 or float32."""
        field, type_ = (
            ("value_int", onnx.AttributeProto.INT) if kind is int else ("value_float", onnx.AttributeProto.FLOAT)
        )
        node = helper.make_node("Constant", [], [self._name(name)])
        node.attribute.append(onnx.AttributeProto(name=field, ref_attr_name=name, type=type_))
        self._bodies[0].append(node)
        return Value(self, node.output[0])

    def constant(self, array: np.ndarray) -> Value:
        """A constant; equal ones are shared and lie outside all bodies."""
        tensor = numpy_helper.from_array(array)
        key = tensor.SerializeToString(deterministic=True)
        if key not in self._constants:
            name = self._name("Constant")
            self._bodies[0].append(helper.make_node("Constant", [], [name], value=tensor))
            self._constants[key] = Value(self, name)
        return self._constants[key]

    def ints(self, *values: int) -> Value:
        """int64 [len(values)]."""
        return self.constant(np.array(values, dtype=np.int64))

    def arange(self, length: Value) -> Value:
        """int64 0 .. length - 1; length is a scalar or of shape [1]."""
        return self.op("Range", 0, self.op("Squeeze", length), 1)

    def take(self, table: Value, index: Value) -> Value:
        """table [n, ...], index [...] -> [*index.shape, ...]; an index outside the table is a run-time error."""
        return self.op("Gather", table, index, axis=0)

    def where(self, condition: Value, yes: Operand, no: Operand) -> Value:
        return self.op("Where", condition, yes, no)

    def scan(
        self,
        body: Callable[..., tuple[list[Value], list[Value]]],
        states: Sequence[Value],
        inputs: Sequence[tuple[Value, int]],
        outputs: int = 0,
        reverse: bool = False,
    ) -> list[Value]:
        """Loop over an axis of the inputs.

        Args:
            body: (*states, *slices) -> (next states, per-step outputs).
            states: what the first step gets.
            inputs: (tensor, axis to walk along).
            outputs: how many per-step outputs; each is stacked along a new first axis.
            reverse: walk, and stack, from the end.
        Returns:
            The last states, then the stacked outputs.
        """
        arguments = [self._name("step") for _ in range(len(states) + len(inputs))]
        made: list[Value] = []

        def write() -> list[Value]:
            after, stacked = body(*map(self.value, arguments))
            assert len(after) == len(states)
            assert len(stacked) == outputs
            made.extend([*after, *stacked])
            return made

        graph = self._body(write, arguments)
        attributes: dict[str, object] = {"body": graph, "num_scan_inputs": len(inputs)}
        attributes["scan_input_axes"] = [axis for _, axis in inputs]
        attributes["scan_input_directions"] = [int(reverse)] * len(inputs)
        if outputs:
            attributes["scan_output_directions"] = [int(reverse)] * outputs
        return self.multi("Scan", len(states) + outputs, *states, *(x for x, _ in inputs), **attributes)

    def choose(self, condition: Value, yes: Callable[[], Value], no: Callable[[], Value], name: str = "") -> Value:
        """Only the chosen side is computed."""
        then, otherwise = self._body(lambda: [yes()], []), self._body(lambda: [no()], [])
        return self.op("If", condition, name=name, then_branch=then, else_branch=otherwise)

    def _body(self, write: Callable[[], list[Value]], arguments: list[str]) -> onnx.GraphProto:
        self._bodies.append([])
        # A body's outputs must be its own: one that lies outside, or appears twice, is passed on by Identity.
        names = [self.op("Identity", v).name for v in write()]
        nodes = self._bodies.pop()
        return helper.make_graph(
            nodes, self._name("body"), [onnx.ValueInfoProto(name=n) for n in arguments], [_untyped(n) for n in names]
        )

    def _operand(self, x: Operand) -> Value:
        if isinstance(x, Value):
            return x
        return self.constant(np.array(x, dtype=np.float32 if isinstance(x, float) else np.int64))

    def _name(self, stem: str) -> str:
        self._count += 1
        return f"{stem}_{self._count}"


def _untyped(name: str) -> onnx.ValueInfoProto:
    return onnx.ValueInfoProto(name=name)
