"""The exported graph that a bundle is built from against the torch model: one step of the first chunk, evaluated by ONNX Runtime on the CPU."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor

from sanawm.bfloat16 import from_bits, to_bits
from sanawm.camera import actions_to_poses, camera_conditions, chunk_plucker, default_intrinsics, rope_time
from sanawm.model.dit import SanaWM
from sanawm.programs import Geometry, programs
from sanawm_calibration.metrics import sqnr
from sanawm_export.onnx.export import program_module
from sanawm_export.quantized.bodies import add_bodies
from sanawm_export.quantized.judge import lower_for_onnxruntime
from sanawm_runtime.engines.onnxruntime import session_options

PROGRAM = "denoise_first"
_ACTION = "w-12,wd-12,a-24"


def check_export(export: Callable[[Path], Path], reference: Callable[[], SanaWM], geometry: Geometry, against: str) -> dict[str, Any]:
    """What the manifest says about parity: SQNR in dB and largest error relative to the largest value of the first chunk's velocity.

    `export` writes PROGRAM into a folder and returns its file; `reference` loads the model it must agree with. They are called one after the
    other, so that two models are never in memory together. Inputs are random latents and text and the features of a real camera path.
    """
    program = programs(geometry)[PROGRAM]
    with tempfile.TemporaryDirectory(prefix="sanawm-check-") as folder:
        file = export(Path(folder))
        model = reference()
        inputs = step_inputs(model, geometry)
        with torch.no_grad():
            expected = program_module(program, model)(*(inputs[t.name] for t in program.inputs))[0].float().numpy()
        del model
        found = evaluate(file, inputs)
    return {
        "program": program.name,
        "against": against,
        "engine": f"ONNX Runtime {onnxruntime.__version__}",
        "sqnr_db": round(decibels(expected, found), 2),
        "max_relative_error": float(np.abs(found - expected).max() / np.abs(expected).max()),
    }


def decibels(reference: np.ndarray, found: np.ndarray) -> float:
    """Signal to noise ratio of `found`, at most 200 dB, since JSON has no infinity."""
    return min(200.0, sqnr(torch.from_numpy(reference), torch.from_numpy(found)))


def step_inputs(model: SanaWM, geometry: Geometry) -> dict[str, Tensor]:
    """Inputs of PROGRAM by name, in the model's dtype where the program has it."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    frames = geometry.first_frames
    path = actions_to_poses(_ACTION)[: 8 * (frames - 1) + 1]
    intrinsics = default_intrinsics(geometry.config.image_width, geometry.config.image_height)
    camera, plucker = (torch.from_numpy(pack(path, intrinsics, geometry.config)).to(model.dtype) for pack in (camera_conditions, chunk_plucker))
    cos, sin = (torch.from_numpy(x) for x in rope_time(np.arange(frames), config))
    mask = torch.arange(config.text_tokens)[None] < config.text_tokens * 2 // 3
    text = torch.randn(1, config.text_tokens, config.caption_channels, generator=generator).to(model.dtype)
    with torch.no_grad():
        features, views = model.encode_text(text, mask), model.encode_camera(camera, plucker, cos, sin)
    latents = torch.randn(1, config.in_channels, frames, config.height, config.width, generator=generator).to(model.dtype)
    timestep = torch.tensor([[0.0] + [float(geometry.config.stream.timesteps[1])] * (frames - 1)])
    found: dict[str, Tensor] = {"latents": latents, "timestep": timestep, "text_mask": mask}
    for i in range(config.depth):
        found |= {f"keys.{i}": features.keys[i], f"values.{i}": features.values[i], f"plucker.{i}": views.plucker[i]}
    return found | {name: getattr(views, name) for name in ("rays", "rays_inverse", "cos", "sin", "cam_cos", "cam_sin")}


def evaluate(file: Path, inputs: Mapping[str, Tensor]) -> np.ndarray:
    """The only output of an exported graph, quantized or not, in float32."""
    model = lower_for_onnxruntime(add_bodies(ir.load(file)))
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        lowered = Path(folder, "judged.onnx")
        ir.save(model, lowered, external_data="judged.data")
        del model
        return run(onnxruntime.InferenceSession(str(lowered), session_options(), providers=["CPUExecutionProvider"]), inputs)


def run(session: onnxruntime.InferenceSession, inputs: Mapping[str, Tensor]) -> np.ndarray:
    """The only output of a session in float32; bfloat16 goes in and out as bits."""
    binding = session.io_binding()
    for tensor in session.get_inputs():
        value = inputs[tensor.name].contiguous()
        if value.dtype == torch.bfloat16:
            bits = value.view(torch.int16).numpy().view(np.uint16)
            binding.bind_ortvalue_input(tensor.name, onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, 16))
        else:
            binding.bind_ortvalue_input(tensor.name, onnxruntime.OrtValue.ortvalue_from_numpy(value.numpy()))
    (output,) = session.get_outputs()
    if output.type == "tensor(float)":
        binding.bind_output(output.name)
        session.run_with_iobinding(binding)
        found: np.ndarray = binding.copy_outputs_to_cpu()[0]
        return found
    bits = to_bits(np.zeros(output.shape, np.float32))
    binding.bind_ortvalue_output(output.name, onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, 16))
    session.run_with_iobinding(binding)
    return from_bits(bits)

