"""The sampler's Euler step as a program, so that latents stay on the device between denoising steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from sanawm.programs import Geometry, Program, TensorSpec
from sanawm_export.onnx.trace import OPSET

# onnx_ir's names of our dtypes.
_DTYPES = {"float32": ir.DataType.FLOAT, "bfloat16": ir.DataType.BFLOAT16}


def euler_programs(geometry: Geometry) -> dict[str, Program]:
    """`euler_first` and `euler_steady`: latents - sizes * velocity, one step size a frame, 0 for a frame that stays as it is."""
    config = geometry.config.dit
    found = {}
    for kind in ("first", "steady"):
        frames = geometry.frames(kind)
        shape = (1, config.in_channels, frames, config.height, config.width)
        latents, velocity, stepped = (TensorSpec(name, geometry.dtype, shape) for name in ("latents", "velocity", "stepped"))
        found[f"euler_{kind}"] = Program(f"euler_{kind}", (latents, velocity, TensorSpec("sizes", "float32", (1, 1, frames, 1, 1))), (stepped,))
    return found


def write_euler(program: Program, path: Path) -> None:
    """The graph of an Euler program: computed in float32, rounded once; frames of size 0 keep their bits."""
    latents, velocity, sizes = (_value(spec) for spec in program.inputs)
    stepped = _value(program.outputs[0])
    dtype = latents.dtype
    assert dtype is not None
    nodes: list[ir.Node] = []

    def add(op: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        nodes.append(ir.node(op, list(inputs), attributes=attributes))
        return nodes[-1].outputs[0]

    wide, speed = (value if dtype == ir.DataType.FLOAT else add("Cast", value, to=int(ir.DataType.FLOAT)) for value in (latents, velocity))
    moved = add("Sub", wide, add("Mul", sizes, speed))
    rounded = moved if dtype == ir.DataType.FLOAT else add("Cast", moved, to=int(dtype))
    nothing = ir.tensor(np.zeros(1, np.float32), name="zero")
    zero = ir.Value(name="zero", const_value=nothing, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1]))
    still = add("Equal", sizes, zero)
    nodes.append(ir.node("Where", [still, latents, rounded], outputs=[stepped]))
    graph = ir.Graph([latents, velocity, sizes], [stepped], nodes=nodes, initializers=[zero], opset_imports={"": OPSET}, name=program.name)
    ir.passes.common.NameFixPass()(model := ir.Model(graph, ir_version=10))
    path.write_bytes(ir.to_proto(model).SerializeToString())


def _value(spec: TensorSpec) -> ir.Value:
    return ir.Value(name=spec.name, type=ir.TensorType(_DTYPES[spec.dtype]), shape=ir.Shape(spec.shape))
