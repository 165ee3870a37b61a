"""Quantized graphs for judges on a CPU.

onnx's reference evaluator runs them as they are, through the body of the dynamic quantization. ONNX Runtime has no FP4 on the CPU, so for it
the FP4 values are carried in types that have them all: stored weights in e4m3, activations in float32. The numbers are the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from sanawm_export.onnx.cpu import widen_bfloat16
from sanawm_export.quantized.bodies import e2m1_as_e4m3
from sanawm_kernels.quant.formats import BLOCK, E2M1_MAX

F32, FP4, FP8 = ir.DataType.FLOAT, ir.DataType.FLOAT4E2M1, ir.DataType.FLOAT8E4M3FN


def lower_for_onnxruntime(model: ir.Model) -> ir.Model:
    """Rewrite a quantized graph in place for ONNX Runtime's CPU provider and return it; functions are inlined.

    FP4 weights are read and move into the graph as e4m3, so this is for graphs that are judged, not for bundles.
    """
    ir.passes.common.InlinePass()(model)
    ir.passes.common.ShapeInferencePass()(model)
    graph = model.graph
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.dtype == FP4:
            value.const_value = ir.Tensor(e2m1_as_e4m3(tensor.numpy()), name=value.name)
            value.dtype = FP8
    for node in list(graph):
        if node.op_type == "Cast" and node.attributes["to"].as_int() == FP4:
            _round_to_e2m1(graph, node)
        elif node.op_type == "DequantizeLinear" and "block_size" in node.attributes:
            _dequantize_blocks(graph, node)
    return widen_bfloat16(model)


class _Rewriter:
    """Builds nodes before another one and takes over its output."""

    def __init__(self, graph: ir.Graph, before: ir.Node) -> None:
        self.graph, self.before, self.count = graph, before, 0

    def value(self, array: Any) -> ir.Value:
        """A constant as an initializer of the graph."""
        name = self._name()
        found = ir.Value(name=name, const_value=ir.Tensor(array, name=name), type=ir.TensorType(ir.DataType.from_numpy(array.dtype)))
        found.shape = ir.Shape(array.shape)
        self.graph.register_initializer(found)
        return found

    def add(self, op: str, inputs: list[ir.Value], dtype: ir.DataType, **attributes: Any) -> ir.Value:
        output = ir.Value(name=self._name(), type=ir.TensorType(dtype))
        node = ir.node(op, inputs, attributes=attributes, outputs=[output])
        self.graph.insert_before(self.before, node)
        return output

    def finish(self, value: ir.Value) -> None:
        old = self.before.outputs[0]
        value.shape = old.shape
        old.replace_all_uses_with(value)
        self.graph.remove(self.before, safe=True)

    def _name(self) -> str:
        self.count += 1
        return f"{self.before.outputs[0].name}__judge_{self.count}"


def _round_to_e2m1(graph: ir.Graph, node: ir.Node) -> None:
    """The cast's numbers in float32: spacing 0.5 under 2, 1 under 4, 2 above, ties to even. Its input lies within [-6, 6]."""
    new = _Rewriter(graph, node)
    x = node.inputs[0]
    assert x is not None
    magnitude = new.add("Abs", [x], F32)
    spacing = new.value(np.float32(0.5).reshape(()))
    for edge, more in ((2.0, 0.5), (4.0, 1.0)):
        above = new.add("GreaterOrEqual", [magnitude, new.value(np.float32(edge).reshape(()))], ir.DataType.BOOL)
        step = new.add("Mul", [new.add("Cast", [above], F32, to=int(F32)), new.value(np.float32(more).reshape(()))], F32)
        spacing = new.add("Add", [spacing, step], F32)
    rounded = new.add("Mul", [new.add("Round", [new.add("Div", [magnitude, spacing], F32)], F32), spacing], F32)
    bounded = new.add("Min", [rounded, new.value(np.float32(E2M1_MAX).reshape(()))], F32)
    new.finish(new.add("Mul", [bounded, new.add("Sign", [x], F32)], F32))


def _dequantize_blocks(graph: ir.Graph, node: ir.Node) -> None:
    """values * scales of blocks of 16 along the last axis, on static shapes."""
    new = _Rewriter(graph, node)
    values, scales = node.inputs[0], node.inputs[1]
    assert values is not None and scales is not None
    shape = node.outputs[0].shape
    assert shape is not None
    *lead, width = shape.numpy()
    wide = values if values.dtype == F32 else new.add("Cast", [values], F32, to=int(F32))
    blocks = new.add("Reshape", [wide, new.value(np.array([*lead, width // BLOCK, BLOCK], np.int64))], F32)
    steps = new.add("Reshape", [scales, new.value(np.array([*lead, width // BLOCK, 1], np.int64))], F32)
    product = new.add("Mul", [blocks, steps], F32)
    new.finish(new.add("Reshape", [product, new.value(np.array([*lead, width], np.int64))], F32))
