"""Timing of a CUDA bundle on the GPU at hand: stages of a clip, whole clips, memory.

Inputs are random and never zero; weights are the bundle's. Stages are timed by the device's clock, whole clips by the host's, from an idle device
to an idle device and without waiting for the device in between.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sanawm.camera import rope_time
from sanawm.errors import UserError
from sanawm.programs import ENCODERS, Geometry, Program, TensorSpec, camera_program, programs
from sanawm.schedule import Chunk, chunk_grid, latent_frames, step_sizes, timestep_row
from sanawm_runtime.bundle import Bundle
from sanawm_runtime.engines._cuda_device import Timestamp
from sanawm_runtime.engines.base import Pending
from sanawm_runtime.engines.cuda import CudaBuffer, CudaEngine
from sanawm_runtime.state import DecoderState, StreamState

# Repetitions of what happens once a clip.
RUNS = 5
# Units of a camera's move in a latent frame, and latent frames to its turning point: far away its logits differ by hundreds (`pair.HEADROOM`).
STRIDE, WALK = 0.1, 120
# Clips that are decoded, too.
DECODED = 2
# Chunks after which every graph is recorded: a stream alternates two sets of state.
WARM = 4

# Buffers of an encoder by name, and what the host writes into them.
Encoder = tuple[dict[str, CudaBuffer], dict[str, NDArray]]


@dataclass(frozen=True)
class Span:
    """What a stream did from one time to another, in seconds since the clip began."""

    stream: str
    stage: str
    begin: float
    end: float


@dataclass
class Times:
    """Seconds. `encode` by encoder; `camera` and `chunk` (its steps and the clean pass) one entry a chunk for each clip that was denoised, and
    `period` from the end of a chunk to the end of the next; `decode` one entry a latent frame; `denoise` and `clip` (decoded frames on the host
    too) one entry a clip; `first` from prompt and picture to the first frame, both on the host.
    """

    load: float = 0.0
    encode: dict[str, list[float]] = field(default_factory=dict)
    first: list[float] = field(default_factory=list)
    camera: list[list[float]] = field(default_factory=list)
    chunk: list[list[float]] = field(default_factory=list)
    period: list[list[float]] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    denoise: list[float] = field(default_factory=list)
    clip: list[float] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)


@dataclass
class Memory:
    """Bytes of the device that are taken while a clip is made, least and most, and blocks allocated after its first chunk."""

    least: int = 0
    most: int = 0
    allocations: int = 0


class Bench:
    """Clips of random latents and poses through a bundle's programs."""

    def __init__(self, bundle: Bundle, frames: int, engine: CudaEngine, *, clips: int, seed: int = 0) -> None:
        world = bundle.manifest.config
        self.bundle, self.engine, self.clips = bundle, engine, clips
        self.random = np.random.default_rng(seed)
        self.chunks = chunk_grid(latent_frames(frames), world.stream.chunk_frames)
        stored = next(t for t in bundle.manifest.programs["denoise_first"].inputs if t.name == "latents")
        if stored.shape[2] != self.chunks[0].frames:
            wanted = self.chunks[0].frames
            raise UserError(f"the bundle starts with {stored.shape[2]} latent frames, a clip of {frames} frames with {wanted}; choose another length")
        self.geometry = Geometry(world, world.dit.text_tokens, self.chunks[0].frames, stored.dtype)
        self.programs: Mapping[str, Program] = programs(self.geometry, ("dit", "vae"))
        self.decodes = "decode" in bundle.manifest.programs
        self.times, self.memory = Times(), Memory()

    def run(self) -> None:
        """Measure everything. Raises EngineError where the GPU refuses something."""
        begin = time.perf_counter()
        for name in self.bundle.manifest.programs:
            self.engine.load(name)
        self.engine.synchronize()
        self.times.load = time.perf_counter() - begin
        self.clip = Clip(self)
        encoders = {name: self._encoder(name) for name in ENCODERS if name in self.bundle.manifest.programs}
        for name, (buffers, _) in encoders.items():
            self.times.encode[name] = self._device_times(name, buffers)
        if self.decodes:
            for _ in range(RUNS + 1):
                self._first_frame(encoders)
            del self.times.first[0]  # it records the graphs
        for name in encoders:
            self.engine.unload(name)
        del encoders
        self._whole_clips()
        if self.decodes:
            self.times.decode = self._device_times("decode", self.clip.decode_buffers(), 20)

    def _encoder(self, name: str) -> Encoder:
        """An encoder's buffers, and a random prompt or picture that is in them."""
        entry = self.bundle.manifest.programs[name]
        buffers = {t.name: self.engine.allocate(TensorSpec(t.name, t.dtype, t.shape)) for t in (*entry.inputs, *entry.outputs)}
        values: dict[str, NDArray] = {}
        for t in entry.inputs:
            tokens = self.random.integers(0, self.geometry.config.text.vocab, t.shape) if t.name == "input_ids" else np.ones(t.shape, np.int64)
            values[t.name] = self.random.uniform(-1, 1, t.shape) if name == "image_encoder" else tokens
            self.engine.write(buffers[t.name], values[t.name])
        return buffers, values

    def _device_times(self, name: str, buffers: Mapping[str, CudaBuffer], runs: int = RUNS) -> list[float]:
        """Seconds of a program's graph on the device."""
        stream = self.engine.stream_of(name)
        self.engine.run(name, buffers)  # records the graph
        marks = []
        for _ in range(runs):
            begin = self.engine.timestamp(stream)
            self.engine.run(name, buffers)
            marks.append((begin, self.engine.timestamp(stream)))
        self.engine.synchronize()
        return [end.since(begin) for begin, end in marks]

    def _first_frame(self, encoders: Mapping[str, Encoder]) -> None:
        """Prompt and picture on the host to the first frame on the host, by way of the first frame's latent on the host as in `World`."""
        values, text = self.clip.inputs(self.chunks[0]), dict(self.clip.text)
        self.engine.synchronize()
        begin = time.perf_counter()
        for name, (buffers, given) in encoders.items():
            for t, array in given.items():
                self.engine.write(buffers[t], array)
            self.engine.run(name, buffers)
            if name == "text_encoder":
                text["text"] = buffers["text"]
            else:
                values["latents"][:, :, :1] = self.engine.read(buffers["latents"])
        self.clip.restart()
        self.engine.run("prompt_kv", text)
        self.clip.denoise(self.chunks[0], values)
        self.clip.decode(self.chunks[0], 1)[0].result()
        self.times.first.append(time.perf_counter() - begin)

    def _whole_clips(self) -> None:
        device = self.engine.device
        values = [self.clip.inputs(chunk) for chunk in self.chunks]
        self.clip.restart()
        used = []
        for chunk in self.chunks[:WARM]:
            self.clip.denoise(chunk, values[chunk.index])
            if self.decodes:
                for pending in self.clip.decode(chunk):
                    pending.result()
            self.engine.synchronize()
            if chunk.index == 0:
                allocations = device.allocations
            used.append(device.used_bytes())
        for _ in range(self.clips):
            self.clip.restart()
            self.engine.synchronize()
            begin = time.perf_counter()
            for chunk in self.chunks:
                self.clip.denoise(chunk, values[chunk.index])
            self.engine.synchronize()
            self.times.denoise.append(time.perf_counter() - begin)
            used.append(device.used_bytes())
            marks = self.clip.marks
            self.times.camera.append([camera.since(start) for start, camera, _ in marks])
            self.times.chunk.append([end.since(camera) for _, camera, end in marks])
            self.times.period.append([b[2].since(a[2]) for a, b in itertools.pairwise(marks)])
        if self.decodes:
            for _ in range(min(self.clips, DECODED)):
                self._decoded_clip(values)
                used.append(device.used_bytes())
        self.memory = Memory(min(used), max(used), device.allocations - allocations)

    def _decoded_clip(self, values: list[dict[str, NDArray]]) -> None:
        """A clip whose chunks are decoded, and their frames copied to the host, while the next one is denoised."""
        self.clip.restart()
        self.engine.synchronize()
        begin, origin = time.perf_counter(), self.engine.timestamp("transformer")
        before: list[Pending] = []
        marks: list[tuple[Timestamp, Timestamp, Timestamp]] = []
        for chunk in self.chunks:
            self.clip.denoise(chunk, values[chunk.index])
            for pending in before:
                pending.result()
            before = self.clip.decode(chunk)
            marks.append((self.clip.decoding, self.engine.timestamp("other"), self.engine.timestamp("copy")))
        for pending in before:
            pending.result()
        self.engine.synchronize()
        self.times.clip.append(time.perf_counter() - begin)
        spans = []
        for (start, camera, end), (first, last, copied) in zip(self.clip.marks, marks):
            for stream, stage, a, b in (
                ("transformer", "camera", start, camera), ("transformer", "denoise", camera, end), ("other", "decode", first, last),
                ("copy", "copy", last, copied),
            ):  # fmt: skip
                spans.append(Span(stream, stage, a.since(origin), b.since(origin)))
        self.times.spans = spans


class Clip:
    """Device buffers of a clip, and its chunks one after the other. `marks` has (start, after the camera program, end) of each chunk."""

    def __init__(self, bench: Bench) -> None:
        self.engine, self.geometry, self.programs, self._random = bench.engine, bench.geometry, bench.programs, bench.random
        program = self.programs["prompt_kv"]
        self.text = {spec.name: self.engine.allocate(spec) for spec in (*program.inputs, *program.outputs)}
        self.engine.write(self.text["text"], self._normal(self.text["text"].spec.shape))
        self.engine.run("prompt_kv", self.text)
        mask = self.programs["denoise_first"].input("text_mask")
        self.text["text_mask"] = self.engine.allocate(mask)
        self.engine.write(self.text["text_mask"], np.ones(mask.shape, bool))
        self._state = StreamState(self.engine, self.geometry)
        # What the host writes has two sets, so that a chunk's inputs arrive while the one before is denoised.
        self._buffers = {"first": [self._allocate("first")], "steady": [self._allocate("steady")]}
        steady = self._buffers["steady"][0]
        self._buffers["steady"].append(steady | {spec.name: self.engine.allocate(spec) for spec in self._written("steady")})
        if bench.decodes:
            self._decoder = DecoderState(self.engine, list(self.programs["decode_first"].outputs[1:]))
            self._frame = self.engine.allocate(self.programs["decode"].input("latents"))
            names = ("decode_first", "decode")
            self._frames = {name: [self.engine.allocate(self.programs[name].output("frames")) for _ in range(2)] for name in names}
        self.restart()

    def restart(self) -> None:
        """Back to chunk 0, with the same buffers in the same order."""
        self.marks: list[tuple[Timestamp, Timestamp, Timestamp]] = []
        self._state.restart()

    def _normal(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        return self._random.standard_normal(shape, np.float32)

    def _written(self, kind: str) -> tuple[TensorSpec, ...]:
        return (*self.programs[camera_program(kind)].inputs, self.programs[f"denoise_{kind}"].input("latents"))

    def _allocate(self, kind: str) -> dict[str, CudaBuffer]:
        camera, denoise = self.programs[camera_program(kind)], self.programs[f"denoise_{kind}"]
        specs = (*self._written(kind), *camera.outputs, denoise.input("timestep"), *denoise.outputs)
        return {spec.name: self.engine.allocate(spec) for spec in specs}

    def inputs(self, chunk: Chunk) -> dict[str, NDArray]:
        """Random latents and maps of a chunk, on a camera that moves ahead for a minute of video, back for the next, and so on."""
        world = self.geometry.config
        poses = np.zeros((1, chunk.frames, 20), np.float32)
        poses[0, :, :16] = np.eye(4, dtype=np.float32).reshape(-1)
        poses[0, :, 11] = STRIDE * (WALK - np.abs(np.arange(chunk.start, chunk.end) % (2 * WALK) - WALK))
        poses[0, :, 16:] = world.dit.width, world.dit.width, world.dit.width / 2, world.dit.height / 2
        cos, sin = rope_time(np.arange(chunk.start, chunk.end), world.dit)
        shapes = {spec.name: spec.shape for spec in self._written(chunk.kind)}
        values = {"camera_conditions": poses, "time_cos": cos, "time_sin": sin}
        return values | {name: self._normal(shapes[name]) for name in ("chunk_plucker", "latents")}

    def bound(self, chunk: Chunk) -> dict[str, CudaBuffer]:
        """Every buffer of a chunk's programs by name."""
        found = {**self._own(chunk), **self.text, **self._state.reads(chunk.kind), **self._state.writes(chunk.kind)}
        return {name: buffer for name, buffer in found.items() if isinstance(buffer, CudaBuffer)}

    def latents(self, chunk: Chunk) -> CudaBuffer:
        """Where a chunk's latents are."""
        return self._own(chunk)["latents"]

    def _own(self, chunk: Chunk) -> dict[str, CudaBuffer]:
        sets = self._buffers["first" if chunk.kind == "first" else "steady"]
        return sets[chunk.index % len(sets)]

    def denoise(self, chunk: Chunk, values: Mapping[str, NDArray]) -> None:
        """Enqueue a chunk's camera program, denoising and clean pass."""
        own, bound, stream = self._own(chunk), self.bound(chunk), self.geometry.config.stream
        for name, array in values.items():
            self.engine.write(own[name], array)
        start = self.engine.timestamp("transformer", after=[own[name] for name in values])
        self.engine.run(camera_program(chunk.kind), own)
        camera = self.engine.timestamp("transformer")
        rows = np.concatenate([timestep_row(t, chunk) for t in stream.timesteps])
        self.engine.run_chunk(chunk.kind, bound, rows, step_sizes(stream), chunk.start == 0)
        self.marks.append((start, camera, self.engine.timestamp("transformer")))
        self._state.advance(chunk.kind)

    def decode(self, chunk: Chunk, frames: int | None = None) -> list[Pending]:
        """Enqueue the decoding of a chunk, or of so many latent frames of it; reads of the frames. `decoding` is when it begins."""
        latents = self.latents(chunk)
        reads: list[Pending] = []
        self.decoding = self.engine.timestamp("other", after=[latents])
        for t in range(frames or chunk.frames):
            name = "decode_first" if chunk.start + t == 0 else "decode"
            self.engine.copy_frame(latents, t, self._frame)
            target = self._frames[name][t % 2]
            self.engine.run(name, self.decode_buffers(name, target))
            self._decoder.advance()
            reads.append(self.engine.read_later(target))
        return reads

    def decode_buffers(self, name: str = "decode", target: CudaBuffer | None = None) -> dict[str, Any]:
        """Buffers of a decoder program for the next latent frame."""
        past = self._decoder.reads() if name == "decode" else {}
        return {"latents": self._frame, "frames": target or self._frames[name][0], **self._decoder.writes(), **past}
