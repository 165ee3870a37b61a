"""Programs as launch lists of this project's kernels, replayed as CUDA graphs through cuda-python: no TensorRT, no torch.

Three streams: one computes the transformer, one everything else, one copies to and from the host. Each buffer knows the last point at which it
was written and read, so work on different streams waits for what it needs and for nothing more.
"""

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sanawm.bfloat16 import to_bits
from sanawm.errors import EngineError
from sanawm.programs import TensorSpec
from sanawm_runtime.bundle import Bundle
from sanawm_runtime.engines._cuda_buffers import STORAGE, CudaBuffer, Memory, PendingRead, own
from sanawm_runtime.engines._cuda_device import Event, Gpu, Timestamp, check_capability
from sanawm_runtime.engines._cuda_kernels import Kernel, read_index
from sanawm_runtime.engines._cuda_plan import Plan, largest_arenas, stream_of
from sanawm_runtime.engines._cuda_program import BoundProgram, Loaded
from sanawm_runtime.engines._cuda_staging import Staging
from sanawm_runtime.engines._cuda_weights import read_table, upload
from sanawm_runtime.engines.base import Buffer, Engine

# Graphs of one program for different buffers: a stream alternates two sets of state, and a few streams may share an engine.
GRAPHS = 16
# Timesteps of chunks on the device: bytes of one chunk's, and chunks that room is made for at once.
ROW_BYTES, ROW_TABLES = 4096, 16


@dataclass
class _Part:
    """Weights that programs share: the block on the device, and the programs that are loaded."""

    block: int
    addresses: Mapping[str, int]
    users: set[str]


@dataclass
class _Program:
    plan: Plan
    part: str
    graphs: OrderedDict[tuple[Any, ...], tuple[BoundProgram, Any]] = dataclasses.field(default_factory=OrderedDict)


class CudaEngine(Engine):
    """Runs the plans of a bundle. `device` can be given for tests."""

    whole_chunks = True

    def __init__(self, bundle: Bundle, device: Gpu | None = None) -> None:
        self._bundle = bundle
        self._device = device or Gpu()
        check_capability(self._device, bundle.manifest.target.capability)
        self._streams = {name: self._device.new_stream() for name in ("transformer", "other", "copy")}
        self._memory = Memory(self._device)
        self._arenas: dict[str, int] = {}
        self._arena_bytes = largest_arenas(bundle.manifest.programs)
        self._programs: dict[str, _Program] = {}
        self._parts: dict[str, _Part] = {}
        self._indices: dict[str, dict[str, Kernel]] = {}
        self._functions: dict[str, Loaded] = {}
        pixels = (t for entry in bundle.manifest.programs.values() for t in entry.outputs if t.dtype == "uint8")
        self._outward = Staging(self._device, 4)
        self._inward = Staging(self._device, 1, max((math.prod(t.shape) for t in pixels), default=0))
        self._chunks: OrderedDict[tuple[Any, ...], tuple[list[BoundProgram], Any]] = OrderedDict()
        self._rows: dict[bytes, int] = {}
        self._row_blocks: list[int] = []
        self._closed = False

    def activate(self) -> None:
        self._device.activate()

    def free_bytes(self) -> int:
        return self._device.free_bytes()

    @property
    def device(self) -> Gpu:
        """The GPU, for its name and driver."""
        return self._device

    def stream_of(self, program: str) -> str:
        """Name of the stream that a program of the bundle runs on."""
        return stream_of(str(self._bundle.manifest.programs[program].extras.get("weights", "")))

    def timestamp(self, stream: str, after: Iterable[Buffer] = ()) -> Timestamp:
        """A point behind all that was enqueued on "transformer", "other" or "copy" so far, and behind what was written to the buffers of `after`."""
        self._check_open()
        for buffer in after:
            if (written := own(buffer).written) is not None:
                written.wait(self._streams[stream])
        return Timestamp(self._device, self._streams[stream])

    def steps(self, program: str, buffers: Mapping[str, Buffer]) -> tuple[BoundProgram, Any]:
        """A program's launches for these buffers and the stream that they belong on, to be measured one by one."""
        self.load(program)
        loaded = self._programs[program]
        bound = {name: self._bound(loaded, name, buffers) for name, b in loaded.plan.buffers.items() if b.role in ("input", "output")}
        return self._bind(loaded, bound, {}), self._streams[stream_of(loaded.part)]

    def synchronize(self) -> None:
        """Wait until everything that was enqueued is done."""
        self._check_open()
        self._device.call("cuCtxSynchronize")

    # memory

    def allocate(self, spec: TensorSpec) -> CudaBuffer:
        self._check_open()
        if spec.dtype not in STORAGE:
            raise EngineError(f"{spec.name} is {spec.dtype}, which the cuda engine does not hold; rebuild the bundle")
        return CudaBuffer(spec, self._memory)

    def write(self, buffer: Buffer, values: NDArray) -> None:
        target = own(buffer)
        if tuple(values.shape) != target.spec.shape:
            raise EngineError(f"{target.spec.name} takes shape {target.spec.shape}, found {values.shape}")
        stored = to_bits(np.asarray(values, np.float32)) if target.spec.dtype == "bfloat16" else values.astype(STORAGE[target.spec.dtype])
        host = self._outward.take(target.spec.nbytes)
        piece = host[: target.spec.nbytes]
        piece[:] = np.ascontiguousarray(stored).reshape(-1).view(np.uint8)
        stream = self._streams["copy"]
        self._outward.give(host, self._enqueue(stream, (), (target,), lambda: self._device.send(target.address, piece, stream)))

    def read_later(self, buffer: Buffer) -> PendingRead:
        source = own(buffer)
        host = self._inward.take(source.spec.nbytes)
        stream = self._streams["copy"]
        done = self._enqueue(stream, (source,), (), lambda: self._device.fetch(host[: source.spec.nbytes], source.address, stream))
        return PendingRead(source.spec, self._inward, host, done)

    def read(self, buffer: Buffer) -> NDArray:
        return self.read_later(buffer).result()

    def copy(self, source: Buffer, target: Buffer) -> None:
        a, b = own(source), own(target)
        if (a.spec.dtype, a.spec.shape) != (b.spec.dtype, b.spec.shape):
            raise EngineError(f"cannot copy {a.spec.dtype}{list(a.spec.shape)} into {b.spec.dtype}{list(b.spec.shape)}")
        stream, size = self._streams["transformer"], a.spec.nbytes
        self._enqueue(stream, (a,), (b,), lambda: self._device.copy_rows(b.address, size, a.address, size, size, 1, stream))

    def copy_frame(self, source: Buffer, index: int, target: Buffer) -> None:
        a, b = own(source), own(target)
        _, channels, frames, *grid = a.spec.shape
        if (b.spec.dtype, b.spec.shape) != (a.spec.dtype, (1, channels, 1, *grid)) or not 0 <= index < frames:
            raise EngineError(f"cannot copy frame {index} of {a.spec.dtype}{list(a.spec.shape)} into {b.spec.dtype}{list(b.spec.shape)}")
        stream, size = self._streams["other"], b.spec.nbytes // channels
        address = a.address + index * size
        self._enqueue(stream, (a,), (b,), lambda: self._device.copy_rows(b.address, size, address, frames * size, size, channels, stream))

    def _enqueue(self, stream: Any, reads: Iterable[CudaBuffer], writes: Iterable[CudaBuffer], action: Callable[[], None]) -> Event:
        """Run `action` on a stream after everything that its buffers wait for; returns the point after it."""
        self._check_open()
        reads, writes = tuple(reads), tuple(writes)
        for buffer in (*reads, *writes):
            if buffer.written is not None:
                buffer.written.wait(stream)
        for buffer in writes:
            for event in buffer.readers.values():
                event.wait(stream)
        action()
        done = Event(self._device, stream)
        for buffer in reads:
            buffer.readers[id(stream)] = done
        for buffer in writes:
            buffer.written = done
            buffer.readers.clear()
        return done

    # programs

    def load(self, program: str) -> None:
        self._check_open()
        if program in self._programs:
            return
        entry = self._bundle.manifest.programs.get(program)
        if entry is None:
            raise EngineError(f"the bundle has no program '{program}'; rebuild it with this version of sanawm")
        plan = Plan.from_json(self._bundle.read(entry.file), entry.file)
        if plan.arena > int(entry.extras["arena"]):
            raise EngineError(f"{program}: its plan needs {plan.arena} bytes of scratch memory and the manifest promises {entry.extras['arena']}")
        weights = str(entry.extras.get("weights", ""))
        if weights not in self._parts:
            table = read_table(self._bundle.read(weights), weights)
            block, addresses = upload(self._device, self._streams["copy"], table, self._bundle, weights)
            self._parts[weights] = _Part(block, addresses, set())
        for name in plan.kernels():
            self._kernel(str(entry.extras.get("kernels", "")), name)
        self._parts[weights].users.add(program)
        self._programs[program] = _Program(plan, weights)

    def _kernel(self, index: str, name: str) -> Loaded:
        """A kernel on the device. Its cubin is loaded from the very bytes that matched the manifest's hash."""
        if name not in self._functions:
            if index not in self._indices:
                self._indices[index] = read_index(self._bundle.read(index), index)
            kernel = self._indices[index].get(name)
            if kernel is None:
                raise EngineError(f"{index} has no kernel {name}; rebuild the bundle")
            image = self._bundle.read(f"{index.rpartition('/')[0]}/{kernel.file}")
            self._functions[name] = Loaded(kernel, self._device.function(image, kernel.entry, kernel.shared_bytes))
        return self._functions[name]

    def unload(self, program: str) -> None:
        found = self._programs.pop(program, None)
        if found is None:
            return
        self._device.call("cuCtxSynchronize")
        for _, graph in found.graphs.values():
            self._device.drop(graph)
        if stream_of(found.part) == "transformer":
            # A chunk's graph holds addresses of the weights of several programs.
            for _, graph in self._chunks.values():
                self._device.drop(graph)
            self._chunks.clear()
        part = self._parts[found.part]
        part.users.discard(program)
        if not part.users:
            self._device.free(part.block)
            del self._parts[found.part]

    def run(self, program: str, buffers: Mapping[str, Buffer]) -> None:
        self.load(program)
        self._replay(program, program, buffers, {})

    def euler(self, latents: Buffer, velocity: Buffer, size: float, keep_first: bool) -> None:
        name = f"euler.{own(latents).spec.shape[2]}"
        self.load(name)
        self._replay(name, name, {"latents": latents, "velocity": velocity}, {"size": float(np.float32(size)), "KEPT": int(keep_first)})

    def _replay(self, program: str, label: str, buffers: Mapping[str, Buffer], scalars: Mapping[str, int | float]) -> None:
        """Launch the graph of a program for these buffers, recording it the first time."""
        loaded = self._programs[program]
        bound = {name: self._bound(loaded, name, buffers) for name, b in loaded.plan.buffers.items() if b.role in ("input", "output")}
        stream = self._streams[stream_of(loaded.part)]
        key = (*(bound[name].address for name in sorted(bound)), *sorted(scalars.items()))
        if key not in loaded.graphs:
            steps = self._bind(loaded, bound, scalars)
            with self._device.record(stream) as made:
                steps.enqueue(self._device, stream)
            if len(loaded.graphs) >= GRAPHS:
                self._device.call("cuStreamSynchronize", stream)
                self._device.drop(loaded.graphs.popitem(last=False)[1][1])
            loaded.graphs[key] = (steps, made[0])
        loaded.graphs.move_to_end(key)
        graph = loaded.graphs[key][1]
        roles = {name: loaded.plan.buffers[name].role for name in bound}
        reads = [bound[name] for name, role in roles.items() if role == "input"]
        writes = [bound[name] for name, role in roles.items() if role == "output"]
        self._enqueue(stream, reads, writes, lambda: self._device.call("cuGraphLaunch", graph, stream))

    def run_chunk(
        self, kind: str, buffers: Mapping[str, Buffer], timesteps: NDArray[np.float32], sizes: Sequence[float], keep_first: bool
    ) -> None:
        """One graph, see `Engine.run_chunk`."""
        denoise, commit = f"denoise_{kind}", f"commit_{kind}"
        euler = f"euler.{timesteps.shape[1]}"
        for name in (denoise, commit, euler):
            self.load(name)
        bound = {
            name: self._bound(self._programs[program], name, buffers)
            for program in (denoise, commit)
            for name, b in self._programs[program].plan.buffers.items()
            if b.role in ("input", "output")
        }
        table = self._timestep_rows(timesteps)
        stream = self._streams["transformer"]
        written = {"latents", "timestep", "velocity"} | {n for n, b in self._programs[commit].plan.buffers.items() if b.role == "output"}
        key = (kind, table, keep_first, *sizes, *(bound[name].address for name in sorted(bound)))
        if key not in self._chunks:
            scalars = [{"size": float(np.float32(size)), "KEPT": int(keep_first)} for size in sizes]
            steps = [self._bind(self._programs[euler], bound, numbers) for numbers in scalars]
            first, last = (self._bind(self._programs[name], bound, {}) for name in (denoise, commit))
            row = timesteps.shape[1] * 4
            with self._device.record(stream) as made:
                for i, step in enumerate(steps):
                    self._device.copy_rows(bound["timestep"].address, row, table + i * row, row, row, 1, stream)
                    first.enqueue(self._device, stream)
                    step.enqueue(self._device, stream)
                last.enqueue(self._device, stream)
            if len(self._chunks) >= GRAPHS:
                self._device.call("cuStreamSynchronize", stream)
                self._device.drop(self._chunks.popitem(last=False)[1][1])
            self._chunks[key] = ([first, *steps, last], made[0])
        self._chunks.move_to_end(key)
        graph = self._chunks[key][1]
        reads = [buffer for name, buffer in bound.items() if name not in written]
        self._enqueue(stream, reads, [bound[name] for name in sorted(written)], lambda: self._device.call("cuGraphLaunch", graph, stream))

    def _timestep_rows(self, timesteps: NDArray[np.float32]) -> int:
        """Address of the rows on the device; a schedule's rows are sent once, and the next few have their place already."""
        key = timesteps.tobytes()
        if len(key) > ROW_BYTES:
            raise EngineError(f"{timesteps.size} timesteps in one chunk are more than {ROW_BYTES // 4}; use a schedule of fewer steps")
        if key not in self._rows:
            place = len(self._rows) % ROW_TABLES
            if not place:
                self._row_blocks.append(self._device.allocate(ROW_BYTES * ROW_TABLES, "timesteps"))
            self._rows[key] = self._row_blocks[-1] + place * ROW_BYTES
            host, stream = self._outward.take(len(key)), self._streams["copy"]
            host[: len(key)] = np.frombuffer(key, np.uint8)
            self._device.send(self._rows[key], host[: len(key)], stream)
            self._device.call("cuStreamSynchronize", stream)
            self._outward.give(host)
        return self._rows[key]

    def _bind(self, loaded: _Program, bound: Mapping[str, CudaBuffer], scalars: Mapping[str, int | float]) -> BoundProgram:
        name = stream_of(loaded.part)
        if name not in self._arenas:
            self._arenas[name] = self._device.allocate(self._arena_bytes[name], "scratch memory of programs")
        addresses = {key: buffer.address for key, buffer in bound.items()}
        kernels, weights = self._functions.__getitem__, self._parts[loaded.part].addresses
        return BoundProgram(self._device, loaded.plan, kernels, addresses, weights, self._arenas[name], scalars)

    def _bound(self, loaded: _Program, name: str, buffers: Mapping[str, Buffer]) -> CudaBuffer:
        wanted, given = loaded.plan.buffers[name], buffers.get(name)
        if given is None:
            raise EngineError(f"{loaded.plan.program} needs a buffer for '{name}', and none was bound")
        buffer = own(given)
        if (buffer.spec.dtype, buffer.spec.shape) != (wanted.dtype, wanted.shape):
            found = f"{buffer.spec.dtype}{list(buffer.spec.shape)}"
            raise EngineError(f"{loaded.plan.program} takes {wanted.dtype}{list(wanted.shape)} for '{name}', found {found}")
        return buffer

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError("the engine is closed; open the world again")

    def close(self) -> None:
        if self._closed:
            return
        for program in list(self._programs):
            self.unload(program)
        self._memory.release()
        self._rows.clear()
        for address in (*self._row_blocks, *self._arenas.values()):
            self._device.free(address)
        self._arenas.clear()
        self._closed = True
        self._device.close()
