"""Recorded inputs through exported graphs in ONNX Runtime: the same evaluations as the torch model, program by program."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from sanawm.camera import rope_time
from sanawm.config import TextConfig, VAEConfig, WorldConfig
from sanawm.errors import UserError
from sanawm.model.dit import BlockState, ChunkState
from sanawm.model.sampler import StreamStep
from sanawm.programs import ATTENTION_FIELDS, Geometry, camera_program, programs
from sanawm.schedule import Chunk, chunk_grid, euler_step, first_chunk_frames, step_sizes, timestep_row
from sanawm_export.onnx.export import export_part
from sanawm_runtime.engines.onnxruntime import session_options

if TYPE_CHECKING:
    from sanawm_export.parity import Recording

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class _Graphs:
    """Exported programs of one geometry, opened as they are used."""

    geometry: Geometry
    directory: Path

    def run(self, name: str, feeds: Arrays) -> Arrays:
        program = programs(self.geometry, ("dit",))[name]
        options = session_options()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(str(self.directory / f"{name}.onnx"), options, providers=["CPUExecutionProvider"])
        names = [t.name for t in program.outputs]
        inputs = {t.name for t in session.get_inputs()}
        return dict(zip(names, session.run(names, {k: v for k, v in feeds.items() if k in inputs}), strict=True))


class OnnxRunner:
    """Runs the dense evaluation and the streaming sampler of a recording on exported float32 graphs."""

    def __init__(self, recording: Recording, group: str, scratch: Path) -> None:
        from sanawm_export.parity import load_model

        self.tensors = {n: t.numpy() for n, t in recording.tensors.items() if n.startswith("in.")}
        self.scratch = scratch
        dit = recording.config(group)
        self.stream_config = recording.stream_config()
        if self.tensors["in.latents"].shape[0] != 1 or (self.stream_config.cached_chunks, self.stream_config.sink) != (2, True):
            raise UserError("exported programs have batch 1 and the window {first chunk, previous chunk}; compare this file with --engine torch")
        vae = replace(VAEConfig(), latent_channels=dit.in_channels)
        text = replace(TextConfig(), hidden=dit.caption_channels)
        self.world = WorldConfig(name=group, dit=dit, vae=vae, text=text, stream=self.stream_config)
        self.model = load_model(recording, group)

    def _export(self, first_frames: int, names: list[str]) -> _Graphs:
        geometry = Geometry(self.world, prompt_tokens=self.world.dit.text_tokens, first_frames=first_frames)
        for _ in export_part("dit", self.model, geometry, self.scratch, names=names):
            pass
        return _Graphs(geometry, self.scratch)

    def _text(self, graphs: _Graphs) -> Arrays:
        features = graphs.run("prompt_kv", {"text": self.tensors["in.text"]})
        return {**features, "text_mask": self.tensors["in.mask"].astype(bool)}

    def _camera(self, graphs: _Graphs, chunk: Chunk) -> Arrays:
        cos, sin = rope_time(np.arange(chunk.start, chunk.end), self.world.dit)
        feeds = {
            "camera_conditions": self.tensors["in.camera"][:, chunk.start : chunk.end],
            "chunk_plucker": self.tensors["in.plucker"][:, :, chunk.start : chunk.end],
            "time_cos": cos,
            "time_sin": sin,
        }
        return graphs.run(camera_program(chunk.kind), feeds)

    def dense(self, timestep_BT: Tensor) -> Tensor:
        """The first-chunk program made as long as the clip has no state and is the dense model."""
        T = self.tensors["in.latents"].shape[2]
        graphs = self._export(T, ["prompt_kv", "camera_first", "denoise_first"])
        feeds = {"latents": self.tensors["in.latents"], "timestep": timestep_BT.numpy().astype(np.float32)}
        feeds |= self._text(graphs) | self._camera(graphs, Chunk(0, 0, T))
        return torch.from_numpy(graphs.run("denoise_first", feeds)["velocity"])

    def stream(self) -> Iterator[StreamStep]:
        config = self.stream_config
        grid = chunk_grid(self.tensors["in.latents"].shape[2], config.chunk_frames)
        kinds = dict.fromkeys(c.kind for c in grid)
        names = ["prompt_kv", *dict.fromkeys(map(camera_program, kinds)), *(f"{v}_{k}" for k in kinds for v in ("denoise", "commit"))]
        graphs = self._export(first_chunk_frames(grid[-1].end, config.chunk_frames), names)
        text = self._text(graphs)
        sink: Arrays = {}
        past: Arrays = {}
        for chunk in grid:
            feeds = text | self._camera(graphs, chunk) | past | (sink if chunk.kind == "steady" else {})
            x = self.tensors["in.latents"][:, :, chunk.start : chunk.end].copy()
            velocities = []
            for timestep, size in zip(config.timesteps, step_sizes(config)):
                step = {"latents": x, "timestep": timestep_row(timestep, chunk)}
                velocities.append(graphs.run(f"denoise_{chunk.kind}", feeds | step)["velocity"])
                x = euler_step(x, velocities[-1], size, chunk)
            after = graphs.run(f"commit_{chunk.kind}", feeds | {"latents": x})
            past = {n.replace("next.", "past.", 1): a for n, a in after.items()}
            if chunk.index == 0:
                sink = {n.replace("next.", "sink.", 1): a for n, a in after.items() if n.rsplit(".", 1)[1] in ATTENTION_FIELDS}
            yield StreamStep(chunk, torch.from_numpy(x), tuple(map(torch.from_numpy, velocities)), _state(after, self.world.dit.depth))


def _state(arrays: Arrays, depth: int) -> ChunkState:
    fields: list[dict[str, Any]] = [{} for _ in range(depth)]
    for name, array in arrays.items():
        _, block, field = name.split(".")
        fields[int(block)][field] = torch.from_numpy(array)
    return tuple(BlockState(**f) for f in fields)
