"""A quantized transformer beside its reference: on the same inputs step by step, and running freely.

Shapes: B batch, C latent channels, T latent frames of a chunk, h, w latent grid.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sanawm.camera import DEFAULT_SCHEME, SCHEMES, camera_conditions, chunk_plucker, relative_to_first
from sanawm.config import StreamConfig, WorldConfig
from sanawm.model.dit import CameraFeatures, ChunkState, SanaWM, TextFeatures
from sanawm.model.sampler import camera_features, stream
from sanawm.schedule import Chunk, euler_step, pixel_frames, step_sizes
from sanawm_calibration.errors import CalibrationError
from sanawm_calibration.inputs import ClipInputs
from sanawm_calibration.metrics import cosine, decibel, slope
from sanawm_calibration.quantize import FakeQuantLinear

# Yaw of the camera-delta probe, a pixel frame: what a held turn key adds.
TURN_DEGREES = SCHEMES[DEFAULT_SCHEME].rotation_degrees
# What a run with another seed adds to the clip's.
OTHER_SEED = 100_000


def shared_copy(model: SanaWM) -> SanaWM:
    """A copy of the modules that shares every tensor with the original.

    Replace layers of it, but do not convert it: `.to(dtype)` and the like change the shared tensors.
    """
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(t): t for t in tensors})


@dataclass(frozen=True)
class Call:
    """One evaluation of a rollout: the latents that went in, the timestep row, and the velocity that came out."""

    latents: Tensor
    timestep: Tensor
    velocity: Tensor

    @property
    def label(self) -> str:
        return str(int(self.timestep.max()))


@dataclass(frozen=True)
class ChunkRecord:
    """A chunk of the reference's rollout: its denoising calls, the states that were read, and the final latents (B, C, T, h, w)."""

    inputs: ClipInputs
    chunk: Chunk
    calls: tuple[Call, ...]
    past: tuple[ChunkState, ...]
    latents: Tensor


def record(model: SanaWM, inputs: ClipInputs, config: StreamConfig) -> Iterator[ChunkRecord]:
    """Roll out a clip with the reference model, chunk by chunk; only the current chunk is held."""
    device = next(model.parameters()).device
    seen: list[tuple[tuple[Any, ...], dict[str, Any], Tensor | None]] = []
    # Whoever takes a record may run the model too; those evaluations are not part of the rollout.
    rolling = True

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if rolling:
            seen.append((args, kwargs, output[0]))

    handle = model.register_forward_hook(hook, with_kwargs=True)
    try:
        text = encode_text(model, inputs)
        noise = inputs.noise().to(device, model.dtype)
        for step in stream(model, noise, text, inputs.camera.to(device), inputs.plucker.to(device), config):
            calls = tuple(Call(args[0].clone(), args[1], velocity) for args, _, velocity in seen if velocity is not None)
            past = tuple(seen[0][1].get("past", ()))
            seen.clear()
            rolling = False
            yield ChunkRecord(inputs, step.chunk, calls, past, step.latents)
            rolling = True
    finally:
        handle.remove()


def encode_text(model: SanaWM, inputs: ClipInputs) -> TextFeatures:
    """The prompt's features by this model."""
    device = next(model.parameters()).device
    with torch.no_grad():
        return model.encode_text(inputs.text.to(device), inputs.text_mask.to(device))


def encode_camera(model: SanaWM, inputs: ClipInputs, chunk: Chunk, moved: tuple[Tensor, Tensor] | None = None) -> CameraFeatures:
    """A chunk's camera features by this model; `moved` replaces the clip's camera and plucker."""
    device = next(model.parameters()).device
    camera, plucker = (inputs.camera, inputs.plucker) if moved is None else moved
    with torch.no_grad():
        return camera_features(model, camera.to(device), plucker.to(device), chunk.start, chunk.end)


def turned(inputs: ClipInputs, world: WorldConfig, chunk: Chunk) -> tuple[Tensor, Tensor]:
    """Camera and Plücker inputs of the clip as if the turn key were held during the chunk, shaped as `ClipInputs.camera` and `.plucker`."""
    poses = relative_to_first(inputs.clip.poses)
    start = max(0, pixel_frames(chunk.start))
    for frame in range(max(1, start), pixel_frames(chunk.end)):
        angle = math.radians(TURN_DEGREES * (frame - start + 1))
        c, s = math.cos(angle), math.sin(angle)
        x, z = poses[frame, :3, 0].copy(), poses[frame, :3, 2].copy()
        poses[frame, :3, 0], poses[frame, :3, 2] = c * x - s * z, s * x + c * z
    # The inputs keep intrinsics in latent pixels; the packing takes those of the image.
    dit = world.dit
    scale = torch.tensor([world.image_width / dit.width, world.image_height / dit.height] * 2)
    rows = (inputs.camera[0, :1, 16:] * scale).double().numpy().repeat(len(poses), 0)
    return torch.from_numpy(camera_conditions(poses, rows, world)), torch.from_numpy(chunk_plucker(poses, rows, world))


@torch.no_grad()
def velocity(model: SanaWM, call: Call, past: Sequence[ChunkState], text: TextFeatures, camera: CameraFeatures) -> Tensor:
    """The model's velocity on a recorded call's inputs."""
    found, _ = model(call.latents, call.timestep, text, camera, past=past)
    assert found is not None
    return found


@torch.no_grad()
def denoise(
    model: SanaWM, record: ChunkRecord, first: Tensor, text: TextFeatures, camera: CameraFeatures, config: StreamConfig
) -> Tensor:
    """Final latents of a chunk by this model from the reference's noise and states; `first` is its velocity at the first step."""
    x = record.calls[0].latents
    for i, size in enumerate(step_sizes(config)):
        v = first if i == 0 else model(x, record.calls[i].timestep, text, camera, past=record.past)[0]
        x = euler_step(x.float(), v.float(), size, record.chunk).to(x.dtype)
    return x


@dataclass
class Scores:
    """What a candidate lost. Energies are summed over clips and chunks; chunk lists are means over clips."""

    energy: dict[str, tuple[float, float]] = field(default_factory=dict)  # label -> velocity's signal, noise
    cosines: dict[int, list[float]] = field(default_factory=dict)  # chunk -> latent cosines from the reference's state
    free: dict[int, tuple[float, float]] = field(default_factory=dict)  # chunk -> signal, noise of the free run's latents
    camera: list[float] = field(default_factory=list)

    def add_energy(self, label: str, reference: Tensor, found: Tensor) -> None:
        signal, noise = self.energy.get(label, (0.0, 0.0))
        self.energy[label] = signal + _energy(reference), noise + _energy(reference.double() - found.double())

    def add_free(self, chunk: int, reference: Tensor, found: Tensor) -> None:
        signal, noise = self.free.get(chunk, (0.0, 0.0))
        self.free[chunk] = signal + _energy(reference), noise + _energy(reference.double() - found.double())

    @property
    def velocity_sqnr(self) -> dict[str, float]:
        """dB by timestep, in the order of the steps."""
        return {label: decibel(*pair) for label, pair in self.energy.items()}

    @property
    def chunk_cosine(self) -> list[float]:
        return [sum(v) / len(v) for _, v in sorted(self.cosines.items())]

    @property
    def free_sqnr(self) -> list[float]:
        """Latent SQNR of the free run by chunk, dB."""
        return [decibel(*pair) for _, pair in sorted(self.free.items())]

    @property
    def drift(self) -> float:
        """Slope of the free run's latent SQNR, dB a chunk; negative where errors grow."""
        return slope(self.free_sqnr)

    @property
    def camera_cosine(self) -> float:
        return sum(self.camera) / len(self.camera) if self.camera else math.nan


def _energy(x: Tensor) -> float:
    return float(x.double().square().sum())


# clip name, clips done, clips in all
Progress = Callable[[str, int, int], None]


def compare(
    reference: SanaWM, candidates: dict[str, SanaWM], inputs: Sequence[ClipInputs], world: WorldConfig, progress: Progress | None = None
) -> dict[str, Scores]:
    """Scores of each candidate against the reference over all clips, and of the reference with another seed as `other seed`.

    Raises CalibrationError naming a layer whose input left the range of its static scale.
    """
    config = world.stream
    scores = {name: Scores() for name in (*candidates, "other seed")}
    for number, item in enumerate(inputs):
        if progress:
            progress(item.clip.name, number, len(inputs))
        finals = []
        texts = {name: encode_text(model, item) for name, model in candidates.items()}
        text = encode_text(reference, item)
        for chunk in record(reference, item, config):
            finals.append(chunk.latents)
            moved = turned(item, world, chunk.chunk)
            change = _camera_change(reference, chunk, text, moved)
            for name, model in candidates.items():
                _score_chunk(scores[name], model, chunk, texts[name], moved, change, config)
        runs = {name: (model, item.noise()) for name, model in candidates.items()}
        runs["other seed"] = (reference, item.noise(item.clip.seed + OTHER_SEED))
        for name, (model, noise) in runs.items():
            for index, latents in enumerate(_free_run(model, item, noise, config)):
                scores[name].add_free(index, finals[index], latents)
    for name, model in candidates.items():
        check_clipping(model, name)
    return scores


def _camera_change(model: SanaWM, chunk: ChunkRecord, text: TextFeatures, moved: tuple[Tensor, Tensor]) -> Tensor:
    """What the turned camera changes in the velocity of the chunk's last step."""
    call = chunk.calls[-1]
    before = velocity(model, call, chunk.past, text, encode_camera(model, chunk.inputs, chunk.chunk))
    after = velocity(model, call, chunk.past, text, encode_camera(model, chunk.inputs, chunk.chunk, moved))
    return after.float() - before.float()


def _score_chunk(
    scores: Scores,
    model: SanaWM,
    chunk: ChunkRecord,
    text: TextFeatures,
    moved: tuple[Tensor, Tensor],
    change: Tensor,
    config: StreamConfig,
) -> None:
    camera = encode_camera(model, chunk.inputs, chunk.chunk)
    found = [velocity(model, call, chunk.past, text, camera) for call in chunk.calls]
    for call, v in zip(chunk.calls, found):
        scores.add_energy(call.label, call.velocity, v)
    final = denoise(model, chunk, found[0], text, camera, config)
    scores.cosines.setdefault(chunk.chunk.index, []).append(cosine(chunk.latents, final))
    after = velocity(model, chunk.calls[-1], chunk.past, text, encode_camera(model, chunk.inputs, chunk.chunk, moved))
    scores.camera.append(cosine(change, after.float() - found[-1].float()))


def _free_run(model: SanaWM, item: ClipInputs, noise: Tensor, config: StreamConfig) -> Iterator[Tensor]:
    device = next(model.parameters()).device
    text = encode_text(model, item)
    for step in stream(model, noise.to(device, model.dtype), text, item.camera.to(device), item.plucker.to(device), config):
        yield step.latents


def check_clipping(model: nn.Module, what: str) -> None:
    """Raise CalibrationError naming a quantized layer whose input was not finite, or left the range of its static scale by most."""
    layers = [m for m in model.modules() if isinstance(m, FakeQuantLinear)]
    for layer in layers:
        if not math.isfinite(layer.peak):
            raise CalibrationError(f"{what}: the input of {layer.packed.name} has an infinity or NaN; give the layer another format")
    worst = max(layers, key=lambda m: m.peak / m.packed.input_limit, default=None)
    if worst is not None and worst.peak > worst.packed.input_limit:
        raise CalibrationError(
            f"{what}: the input of {worst.packed.name} reached {worst.peak:.4g} and its scale clips at {worst.packed.input_limit:.4g}; "
            "add clips like these to the calibration set and calibrate again"
        )
