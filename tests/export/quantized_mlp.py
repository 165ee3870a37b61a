"""Small graphs of linear layers in mixed precision, in the node patterns that TensorRT compiles to FP4 and FP8 products."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnx import ModelProto, TensorProto, helper

from sanawm_export.tensorrt import graph, network
from sanawm_runtime.engines._trt_library import open_library

WIDTH, ROWS = 256, 64


class _Layers:
    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.weights: list[Any] = []
        self.rng = np.random.default_rng(0)

    def node(self, op: str, inputs: list[str], outputs: list[str], **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, outputs, **attributes))
        return outputs[0]

    def stored(self, name: str, kind: int, shape: list[int], data: bytes) -> str:
        self.weights.append(helper.make_tensor(name, kind, shape, data, raw=True))
        return name

    def scalar(self, name: str, value: float) -> str:
        return self.stored(name, TensorProto.FLOAT, [], np.float32(value).tobytes())

    def weight(self, name: str, kind: str) -> str:
        shape, w = [WIDTH, WIDTH], f"{name}.weight"
        if kind == "nvfp4":
            self.stored(w, TensorProto.FLOAT4E2M1, shape, self.rng.integers(0, 256, WIDTH * WIDTH // 2, np.uint8).tobytes())
            scales = self.rng.uniform(1, 9, (WIDTH, WIDTH // 16)).astype(ml_dtypes.float8_e4m3fn)
            self.stored(f"{w}_scale", TensorProto.FLOAT8E4M3FN, [WIDTH, WIDTH // 16], scales.tobytes())
            steps = self.node("DequantizeLinear", [f"{w}_scale", self.scalar(f"{w}_scale_2", 0.01)], [f"{w}_steps"])
            wide = self.node("DequantizeLinear", [w, steps], [f"{w}_wide"], axis=-1, block_size=16)
        elif kind == "fp8":
            self.stored(w, TensorProto.FLOAT8E4M3FN, shape, self.rng.uniform(-3, 3, shape).astype(ml_dtypes.float8_e4m3fn).tobytes())
            wide = self.node("DequantizeLinear", [w, self.scalar(f"{w}_scale", 0.0625)], [f"{w}_wide"])
        else:
            wide = self.stored(w, TensorProto.BFLOAT16, shape, self.rng.uniform(-1, 1, shape).astype(ml_dtypes.bfloat16).tobytes())
        if kind != "bf16":
            wide = self.node("Cast", [wide], [f"{w}_cast"], to=TensorProto.BFLOAT16)
        return self.node("Transpose", [wide], [f"{w}_t"], perm=[1, 0])

    def activation(self, name: str, x: str, kind: str) -> str:
        if kind == "bf16":
            return x
        scale = self.scalar(f"{name}_x", 0.125)
        if kind == "nvfp4":
            self.node("TRT_FP4DynamicQuantize", [x, scale], [f"{name}_q", f"{name}_s"], domain="trt", axis=-1, block_size=16, scale_type=17)
            steps = self.node("DequantizeLinear", [f"{name}_s", scale], [f"{name}_steps"])
            wide = self.node("DequantizeLinear", [f"{name}_q", steps], [f"{name}_wide"], axis=-1, block_size=16)
        else:
            zero = self.stored(f"{name}_zero", TensorProto.FLOAT8E4M3FN, [], b"\0")
            self.node("Cast", [x], [f"{name}_f"], to=TensorProto.FLOAT)
            self.node("QuantizeLinear", [f"{name}_f", scale, zero], [f"{name}_q"])
            wide = self.node("DequantizeLinear", [f"{name}_q", scale], [f"{name}_wide"])
        return self.node("Cast", [wide], [f"{name}_cast"], to=TensorProto.BFLOAT16)


def mlp(layers: dict[str, tuple[str, str]]) -> ir.Model:
    """Linear layers one after another: name -> (format of the weight, format of the activation)."""
    made, x = _Layers(), "x"
    for name, (weight, activation) in layers.items():
        given = made.activation(name, x, activation)
        x = made.node("Relu", [made.node("MatMul", [given, made.weight(name, weight)], [f"{name}_y"])], [f"{name}_relu"])
    made.node("Identity", [x], ["y"])
    infos = [helper.make_tensor_value_info(name, TensorProto.BFLOAT16, [1, ROWS, WIDTH]) for name in ("x", "y")]
    proto: ModelProto = helper.make_model(
        helper.make_graph(made.nodes, "mlp", infos[:1], infos[1:], made.weights),
        opset_imports=[helper.make_opsetid("", 23), helper.make_opsetid("trt", 1)],
        ir_version=11,
    )
    model = ir.serde.deserialize_model(proto)
    ir.passes.common.ShapeInferencePass()(model)
    return model


def build(model: ir.Model, path: Path, capability: str = "sm_120") -> Path:
    """The graph's engine at `path`."""
    library = open_library("tensorrt_rtx")
    parsed = network.parse(library, graph.serialize(model), path.parent)
    config = network.configure(library, parsed, capability, network.BuildOptions())
    with open(path, "wb") as file:
        network.serialize(library, parsed, config, file.write)
    return path
