"""One run of the model along its time axis: state, camera, denoising, decoding."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sanawm.camera import CameraPacker, rope_time
from sanawm.programs import camera_program
from sanawm.schedule import Chunk as Span
from sanawm.schedule import step_sizes, timestep_row
from sanawm_runtime.chunk import chunk_noise
from sanawm_runtime.engines.base import Buffer, Pending
from sanawm_runtime.errors import Cancelled
from sanawm_runtime.marks import mark
from sanawm_runtime.state import DecoderState, StreamState

if TYPE_CHECKING:
    from sanawm_runtime.world import World

# stage, programs done, programs in all of this chunk
Progress = Callable[[str, int, int], None]


class Monitor:
    """Watches one step: times its stages, reports progress, and gives up between programs when asked to."""

    def __init__(self, total: int, progress: Progress | None, given_up: Callable[[], bool]) -> None:
        self.seconds: dict[str, float] = {}
        self.binding = False
        self._done, self._total = 0, total
        self._progress, self._given_up = progress, given_up

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.check()
        begin = time.perf_counter()
        with mark(name):
            yield
        self.seconds[name] = time.perf_counter() - begin

    def check(self) -> None:
        """Raises Cancelled if the step was given up and nothing of it has to stay."""
        if not self.binding and self._given_up():
            raise Cancelled("the step was cancelled; the stream is as it was before it")

    def advance(self, stage: str) -> None:
        self._done += 1
        if self._progress:
            self._progress(stage, self._done, self._total)


class Rollout:
    """Buffers and state of a run. Memory and time of a chunk are constant however long it gets.

    Everything here computes: the caller holds the engine's turn.
    """

    def __init__(self, world: World, text: dict[str, Buffer]) -> None:
        self.world = world
        self.chunks = 0
        self._text = text
        self._first_latent: NDArray[np.float32] | None = None
        self._packer = CameraPacker(world.config)
        engine, programs = world.engine, world.programs
        self._state = StreamState(engine, world.geometry)
        self._decoder = DecoderState(engine, list(programs["decode_first"].outputs[1:]))
        self._latent_frame = engine.allocate(programs["decode"].input("latents"))
        # Two of each: a latent frame is decoded while the frames of the one before are copied to the host.
        names = ("decode_first", "decode")
        self._frames = {name: [engine.allocate(programs[name].output("frames")) for _ in range(2)] for name in names}
        self._buffers = {kind: self._chunk_buffers(kind) for kind in ("first", "steady")}

    def _chunk_buffers(self, kind: str) -> dict[str, Buffer]:
        """Buffers of a chunk's inputs and of its camera features; second and steady chunks have the same shapes."""
        programs = self.world.programs
        camera, denoise = programs[camera_program(kind)], programs[f"denoise_{kind}"]
        specs = (*camera.inputs, *camera.outputs, denoise.input("latents"), denoise.input("timestep"), *denoise.outputs)
        return {spec.name: self.world.engine.allocate(spec) for spec in specs}

    def begin(self, first_latent: NDArray[np.float32]) -> None:
        """Start at chunk 0 from the latent (1, C, 1, h, w) of a first frame."""
        self.chunks = 0
        self._first_latent = first_latent
        self._packer = CameraPacker(self.world.config)
        self._state.restart()

    def fork(self) -> Rollout:
        """A copy that goes on by itself; the prompt's buffers, which nobody writes, are shared."""
        other = Rollout(self.world, self._text)
        other.chunks, other._first_latent = self.chunks, self._first_latent
        other._packer = copy.copy(self._packer)
        self._state.copy_to(other._state, self.world.engine)
        self._decoder.copy_to(other._decoder, self.world.engine)
        return other

    @property
    def span(self) -> Span:
        """Latent frames of the next chunk."""
        index, first, step = self.chunks, self.world.geometry.first_frames, self.world.config.stream.chunk_frames
        start = 0 if index == 0 else first + (index - 1) * step
        return Span(index, start, start + (first if index == 0 else step))

    @property
    def poses_needed(self) -> int:
        return CameraPacker.poses_needed(self.span.frames, self.chunks == 0)

    @property
    def has_room(self) -> bool:
        """Whether the next chunk still fits the model's time axis."""
        return self.span.end <= self.world.config.dit.rope_frames

    @property
    def work(self) -> int:
        """Programs that the next chunk runs."""
        return 2 + len(self.world.config.stream.timesteps) + self.span.frames

    def step(
        self, poses: NDArray[np.float64], intrinsics: NDArray[np.float64], seed: int, noise: int, monitor: Monitor
    ) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """The next chunk's latents and frames along poses (P, 4, 4), with intrinsics (P, 4) and the noise of chunk number `noise`.

        Whatever is raised before `monitor.binding` leaves the run as it was.
        """
        span, before = self.span, copy.copy(self._packer)
        buffers = self._buffers["first" if span.kind == "first" else "steady"]
        try:
            packed = self._packer.push(poses, intrinsics)
            with monitor.stage("camera"):
                self._camera(span, packed.camera_conditions, packed.chunk_plucker, buffers)
                monitor.advance("camera")
            with monitor.stage("denoise"):
                self._denoise(span, buffers, seed, noise, monitor)
                latents = self.world.engine.read(buffers["latents"])
            monitor.check()
        except BaseException:
            self._packer = before
            raise
        monitor.binding = True
        with monitor.stage("commit"):
            self._commit(span, buffers)
            monitor.advance("commit")
        with monitor.stage("decode"):
            frames = self._decode(span, buffers["latents"], monitor)
        self.chunks += 1
        return latents, frames

    def _run(self, name: str, buffers: dict[str, Buffer]) -> None:
        program = self.world.programs[name]
        self.world.engine.run(name, {spec.name: buffers[spec.name] for spec in (*program.inputs, *program.outputs)})

    def _camera(self, span: Span, conditions: NDArray, plucker: NDArray, buffers: dict[str, Buffer]) -> None:
        cos, sin = rope_time(np.arange(span.start, span.end), self.world.config.dit)
        for key, values in (("camera_conditions", conditions), ("chunk_plucker", plucker), ("time_cos", cos), ("time_sin", sin)):
            self.world.engine.write(buffers[key], values)
        self._run(camera_program(span.kind), buffers)

    def _denoise(self, span: Span, buffers: dict[str, Buffer], seed: int, noise: int, monitor: Monitor) -> None:
        engine, stream = self.world.engine, self.world.config.stream
        latents = buffers["latents"]
        x = chunk_noise(seed, noise, latents.spec.shape)
        if span.start == 0:
            x[:, :, :1] = self._first_latent
        engine.write(latents, x)
        bound = {**buffers, **self._text, **self._state.reads(span.kind)}
        if engine.whole_chunks:
            # With the clean pass, whose outputs nobody reads before the step is binding.
            rows = np.concatenate([timestep_row(timestep, span) for timestep in stream.timesteps])
            engine.run_chunk(span.kind, bound | self._state.writes(span.kind), rows, step_sizes(stream), keep_first=span.start == 0)
            for _ in stream.timesteps:
                monitor.advance("denoise")
            return
        for timestep, size in zip(stream.timesteps, step_sizes(stream)):
            monitor.check()
            engine.write(buffers["timestep"], timestep_row(timestep, span))
            self._run(f"denoise_{span.kind}", bound)
            engine.euler(latents, buffers["velocity"], size, keep_first=span.start == 0)
            monitor.advance("denoise")

    def _commit(self, span: Span, buffers: dict[str, Buffer]) -> None:
        if not self.world.engine.whole_chunks:
            self._run(f"commit_{span.kind}", {**buffers, **self._text, **self._state.reads(span.kind), **self._state.writes(span.kind)})
        self._state.advance(span.kind)

    def _decode(self, span: Span, latents: Buffer, monitor: Monitor) -> NDArray[np.uint8]:
        engine = self.world.engine
        names = ["decode" if span.start + t else "decode_first" for t in range(span.frames)]
        counts = [self._frames[name][0].spec.shape[0] for name in names]
        out = np.empty((sum(counts), *self.world.image_size, 3), np.uint8)
        # The read of a latent frame runs beside the decoding of the next one, and is taken before a third is begun.
        reads: list[tuple[Pending, NDArray[np.uint8]]] = []

        def take() -> None:
            read, target = reads.pop(0)
            read.result(target)
            monitor.advance("decode")

        for t, (name, target) in enumerate(zip(names, np.split(out, np.cumsum(counts[:-1])))):
            engine.copy_frame(latents, t, self._latent_frame)
            state = self._decoder.writes() | (self._decoder.reads() if name == "decode" else {})
            frames = self._frames[name][t % 2]
            self._run(name, {"latents": self._latent_frame, "frames": frames, **state})
            self._decoder.advance()
            reads.append((engine.read_later(frames), target))
            if len(reads) == 2:
                take()
        while reads:
            take()
        return out
