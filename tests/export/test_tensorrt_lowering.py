"""Graphs made ready for TensorRT: nodes replaced, inlined and moved without changing what is computed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from interpret_launches import pretend
from small_world import small

from sanawm.config import DiTConfig
from sanawm.errors import EngineError
from sanawm.programs import Geometry, Program, TensorSpec
from sanawm_export.onnx.export import export_part
from sanawm_export.tensorrt import graph
from sanawm_export.tensorrt.audit import asked_precisions
from sanawm_export.tensorrt.euler import euler_programs, write_euler
from sanawm_export.tensorrt.gdn_launches import Placed, gdn_launches, output_operands
from sanawm_export.tensorrt.lowering import FUSED, fuse_gdn
from sanawm_kernels.gdn.plans import Problem
from sanawm_runtime.engines._trt_launch import LaunchList, Operand
from sanawm_runtime.engines.onnxruntime import session_options

CAPABILITY = "sm_80"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., torch.nn.Module]) -> Path:
    """The graphs of a step in the first chunk and of a commit in a later one, bfloat16."""
    folder = tmp_path_factory.mktemp("graphs")
    world = small()
    geometry = Geometry(world, 16, 4, "bfloat16")
    model = make_model(world.dit, dtype=torch.bfloat16)
    assert len(list(export_part("dit", model, geometry, folder, names=["denoise_first", "commit_steady"]))) == 2
    return folder


def fused(exported: Path, name: str) -> tuple[ir.Model, list[LaunchList]]:
    model = graph.load_graph(exported / f"{name}.onnx")
    graph.name_layers(model)
    graph.inline(model, keep=lambda kind: kind in FUSED)
    return model, fuse_gdn(model, CAPABILITY, pretend)


@pytest.mark.parametrize("case", ["1 1 1", "0 0 1", "1 1 0"], ids=["later chunk", "first chunk, read only", "camera tail not carried"])
def test_launch_lists_compute_the_definition(case: str) -> None:
    """Every pointer, stride and grid of a list, by running its kernels in Triton's interpreter."""
    script = Path(__file__).parent / "interpret_launches.py"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, str(script), *case.split()], capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    errors = json.loads(done.stdout.splitlines()[-1])
    assert set(errors) >= {"main_out", "camera_out"} and ("s_cam" in errors) == (case[2] == "1")
    # float32 against float64, relative to the largest value: a few roundings.
    assert all(error < 1e-5 for error in errors.values()), errors


def test_a_block_becomes_one_node(exported: Path) -> None:
    model, (launches,) = fused(exported, "commit_steady")
    (node,) = [n for n in model.graph if n.op_type == "SanaLaunches"]
    assert not any(n.op_type in FUSED for n in model.graph)
    assert [o.shape for o in node.outputs] == [ir.Shape(o.shape) for o in launches.outputs]
    assert {o.name for o in model.graph.outputs} >= {"next.0.s", "next.0.z", "next.0.s_cam", "next.0.k_tail", "next.0.cam_tail"}
    assert all(o.is_graph_output() for o in node.outputs if str(o.name).startswith("next."))
    assert [k.name.split(".")[1] for k in launches.kernels] == ["prepare", "summarize", "combine", "apply"]
    # The payload is found again in the bytes that are parsed.
    attributes = {a.name: a for a in onnx.load_from_string(graph.serialize(model)).graph.node[list(model.graph).index(node)].attribute}
    assert LaunchList.from_fields(*(onnx.numpy_helper.to_array(attributes[n].t).tobytes() for n in ("launches", "cubins"))) == launches  # type: ignore[arg-type]


def test_projections_are_read_where_they_lie(exported: Path) -> None:
    model, (launches,) = fused(exported, "denoise_first")
    width = small().dit.hidden
    (node,) = [n for n in model.graph if n.op_type == "SanaLaunches"]
    # q, k and v of the main branch are parts of one product, whose split nobody needs any more.
    assert launches.inputs[0].shape[-1] == 3 * width and node.inputs[0].producer().op_type == "MatMul"  # type: ignore[union-attr]
    prepare = [a for a in launches.launches[0].arguments if a.source == "input" and a.index == 0]
    assert [a.value for a in prepare] == [0, 2 * width]
    assert len(launches.outputs) == 2, "a denoising step leaves no state"


def test_both_lowerings_ask_for_the_same_precisions(exported: Path) -> None:
    plugin, _ = fused(exported, "denoise_first")
    plain = graph.load_graph(exported / "denoise_first.onnx")
    graph.inline(plain)
    asked = [asked_precisions(graph.name_layers(m)) for m in (plugin, plain)]
    assert asked[0] == asked[1] and set(asked[0].values()) == {"bf16"}
    assert not any(n.domain for n in plain.graph) and not plain.functions


def test_matmul_lowering_computes_what_was_exported(exported: Path, tmp_path: Path) -> None:
    from sanawm_export.onnx.cpu import widen_bfloat16

    results = []
    for lowered in (False, True):
        model = graph.load_graph(exported / "denoise_first.onnx")
        if lowered:
            graph.name_layers(model)
            graph.inline(model)
            graph.sink_uint8(model)
        path = exported / f"judged-{lowered}.onnx"
        path.write_bytes(graph.serialize(widen_bfloat16(model)))
        results.append(run(path, np.random.default_rng(0)))
    np.testing.assert_array_equal(*results)
    assert np.isfinite(results[0]).all() and np.abs(results[0]).max() > 0.1


def run(path: Path, rng: np.random.Generator) -> Any:
    """Outputs of a bfloat16 graph on random inputs, as float32."""
    session = onnxruntime.InferenceSession(str(path), session_options(), providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for tensor in session.get_inputs():
        values = rng.standard_normal(tensor.shape).astype(np.float32)
        if tensor.type == "tensor(bfloat16)":
            value = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type((values.view(np.uint32) >> 16).astype(np.uint16), 16)
        elif tensor.type == "tensor(bool)":
            value = onnxruntime.OrtValue.ortvalue_from_numpy(np.ones(tensor.shape, bool))
        else:
            value = onnxruntime.OrtValue.ortvalue_from_numpy(500 * np.abs(values) if tensor.name == "timestep" else values)
        binding.bind_ortvalue_input(tensor.name, value)
    name = session.get_outputs()[0]
    out = np.zeros(name.shape, np.uint16)
    binding.bind_ortvalue_output(name.name, onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(out, 16))
    session.run_with_iobinding(binding)
    return (out.astype(np.uint32) << 16).view(np.float32)


def problem(**changes: Any) -> Problem:
    return Problem(1, 2, 16, 2, 12, 0.1, **changes)


def test_alignment_that_kernels_count_on_is_checked() -> None:
    names = "main_q main_k main_v camera_q camera_k camera_v beta decay A_log dt_bias main_conv main_q_norm main_k_norm cos sin camera_conv"
    names += " camera_q_norm camera_k_norm rays rays_inverse camera_cos camera_sin s z k_tail s_cam cam_tail"
    places = {name: Placed(0, 0, 32) for name in names.split()} | {"main_k": Placed(0, 24, 32)}
    with pytest.raises(EngineError, match="need main_k to be a multiple of 16, found 24; build with --gdn matmul"):
        gdn_launches(problem(), CAPABILITY, [Operand("float32", (10_000,))], places, pretend)


def test_chunks_too_long_for_the_kernels(tmp_path: Path, make_model: Callable[..., torch.nn.Module]) -> None:
    world = small(depth=1)
    geometry = Geometry(world, 16, 6, "bfloat16")
    list(export_part("dit", make_model(world.dit, dtype=torch.bfloat16), geometry, tmp_path, names=["denoise_first"]))
    with pytest.raises(EngineError, match="take chunks of up to 5 frames, found 6; build with --gdn matmul"):
        fused(tmp_path, "denoise_first")


def test_a_branch_without_its_partner(exported: Path) -> None:
    model = graph.load_graph(exported / "denoise_first.onnx")
    graph.inline(model, keep=lambda kind: kind == "MainGDN")
    with pytest.raises(EngineError, match="has no partner of the other branch"):
        fuse_gdn(model, CAPABILITY, pretend)


def test_outputs_of_the_node() -> None:
    assert list(output_operands(problem(commit=False))) == ["main_out", "camera_out"]
    assert list(output_operands(problem())) == ["main_out", "camera_out", "s", "z", "k_tail", "s_cam", "cam_tail"]
    assert "cam_tail" not in output_operands(problem(camera_carry=False))


def pixels(last: str) -> ir.Model:
    """x -> uint8 -> reshaped -> `last` -> y."""
    nodes = [
        onnx.helper.make_node("Cast", ["x"], ["a"], to=onnx.TensorProto.UINT8),
        onnx.helper.make_node("Unsqueeze", ["a", "axes"], ["b"]),
        onnx.helper.make_node(last, ["b"], ["y"]),
    ]
    info = onnx.helper.make_tensor_value_info
    inputs, outputs = [info("x", onnx.TensorProto.FLOAT, [2, 3])], [info("y", onnx.TensorProto.UINT8, [3, 2, 1] if last == "Transpose" else None)]
    axes = onnx.numpy_helper.from_array(np.array([0], np.int64), "axes")
    proto = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "pixels", inputs, outputs, [axes]), opset_imports=[onnx.helper.make_opsetid("", 23)], ir_version=11
    )
    model = ir.serde.deserialize_model(proto)
    ir.passes.common.ShapeInferencePass()(model)
    return model


def test_conversions_to_uint8_move_to_the_end(tmp_path: Path) -> None:
    values = np.array([[0, 1, 254], [255, 7, 100]], np.float32)
    results = []
    for moved in (False, True):
        model = pixels("Transpose")
        if moved:
            graph.sink_uint8(model)
            assert [n.op_type for n in model.graph] == ["Unsqueeze", "Transpose", "Cast"]
        session = onnxruntime.InferenceSession(graph.serialize(model), session_options(), providers=["CPUExecutionProvider"])
        results.append(session.run(["y"], {"x": values})[0])
    assert results[1].dtype == np.uint8
    np.testing.assert_array_equal(*results)
    with pytest.raises(ValueError, match="BitwiseNot computes on uint8 values"):
        graph.sink_uint8(pixels("BitwiseNot"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_euler_program(tmp_path: Path, dtype: str) -> None:
    program: Program = euler_programs(Geometry(small(), 16, 4, dtype))["euler_first"]
    write_euler(program, tmp_path / "e.onnx")
    onnx.checker.check_model(str(tmp_path / "e.onnx"), full_check=True)
    latents, sizes = program.input("latents"), program.input("sizes")
    assert (latents.shape[2], sizes) == (4, TensorSpec("sizes", "float32", (1, 1, 4, 1, 1)))
    if dtype == "bfloat16":
        return  # ONNX Runtime's CPU provider has no bfloat16 arithmetic
    rng = np.random.default_rng(0)
    x, v = (rng.standard_normal(latents.shape).astype(np.float32) for _ in range(2))
    v[0, 0, 0, 0, 0] = np.inf
    step = np.full(sizes.shape, 0.04, np.float32)
    step[:, :, 0] = 0
    session = onnxruntime.InferenceSession(str(tmp_path / "e.onnx"), session_options(), providers=["CPUExecutionProvider"])
    (found,) = session.run(["stepped"], {"latents": x, "velocity": v, "sizes": step})
    np.testing.assert_array_equal(found[:, :, 1:], (x - np.float32(0.04) * v)[:, :, 1:])
    np.testing.assert_array_equal(found[:, :, 0], x[:, :, 0])


def test_layer_names(exported: Path) -> None:
    config: DiTConfig = small().dit
    names = set(graph.name_layers(graph.load_graph(exported / "denoise_first.onnx")))
    assert {"blocks.0.attn.qkv", "blocks.0.mlp.depth_conv.conv", "blocks.1.attn.output_gate", "final_layer.linear"} <= names
    assert len([n for n in names if n.startswith("blocks.0.")]) == 15 and not any(n.startswith(f"blocks.{config.depth}.") for n in names)
