"""The very graphs that engines are built from, in ONNX Runtime against the fake-quantized torch model."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from small_world import RECIPE, made_up_calibration, small

from sanawm.bfloat16 import from_bits, to_bits
from sanawm.camera import rope_time
from sanawm.programs import Geometry, programs
from sanawm_calibration.apply import fake_quantized, quantize_model
from sanawm_calibration.recipe import layer_table, load_recipe
from sanawm_export.onnx.export import program_module
from sanawm_export.quantized.bodies import add_bodies
from sanawm_export.quantized.export import export_prepared, prepare_export
from sanawm_export.quantized.judge import lower_for_onnxruntime
from sanawm_export.tensorrt.kernels import KernelCompiler
from sanawm_export.tensorrt.lower import Lowering
from sanawm_runtime.engines._trt_library import open_library
from sanawm_runtime.engines.onnxruntime import session_options


def decibels(reference: np.ndarray, found: np.ndarray) -> float:
    return float(10 * np.log10((reference**2).sum() / ((found - reference) ** 2).sum()))


def inputs_of_a_step(model: Any, clip: Any) -> dict[str, torch.Tensor]:
    """Inputs of a denoising step in chunk 0, with the features of a real camera path."""
    config, dtype = model.config, model.dtype
    cos, sin = (torch.from_numpy(x) for x in rope_time(np.arange(4), config))
    with torch.no_grad():
        text = model.encode_text(clip.text.to(dtype), clip.mask)
        camera = model.encode_camera(clip.camera, clip.plucker, cos, sin)
    found = {"latents": clip.latents.to(dtype), "timestep": torch.full((1, 4), 889.0), "text_mask": clip.mask}
    for i in range(config.depth):
        found |= {f"keys.{i}": text.keys[i], f"values.{i}": text.values[i], f"plucker.{i}": camera.plucker[i]}
    return found | {name: getattr(camera, name) for name in ("rays", "rays_inverse", "cos", "sin", "cam_cos", "cam_sin")}


@pytest.mark.parametrize(
    ("precision", "dtype", "least_db"),
    [
        # In bfloat16 both sides round every product, here and there differently, and then an activation falls on another of the few numbers of
        # its format; how far that spreads depends on the format's steps.
        ("fp8", torch.bfloat16, 30.0),
        ("everything", torch.bfloat16, 18.0),
        # In float32 hardly any activation is close enough to a boundary.
        ("everything", torch.float32, 100.0),
    ],
    ids=["fp8", "all formats", "all formats, float32"],
)
def test_built_graphs_agree_with_the_fake_quantized_model(
    tmp_path: Path, make_model: Callable[..., Any], make_clip: Callable[..., Any], precision: str, dtype: torch.dtype, least_db: float
) -> None:
    world, name = small(), "denoise_first"
    (tmp_path / "everything.toml").write_text(RECIPE)
    recipe = load_recipe(tmp_path / "everything.toml" if precision == "everything" else precision)
    calibration = made_up_calibration(world, {"fingerprint": "", "source": ""})
    geometry = Geometry(world, 16, 4, str(dtype).removeprefix("torch."))
    program = programs(geometry)[name]
    plain, reference, model = (make_model(world.dit, dtype=dtype) for _ in range(3))
    inputs = inputs_of_a_step(plain, make_clip(world.dit, 4))
    fake_quantized(reference, quantize_model(reference, layer_table(recipe, world.dit), calibration, merge=True))
    with torch.no_grad():
        unquantized, expected = (program_module(program, m)(*(inputs[t.name] for t in program.inputs))[0].float().numpy() for m in (plain, reference))

    quantized = prepare_export(model, calibration, recipe, merge=True)
    (exported,) = export_prepared(model, quantized, geometry, tmp_path, names=[name])
    asked = {layer: entry.format for layer, entry in quantized.table.items() if entry.format != "bf16"}
    with KernelCompiler("sm_120") as compiler:
        lowering = Lowering(open_library("tensorrt_rtx"), "sm_120", "matmul", compiler)
        job, _, _ = lowering.job(program, tmp_path / exported.file, tmp_path, asked)
    assert {"fp8"} <= set(job.asked.values()) <= {"fp8", "nvfp4", "bf16", "fp32"}
    found = run(lower_for_onnxruntime(add_bodies(ir.load(job.graph))), tmp_path / "judged.onnx", inputs)
    agreement, change = decibels(expected, found), decibels(unquantized, found)
    print(f"{precision} {dtype}: {agreement:.1f} dB with the fake-quantized model, {change:.1f} dB with the unquantized one")
    assert agreement >= least_db
    # It is the quantized model that the graph agrees with, not merely the model.
    assert change < agreement - 3


def run(model: ir.Model, path: Path, inputs: dict[str, torch.Tensor]) -> np.ndarray:
    path.write_bytes(ir.to_proto(model).SerializeToString())
    session = onnxruntime.InferenceSession(str(path), session_options(), providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for tensor in session.get_inputs():
        value = inputs[tensor.name]
        if value.dtype == torch.bfloat16:
            bits = value.contiguous().view(torch.int16).numpy().view(np.uint16)
            binding.bind_ortvalue_input(tensor.name, onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, 16))
        else:
            binding.bind_ortvalue_input(tensor.name, onnxruntime.OrtValue.ortvalue_from_numpy(value.contiguous().numpy()))
    (output,) = session.get_outputs()
    if output.type == "tensor(float)":
        binding.bind_output(output.name)
        session.run_with_iobinding(binding)
        return binding.copy_outputs_to_cpu()[0]
    bits = to_bits(np.zeros(output.shape, np.float32))
    binding.bind_ortvalue_output(output.name, onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, 16))
    session.run_with_iobinding(binding)
    return from_bits(bits)
