"""A GPU and a TensorRT library that exist in host memory: what the executor asks of both, and nothing more.

Device addresses are real host addresses, so copies copy. Work enqueued while a stream is being captured is kept and runs at every replay.
"""

from __future__ import annotations

import ctypes
import json
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorrt_rtx_bindings as rtx
from cuda.bindings import driver as real

from sanawm_runtime.engines._trt_library import RTX_VERSION, Library

OK = real.CUresult.CUDA_SUCCESS


class FakeDriver:
    """`cuda.bindings.driver` with one GPU; `calls` lists what was called."""

    def __init__(self, capability: tuple[int, int] = (12, 0), memory: int = 1 << 30) -> None:
        self.calls: list[str] = []
        self.memory: dict[int, Any] = {}
        self.free = memory
        self.recording: list[Callable[[], None]] | None = None
        self.launches: list[tuple[Any, ...]] = []
        self._capability = capability
        self._handles = 0

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            return getattr(real, name)  # enumerations and handle types

        def call(*arguments: Any) -> Any:
            self.calls.append(name)
            return getattr(self, f"_{name}", self._any)(*arguments)

        return call

    def _any(self, *arguments: Any) -> Any:
        return (OK,)

    def _handle(self, *arguments: Any) -> Any:
        self._handles += 1
        return OK, self._handles

    _cuDeviceGet = _cuDevicePrimaryCtxRetain = _cuStreamCreate = _cuModuleLoadData = _cuModuleGetFunction = _handle

    def _cuCtxGetCurrent(self) -> Any:
        return OK, 1

    def _cuDeviceGetName(self, *arguments: Any) -> Any:
        return OK, b"NVIDIA GeForce RTX 5090" + bytes(40)

    def _cuDriverGetVersion(self) -> Any:
        return OK, 13010

    def _cuDeviceGetAttribute(self, attribute: Any, device: Any) -> Any:
        return OK, self._capability[attribute != real.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR]

    def _cuGetErrorName(self, code: Any) -> Any:
        return OK, code.name.encode()

    def _cuMemGetInfo(self) -> Any:
        return OK, self.free, self.free

    def _cuMemAlloc(self, nbytes: int) -> Any:
        if nbytes > self.free:
            return real.CUresult.CUDA_ERROR_OUT_OF_MEMORY, 0
        block = np.full(nbytes, 0xAB, np.uint8)
        self.memory[block.ctypes.data] = block
        self.free -= nbytes
        return OK, block.ctypes.data

    def _cuMemFree(self, address: int) -> Any:
        self.free += self.memory.pop(address).nbytes
        return (OK,)

    def _copy(self, to: int, source: int, nbytes: int, stream: Any) -> Any:
        self.enqueue(lambda: ctypes.memmove(to, source, nbytes))
        return (OK,)

    _cuMemcpyHtoDAsync = _cuMemcpyDtoHAsync = _cuMemcpyDtoDAsync = _copy

    def enqueue(self, work: Callable[[], Any]) -> None:
        if self.recording is None:
            work()
        else:
            self.recording.append(work)

    def _cuStreamBeginCapture(self, stream: Any, mode: Any) -> Any:
        self.recording = []
        return (OK,)

    def _cuStreamEndCapture(self, stream: Any) -> Any:
        recorded, self.recording = self.recording, None
        return OK, recorded

    def _cuGraphInstantiate(self, graph: Any, flags: int) -> Any:
        return OK, list(graph)

    def _cuGraphLaunch(self, graph: Any, stream: Any) -> Any:
        for work in graph:
            work()
        return (OK,)

    def _cuLaunchKernel(self, *arguments: Any) -> Any:
        self.launches.append(arguments)
        return (OK,)


class FakeContext:
    """Runs `compute(inputs) -> outputs` on the bound addresses."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine, self.bound, self.block = engine, {}, (0, 0)  # type: ignore[var-annotated]
        self.enqueued = 0

    def set_device_memory(self, address: int, nbytes: int) -> None:
        self.block = (address, nbytes)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.bound[name] = address
        return address % 16 == 0

    def is_stream_capturable(self, stream: int) -> bool:
        return self.engine.capturable

    def execute_async_v3(self, stream: int) -> bool:
        engine, bound = self.engine, dict(self.bound)
        assert self.block[1] >= engine.device_memory_size_v2
        self.enqueued += 1
        if engine.fails:
            return False

        def work() -> None:
            views = {name: _view(bound[name], *engine.entry(name)) for name in bound}
            for name, values in engine.compute({n: v.copy() for n, v in views.items() if engine.is_input(n)}).items():
                views[name][...] = values

        engine.driver.enqueue(work)
        return True


def _view(address: int, dtype: str, shape: tuple[int, ...]) -> Any:
    stored = np.dtype({"bfloat16": np.uint16}.get(dtype, dtype))
    size = int(np.prod(shape)) * stored.itemsize
    return np.frombuffer((ctypes.c_uint8 * size).from_address(address), stored).reshape(shape)


class FakeCache:
    """A runtime cache that takes back what it gave."""

    def __init__(self) -> None:
        self.taken: bytes | None = None

    def deserialize(self, data: bytes) -> bool:
        self.taken = data if data.startswith(b"compiled") else None
        return self.taken is not None

    def serialize(self) -> bytes:
        return self.taken or b"compiled for an RTX 5090"


class FakeConfig:
    """A runtime configuration."""

    def __init__(self) -> None:
        self.cache: FakeCache | None = None
        self.strategy: Any = None

    def create_runtime_cache(self) -> FakeCache:
        return FakeCache()

    def set_runtime_cache(self, cache: FakeCache) -> bool:
        self.cache = cache
        return True

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy


class FakeEngine:
    """An engine made of a recorded I/O table: [[name, dtype, shape, is_input], ...]."""

    def __init__(self, driver: FakeDriver, record: dict[str, Any], compute: Callable[..., dict[str, Any]]) -> None:
        self.driver, self.table, self.compute = driver, record["table"], compute
        self.device_memory_size_v2 = record.get("memory", 1024)
        self.capturable, self.fails = record.get("capturable", True), False
        self.weights = record.get("weights", 0)
        driver.free -= self.weights
        self._contexts: list[weakref.ref[FakeContext]] = []
        self.configs: list[FakeConfig] = []

    def __del__(self) -> None:
        self.driver.free += self.weights

    @property
    def contexts(self) -> list[FakeContext]:
        return [context for reference in self._contexts if (context := reference()) is not None]

    num_io_tensors = property(lambda self: len(self.table))

    def entry(self, name: str) -> tuple[str, tuple[int, ...]]:
        _, dtype, shape, _ = next(row for row in self.table if row[0] == name)
        return dtype, tuple(shape)

    def is_input(self, name: str) -> bool:
        return bool(next(row for row in self.table if row[0] == name)[3])

    def get_tensor_name(self, index: int) -> str:
        return str(self.table[index][0])

    def get_tensor_dtype(self, name: str) -> Any:
        kinds = {"float32": rtx.float32, "bfloat16": rtx.bfloat16, "int64": rtx.int64, "bool": rtx.bool, "uint8": rtx.uint8}
        return kinds[self.entry(name)[0]]

    def get_tensor_mode(self, name: str) -> Any:
        return rtx.TensorIOMode.INPUT if self.is_input(name) else rtx.TensorIOMode.OUTPUT

    def get_tensor_shape(self, name: str) -> Any:
        return self.entry(name)[1]

    def create_runtime_config(self) -> FakeConfig:
        self.configs.append(FakeConfig())
        return self.configs[-1]

    def create_execution_context(self, config: FakeConfig) -> FakeContext:
        assert config.strategy == rtx.ExecutionContextAllocationStrategy.USER_MANAGED
        context = FakeContext(self)
        self._contexts.append(weakref.ref(context))
        return context


class FakeModule:
    """The bindings with a runtime whose engine files are JSON records; `programs` maps their `compute` names to functions."""

    __version__ = RTX_VERSION

    def __init__(self, driver: FakeDriver, programs: dict[str, Callable[..., dict[str, Any]]]) -> None:
        # The executor alone keeps engines alive.
        self.engines: weakref.WeakValueDictionary[str, FakeEngine] = weakref.WeakValueDictionary()
        module = self

        class Runtime:
            engine_host_code_allowed = True

            def __init__(self, logger: Any) -> None:
                self.logger = logger

            def deserialize_cuda_engine(self, data: bytes) -> Any:
                assert not self.engine_host_code_allowed
                record = json.loads(data)
                engine = FakeEngine(driver, record, programs[record["compute"]])
                module.engines[record["name"]] = engine
                return engine

        self.Runtime = Runtime

    def __getattr__(self, name: str) -> Any:
        return getattr(rtx, name)

    def get_plugin_registry(self) -> Any:
        class Registry:
            def register_creator(self, creator: Any, namespace: str) -> bool:
                return True

        return Registry()


def fake_library(driver: FakeDriver, programs: dict[str, Callable[..., dict[str, Any]]]) -> Library:
    """A library as `open_library` returns it."""
    return Library("tensorrt_rtx", FakeModule(driver, programs), RTX_VERSION)
