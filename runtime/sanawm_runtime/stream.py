"""One running stream: poses in, frames out, chunk by chunk."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sanawm.camera import ActionIntegrator, CameraPacker, rope_time
from sanawm.errors import CameraError, InputError
from sanawm.programs import camera_program
from sanawm.schedule import Chunk as Span
from sanawm.schedule import step_sizes, timestep_row
from sanawm_runtime.engines.base import Buffer
from sanawm_runtime.state import DecoderState, StreamState

if TYPE_CHECKING:
    from sanawm_runtime.world import World


@dataclass(frozen=True)
class Chunk:
    """What one step produced.

    frames (F, H, W, 3) uint8 RGB; latents (1, C, T, h, w) float32, normalised; poses (F, 4, 4) float64 as given; seconds spent in each stage.
    """

    index: int
    frames: NDArray[np.uint8]
    latents: NDArray[np.float32]
    poses: NDArray[np.float64]
    seconds: dict[str, float]


def chunk_noise(seed: int, chunk: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Standard normal noise of a chunk, from a counter generator keyed by (seed, chunk): any chunk can be drawn alone."""
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, chunk], np.uint64)))
    return generator.standard_normal(shape, np.float32)


class Stream:
    """A stream in progress; made by `World.start`. Memory and time of a chunk are constant however long it runs."""

    def __init__(
        self,
        world: World,
        text: dict[str, Buffer],
        first_latent: NDArray[np.float32],
        first_frame: NDArray[np.uint8],
        intrinsics: NDArray[np.float64],
        seed: int,
    ) -> None:
        if not 0 <= seed < 2**64:
            raise InputError(f"expected a seed from 0 to 2**64 - 1, found {seed}; choose another")
        self.world = world
        self.first_frame = first_frame
        self.seed = seed
        self.chunks_done = 0
        self._text = text
        self._first_latent = first_latent
        self._intrinsics = intrinsics
        self._packer = CameraPacker(world.config)
        engine, programs = world.engine, world.programs
        self._state = StreamState(engine, world.geometry)
        self._decoder = DecoderState(engine, list(programs["decode_first"].outputs[1:]))
        self._latent_frame = engine.allocate(programs["decode"].input("latents"))
        self._frames = {name: engine.allocate(programs[name].output("frames")) for name in ("decode_first", "decode")}
        self._buffers = {kind: self._chunk_buffers(kind) for kind in ("first", "steady")}

    def _chunk_buffers(self, kind: str) -> dict[str, Buffer]:
        """Buffers of a chunk's inputs and of its camera features; second and steady chunks have the same shapes."""
        programs = self.world.programs
        camera, denoise = programs[camera_program(kind)], programs[f"denoise_{kind}"]
        specs = (*camera.inputs, *camera.outputs, denoise.input("latents"), denoise.input("timestep"), *denoise.outputs)
        return {spec.name: self.world.engine.allocate(spec) for spec in specs}

    @property
    def frames_done(self) -> int:
        """Pixel frames generated so far."""
        return self._packer.frames

    @property
    def _span(self) -> Span:
        index, first, step = self.chunks_done, self.world.geometry.first_frames, self.world.config.stream.chunk_frames
        start = 0 if index == 0 else first + (index - 1) * step
        return Span(index, start, start + (first if index == 0 else step))

    @property
    def poses_needed(self) -> int:
        """Poses the next chunk takes, one a pixel frame: 25 for the first chunk, 24 later (with the default chunk grid)."""
        return CameraPacker.poses_needed(self._span.frames, self.chunks_done == 0)

    def step(self, poses: ArrayLike) -> Chunk:
        """Generate the next chunk along `poses`.

        poses (P, 4, 4) camera-to-world in any fixed world axes (OpenCV camera axes), P = `poses_needed`; the stream's first pose becomes the
        origin. Raises CameraError, which leaves the stream as it was, and EngineError, after which the stream cannot go on.
        """
        given = np.asarray(poses, np.float64)
        if given.ndim != 3 or len(given) != self.poses_needed:
            raise CameraError(f"chunk {self.chunks_done} takes {self.poses_needed} poses (P, 4, 4), found shape {given.shape}; see poses_needed")
        span = self._span
        limit = self.world.config.dit.rope_frames
        if span.end > limit:
            raise InputError(f"the model's time axis ends after {limit} latent frames ({8 * limit - 7} frames); start a new stream from the last frame")
        packed = self._packer.push(given, self._rows(len(given)))
        seconds: dict[str, float] = {}
        buffers = self._buffers["first" if span.kind == "first" else "steady"]

        begin = time.perf_counter()
        self._run_camera(span, packed.camera_conditions, packed.chunk_plucker, buffers)
        seconds["camera"], begin = time.perf_counter() - begin, time.perf_counter()
        self._denoise(span, buffers)
        latents = self.world.engine.read(buffers["latents"])
        seconds["denoise"], begin = time.perf_counter() - begin, time.perf_counter()
        self._commit(span, buffers)
        seconds["commit"], begin = time.perf_counter() - begin, time.perf_counter()
        frames = self._decode(latents)
        seconds["decode"] = time.perf_counter() - begin
        self.chunks_done += 1
        return Chunk(span.index, frames, latents, given, seconds)

    def _rows(self, count: int) -> NDArray[np.float64]:
        """Intrinsics (count, 4) of the next frames."""
        last = len(self._intrinsics) - 1
        return self._intrinsics[np.minimum(np.arange(self.frames_done, self.frames_done + count), last)]

    def generate(self, poses: ArrayLike) -> Iterator[Chunk]:
        """Generate along a whole trajectory, one chunk at a time.

        poses (F, 4, 4) with F = the next `poses_needed` plus a multiple of the later ones'.
        """
        path = np.asarray(poses, np.float64)
        later = CameraPacker.poses_needed(self.world.config.stream.chunk_frames, False)
        if len(path) < self.poses_needed or (len(path) - self.poses_needed) % later:
            raise CameraError(f"expected {self.poses_needed} + {later}k poses, found {len(path)}; trim or extend the camera path")
        start = 0
        while start < len(path):
            end = start + self.poses_needed
            yield self.step(path[start:end])
            start = end

    def hold(self, keys: str, integrator: ActionIntegrator) -> Chunk:
        """Generate the next chunk with `keys` held (a string such as "wd", "" to rest), moving `integrator` along."""
        poses = [integrator.pose.copy()] if self.chunks_done == 0 else []
        poses += [integrator.step(keys) for _ in range(self.poses_needed - len(poses))]
        return self.step(np.stack(poses))

    def _run_camera(self, span: Span, conditions: NDArray, plucker: NDArray, buffers: dict[str, Buffer]) -> None:
        engine, name = self.world.engine, camera_program(span.kind)
        cos, sin = rope_time(np.arange(span.start, span.end), self.world.config.dit)
        for key, values in (("camera_conditions", conditions), ("chunk_plucker", plucker), ("time_cos", cos), ("time_sin", sin)):
            engine.write(buffers[key], values)
        self._run(name, buffers)

    def _run(self, name: str, buffers: dict[str, Buffer]) -> None:
        program = self.world.programs[name]
        self.world.engine.run(name, {spec.name: buffers[spec.name] for spec in (*program.inputs, *program.outputs)})

    def _denoise(self, span: Span, buffers: dict[str, Buffer]) -> None:
        engine, stream = self.world.engine, self.world.config.stream
        latents = buffers["latents"]
        x = chunk_noise(self.seed, span.index, latents.spec.shape)
        if span.start == 0:
            x[:, :, :1] = self._first_latent
        engine.write(latents, x)
        bound = {**buffers, **self._text, **self._state.reads(span.kind)}
        for timestep, size in zip(stream.timesteps, step_sizes(stream)):
            engine.write(buffers["timestep"], timestep_row(timestep, span))
            self._run(f"denoise_{span.kind}", bound)
            engine.euler(latents, buffers["velocity"], size, keep_first=span.start == 0)

    def _commit(self, span: Span, buffers: dict[str, Buffer]) -> None:
        self._run(f"commit_{span.kind}", {**buffers, **self._text, **self._state.reads(span.kind), **self._state.writes(span.kind)})
        self._state.advance(span.kind)

    def _decode(self, latents: NDArray[np.float32]) -> NDArray[np.uint8]:
        engine, out = self.world.engine, []
        for t in range(latents.shape[2]):
            name = "decode" if self.chunks_done or t else "decode_first"
            engine.write(self._latent_frame, latents[:, :, t : t + 1])
            state = self._decoder.writes() | (self._decoder.reads() if name == "decode" else {})
            self._run(name, {"latents": self._latent_frame, "frames": self._frames[name], **state})
            self._decoder.advance()
            out.append(engine.read(self._frames[name]))
        return np.concatenate(out)
