"""Timing of a CUDA bundle's denoiser and decoder on the GPU at hand, with the computed floor beside each time.

Inputs are random and never zero; weights are the bundle's. A stage is timed from an idle device to an idle device, on the host's clock.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sanawm.camera import rope_time
from sanawm.errors import UserError
from sanawm.programs import Geometry, Program, TensorSpec, camera_program, programs
from sanawm.schedule import Chunk, chunk_grid, latent_frames, step_sizes, timestep_row
from sanawm_export.cuda.cost import Gpu, floor_us
from sanawm_runtime.bundle import Bundle
from sanawm_runtime.engines._cuda_plan import Plan
from sanawm_runtime.engines.cuda import CudaBuffer, CudaEngine
from sanawm_runtime.state import DecoderState, StreamState

ENCODERS = {"text_encoder": "a prompt's token ids to its embedding on the device", "image_encoder": "the first frame to its latent on the device"}
ENCODER_RUNS = 5


@dataclass
class Times:
    """Seconds of each stage: `load`, and one entry a chunk (`camera`, `denoise`: its steps and the clean pass) or a latent frame (`decode`).

    `encode` has the repetitions of each encoder, which is given back before the clip begins.
    """

    load: float = 0.0
    encode: dict[str, list[float]] = field(default_factory=dict)
    camera: list[float] = field(default_factory=list)
    denoise: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)


class Bench:
    """One clip of random latents and poses through a bundle's programs."""

    def __init__(self, bundle: Bundle, frames: int, engine: CudaEngine, seed: int = 0) -> None:
        world = bundle.manifest.config
        self.bundle, self.engine = bundle, engine
        self.random = np.random.default_rng(seed)
        latents = latent_frames(frames)
        self.chunks = chunk_grid(latents, world.stream.chunk_frames)
        shape = next(t.shape for t in bundle.manifest.programs["denoise_first"].inputs if t.name == "latents")
        if shape[2] != self.chunks[0].frames:
            wanted = self.chunks[0].frames
            raise UserError(f"the bundle starts with {shape[2]} latent frames, a clip of {frames} frames with {wanted}; choose another length")
        dtype = next(t.dtype for t in bundle.manifest.programs["denoise_first"].inputs if t.name == "latents")
        self.geometry = Geometry(world, world.dit.text_tokens, self.chunks[0].frames, dtype)
        self.programs: Mapping[str, Program] = programs(self.geometry, ("dit", "vae"))
        self.times = Times()

    def run(self) -> Times:
        """Time the clip's every chunk. Raises EngineError where the GPU refuses something."""
        begin = time.perf_counter()
        for name in self.bundle.manifest.programs:
            self.engine.load(name)
        self.engine.synchronize()
        self.times.load = time.perf_counter() - begin
        for name in ENCODERS:
            if name in self.bundle.manifest.programs:
                self._encode(name)
        text = self._text()
        state = StreamState(self.engine, self.geometry)
        buffers = {kind: self._buffers(kind) for kind in ("first", "steady")}
        decoder = DecoderState(self.engine, list(self.programs["decode_first"].outputs[1:])) if "decode" in self.bundle.manifest.programs else None
        for chunk in self.chunks:
            own = buffers["first" if chunk.kind == "first" else "steady"]
            self._chunk(chunk, own, text, state)
            if decoder is not None:
                self._decode(chunk, own["latents"], decoder)
        return self.times

    def _timed(self, into: list[float], action: Callable[[], None]) -> None:
        self.engine.synchronize()
        begin = time.perf_counter()
        action()
        self.engine.synchronize()
        into.append(time.perf_counter() - begin)

    def _random(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        return self.random.standard_normal(shape, np.float32)

    def _encode(self, name: str) -> None:
        """Time an encoder on a random prompt or picture, then give it back."""
        entry = self.bundle.manifest.programs[name]
        specs = [TensorSpec(t.name, t.dtype, t.shape) for t in (*entry.inputs, *entry.outputs)]
        buffers = {spec.name: self.engine.allocate(spec) for spec in specs}
        for t in entry.inputs:
            tokens = self.random.integers(0, self.geometry.config.text.vocab, t.shape) if t.name == "input_ids" else np.ones(t.shape, np.int64)
            self.engine.write(buffers[t.name], self.random.uniform(-1, 1, t.shape) if name == "image_encoder" else tokens)
        self.engine.run(name, buffers)  # records the graph
        for _ in range(ENCODER_RUNS):
            self._timed(self.times.encode.setdefault(name, []), lambda: self.engine.run(name, buffers))
        self.engine.unload(name)

    def _text(self) -> dict[str, CudaBuffer]:
        program = self.programs["prompt_kv"]
        buffers = {spec.name: self.engine.allocate(spec) for spec in (*program.inputs, *program.outputs)}
        self.engine.write(buffers["text"], self._random(buffers["text"].spec.shape))
        self.engine.run("prompt_kv", buffers)
        mask = self.programs["denoise_first"].input("text_mask")
        buffers["text_mask"] = self.engine.allocate(mask)
        self.engine.write(buffers["text_mask"], np.ones(mask.shape, bool))
        return buffers

    def _buffers(self, kind: str) -> dict[str, CudaBuffer]:
        camera, denoise = self.programs[camera_program(kind)], self.programs[f"denoise_{kind}"]
        specs = (*camera.inputs, *camera.outputs, denoise.input("latents"), denoise.input("timestep"), *denoise.outputs)
        return {spec.name: self.engine.allocate(spec) for spec in specs}

    def _chunk(self, chunk: Chunk, own: dict[str, CudaBuffer], text: dict[str, CudaBuffer], state: StreamState) -> None:
        world = self.geometry.config
        poses = np.zeros((1, chunk.frames, 20), np.float32)
        poses[0, :, :16] = np.eye(4, dtype=np.float32).reshape(-1)
        poses[0, :, 11] = 0.1 * np.arange(chunk.start, chunk.end)
        poses[0, :, 16:] = world.dit.width, world.dit.width, world.dit.width / 2, world.dit.height / 2
        cos, sin = rope_time(np.arange(chunk.start, chunk.end), world.dit)
        maps = self._random(own["chunk_plucker"].spec.shape)
        for name, values in (("camera_conditions", poses), ("chunk_plucker", maps), ("time_cos", cos), ("time_sin", sin)):
            self.engine.write(own[name], values)
        self.engine.write(own["latents"], self._random(own["latents"].spec.shape))
        self._timed(self.times.camera, lambda: self.engine.run(camera_program(chunk.kind), own))
        bound = {**own, **text, **state.reads(chunk.kind), **state.writes(chunk.kind)}
        rows = np.concatenate([timestep_row(t, chunk) for t in world.stream.timesteps])
        sizes = step_sizes(world.stream)
        self._timed(self.times.denoise, lambda: self.engine.run_chunk(chunk.kind, bound, rows, sizes, chunk.start == 0))
        state.advance(chunk.kind)

    def _decode(self, chunk: Chunk, latents: CudaBuffer, decoder: DecoderState) -> None:
        values = self.engine.read(latents)
        for t in range(chunk.frames):
            name = "decode_first" if chunk.start + t == 0 else "decode"
            program = self.programs[name]
            own = {spec.name: self.engine.allocate(spec) for spec in (program.inputs[0], program.outputs[0])}
            self.engine.write(own["latents"], values[:, :, t : t + 1])
            bound = {**own, **decoder.writes(), **(decoder.reads() if name == "decode" else {})}
            self._timed(self.times.decode, lambda name=name, bound=bound: self.engine.run(name, bound))  # type: ignore[misc]
            decoder.advance()


def rows(bench: Bench, gpu: Gpu | None) -> list[dict[str, Any]]:
    """Rows of a result file: medians without the first two chunks, which record graphs; with the floor on `gpu` where its peaks are known."""
    times, recipe = bench.times, bench.bundle.manifest.precision.recipe
    plans = {name: Plan.from_json(bench.bundle.read(entry.file)) for name, entry in bench.bundle.manifest.programs.items()}
    steps = len(bench.geometry.config.stream.timesteps)

    def floor(**counts: int) -> float | None:
        return None if gpu is None else sum(n * sum(floor_us(s, gpu) for s in plans[name].steps) for name, n in counts.items()) / 1e6

    found = [_row(f"engine.load.{recipe}", "wall", [times.load], None, "reading or making, packing and sending all weights")]
    cases = [
        ("engine.camera", times.camera[2:], floor(camera=1), "one chunk's camera program"),
        ("engine.chunk", times.denoise[2:], floor(denoise_steady=steps, commit_steady=1), f"{steps} denoising steps and the clean pass of one chunk"),
        ("engine.decode", times.decode[2:], floor(decode=1) if "decode" in plans else None, "one latent frame to eight frames on the device"),
    ]
    cases += [(f"engine.{name}", values, floor(**{name: 1}), ENCODERS[name]) for name, values in times.encode.items()]
    found += [_row(f"{case}.{recipe}", "median", values, bound, what) for case, values, bound, what in cases if values]
    frames = 8 * (bench.chunks[-1].end - 1) + 1
    total = [sum(times.denoise) + sum(times.camera)]
    found.append(_row(f"engine.denoise.{frames}f.{recipe}", "sum", total, None, "camera programs, denoising and clean passes"))
    return found


def _row(case: str, metric: str, values: list[float], floor: float | None, includes: str) -> dict[str, Any]:
    return {
        "case": case, "metric": metric, "value": statistics.median(values), "unit": "s", "min": min(values), "max": max(values), "n": len(values),
        "floor": floor, "peer": None, "peer_value": None, "includes": includes,
    }  # fmt: skip
