"""bfloat16 graphs for ONNX Runtime's CPU provider, which has no bfloat16 arithmetic.

Every operator that would compute in bfloat16 reads its operands widened to float32 and rounds its results to bfloat16: what a device with
float32 accumulation does, operator by operator. Weights and state stay bfloat16 in files and memory.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

BF16 = ir.DataType.BFLOAT16
F32 = ir.DataType.FLOAT
# Operators that move data without computing, and have bfloat16 kernels on the CPU.
_MOVES = {"Cast", "Reshape", "Transpose", "Identity", "Squeeze", "Unsqueeze", "Constant"}


def widen_bfloat16(model: ir.Model) -> ir.Model:
    """Rewrite `model` in place and return it; graph inputs and outputs keep their dtypes. Function bodies are inlined first."""
    ir.passes.common.InlinePass()(model)
    _infer(model)
    graph = model.graph
    widened: dict[ir.Value, ir.Value] = {}
    for node in list(graph):
        if node.op_type in _MOVES or not _touches(node):
            continue
        for i, value in enumerate(node.inputs):
            if value is not None and value.dtype == BF16:
                node.replace_input_with(i, _widen(graph, node, value, widened))
        for output in list(node.outputs):
            if output.dtype == BF16:
                _narrow(graph, node, output)
        if node.op_type == "ConstantOfShape":
            raise ValueError("a bfloat16 ConstantOfShape cannot be widened; make the constant explicit")
    return model


def _infer(model: ir.Model) -> None:
    inferred: Any = ir.passes.common.ShapeInferencePass()(model)
    missing = [v.name for node in model.graph for v in node.outputs if v.dtype is None and v.uses()]
    if missing:
        raise ValueError(f"no element type is known for {', '.join(map(str, missing[:5]))}; shape inference failed ({inferred})")


def _touches(node: ir.Node) -> bool:
    return any(v is not None and v.dtype == BF16 for v in (*node.inputs, *node.outputs))


def _cast(value: ir.Value, dtype: ir.DataType, name: str) -> ir.Node:
    out = ir.Value(name=name, type=ir.TensorType(dtype), shape=value.shape)
    return ir.node("Cast", [value], attributes={"to": int(dtype)}, outputs=[out])


def _widen(graph: ir.Graph, before: ir.Node, value: ir.Value, widened: dict[ir.Value, ir.Value]) -> ir.Value:
    if value not in widened:
        node = _cast(value, F32, f"{value.name}__wide")
        graph.insert_before(before, node)
        widened[value] = node.outputs[0]
    return widened[value]


def _narrow(graph: ir.Graph, node: ir.Node, output: ir.Value) -> None:
    name = output.name
    wide = ir.Value(name=f"{name}__exact", type=ir.TensorType(F32), shape=output.shape)
    cast = _cast(wide, BF16, f"{name}__rounded")
    rounded = cast.outputs[0]
    graph.insert_after(node, cast)
    output.replace_all_uses_with(rounded, replace_graph_outputs=True)
    # The node now produces `wide`; the rounded value takes over the name.
    output.name, output.type = wide.name, wide.type
    cast.replace_input_with(0, output)
    rounded.name = name
