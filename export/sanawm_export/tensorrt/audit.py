"""Precision asked and precision realised, layer by layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from sanawm.errors import UserError
from sanawm_export.tensorrt.plan import Plan

# How element types are called in recipes, reports and manifests.
_WORDS = {
    ir.DataType.FLOAT: "fp32",
    ir.DataType.FLOAT16: "fp16",
    ir.DataType.BFLOAT16: "bf16",
    ir.DataType.FLOAT8E4M3FN: "fp8",
    ir.DataType.FLOAT4E2M1: "nvfp4",
}
QUANTIZED = ("fp8", "nvfp4")
# Between a quantized value and its use: the value itself stays what it was.
_TRANSPARENT = {"Cast", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Identity"}
_DYNAMIC_FP4 = "TRT_FP4DynamicQuantize"
# A layer whose product the library evaluated while building, and one that it computes inside a generated kernel.
CONSTANT, GENERATED = "constant", "generated"


@dataclass(frozen=True)
class AuditRow:
    """One layer: what the graph asks for and what the engine computes."""

    layer: str
    asked: str
    realised: str

    @property
    def agrees(self) -> bool:
        # Small unquantized products may be computed inside other kernels, in the types the graph states.
        return self.asked == self.realised or (self.realised in (CONSTANT, GENERATED) and self.asked not in QUANTIZED)


def asked_precision(node: ir.Node) -> str:
    """What a multiplication of the graph asks for: one word if both operands agree, else both."""
    first, second = (_operand(value) for value in node.inputs[:2])
    return first if first == second else f"{first} x {second}"


def _operand(value: ir.Value | None) -> str:
    dtype = value.dtype if value is not None else None
    while value is not None:
        node = value.producer()
        if node is None:
            break
        if node.op_type == _DYNAMIC_FP4:
            return "nvfp4"
        if node.op_type == "DequantizeLinear":
            value = node.inputs[0]
            found = _quantized(value)
            if found is not None:
                return found
            continue
        if node.op_type not in _TRANSPARENT:
            break
        if dtype is None and node.op_type == "Cast":
            dtype = ir.DataType(node.attributes["to"].as_int())
        value = node.inputs[0]
    if dtype is None and value is not None:
        dtype = value.dtype
    return _WORDS.get(dtype, str(dtype)) if dtype is not None else "unknown"


def _quantized(value: ir.Value | None) -> str | None:
    """The storage type of a value that is dequantized, if it is a low-precision one."""
    if value is None:
        return None
    dtype = value.dtype or (value.const_value.dtype if value.const_value is not None else None)
    node = value.producer()
    if node is not None and node.op_type == _DYNAMIC_FP4:
        # Its second output is the block scale, which itself is dequantized.
        return "nvfp4"
    if node is not None and node.op_type == "QuantizeLinear" and dtype is None:
        zero = node.inputs[2] if len(node.inputs) > 2 else None
        dtype = zero.dtype if zero is not None else ir.DataType(node.attributes["output_dtype"].as_int())
    word = _WORDS.get(dtype, "") if dtype is not None else ""
    return word if word in QUANTIZED else None


def asked_precisions(layers: Mapping[str, ir.Node]) -> dict[str, str]:
    """Precision of each layer whose product depends on the program's inputs; the others are constants of the engine."""
    if not layers:
        return {}
    graph = next(iter(layers.values())).graph
    assert graph is not None
    depends: set[ir.Value] = set(graph.inputs)
    for node in graph:
        if any(value in depends for value in node.inputs):
            depends.update(node.outputs)
    return {name: asked_precision(node) for name, node in layers.items() if any(value in depends for value in node.inputs)}


def audit(asked: Mapping[str, str], plan: Plan) -> list[AuditRow]:
    """Compare each layer with the compiled multiplications that it became part of."""
    realised: dict[str, set[str]] = {}
    for gemm in plan.gemms:
        for layer in gemm.layers:
            realised.setdefault(layer, set()).add(gemm.precision)
    missing = CONSTANT if not plan.gemms else GENERATED
    return [AuditRow(layer, word, " and ".join(sorted(realised.get(layer, {missing})))) for layer, word in asked.items()]


def require_agreement(program: str, rows: Iterable[AuditRow]) -> None:
    """Raise UserError that lists the layers whose precision is not the one asked for."""
    wrong = [row for row in rows if not row.agrees]
    if not wrong:
        return
    listed = "; ".join(f"{row.layer} asked {row.asked}, got {row.realised}" for row in wrong[:5])
    more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
    raise UserError(f"{program}: the engine does not compute what the recipe asks: {listed}{more}; choose another recipe for this target")


def require_recipe(program: str, asked: Mapping[str, str], recipe: Mapping[str, str]) -> None:
    """Raise UserError unless the graph asks for exactly the recipe's precision in each layer that the recipe names."""
    differ = [layer for layer, word in recipe.items() if layer in asked and asked[layer] != word]
    if differ:
        listed = "; ".join(f"{layer} is {asked[layer]} in the graph and {recipe[layer]} in the recipe" for layer in differ[:5])
        raise UserError(f"{program}: the exported graph is not the recipe's: {listed}; export it again")


def counts(rows: Iterable[AuditRow]) -> dict[str, int]:
    """Number of layers by realised precision, most first."""
    found = Counter(row.realised for row in rows)
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))
