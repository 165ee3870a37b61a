"""Rewriting of an exported graph into what TensorRT's parser takes, without changing what it computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes import common as passes
from onnxscript import optimizer

from sanawm_export.onnx.nodes import DOMAIN
from sanawm_export.onnx.trace import FOLD_OUTPUT_ELEMENTS

# Operators between a weight and the multiplication that uses it.
_CARRIERS = {"Transpose", "Cast", "DequantizeLinear", "Reshape", "Squeeze", "Unsqueeze", "Identity"}
_GEMMS = ("MatMul", "Gemm", "Conv")
# Operators that move uint8 values without changing them, so that the conversion may as well follow.
_MOVES = {"Squeeze", "Unsqueeze", "Transpose", "Reshape"}


def load_graph(path: Path) -> ir.Model:
    """An exported graph with the types that ONNX can infer; weights stay in their file."""
    model = ir.load(path)
    passes.ShapeInferencePass()(model)
    return model


def inline(model: ir.Model, keep: Callable[[str], bool] = lambda op_type: False) -> None:
    """Replace the project's nodes by their function bodies, except the kinds that `keep` says, and fold what became constant.

    Functions of other domains describe operators that the library has itself; their nodes stay, without the description.
    """
    stay = [i for i in model.functions if i[0] != DOMAIN or keep(i[1])]
    # A node's body has to go before: the parser would use it instead of the operator.
    for identifier in stay:
        del model.functions[identifier]
    passes.InlinePass()(model)
    _fold(model)


def _fold(model: ir.Model) -> None:
    weights = {name for name, value in model.graph.initializers.items() if isinstance(value.const_value, ir.ExternalTensor)}

    def should_fold(node: ir.Node) -> bool | None:
        return False if any(x is not None and x.name in weights for x in node.inputs) else None

    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    optimizer.fold_constants(model, should_fold=should_fold, output_size_limit=FOLD_OUTPUT_ELEMENTS, onnx_shape_inference=False)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    passes.IdentityEliminationPass()(model)
    passes.RemoveUnusedNodesPass()(model)
    passes.DeduplicateInitializersPass()(model)
    passes.NameFixPass()(model)


def sink_uint8(model: ir.Model) -> None:
    """Move conversions to uint8 to the graph's end: the library has uint8 at a network's border only. Raises ValueError if one cannot move."""
    graph = model.graph
    for cast in [n for n in graph if n.op_type == "Cast" and n.attributes["to"].as_int() == int(ir.DataType.UINT8)]:
        (source,), result = cast.inputs, cast.outputs[0]
        assert source is not None
        movers: list[ir.Node] = []
        while not result.is_graph_output():
            (use,) = result.uses()
            if use.node.op_type not in _MOVES:
                raise ValueError(f"{graph.name}: {use.node.op_type} computes on uint8 values, which TensorRT cannot; convert after it")
            movers.append(use.node)
            result = use.node.outputs[0]
        if not movers:
            continue
        movers[0].replace_input_with(0, source)
        for node in movers:
            node.outputs[0].type = ir.TensorType(source.dtype or ir.DataType.FLOAT)
        last = ir.Value(name=result.name, type=ir.TensorType(ir.DataType.UINT8), shape=result.shape)
        result.name = f"{result.name}__wide"
        graph.append(ir.node("Cast", [result], attributes={"to": int(ir.DataType.UINT8)}, outputs=[last]))
        graph.outputs[list(graph.outputs).index(result)] = last
        graph.remove(cast, safe=True)


def weight_of(node: ir.Node) -> ir.Value | None:
    """The stored weight that a multiplication or convolution uses, or None for a product of two activations."""
    for value in node.inputs[:2]:
        while value is not None and not value.is_initializer():
            producer = value.producer()
            if producer is None or producer.op_type not in _CARRIERS:
                value = None
            else:
                value = producer.inputs[0]
        if value is not None:
            return value
    return None


def layer_name(weight: ir.Value) -> str:
    """The layer that a stored weight belongs to: "blocks.0.attn.qkv" for "blocks.0.attn.qkv.weight"."""
    name = weight.name or ""
    return name.rpartition(".")[0] if name.rpartition(".")[2].startswith("weight") else name


def name_layers(model: ir.Model) -> dict[str, ir.Node]:
    """Name every multiplication with a stored weight after its layer, which engines carry along. Returns the nodes by that name."""
    named: dict[str, ir.Node] = {}
    for node in model.graph:
        if node.op_type not in _GEMMS:
            continue
        weight = weight_of(node)
        if weight is None:
            continue
        layer = layer_name(weight)
        name = layer if layer not in named else f"{layer}#{sum(1 for n in named if n.partition('#')[0] == layer)}"
        node.name = name
        named[name] = node
    for node in model.graph:
        if node.name in named and named[node.name] is not node:
            node.name = f"{node.name}__other"
    return named


def serialize(model: ir.Model) -> bytes:
    """The graph as ONNX bytes; weights as references into their file."""
    return ir.to_proto(model).SerializeToString()


def external_files(model: ir.Model) -> set[Path]:
    """The weight files that a graph points into."""
    return {Path(t.path) for t in _tensors(model) if isinstance(t, ir.ExternalTensor)}


def _tensors(model: ir.Model) -> Iterable[ir.TensorProtocol]:
    return (v.const_value for v in model.graph.initializers.values() if v.const_value is not None)
