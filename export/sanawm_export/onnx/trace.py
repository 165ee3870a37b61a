"""Torch module -> ONNX graph of one program, with the project's nodes and their function bodies."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Collection, Sequence
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from onnxscript import optimizer
from torch import Tensor, nn

from sanawm.programs import Program
from sanawm_export.onnx.nodes import DOMAIN, VERSION, GraphOps, NodeCall
from sanawm_kernels import ops

OPSET = 23
# Larger results of constant arithmetic stay computed in the graph.
FOLD_OUTPUT_ELEMENTS = 1 << 20


def _torch_export(module: nn.Module, inputs: Sequence[Tensor], input_names: Sequence[str], output_names: Sequence[str]) -> ir.Model:
    # The exporter reports absent optional libraries and its own deprecations, neither of which a user can act on.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(module.eval(), tuple(inputs), strict=False)
        program: Any = torch.onnx.export(
            exported,
            dynamo=True,
            opset_version=OPSET,
            input_names=list(input_names),
            output_names=list(output_names),
            optimize=False,
            verbose=False,
        )
    return program.model


def _simplify(model: ir.Model, weights: Collection[str] = ()) -> ir.Model:
    """Fold shape arithmetic and small constants and drop what is unused; the named weights keep their values, names and layouts."""

    def should_fold(node: ir.Node) -> bool | None:
        return False if any(x is not None and x.name in weights for x in node.inputs) else None

    # Not onnxscript's whole optimizer: its rewrite rules drop additions of constants up to 1e-8, among them the GDN denominator's.
    passes.InlinePass()(model)
    for _ in range(2):
        optimizer.fold_constants(model, should_fold=should_fold, output_size_limit=FOLD_OUTPUT_ELEMENTS, onnx_shape_inference=False)
        passes.RemoveUnusedNodesPass()(model)
    passes.IdentityEliminationPass()(model)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    passes.DeduplicateInitializersPass()(model)
    passes.CommonSubexpressionEliminationPass()(model)
    passes.RemoveUnusedFunctionsPass()(model)
    passes.RemoveUnusedOpsetsPass()(model)
    passes.OutputFixPass()(model)
    passes.NameFixPass()(model)
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
    model.metadata_props.clear()
    return model


class _Definition(nn.Module):
    def __init__(self, call: NodeCall) -> None:
        super().__init__()
        self.call = call

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return self.call.definition(*tensors)


@functools.lru_cache(maxsize=64)
def _body(call: NodeCall) -> onnx.FunctionProto:
    """The plain definition of a node, specialised to this graph's static shapes, as a function of standard operators.

    Programs of one world share most bodies, and exporting one takes seconds.
    """
    inputs = [torch.zeros(shape, dtype=dtype) for shape, dtype in call.inputs]
    outputs = call.definition(*(torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in call.inputs))
    names = [f"in_{i}" for i in range(len(inputs))]
    model = _simplify(_torch_export(_Definition(call), inputs, names, [f"out_{i}" for i in range(len(outputs))]))
    graph = model.graph
    # Functions hold no initializers: constants become nodes.
    for name, value in list(graph.initializers.items()):
        constant = ir.node("Constant", [], attributes={"value": value.const_value}, outputs=[ir.Value(name=f"{name}_constant")])
        value.replace_all_uses_with(constant.outputs[0])
        del graph.initializers[name]
        graph.insert_before(graph[0], constant)
    graph.opset_imports[""] = OPSET
    attributes = [ir.Attr(name, _attribute_type(value), None) for name, value in call.attributes]
    return ir.serde.serialize_function(ir.Function(DOMAIN, call.name, graph=graph, attributes=attributes))


def _attribute_type(value: Any) -> ir.AttributeType:
    return ir.AttributeType.FLOAT if isinstance(value, float) else ir.AttributeType.INT


TORCH_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int64": torch.int64,
    "bool": torch.bool,
    "uint8": torch.uint8,
}


def trace(program: Program, module: nn.Module) -> ir.Model:
    """ONNX graph of a program: inputs and outputs named and shaped by its signature, weights named as in the checkpoint.

    Raises ValueError when the traced module's outputs do not have the signature's dtypes and shapes.
    """
    graph_ops = GraphOps()
    inputs = [torch.zeros(t.shape, dtype=TORCH_DTYPES[t.dtype]) for t in program.inputs]
    with ops.implementation(graph_ops):
        model = _torch_export(module, inputs, [t.name for t in program.inputs], [t.name for t in program.outputs])
    _simplify(model, dict(module.named_parameters()) | dict(module.named_buffers()))
    for call in graph_ops.calls.values():
        function = ir.serde.deserialize_function(_body(call))
        model.functions[function.identifier()] = function
    if graph_ops.calls:
        model.opset_imports[DOMAIN] = VERSION
    model.graph.name = program.name
    _check(program, model)
    return model


def _check(program: Program, model: ir.Model) -> None:
    for kind, specs, values in (("input", program.inputs, model.graph.inputs), ("output", program.outputs, model.graph.outputs)):
        found = [(v.name, tuple(v.shape.numpy()) if v.shape else None, v.dtype.name.lower() if v.dtype else None) for v in values]
        names = {"float": "float32"}
        for spec, (name, shape, dtype) in zip(specs, found, strict=True):
            if (spec.name, spec.shape, spec.dtype) != (name, shape, names.get(str(dtype), dtype)):
                raise ValueError(f"{program.name}: {kind} {spec.name} should be {spec.dtype}{spec.shape}, the graph has {name} {dtype}{shape}")
