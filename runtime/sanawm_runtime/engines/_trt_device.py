"""A GPU through the CUDA driver: context, stream, memory, modules, graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sanawm.errors import EngineError


def load_driver() -> Any:
    """`cuda.bindings.driver`, initialised. Raises EngineError without cuda-python, a driver or a GPU."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise EngineError("cuda-python is not installed; run `pip install 'sanawm[rtx]'`") from error
    try:
        code = driver.cuInit(0)[0]
    except RuntimeError as error:  # cuda-python loads the driver at the first call
        raise EngineError("no NVIDIA driver was found here; install one and check it with `nvidia-smi`") from error
    if code != driver.CUresult.CUDA_SUCCESS:
        raise EngineError(f"the NVIDIA driver cannot start ({_name(driver, code)}); check it with `nvidia-smi`")
    return driver


def _name(driver: Any, code: Any) -> str:
    text = driver.cuGetErrorName(code)[1]
    return text.decode() if isinstance(text, bytes) else str(code)


class Device:
    """One GPU's primary context with one stream, which everything here is ordered on. `driver` can be given for tests.

    `allocations` counts the blocks of memory that were ever asked for, `held_bytes` are those of the device now, `peak_bytes` at most.
    """

    def __init__(self, index: int = 0, driver: Any = None) -> None:
        self.driver = driver if driver is not None else load_driver()
        self._device = self._call("cuDeviceGet", index)
        self._context = self._call("cuDevicePrimaryCtxRetain", self._device)
        self.activate()
        self.stream = self._call("cuStreamCreate", self.driver.CUstream_flags.CU_STREAM_NON_BLOCKING.value)
        self._memory: dict[int, int] = {}
        self.allocations = 0
        self.held_bytes = self.peak_bytes = 0
        self._closed = False

    def _call(self, name: str, *arguments: Any) -> Any:
        code, *values = getattr(self.driver, name)(*arguments)
        if code != self.driver.CUresult.CUDA_SUCCESS:
            raise EngineError(f"CUDA: {name} failed with {_name(self.driver, code)}")
        return values[0] if values else None

    def activate(self) -> None:
        """Make the context current in this thread; needed once in every thread that makes calls."""
        self._call("cuCtxSetCurrent", self._context)

    @property
    def name(self) -> str:
        """For example "NVIDIA GeForce RTX 5090"."""
        raw = self._call("cuDeviceGetName", 256, self._device)
        return raw.split(b"\0")[0].decode() if isinstance(raw, bytes) else str(raw)

    @property
    def capability(self) -> str:
        attribute = self.driver.CUdevice_attribute
        parts = (attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)
        return "sm_" + "".join(str(self._call("cuDeviceGetAttribute", part, self._device)) for part in parts)

    @property
    def driver_version(self) -> str:
        """The newest CUDA the driver serves, for example "13.1"."""
        number = self._call("cuDriverGetVersion")
        return f"{number // 1000}.{number % 1000 // 10}"

    def free_bytes(self) -> int:
        code, free, _ = self.driver.cuMemGetInfo()
        return int(free) if code == self.driver.CUresult.CUDA_SUCCESS else 0

    def used_bytes(self) -> int:
        """Bytes of the device's memory that are taken, by this process and by others, with what the driver keeps for contexts and graphs."""
        code, free, total = self.driver.cuMemGetInfo()
        return int(total) - int(free) if code == self.driver.CUresult.CUDA_SUCCESS else 0

    def allocate(self, nbytes: int, what: str) -> int:
        """Address of new device memory; `what` says for what. Raises EngineError when there is not enough."""
        code, address = self.driver.cuMemAlloc(max(nbytes, 1))
        if code != self.driver.CUresult.CUDA_SUCCESS:
            free = self.free_bytes() / 2**30
            wanted = nbytes / 2**30
            raise EngineError(
                f"the GPU has no room for {wanted:.2f} GiB more ({free:.2f} GiB free), wanted for {what}; close other programs, or give back the "
                "encoders' memory after a start (free_encoders, --free-encoders)"
            )
        self._memory[int(address)] = nbytes
        self.allocations += 1
        self.held_bytes += nbytes
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)
        return int(address)

    def free(self, address: int) -> None:
        if address in self._memory:
            self.held_bytes -= self._memory.pop(address)
            self._call("cuMemFree", address)

    def copy_in(self, address: int, values: NDArray) -> None:
        """Host to device, in stream order; returns when `values` may change."""
        self._call("cuMemcpyHtoDAsync", address, values.ctypes.data, values.nbytes, self.stream)
        self.synchronize()

    def copy_out(self, values: NDArray, address: int) -> None:
        """Device to host, in stream order; returns when `values` is filled."""
        self._call("cuMemcpyDtoHAsync", values.ctypes.data, address, values.nbytes, self.stream)
        self.synchronize()

    def copy(self, to: int, address: int, nbytes: int) -> None:
        """Device to device, in stream order."""
        self._call("cuMemcpyDtoDAsync", to, address, nbytes, self.stream)

    def synchronize(self) -> None:
        self._call("cuStreamSynchronize", self.stream)

    @contextlib.contextmanager
    def capture(self) -> Iterator[list[Any]]:
        """Record what the enclosed calls enqueue instead of running it; the list then holds the executable graph."""
        made: list[Any] = []
        # Thread-local: other threads of the process may allocate meanwhile.
        self._call("cuStreamBeginCapture", self.stream, self.driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
        try:
            yield made
        except BaseException:
            # The stream has to leave capture mode; the error that led here is the one to report.
            self.driver.cuStreamEndCapture(self.stream)
            raise
        graph = self._call("cuStreamEndCapture", self.stream)
        try:
            made.append(self._call("cuGraphInstantiate", graph, 0))
        finally:
            self._call("cuGraphDestroy", graph)

    def replay(self, executable: Any) -> None:
        self._call("cuGraphLaunch", executable, self.stream)

    def drop(self, executable: Any) -> None:
        self._call("cuGraphExecDestroy", executable)

    def close(self) -> None:
        """Free the memory and give the context back."""
        if self._closed:
            return
        self._closed = True
        for address in sorted(self._memory):
            self.free(address)
        self._call("cuStreamDestroy", self.stream)
        self._call("cuDevicePrimaryCtxRelease", self._device)


def host_array(dtype: str, shape: tuple[int, ...]) -> NDArray:
    """Host memory in a tensor's stored form; bfloat16 as its bits."""
    stored = {"bfloat16": np.uint16, "bool": np.bool_}
    return np.empty(shape, stored.get(dtype, dtype))
