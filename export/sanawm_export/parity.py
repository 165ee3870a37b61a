"""Comparison with recorded reference vectors.

A file holds `weights.*` under official names, `in.*` (latents with the clean first frame, text, mask, camera, plucker), and groups of outputs,
each computed under the settings its metadata names: `dense.*` one evaluation over the whole clip, any other group the whole streaming sampler
(`c<chunk>.s<step>.velocity`, `c<chunk>.block<i>.slot<k>` caches of the clean pass, `latents`, `segments`).
"""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sanawm.config import DiTConfig, StreamConfig
from sanawm.errors import UserError
from sanawm.model.dit import BlockState, ChunkState, SanaWM
from sanawm.model.sampler import StreamStep, camera_features, stream
from sanawm.schedule import chunk_grid

# BlockState fields in the slots of the published caches; GDN and softmax blocks number theirs differently.
_GDN_SLOTS = {0: "s", 1: "z", 2: "s_cam", 3: "cam_tail", 4: "k_tail", 9: "ffn_tail"}
_SOFTMAX_SLOTS = {0: "k", 1: "v", 2: "cam_k", 3: "cam_v", 9: "ffn_tail"}


@dataclass(frozen=True)
class Row:
    """Largest absolute error of one recorded tensor, and its largest recorded value."""

    tensor: str
    error: float
    scale: float


@dataclass(frozen=True)
class Recording:
    """A recorded file: tensors by name and its metadata."""

    tensors: dict[str, Tensor]
    meta: dict[str, str]

    @property
    def groups(self) -> list[str]:
        """Output groups, in the file's order."""
        return list(dict.fromkeys(n.partition(".")[0] for n in self.tensors if not n.startswith(("in.", "weights."))))

    def weights(self) -> dict[str, Tensor]:
        return {n.removeprefix("weights."): t for n, t in self.tensors.items() if n.startswith("weights.")}

    def config(self, group: str) -> DiTConfig:
        """Model configuration under a group's settings."""

        def scale(name: str) -> float | None:
            return float(self.meta[f"{group}.{name}"]) if f"{group}.{name}" in self.meta else None

        def flag(name: str, default: bool) -> bool:
            return self.meta.get(f"{group}.{name}", str(default)).lower() == "true"

        weights = self.weights()
        number = {k: int(self.meta[k]) for k in ("heads", "head_dim", "layers", "softmax_every", "height", "width")}
        base = DiTConfig()
        return DiTConfig(
            in_channels=self.tensors["in.latents"].shape[1],
            hidden=number["heads"] * number["head_dim"],
            depth=number["layers"],
            head_dim=number["head_dim"],
            cross_heads=int(self.meta.get("cross_heads", number["heads"])),
            softmax_every=number["softmax_every"],
            mlp_ratio=weights["blocks.0.mlp.point_conv.conv.weight"].shape[1] // weights["blocks.0.mlp.point_conv.conv.weight"].shape[0],
            caption_channels=self.tensors["in.text"].shape[-1],
            text_tokens=self.tensors["in.text"].shape[-2],
            plucker_channels=self.tensors["in.plucker"].shape[1],
            height=number["height"],
            width=number["width"],
            rms_clamp=flag("rms_clamp", base.rms_clamp),
            main_softmax_scale=scale("main_softmax_scale"),
            camera_softmax_scale=scale("camera_softmax_scale"),
            camera_conv_tail=flag("camera_conv_tail", base.camera_conv_tail),
        )

    def stream_config(self) -> StreamConfig:
        """Sampler settings; what the file does not name has the official value."""
        base, meta = StreamConfig(), self.meta
        sigmas = meta.get("sigmas")
        return dataclasses.replace(
            base,
            chunk_frames=int(meta.get("chunk_frames", base.chunk_frames)),
            timesteps=tuple(int(t) for t in meta["timesteps"].split(",")) if "timesteps" in meta else base.timesteps,
            sigmas=tuple(float(s) for s in sigmas.split(",")) if sigmas else base.sigmas,
            cached_chunks=int(meta.get("cached_chunks", base.cached_chunks)),
            sink=meta.get("sink", str(base.sink)).lower() == "true",
        )


class Runner(Protocol):
    """Evaluates the model of a group on the recorded inputs."""

    def dense(self, timestep_BT: Tensor) -> Tensor: ...

    def stream(self) -> Iterator[StreamStep]: ...


def read_recording(path: Path) -> Recording:
    """Read a file of recorded vectors. Raises UserError for one that is not."""
    try:
        with safe_open(str(path), "pt") as file:
            recording = Recording({n: file.get_tensor(n) for n in file.keys()}, file.metadata() or {})  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: expected a safetensors file of recorded vectors, found something else ({error})") from error
    needed = ["in.latents", "in.text", "in.mask", "in.camera", "in.plucker"]
    missing = [n for n in needed if n not in recording.tensors]
    missing += [n for n in ("heads", "head_dim", "layers", "softmax_every", "height", "width") if n not in recording.meta]
    if missing or not recording.weights():
        raise UserError(f"{path}: not a file of recorded vectors, it lacks {', '.join(missing) or 'weights'}; record it with inputs and metadata")
    return recording


class TorchRunner:
    """The torch model itself."""

    def __init__(self, recording: Recording, group: str) -> None:
        self.recording = recording
        self.model = load_model(recording, group)
        self.text = self.model.encode_text(recording.tensors["in.text"], recording.tensors["in.mask"])

    def dense(self, timestep_BT: Tensor) -> Tensor:
        t = self.recording.tensors
        camera = camera_features(self.model, t["in.camera"], t["in.plucker"], 0, t["in.latents"].shape[2])
        velocity, _ = self.model(t["in.latents"], timestep_BT, self.text, camera)
        assert velocity is not None
        return velocity

    def stream(self) -> Iterator[StreamStep]:
        t = self.recording.tensors
        return stream(self.model, t["in.latents"], self.text, t["in.camera"], t["in.plucker"], self.recording.stream_config())


def load_model(recording: Recording, group: str) -> SanaWM:
    """The transformer with the recorded weights under a group's settings. Raises UserError when they do not fit."""
    config = recording.config(group)
    model = SanaWM(config).eval().requires_grad_(False)
    try:
        model.load_state_dict(recording.weights(), strict=True)
    except RuntimeError as error:
        raise UserError(f"the recorded weights do not fit the recorded metadata: {error}") from error
    return model


def run_parity(path: Path, engine: str = "torch") -> Iterator[Row]:
    """Compare every recorded output with what `engine` ("torch" or "onnxruntime") computes, in float32.

    Raises UserError for a file that cannot be used or holds a tensor nobody knows how to compare.
    """
    recording = read_recording(path)
    for group in recording.groups:
        names = [n for n in recording.tensors if n.startswith(f"{group}.")]
        with torch.no_grad(), tempfile.TemporaryDirectory() as scratch:
            if engine == "torch":
                runner: Runner = TorchRunner(recording, group)
            else:
                from sanawm_export.onnx.runner import OnnxRunner

                runner = OnnxRunner(recording, group, Path(scratch))
            found = _dense(recording, group, runner) if f"{group}.out" in names else _stream(recording, group, runner)
        for name in names:
            if name in (f"{group}.timestep",):
                continue
            if name not in found:
                raise UserError(f"{path}: do not know how to compare the recorded tensor {name}; expected a name this version records")
            yield _compare(name, found[name], recording.tensors[name])


def _dense(recording: Recording, group: str, runner: Runner) -> dict[str, Tensor]:
    timestep = recording.tensors[f"{group}.timestep"].float()
    latents = recording.tensors["in.latents"]
    return {f"{group}.out": runner.dense(timestep.reshape(latents.shape[0], -1))}


def _stream(recording: Recording, group: str, runner: Runner) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    latents = []
    config = recording.config(group)
    for step in runner.stream():
        prefix = f"{group}.c{step.chunk.index}"
        latents.append(step.latents)
        found |= {f"{prefix}.s{i}.velocity": v for i, v in enumerate(step.velocities)}
        found |= _slots(prefix, step.state, config)
    found[f"{group}.latents"] = torch.cat(latents, 2)
    grid = chunk_grid(recording.tensors["in.latents"].shape[2], recording.stream_config().chunk_frames)
    found[f"{group}.segments"] = torch.tensor([0, *(c.end for c in grid)])
    return found


def _slots(prefix: str, state: ChunkState, config: DiTConfig) -> dict[str, Tensor]:
    slots: dict[str, Tensor] = {}
    for i, block in enumerate(state):
        table = _SOFTMAX_SLOTS if config.is_softmax(i) else _GDN_SLOTS
        for slot, field in table.items():
            if (tensor := getattr(block, field)) is not None:
                slots[f"{prefix}.block{i}.slot{slot}"] = _published_layout(field, block, tensor)
    return slots


def _published_layout(field: str, block: BlockState, tensor: Tensor) -> Tensor:
    """Our state tensor in the shape public code caches it."""
    if field == "z":
        return tensor.unsqueeze(-1)
    if field in ("k_tail", "cam_tail"):  # (B, 3, S, C) -> (B*S, 3, C)
        return tensor.transpose(1, 2).flatten(0, 1)
    if field == "ffn_tail":  # (B, S, C) -> (B, C, 1, S)
        return tensor.transpose(1, 2).unsqueeze(2)
    return tensor


def _compare(name: str, found: Tensor, recorded: Tensor) -> Row:
    if found.shape != recorded.shape and re.search(r"slot[0-3]$", name) and found.transpose(1, 2).shape == recorded.shape:
        found = found.transpose(1, 2)  # attention caches are recorded head-major by some
    if found.shape != recorded.shape:
        raise UserError(f"{name} was recorded with shape {tuple(recorded.shape)}, and the model gives {tuple(found.shape)}; record it again")
    difference = (found.double() - recorded.double()).abs()
    error: Any = difference.max() if difference.numel() else torch.zeros(())
    # A NaN must not pass as a small error.
    return Row(name, float("inf") if torch.isnan(error) else float(error), float(recorded.double().abs().max()))
