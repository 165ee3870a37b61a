"""Calibrate, quantize, export, evaluate: every recipe's graphs against its fake-quantized model and its layer table."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from sanawm.camera import camera_conditions, chunk_plucker, default_intrinsics, relative_to_first, rope_time
from sanawm.config import WorldConfig, tiny_config
from sanawm.keys import dit_tensors
from sanawm.model.checkpoint.synth import synth_tensor
from sanawm.model.dit import SanaWM
from sanawm.model.linearize import linearize
from sanawm.programs import Geometry, programs
from sanawm_calibration import collect, store
from sanawm_calibration.apply import fake_quantized, quantize_model
from sanawm_calibration.clips import Clip
from sanawm_calibration.evaluate import shared_copy
from sanawm_calibration.gates import EXPORT_SQNR
from sanawm_calibration.generated import MOTIONS, motion_poses
from sanawm_calibration.inputs import ClipInputs
from sanawm_calibration.metrics import sqnr
from sanawm_calibration.recipe import LayerFormat, layer_table, load_recipe
from sanawm_calibration.roles import model_layers
from sanawm_calibration.store import Calibration
from sanawm_export.onnx.export import program_module
from sanawm_export.quantized import export_quantized, graph_formats
from sanawm_export.quantized.bodies import dynamic_quantize_body
from sanawm_export.quantized.formats import check_formats
from sanawm_export.quantized.weights import write_weights
from sanawm_kernels.quant.formats import Nvfp4Tensor, pack_e2m1, quantize_nvfp4
from sanawm_runtime.engines.onnxruntime import session_options

PROGRAMS = ("prompt_kv", "camera_first", "denoise_first")
OWN_RECIPE = """
[[layers]]
tiers = ["A"]
format = "nvfp4"
scales = "four-over-six"
awq = true
lowrank = 4
[[layers]]
tiers = ["B"]
format = "fp8"
"""


@pytest.fixture(scope="module")
def world() -> WorldConfig:
    tiny = tiny_config()
    return replace(tiny, name="small", dit=replace(tiny.dit, hidden=64, depth=2, softmax_every=2, height=3, width=4, text_tokens=16))


@pytest.fixture(scope="module")
def model(world: WorldConfig) -> SanaWM:
    with torch.device("meta"):
        model = SanaWM(world.dit)
    state = {name: torch.from_numpy(synth_tensor(name, info.shape, 3)).float() for name, info in dit_tensors(world.dit).items()}
    model.load_state_dict(state, strict=True, assign=True)
    return linearize(model.eval().requires_grad_(False))


@pytest.fixture(scope="module")
def item(world: WorldConfig) -> ClipInputs:
    generator = torch.Generator().manual_seed(0)
    dit = world.dit
    poses = motion_poses(MOTIONS[6], 73)
    rows = np.repeat(default_intrinsics(world.image_width, world.image_height)[None], 73, 0)
    relative = relative_to_first(poses)
    return ClipInputs(
        Clip("clip", "a street", lambda: np.zeros((8, 8, 3), np.uint8), poses),
        torch.randn(1, dit.in_channels, 1, dit.height, dit.width, generator=generator),
        torch.randn(1, dit.text_tokens, dit.caption_channels, generator=generator),
        torch.arange(dit.text_tokens)[None] < 12,
        torch.from_numpy(camera_conditions(relative, rows, world)),
        torch.from_numpy(chunk_plucker(relative, rows, world)),
    )


@pytest.fixture(scope="module")
def calibration(world: WorldConfig, model: SanaWM, item: ClipInputs) -> Calibration:
    shard = collect.collect_clip(model, item, world.stream, rows=64)
    found = store.build([shard], world, checkpoint={}, clips=[], settings={})
    # A search's result: a mix that follows no role.
    names = list(model_layers(world.dit))
    kinds = [LayerFormat("nvfp4", "mse"), LayerFormat("fp8"), LayerFormat()]
    tiers = model_layers(world.dit)
    mixed = {n: kinds[i % 3] if tiers[n].tier != "C" else LayerFormat() for i, n in enumerate(names)}
    found.search = {"layers": {n: f.to_json() for n, f in mixed.items()}}
    return found


@pytest.fixture(scope="module")
def feeds(world: WorldConfig, model: SanaWM, item: ClipInputs) -> dict[str, Tensor]:
    """Inputs of the first chunk's programs; features come from the reference model."""
    cos, sin = rope_time(np.arange(4), world.dit)
    found: dict[str, Tensor] = {
        "text": item.text,
        "text_mask": item.text_mask,
        "camera_conditions": item.camera[:, :4],
        "chunk_plucker": item.plucker[:, :, :4],
        "time_cos": torch.from_numpy(cos),
        "time_sin": torch.from_numpy(sin),
        "latents": item.noise()[:, :, :4].contiguous(),
        "timestep": torch.tensor([[0.0, 960, 960, 960]]),
    }
    for name in PROGRAMS[:2]:
        found |= run_torch(name, model, world, found)
    return found


def geometry(world: WorldConfig, dtype: str = "float32") -> Geometry:
    return Geometry(world, prompt_tokens=64, dtype=dtype)


def run_torch(name: str, model: SanaWM, world: WorldConfig, feeds: dict[str, Tensor]) -> dict[str, Tensor]:
    program = programs(geometry(world), ("dit",))[name]
    with torch.no_grad():
        outputs = program_module(program, model)(*[feeds[spec.name] for spec in program.inputs])
    return {spec.name: x for spec, x in zip(program.outputs, outputs)}


def run_reference(path: Path, feeds: dict[str, Tensor]) -> dict[str, Tensor]:
    session = ReferenceEvaluator(onnx.load(path))
    found = session.run(None, {name: feeds[name].numpy() for name in session.input_names})
    return {name: torch.from_numpy(np.asarray(x)) for name, x in zip(session.output_names, found)}


def run_onnxruntime(path: Path, feeds: dict[str, Tensor]) -> dict[str, Tensor]:
    session = onnxruntime.InferenceSession(str(path), session_options(), providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    found = session.run(names, {i.name: feeds[i.name].numpy() for i in session.get_inputs()})
    return {name: torch.from_numpy(x) for name, x in zip(names, found)}


def worst(expected: dict[str, Tensor], found: dict[str, Tensor]) -> float:
    return min(sqnr(expected[name].float(), found[name].float()) for name in expected)


def recipe_path(name: str, folder: Path) -> Path | str:
    if name != "own":
        return name
    path = folder / "own.toml"
    path.write_text(OWN_RECIPE)
    return path


@pytest.mark.parametrize("name", ["bf16", "fp8", "nvfp4", "nvfp4-guarded", "nvfp4-official", "mixed", "own"])
def test_every_recipe_survives_the_export(
    name: str, world: WorldConfig, model: SanaWM, calibration: Calibration, feeds: dict[str, Tensor], tmp_path: Path
) -> None:
    recipe = recipe_path(name, tmp_path)
    table = layer_table(load_recipe(recipe), world.dit, calibration.found_table())
    fake = shared_copy(model)
    packed = quantize_model(fake, table, calibration)
    fake_quantized(fake, packed)
    # The longest graph is exported once; the recipes that merge nothing differ in nothing else.
    exported = list(export_quantized(shared_copy(model), geometry(world), calibration, recipe, tmp_path, names=PROGRAMS))
    assert [e.program.name for e in exported] == list(PROGRAMS) and {e.weights for e in exported} == {"dit.safetensors"}
    seen: dict[str, str] = {}
    for program in exported:
        path = tmp_path / program.file
        graph = ir.load(path)
        seen |= graph_formats(graph)
        expected = run_torch(program.program.name, fake, world, feeds)
        assert worst(expected, run_reference(path, feeds)) >= EXPORT_SQNR, program.file
        _check_scales(graph, packed.packed)
    # Every layer that the first chunk's programs run, in the recipe's format; the rest are not evaluated at all.
    idle = {"raymap_embedder.proj", "y_embedder.y_proj.fc1"} | {f"blocks.{i}.attn.{p}" for i in range(2) for p in ("beta_proj", "gate_proj")}
    layers = {n: f for n, f in seen.items() if n in table}
    assert set(table) - set(layers) <= idle
    assert layers == {n: table[n].format for n in layers}


def _check_scales(graph: ir.Model, packed: dict[str, Any]) -> None:
    """Scales of the graph are those of the calibrated layers, bit for bit, and weights keep their packing."""
    stored = {name: value.const_value for name, value in graph.graph.initializers.items()}
    for name, layer in packed.items():
        if f"{name}.weight" not in stored:
            continue
        raw = stored[f"{name}.weight"]
        assert raw is not None
        if isinstance(layer.weight, Nvfp4Tensor):
            assert raw.dtype == ir.DataType.FLOAT4E2M1
            assert np.array_equal(np.frombuffer(raw.tobytes(), np.uint8), layer.weight.packed.numpy().reshape(-1))
            scales = stored[f"{name}.weight_scale"]
            assert np.array_equal(np.frombuffer(scales.tobytes(), np.uint8), layer.weight.scales.view(torch.uint8).numpy().reshape(-1))
        else:
            assert raw.dtype == ir.DataType.FLOAT8E4M3FN
            assert np.array_equal(np.frombuffer(raw.tobytes(), np.uint8), layer.weight.values.view(torch.uint8).numpy().reshape(-1))
    constants = {float(t.numpy()) for t in stored.values() if t is not None and t.dtype == ir.DataType.FLOAT and t.shape.numpy() == ()}
    used = {name for name in packed if f"{name}.weight" in stored}
    assert {packed[name].input_scale for name in used} <= constants


def test_onnxruntime_judges_the_same_numbers(
    world: WorldConfig, model: SanaWM, calibration: Calibration, feeds: dict[str, Tensor], tmp_path: Path
) -> None:
    fake = shared_copy(model)
    table = layer_table(load_recipe("nvfp4"), world.dit)
    packed = quantize_model(fake, table, calibration, merge=True)
    fake_quantized(fake, packed)
    for _ in export_quantized(shared_copy(model), geometry(world), calibration, "nvfp4", tmp_path, names=("denoise_first",), merge=True, cpu=True):
        pass
    graph = onnx.load(tmp_path / "denoise_first.onnx", load_external_data=False)
    assert not graph.functions and not any(t.data_type == TensorProto.FLOAT4E2M1 for t in graph.graph.initializer)
    found = run_onnxruntime(tmp_path / "denoise_first.onnx", feeds)
    # Rounding near a tie may go either way where a product's sum differs in the last place; nothing else differs.
    assert worst(run_torch("denoise_first", fake, world, feeds), found) > 60


def test_bfloat16_graph_has_the_documented_pattern(world: WorldConfig, model: SanaWM, calibration: Calibration, tmp_path: Path) -> None:
    import copy

    half = copy.deepcopy(model).bfloat16()
    for _ in export_quantized(half, geometry(world, "bfloat16"), calibration, "nvfp4", tmp_path, names=("camera_first", "denoise_first"), merge=True):
        pass
    graph = ir.load(tmp_path / "denoise_first.onnx")
    by = {node.name: node for node in graph.graph}
    # qkv and the gate are one FP4 product, the camera's projections one FP8 product; each reads one quantization of the modulated input.
    assert [graph_formats(graph)[f"blocks.0.attn.merged.{i}"] for i in range(2)] == ["nvfp4", "fp8"]
    fp4 = by["blocks.0.attn.merged.0/matmul"]

    def producer(node: ir.Node, index: int) -> ir.Node:
        value = node.inputs[index]
        assert value is not None
        found = value.producer()
        assert found is not None
        return found

    cast = producer(fp4, 0)
    second = producer(cast, 0)
    quantize, first = producer(second, 0), producer(second, 1)
    assert [n.op_type for n in (cast, second, first)] == ["Cast", "DequantizeLinear", "DequantizeLinear"]
    assert (quantize.domain, quantize.op_type) == ("trt", "TRT_FP4DynamicQuantize")
    assert {k: v.value for k, v in quantize.attributes.items()} == {"axis": -1, "block_size": 16, "scale_type": 17}
    assert quantize.inputs[0].dtype == ir.DataType.BFLOAT16  # type: ignore[union-attr]
    scale = quantize.inputs[1]
    assert scale is not None and scale.const_value is not None and scale.const_value.dtype == ir.DataType.FLOAT and scale in first.inputs
    narrow = producer(fp4, 1)
    turned = producer(narrow, 0)
    weight, scales = producer(turned, 0), producer(producer(turned, 0), 1)
    assert [n.op_type for n in (narrow, turned, weight, scales)] == ["Cast", "Transpose", "DequantizeLinear", "DequantizeLinear"]
    assert weight.inputs[0].dtype == ir.DataType.FLOAT4E2M1 and scales.inputs[0].dtype == ir.DataType.FLOAT8E4M3FN  # type: ignore[union-attr]
    fp8 = by["blocks.0.attn.merged.1/matmul"]
    dequantize = producer(fp8, 0)
    assert [dequantize.op_type, producer(dequantize, 0).op_type] == ["DequantizeLinear", "QuantizeLinear"]
    # No cast between the scales and the product: they have the graph's dtype, which holds powers of two exactly.
    assert dequantize.inputs[1].dtype == ir.DataType.BFLOAT16  # type: ignore[union-attr]
    quantizers = [n for n in graph.graph if n.op_type in ("TRT_FP4DynamicQuantize", "QuantizeLinear")]
    # A block's products read eight tensors, one for each source of the roles; the attention's input is quantized to both formats.
    assert len(quantizers) == 2 * (8 + 1)
    header = _header(tmp_path / "dit.safetensors")
    assert header["blocks.0.attn.merged.0.weight"]["dtype"] == "U8" and header["blocks.0.mlp.t_conv.weight"]["dtype"] == "F8_E4M3"
    assert header["blocks.1.mlp.t_conv.weight_scale"]["dtype"] == "BF16"


def _header(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size])


def test_dynamic_quantization_body_is_the_format(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(2, 24, 64, generator=generator)
    x[0, 0, :2] = torch.tensor([40.0, -40.0])
    x[0, 1], x[1, 2] = 0, x[1, 2] * 1e-6
    scale = torch.tensor(2.0**-7)
    nodes = [onnx.helper.make_node("TRT_FP4DynamicQuantize", ["x", "s"], ["y", "y_scale"], domain="trt", axis=-1, block_size=16, scale_type=17)]
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "quantize",
        [value("x", TensorProto.FLOAT, x.shape), value("s", TensorProto.FLOAT, [])],
        [value("y", TensorProto.FLOAT4E2M1, x.shape), value("y_scale", TensorProto.FLOAT8E4M3FN, [2, 24, 4])],
    )
    imports = [onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid("trt", 1)]
    model = onnx.helper.make_model(graph, functions=[dynamic_quantize_body()], opset_imports=imports, ir_version=11)
    onnx.checker.check_model(model, full_check=True)
    codes, scales = ReferenceEvaluator(model).run(None, {"x": x.numpy(), "s": scale.numpy()})
    expected = quantize_nvfp4(x, scale)
    assert np.array_equal(scales.view(np.uint8), expected.scales.view(torch.uint8).numpy())
    found = pack_e2m1(torch.from_numpy(codes.view(np.uint8).copy()))
    # The sign of zero is not a number's.
    assert torch.equal(Nvfp4Tensor(found, expected.scales, scale).dequantize(), expected.dequantize())


def test_graphs_that_differ_from_the_recipe_are_refused(world: WorldConfig) -> None:
    table = {"blocks.0.attn.qkv": LayerFormat("nvfp4", "mse")}
    check_formats({"blocks.0.attn.qkv": "nvfp4", "blocks.0.extra": "bf16"}, table, "denoise")
    with pytest.raises(ValueError, match=r"denoise: blocks\.0\.attn\.qkv is bf16 in the graph and nvfp4 in the recipe"):
        check_formats({"blocks.0.attn.qkv": "bf16"}, table, "denoise")


def test_the_weight_file_is_whole_or_absent(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="x has dtype torch.int32"):
        write_weights(tmp_path / "w.safetensors", {"x": torch.zeros(2, dtype=torch.int32)})
    assert not list(tmp_path.iterdir())
    from safetensors.torch import load_file

    tensors = {"a": torch.randn(3, 4), "b": torch.tensor(2.0), "c": torch.ones(2, 16, dtype=torch.float8_e4m3fn)}
    write_weights(tmp_path / "w.safetensors", tensors)
    found = load_file(tmp_path / "w.safetensors")
    assert all(torch.equal(found[n].float(), t.float()) for n, t in tensors.items())
