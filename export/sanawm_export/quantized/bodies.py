"""Definition of TRT_FP4DynamicQuantize in standard operators, so that any consumer of ONNX can run a graph that has it."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from sanawm_export.quantized.modules import DYNAMIC_QUANTIZE, TRT_DOMAIN
from sanawm_kernels.quant.formats import BLOCK, E2M1_MAX, E4M3_MAX, E4M3_SMALLEST

OPSET = 23


def dynamic_quantize_body() -> onnx.FunctionProto:
    """(x, scale) -> (e2m1 values shaped as x, e4m3 scales of blocks of 16 along the last axis), for any rank.

    Block scales are amax / (6 scale) rounded to e4m3 within [2^-9, 448]: the numerics of `sanawm_kernels.quant.formats.quantize_nvfp4`.
    """
    nodes: list[onnx.NodeProto] = []

    def add(op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(op, inputs, [output], name=f"nvfp4_{output}", **attributes))
        return output

    def constant(name: str, value: float | list[int]) -> str:
        array = np.array(value, np.int64 if isinstance(value, list) else np.float32)
        return add("Constant", [], name, value=numpy_helper.from_array(array, name))

    wide = add("Cast", ["x"], "wide", to=TensorProto.FLOAT)
    lead = add("Shape", ["x"], "lead", end=-1)
    block_shape = add("Concat", [lead, constant("per_block", [-1, BLOCK])], "block_shape", axis=0)
    blocks = add("Reshape", [wide, block_shape], "blocks")
    last = constant("last_axis", [-1])
    amax = add("ReduceMax", [add("Abs", [blocks], "magnitude"), last], "amax", keepdims=0)
    wanted = add("Div", [amax, add("Mul", [constant("largest", E2M1_MAX), "scale"], "six_scales")], "wanted")
    clipped = add("Clip", [wanted, constant("smallest", E4M3_SMALLEST), constant("top", E4M3_MAX)], "clipped")
    add("Cast", [clipped], "y_scale", to=TensorProto.FLOAT8E4M3FN)
    step = add("Mul", [add("Cast", ["y_scale"], "rounded", to=TensorProto.FLOAT), "scale"], "step")
    ratio = add("Div", [blocks, add("Unsqueeze", [step, last], "steps")], "ratio")
    bounded = add("Clip", [ratio, constant("low", -E2M1_MAX), constant("high", E2M1_MAX)], "bounded")
    flat = add("Reshape", [bounded, add("Shape", ["x"], "shape")], "flat")
    add("Cast", [flat], "y", to=TensorProto.FLOAT4E2M1)
    return helper.make_function(
        TRT_DOMAIN,
        DYNAMIC_QUANTIZE,
        ["x", "scale"],
        ["y", "y_scale"],
        nodes,
        [helper.make_opsetid("", OPSET)],
        attributes=["axis", "block_size", "scale_type"],
    )


def add_bodies(model: ir.Model) -> ir.Model:
    """Give the model the body of its dynamic quantization, in place, where it has such nodes."""
    if any(node.op_type == DYNAMIC_QUANTIZE for node in model.graph):
        function = ir.serde.deserialize_function(dynamic_quantize_body())
        model.functions[function.identifier()] = function
        model.opset_imports[TRT_DOMAIN] = 1
    return model


def e2m1_as_e4m3(codes: np.ndarray) -> np.ndarray:
    """e2m1 numbers in e4m3, which has all of them."""
    return codes.astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
