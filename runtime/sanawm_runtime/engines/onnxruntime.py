"""ONNX Runtime on the CPU: the embedded default and the judge of exported graphs."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sanawm.bfloat16 import from_bits, to_bits
from sanawm.errors import EngineError
from sanawm.programs import TensorSpec
from sanawm_runtime.bundle import Bundle
from sanawm_runtime.engines.base import Buffer, Engine

_ONNX_BFLOAT16 = 16
_STORAGE = {
    "float32": np.float32,
    "bfloat16": np.uint16,
    "int64": np.int64,
    "bool": np.bool_,
    "uint8": np.uint8,
}
_pool_lock = threading.Lock()
_pool_threads: int | None = None


def _library(threads: int | None) -> Any:
    """The onnxruntime module with one thread pool for every program of the process."""
    global _pool_threads
    try:
        import onnxruntime
    except ImportError as error:
        raise EngineError("the bundle runs on ONNX Runtime, which is not installed; run `pip install 'sanawm[cpu]'`") from error
    with _pool_lock:
        if _pool_threads is None:
            _pool_threads = threads or os.cpu_count() or 1
            onnxruntime.set_global_thread_pool_sizes(_pool_threads, 1)
        elif threads is not None and threads != _pool_threads:
            raise EngineError(f"this process already computes with {_pool_threads} threads, found a request for {threads}; use one number")
    return onnxruntime


def session_options(threads: int | None = None) -> Any:
    """ONNX Runtime's SessionOptions for a session in the process's one thread pool; beside that pool ONNX Runtime makes no others."""
    options = _library(threads).SessionOptions()
    options.use_per_session_threads = False
    return options


class _CpuBuffer(Buffer):
    """A numpy array shared with an OrtValue."""

    def __init__(self, spec: TensorSpec, library: Any) -> None:
        super().__init__(spec)
        if spec.dtype not in _STORAGE:
            raise EngineError(f"ONNX Runtime's CPU provider cannot hold {spec.name} in {spec.dtype}; build the bundle with --precision fp32 or bf16")
        try:
            self.array: NDArray[Any] = np.empty(spec.shape, _STORAGE[spec.dtype])
        except (MemoryError, ValueError) as error:
            raise EngineError(f"{spec.name} needs {spec.nbytes / 1e9:.1f} GB, which this machine does not have free; close other streams") from error
        value = library.OrtValue
        if spec.dtype == "bfloat16":
            self.value = value.ortvalue_from_numpy_with_onnx_type(self.array, _ONNX_BFLOAT16)
        else:
            self.value = value.ortvalue_from_numpy(self.array)


class OnnxRuntimeEngine(Engine):
    """Programs as ONNX graphs with one shared weight file for each part of the model."""

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        self._bundle = bundle
        self._library = _library(threads)
        self._sessions: dict[str, Any] = {}
        self._weights: dict[str, memoryview] = {}
        self._closed = False

    def allocate(self, spec: TensorSpec) -> Buffer:
        return _CpuBuffer(spec, self._library)

    def write(self, buffer: Buffer, values: NDArray) -> None:
        assert isinstance(buffer, _CpuBuffer)
        if values.shape != buffer.spec.shape:
            raise EngineError(f"{buffer.spec.name} takes shape {buffer.spec.shape}, found {values.shape}")
        buffer.array[...] = to_bits(values) if buffer.spec.dtype == "bfloat16" else values

    def read(self, buffer: Buffer) -> NDArray:
        assert isinstance(buffer, _CpuBuffer)
        return from_bits(buffer.array) if buffer.spec.dtype == "bfloat16" else buffer.array.copy()

    def load(self, program: str) -> None:
        if self._closed:
            raise EngineError("the engine is closed; open the world again")
        if program in self._sessions:
            return
        entry = self._bundle.manifest.programs.get(program)
        if entry is None:
            raise EngineError(f"the bundle has no program '{program}'; rebuild it with this version of sanawm")
        graph = self._bundle.read(entry.file)
        weights = str(entry.extras.get("weights", ""))
        options = session_options()
        # Its failures come as exceptions with the same words.
        options.log_severity_level = 4
        if weights:
            if weights not in self._weights:
                self._weights[weights] = self._bundle.open_verified(weights)
            view = self._weights[weights]
            options.add_external_initializers_from_files_in_memory([weights.rsplit("/", 1)[-1]], [view], [len(view)])
        try:
            self._sessions[program] = self._library.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the library's exceptions share no narrower base
            version = self._library.__version__
            raise EngineError(f"ONNX Runtime {version} cannot load {entry.file}: {_first_line(error)}; rebuild the bundle") from error

    def run(self, program: str, buffers: Mapping[str, Buffer]) -> None:
        self.load(program)
        session = self._sessions[program]
        binding = session.io_binding()
        for tensor in session.get_inputs():
            binding.bind_ortvalue_input(tensor.name, self._value(program, tensor.name, buffers))
        for tensor in session.get_outputs():
            binding.bind_ortvalue_output(tensor.name, self._value(program, tensor.name, buffers))
        try:
            session.run_with_iobinding(binding)
        except Exception as error:  # the library's exceptions share no narrower base
            raise EngineError(f"ONNX Runtime failed in {program}: {_first_line(error)}") from error

    def _value(self, program: str, name: str, buffers: Mapping[str, Buffer]) -> Any:
        buffer = buffers.get(name)
        if not isinstance(buffer, _CpuBuffer):
            raise EngineError(f"{program} needs a buffer for '{name}', and none was bound")
        return buffer.value

    def unload(self, program: str) -> None:
        self._sessions.pop(program, None)

    def close(self) -> None:
        self._closed = True
        self._sessions.clear()
        self._weights.clear()


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
