"""TensorRT-RTX and TensorRT engines on an NVIDIA GPU, without torch."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sanawm.bfloat16 import from_bits, to_bits
from sanawm.errors import BundleError, EngineError
from sanawm.programs import TensorSpec
from sanawm_runtime.bundle import Bundle, ProgramEntry
from sanawm_runtime.engines._trt_bindings import addresses
from sanawm_runtime.engines._trt_device import Device, host_array
from sanawm_runtime.engines._trt_jit import JitFiles, JitKey
from sanawm_runtime.engines._trt_library import Library, checked, logger, open_library, refuse_invalid
from sanawm_runtime.engines._trt_plugin import register
from sanawm_runtime.engines._trt_program import CompiledProgram
from sanawm_runtime.engines.base import Buffer, Engine

_LOG = logging.getLogger("sanawm.tensorrt")
# Device memory that stays free for what the library and the driver allocate themselves.
_RESERVE = 256 * 2**20


class DeviceBuffer(Buffer):
    """Device memory that is freed with its last reference."""

    def __init__(self, spec: TensorSpec, device: Device) -> None:
        super().__init__(spec)
        self.address = device.allocate(spec.nbytes, spec.name)
        self._finalizer = weakref.finalize(self, device.free, self.address)


class TensorRTEngine(Engine):
    """A bundle's engines on one GPU.

    Programs run in turn on one stream, so they share one block of device memory for activations. `device`, `library` can be given for tests;
    `jit_folder` is where compiled code is kept (default: beside the bundle); `graphs` replays CUDA graphs.
    """

    def __init__(
        self, bundle: Bundle, threads: int | None = None, *, device: Device | None = None, library: Library | None = None,
        jit_folder: Path | None = None, graphs: bool = True,
    ) -> None:  # fmt: skip
        name = bundle.manifest.target.engine
        if name not in ("tensorrt_rtx", "tensorrt"):
            raise EngineError(f"the bundle needs the {name} engine, and this is TensorRT's; open it with the engine it was built for")
        self._bundle = bundle
        self._library = library or open_library(name)  # type: ignore[arg-type]
        check_version(bundle, self._library)
        self._device = device or Device()
        self._check_capability()
        register(self._library)
        log, messages = logger(self._library)
        self._runtime: Any = checked(messages, f"{self._library.title} cannot start", lambda: self._library.module.Runtime(log))
        self._jit = JitFiles(bundle.root, JitKey(self._device.name, self._device.driver_version, self._library.title), jit_folder)
        self._graphs = graphs
        self._programs: dict[str, CompiledProgram] = {}
        self._kept: dict[str, bool] = {}
        self._memory = (0, 0)  # address, bytes
        self._steppers: dict[tuple[int, ...], tuple[str, DeviceBuffer, DeviceBuffer]] = {}
        self._closed = False

    def _check_capability(self) -> None:
        wanted, found = self._bundle.manifest.target.capability, self._device.capability
        if wanted != found:
            self._device.close()
            raise EngineError(f"the bundle is for {wanted}, and the GPU here is {found}; build one with `sanawm build-engine --target {found}`")

    def activate(self) -> None:
        self._device.activate()

    def allocate(self, spec: TensorSpec) -> Buffer:
        self._require_open()
        return DeviceBuffer(spec, self._device)

    def write(self, buffer: Buffer, values: NDArray) -> None:
        assert isinstance(buffer, DeviceBuffer)
        spec = buffer.spec
        if values.shape != spec.shape:
            raise EngineError(f"{spec.name} takes shape {spec.shape}, found {values.shape}")
        stored = host_array(spec.dtype, spec.shape)
        stored[...] = to_bits(values) if spec.dtype == "bfloat16" else values
        self._device.copy_in(buffer.address, stored)

    def read(self, buffer: Buffer) -> NDArray:
        assert isinstance(buffer, DeviceBuffer)
        stored = host_array(buffer.spec.dtype, buffer.spec.shape)
        self._device.copy_out(stored, buffer.address)
        return from_bits(stored) if buffer.spec.dtype == "bfloat16" else stored

    def copy(self, source: Buffer, target: Buffer) -> None:
        assert isinstance(source, DeviceBuffer) and isinstance(target, DeviceBuffer)
        self._device.copy(target.address, source.address, source.spec.nbytes)

    def load(self, program: str) -> None:
        self._require_open()
        if program in self._programs:
            return
        entry = self._bundle.manifest.programs.get(program)
        if entry is None:
            raise EngineError(f"the bundle has no program '{program}'; rebuild it with this version of sanawm")
        sha256 = self._bundle.manifest.files[entry.file].sha256
        self._make_room(entry)
        engine = self._deserialize(program, entry)
        compiled = CompiledProgram(program, self._library, self._device, engine, entry, self._jit.read(program, sha256), self._graphs)
        self._reserve(compiled)
        self._programs[program] = compiled
        self._kept[program] = False

    def _deserialize(self, program: str, entry: ProgramEntry) -> Any:
        # An engine is code: it is deserialized from the very bytes that were hashed, and nothing in it may bring a library of its own.
        data = self._bundle.read(entry.file)
        runtime, (_, messages) = self._runtime, logger(self._library)
        runtime.engine_host_code_allowed = False
        refuse_invalid(self._library, runtime, data, entry.file)
        engine = runtime.deserialize_cuda_engine(data)
        if engine is None:
            reason = messages.error() or "it gave no reason"
            raise EngineError(f"{self._library.title} cannot load {entry.file}: {reason}; check the driver, or rebuild the bundle for this GPU")
        return engine

    def _make_room(self, entry: ProgramEntry) -> None:
        """Unload programs that were not used for longest until the weights of another one fit."""
        wanted = entry.extras.get("weight_bytes", 0)
        need = (wanted if isinstance(wanted, int) else 0) + _RESERVE
        while self._programs and self._device.free_bytes() < need:
            name = next(iter(self._programs))
            _LOG.info("unloading %s to make room for %s", name, entry.file)
            self.unload(name)

    def _reserve(self, compiled: CompiledProgram) -> None:
        """Let every program use one block, as large as the largest needs."""
        address, size = self._memory
        if compiled.memory > size:
            self._device.synchronize()
            self._device.free(address)
            self._memory = (0, 0)
            size = compiled.memory
            address = self._device.allocate(size, "scratch memory of programs")
            self._memory = (address, size)
            for other in self._programs.values():
                other.use_memory(address, size)
        compiled.use_memory(address, size)

    def run(self, program: str, buffers: Mapping[str, Buffer]) -> None:
        self.load(program)
        compiled = self._programs[program] = self._programs.pop(program)  # the most recently used one comes last
        compiled.run(addresses(program, compiled.table, buffers))
        if not self._kept[program]:
            # By now it has compiled whatever it compiles.
            self._kept[program] = True
            if (code := compiled.compiled_code()) is not None:
                entry = self._bundle.manifest.programs[program]
                self._jit.write(program, self._bundle.manifest.files[entry.file].sha256, code)

    def euler(self, latents: Buffer, velocity: Buffer, size: float, keep_first: bool) -> None:
        name, sizes, stepped = self._stepper(latents.spec)
        row = np.full(sizes.spec.shape, size, np.float32)
        if keep_first:
            row[:, :, 0] = 0  # which the program takes as: keep every bit
        self.write(sizes, row)
        self.run(name, {"latents": latents, "velocity": velocity, "sizes": sizes, "stepped": stepped})
        self.copy(stepped, latents)

    def _stepper(self, latents: TensorSpec) -> tuple[str, DeviceBuffer, DeviceBuffer]:
        if latents.shape not in self._steppers:
            for name, entry in self._bundle.manifest.programs.items():
                if name.startswith("euler_") and (entry.inputs[0].dtype, tuple(entry.inputs[0].shape)) == (latents.dtype, latents.shape):
                    sizes = next(t for t in entry.inputs if t.name == "sizes")
                    buffers = (DeviceBuffer(TensorSpec(t.name, t.dtype, tuple(t.shape)), self._device) for t in (sizes, entry.outputs[0]))
                    self._steppers[latents.shape] = (name, *buffers)  # type: ignore[assignment]
                    break
            else:
                raise BundleError(f"bundle {self._bundle.root}: no Euler program for latents {list(latents.shape)}; rebuild it with this version")
        return self._steppers[latents.shape]

    def unload(self, program: str) -> None:
        compiled = self._programs.pop(program, None)
        if compiled is not None:
            self._device.synchronize()
            compiled.close()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._device.activate()
        self._device.synchronize()
        for compiled in self._programs.values():
            compiled.close()
        self._programs.clear()
        self._steppers.clear()
        self._runtime = None
        self._device.close()

    def _require_open(self) -> None:
        if self._closed:
            raise EngineError("the engine is closed; open the world again")


def check_version(bundle: Bundle, library: Library) -> None:
    """Refuse a bundle whose engines were built by another version: engines are locked to theirs. Raises BundleError."""
    built = bundle.manifest.versions.get(library.engine, "an unknown version")
    if built != library.version:
        raise BundleError(f"bundle {bundle.root}: built with {library.engine} {built}, found {library.version} here; install {built} or rebuild it")
