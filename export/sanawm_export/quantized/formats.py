"""The precision of every matrix product as a graph really has it, read back from its nodes."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from sanawm_calibration.recipe import Format, LayerFormat
from sanawm_export.quantized.modules import DYNAMIC_QUANTIZE

# Nodes between a stored weight and the product that reads it.
_WEIGHT_PATH = {"Transpose", "Cast", "DequantizeLinear", "Identity"}
_WEIGHT_FORMATS: dict[ir.DataType, Format] = {ir.DataType.FLOAT4E2M1: "nvfp4", ir.DataType.FLOAT8E4M3FN: "fp8"}
_QUANTIZERS: dict[str, Format] = {DYNAMIC_QUANTIZE: "nvfp4", "QuantizeLinear": "fp8"}


def weight_of(node: ir.Node) -> ir.Value | None:
    """The stored matrix that a MatMul multiplies by, None for a product of two activations."""
    value = node.inputs[1]
    while value is not None:
        if value.const_value is not None:
            return value
        producer = value.producer()
        if producer is None or producer.op_type not in _WEIGHT_PATH:
            return None
        value = producer.inputs[0]
    return None


def _input_format(node: ir.Node) -> Format:
    """How a MatMul's activation is quantized."""
    value = node.inputs[0]
    while value is not None and (producer := value.producer()) is not None:
        if producer.op_type in _QUANTIZERS:
            return _QUANTIZERS[producer.op_type]
        if producer.op_type not in ("Cast", "DequantizeLinear"):
            break
        value = producer.inputs[0]
    return "bf16"


def products(model: ir.Model, prefix: str = "") -> dict[str, ir.Node]:
    """MatMul nodes by the layer whose stored weight they multiply by; `prefix` stands before the layers' names in the graph."""
    found: dict[str, ir.Node] = {}
    for node in model.graph:
        if node.op_type == "MatMul" and (weight := weight_of(node)) is not None and str(weight.name).endswith(".weight"):
            found[str(weight.name).removeprefix(prefix).removesuffix(".weight")] = node
    return found


def graph_formats(model: ir.Model, prefix: str = "") -> dict[str, Format]:
    """Format of every layer in a graph; `bf16` stands for the graph's own dtype.

    Raises ValueError for a product whose weight and activation are quantized differently, which no engine runs as it is meant.
    """
    found: dict[str, Format] = {}
    for name, node in products(model, prefix).items():
        weight = weight_of(node)
        assert weight is not None and weight.dtype is not None
        stored, given = _WEIGHT_FORMATS.get(weight.dtype, "bf16"), _input_format(node)
        if stored != given:
            raise ValueError(f"{name}: the weight is stored in {stored} and its input is quantized to {given}")
        found[name] = stored
    return found


def check_formats(found: Mapping[str, Format], table: Mapping[str, LayerFormat], what: str) -> None:
    """Raise ValueError where a graph's formats differ from a recipe's layer table."""
    for name, layer_format in found.items():
        # Products that are no layers of the table, such as low-rank corrections, are never quantized.
        wanted = table[name].format if name in table else "bf16"
        if layer_format != wanted:
            raise ValueError(f"{what}: {name} is {layer_format} in the graph and {wanted} in the recipe")


def name_products(model: ir.Model, prefix: str = "") -> None:
    """Name each layer's MatMul `<layer>/matmul`, so that an engine's own report can be read."""
    for name, node in products(model, prefix).items():
        node.name = f"{name}/matmul"
