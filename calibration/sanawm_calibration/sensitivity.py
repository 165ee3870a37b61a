"""What each layer's quantization alone does to the velocity at every timestep and to the change that a moved camera makes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sanawm.config import WorldConfig
from sanawm.model.dit import CameraFeatures, SanaWM, TextFeatures
from sanawm_calibration.errors import CalibrationError
from sanawm_calibration.evaluate import ChunkRecord, encode_camera, encode_text, record, turned, velocity
from sanawm_calibration.inputs import ClipInputs
from sanawm_calibration.metrics import decibel
from sanawm_calibration.quantize import FakeQuantLinear, quantize_linear
from sanawm_calibration.recipe import Format, LayerFormat
from sanawm_calibration.roles import Layer, quantizable
from sanawm_calibration.store import Calibration

# Column of the camera-delta probe beside the timesteps'.
CAMERA = "camera"
# column -> noise energy relative to the signal's
Noise = dict[str, float]
# layer name, layers done, layers in all
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Point:
    """A recorded chunk with the reference's answers: velocities, features, and the change that a turned camera makes in the last one."""

    record: ChunkRecord
    moved: tuple[Tensor, Tensor]
    text: TextFeatures
    camera: CameraFeatures
    camera_moved: CameraFeatures
    change: Tensor


def record_points(model: SanaWM, inputs: Sequence[ClipInputs], world: WorldConfig) -> list[Point]:
    """The last chunk of each clip, from the reference's own rollout."""
    points = []
    for item in inputs:
        *_, last = record(model, item, world.stream)
        moved = turned(item, world, last.chunk)
        text = encode_text(model, item)
        camera = encode_camera(model, item, last.chunk)
        camera_moved = encode_camera(model, item, last.chunk, moved)
        after = velocity(model, last.calls[-1], last.past, text, camera_moved)
        points.append(Point(last, moved, text, camera, camera_moved, after.float() - last.calls[-1].velocity.float()))
    return points


def noise(model: SanaWM, points: Sequence[Point], programs: frozenset[str] = frozenset({"forward", "camera", "prompt"})) -> Noise:
    """Relative noise of a candidate in each column over all points.

    `programs` are those whose layers differ from the reference's: features that they do not touch are reused.
    """
    signal: dict[str, float] = {}
    error: dict[str, float] = {}

    def add(column: str, reference: Tensor, found: Tensor) -> None:
        signal[column] = signal.get(column, 0.0) + float(reference.double().square().sum())
        error[column] = error.get(column, 0.0) + float((reference.double() - found.double()).square().sum())

    for point in points:
        item, chunk = point.record.inputs, point.record.chunk
        text = encode_text(model, item) if "prompt" in programs else point.text
        camera, moved = point.camera, point.camera_moved
        if "camera" in programs:
            camera, moved = encode_camera(model, item, chunk), encode_camera(model, item, chunk, point.moved)
        for call in point.record.calls:
            found = velocity(model, call, point.record.past, text, camera)
            add(call.label, call.velocity, found)
        after = velocity(model, point.record.calls[-1], point.record.past, text, moved)
        add(CAMERA, point.change, after.float() - found.float())
    return {column: error[column] / signal[column] for column in signal}


@dataclass(frozen=True)
class Sensitivity:
    """Of each layer and candidate format: relative noise by column, and the layer's own output SQNR in dB."""

    noise: dict[str, dict[LayerFormat, Noise]]
    layer_sqnr: dict[str, dict[LayerFormat, float]]

    @property
    def columns(self) -> list[str]:
        return list(next(iter(next(iter(self.noise.values())).values())))


def output_sqnr(linear: nn.Linear, quantized: FakeQuantLinear, rows_MK: Tensor) -> float:
    """Output SQNR in dB of a quantized layer on sampled inputs; the bias is not part of the signal."""
    if not rows_MK.numel():
        raise CalibrationError(f"{quantized.packed.name}: the calibration has no sampled inputs to measure with; calibrate with --rows above 0")
    x = rows_MK.to(linear.weight)
    bias = 0 if linear.bias is None else linear.bias
    reference = (linear(x) - bias).double()
    found = (quantized(x) - bias).double()
    return decibel(float(reference.square().sum()), float((reference - found).square().sum()))


@torch.no_grad()
def measure(
    model: SanaWM,
    calibration: Calibration,
    points: Sequence[Point],
    candidates: Sequence[LayerFormat],
    *,
    progress: Progress | None = None,
) -> Sensitivity:
    """Quantize one layer at a time in every candidate format; the linearized model is left as it was."""
    noises: dict[str, dict[LayerFormat, Noise]] = {}
    ratios: dict[str, dict[LayerFormat, float]] = {}
    layers = quantizable(model.config)
    for done, (name, layer) in enumerate(layers.items()):
        if progress:
            progress(name, done, len(layers))
        parent, _, child = name.rpartition(".")
        owner, linear = model.get_submodule(parent), model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        rows = calibration.rows(layer)
        noises[name], ratios[name] = {}, {}
        for layer_format in candidates:
            quantized = _single(name, layer, linear, layer_format, calibration)
            ratios[name][layer_format] = output_sqnr(linear, quantized, rows)
            setattr(owner, child, quantized)
            try:
                noises[name][layer_format] = noise(model, points, frozenset({layer.role.program}))
            finally:
                setattr(owner, child, linear)
    return Sensitivity(noises, ratios)


def _single(name: str, layer: Layer, linear: nn.Linear, layer_format: LayerFormat, calibration: Calibration) -> FakeQuantLinear:
    amax = calibration.channel_amax(layer).to(linear.weight.device)
    return FakeQuantLinear(quantize_linear(name, linear, layer_format, amax, calibration.rows(layer)), linear.weight.dtype)


def ladder(formats: Sequence[Format]) -> list[LayerFormat]:
    """Candidate formats from the cheapest to bfloat16, of those that a target has units for."""
    steps = {"nvfp4": LayerFormat("nvfp4", "mse"), "fp8": LayerFormat("fp8"), "bf16": LayerFormat()}
    return [steps[name] for name in ("nvfp4", "fp8", "bf16") if name in formats]
