"""bfloat16 graphs on ONNX Runtime's CPU provider, which computes in float32, against the torch model in bfloat16."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from sanawm.bfloat16 import from_bits, to_bits
from sanawm.config import DiTConfig, tiny_config
from sanawm.programs import Geometry, programs
from sanawm_export.onnx.cpu import widen_bfloat16
from sanawm_export.onnx.export import export_part, program_module
from sanawm_runtime.engines.onnxruntime import session_options

SMALL = DiTConfig(
    in_channels=6, hidden=64, depth=2, softmax_every=2, head_dim=16, cross_heads=2, caption_channels=16, text_tokens=6, height=2, width=3
)
FRAMES = 3


@pytest.fixture(scope="module")
def geometry() -> Geometry:
    tiny = tiny_config()
    parts: dict[str, Any] = {"vae": replace(tiny.vae, latent_channels=6), "text": replace(tiny.text, hidden=16)}
    return Geometry(replace(tiny, dit=SMALL, **parts), prompt_tokens=8, first_frames=FRAMES, dtype="bfloat16")


@pytest.fixture(scope="module")
def exported(geometry: Geometry, tmp_path_factory: pytest.TempPathFactory, make_model: Any) -> Path:
    folder = tmp_path_factory.mktemp("bfloat16")
    names = ["prompt_kv", "denoise_first"]
    assert [e.program.name for e in export_part("dit", make_model(SMALL, 1, torch.bfloat16), geometry, folder, names=names, cpu=True)] == names
    return folder


def feeds(program: Any, model: Any, clip: Any) -> dict[str, torch.Tensor]:
    from sanawm.model.sampler import camera_features

    text, camera = clip.features(model), camera_features(model, clip.camera, clip.plucker, 0, FRAMES)
    named = {"latents": clip.latents.to(model.dtype), "timestep": torch.tensor([[0.0, 727.0, 727.0]]), "text_mask": clip.mask}
    named |= {name: getattr(camera, name) for name in ("rays", "rays_inverse", "cos", "sin", "cam_cos", "cam_sin")}
    for i in range(SMALL.depth):
        named |= {f"plucker.{i}": camera.plucker[i], f"keys.{i}": text.keys[i], f"values.{i}": text.values[i]}
    return {spec.name: named[spec.name] for spec in program.inputs}


def test_graph_agrees_with_torch(exported: Path, geometry: Geometry, make_model: Any, make_clip: Any) -> None:
    program = programs(geometry)["denoise_first"]
    clip = make_clip(SMALL, FRAMES, 2)
    model, exact = make_model(SMALL, 1, torch.bfloat16), make_model(SMALL, 1, torch.bfloat16).double()
    inputs = feeds(program, model, clip)
    with torch.no_grad():
        theirs = program_module(program, model)(*inputs.values())[0].double().numpy()
        # The same rounded weights and inputs without further rounding.
        wide = {n: x.double() if x.is_floating_point() and n != "timestep" else x for n, x in inputs.items()}
        truth = program_module(program, exact)(*wide.values())[0].numpy()
    session = onnxruntime.InferenceSession(str(exported / "denoise_first.onnx"), session_options(), providers=["CPUExecutionProvider"])
    kinds = {t.name: t.type for t in session.get_inputs()}
    binding = session.io_binding()
    for name, x in inputs.items():
        if kinds[name] == "tensor(bfloat16)":
            value = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(to_bits(x.float().numpy()), onnx.TensorProto.BFLOAT16)
        else:
            value = onnxruntime.OrtValue.ortvalue_from_numpy(x.contiguous().numpy())
        binding.bind_ortvalue_input(name, value)
    bits = np.zeros(truth.shape, np.uint16)
    out = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, onnx.TensorProto.BFLOAT16)
    binding.bind_ortvalue_output("velocity", out)
    session.run_with_iobinding(binding)
    ours = from_bits(bits).astype(np.float64)

    def error(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.linalg.norm(a - b) / np.linalg.norm(b))

    # Two blocks of some thirty operations, each rounded by up to 2**-9; both orders of rounding are as far from exact arithmetic.
    assert 1e-4 < error(ours, truth) < 0.02 and error(ours, truth) < 1.5 * error(theirs, truth)
    assert error(ours, theirs) < 0.02


def test_state_and_weights_stay_bfloat16(exported: Path, geometry: Geometry) -> None:
    model = onnx.load(exported / "denoise_first.onnx", load_external_data=False)
    types = {v.name: v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)}
    assert types["latents"] == types["velocity"] == types["keys.0"] == onnx.TensorProto.BFLOAT16 and types["rays"] == onnx.TensorProto.FLOAT
    stored = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    assert stored and {t.data_type for t in stored} == {onnx.TensorProto.BFLOAT16}
    assert not model.functions and {n.domain for n in model.graph.node} == {""}


def test_nothing_computes_in_bfloat16(exported: Path) -> None:
    """Only data movement may see a bfloat16 tensor: the provider has no kernels for anything else."""
    model = onnx.shape_inference.infer_shapes(onnx.load(exported / "denoise_first.onnx"))
    graph = model.graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input, *graph.output)}
    types |= {t.name: t.data_type for t in graph.initializer}
    touching = {n.op_type for n in graph.node if any(types.get(v) == onnx.TensorProto.BFLOAT16 for v in (*n.input, *n.output))}
    assert "Cast" in touching and touching <= {"Cast", "Reshape", "Transpose", "Identity", "Squeeze", "Unsqueeze", "Constant"}


def small_graph(node: onnx.NodeProto, inputs: list[onnx.ValueInfoProto], initializers: list[onnx.TensorProto]) -> ir.Model:
    output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.BFLOAT16, None)
    graph = onnx.helper.make_graph([node], "g", inputs, [output], initializers)
    return ir.from_proto(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)], ir_version=10))


def test_rounding_is_kept(tmp_path: Path) -> None:
    """x + 1/256 in bfloat16 near 1 is x again; a graph that only widened would keep the fraction."""
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.BFLOAT16, [2])
    small = onnx.helper.make_tensor("c", onnx.TensorProto.BFLOAT16, [1], to_bits(np.array([2**-8], np.float32)).tobytes(), raw=True)
    model = widen_bfloat16(small_graph(onnx.helper.make_node("Add", ["x", "c"], ["y"]), [x], [small]))
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), session_options(), providers=["CPUExecutionProvider"])
    bits, result = to_bits(np.array([1.0, 0.25], np.float32)), np.zeros(2, np.uint16)
    binding = session.io_binding()
    values = [onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(a, onnx.TensorProto.BFLOAT16) for a in (bits, result)]
    binding.bind_ortvalue_input("x", values[0])
    binding.bind_ortvalue_output("y", values[1])
    session.run_with_iobinding(binding)
    np.testing.assert_array_equal(from_bits(result), [1.0, 0.25390625])


def test_a_constant_that_cannot_be_widened() -> None:
    value = onnx.helper.make_tensor("v", onnx.TensorProto.BFLOAT16, [1], b"\0\0", raw=True)
    shape = onnx.helper.make_tensor("shape", onnx.TensorProto.INT64, [1], [3])
    with pytest.raises(ValueError, match="a bfloat16 ConstantOfShape cannot be widened"):
        widen_bfloat16(small_graph(onnx.helper.make_node("ConstantOfShape", ["shape"], ["y"], value=value), [], [shape]))
