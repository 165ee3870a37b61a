"""What the CUDA engine needs of a GPU beyond memory: several streams, events, kernels, pinned memory, graphs."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sanawm.errors import EngineError
from sanawm_runtime.engines._cuda_kernels import DESCRIPTOR_BYTES
from sanawm_runtime.engines._cuda_plan import ITEM_BYTES
from sanawm_runtime.engines._trt_device import Device

_MAP_TYPES = {"bfloat16": "BFLOAT16", "float16": "FLOAT16", "float32": "FLOAT32", "float8_e4m3fn": "UINT8", "uint8": "UINT8"}


class Event:
    """A point in a stream's order; destroyed with its last reference."""

    def __init__(self, device: Gpu, stream: Any) -> None:
        self._device, self.stream = device, stream
        self.handle = device.call("cuEventCreate", device.driver.CUevent_flags.CU_EVENT_DISABLE_TIMING.value)
        device.call("cuEventRecord", self.handle, stream)

    def wait(self, stream: Any) -> None:
        """Make `stream` wait for this point."""
        if stream is not self.stream:
            self._device.call("cuStreamWaitEvent", stream, self.handle, 0)

    def synchronize(self) -> None:
        """Make the host wait for this point."""
        self._device.call("cuEventSynchronize", self.handle)

    def __del__(self) -> None:
        handle = getattr(self, "handle", None)
        if handle is not None and not self._device.closed:
            self._device.driver.cuEventDestroy(handle)


class Timestamp:
    """A point in a stream's order with the time at which the device reached it. Within a recording it becomes part of the graph."""

    def __init__(self, device: Gpu, stream: Any) -> None:
        self._device, flags = device, device.driver.CUevent_record_flags
        self.handle = device.call("cuEventCreate", device.driver.CUevent_flags.CU_EVENT_DEFAULT.value)
        recording = device.recording is stream
        how = flags.CU_EVENT_RECORD_EXTERNAL if recording else flags.CU_EVENT_RECORD_DEFAULT
        device.call("cuEventRecordWithFlags", self.handle, stream, how.value)

    def since(self, earlier: Timestamp) -> float:
        """Seconds from an earlier point to this one; both must have been reached."""
        return float(self._device.call("cuEventElapsedTime", earlier.handle, self.handle)) / 1e3

    def __del__(self) -> None:
        handle = getattr(self, "handle", None)
        if handle is not None and not self._device.closed:
            self._device.driver.cuEventDestroy(handle)


class Gpu(Device):
    """One GPU with streams that its user makes; `driver` can be given for tests."""

    def __init__(self, index: int = 0, driver: Any = None) -> None:
        super().__init__(index, driver)
        self._streams: list[Any] = []
        self._modules: list[Any] = []
        self._pinned: dict[int, Any] = {}
        # The stream of which a graph is being recorded.
        self.recording: Any = None

    def call(self, name: str, *arguments: Any) -> Any:
        """A driver function by name. Raises EngineError for anything but success."""
        return self._call(name, *arguments)

    @property
    def closed(self) -> bool:
        return self._closed

    def new_stream(self) -> Any:
        stream = self.call("cuStreamCreate", self.driver.CUstream_flags.CU_STREAM_NON_BLOCKING.value)
        self._streams.append(stream)
        return stream

    def function(self, image: bytes, symbol: str, shared: int) -> Any:
        """The kernel `symbol` of a cubin, with leave to use `shared` bytes of dynamic shared memory. Raises EngineError."""
        module = self.call("cuModuleLoadData", image)
        self._modules.append(module)
        function = self.call("cuModuleGetFunction", module, symbol.encode())
        if shared:
            attribute = self.driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            self.call("cuFuncSetAttribute", function, attribute, shared)
        return function

    def launch(self, function: Any, grid: tuple[int, int, int], threads: int, shared: int, stream: Any, arguments: int) -> None:
        """Enqueue a kernel; `arguments` is the address of an array of pointers to its parameters."""
        self.call("cuLaunchKernel", function, *grid, threads, 1, 1, shared, stream, arguments, 0)

    def describe(
        self, address: int, dtype: str, shape: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...], swizzle: int
    ) -> bytes:
        """Descriptor of a tensor for the tensor memory accelerator; strides in elements, the last one 1. What lies outside of it reads as zeros."""
        driver, size = self.driver, ITEM_BYTES[dtype]
        map_ = self.call(
            "cuTensorMapEncodeTiled", getattr(driver.CUtensorMapDataType, f"CU_TENSOR_MAP_DATA_TYPE_{_MAP_TYPES[dtype]}"), len(shape), address,
            [driver.cuuint64_t(n) for n in reversed(shape)], [driver.cuuint64_t(s * size) for s in reversed(strides[:-1])],
            [driver.cuuint32_t(n) for n in reversed(box)], [driver.cuuint32_t(1)] * len(shape),
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE, driver.CUtensorMapSwizzle(swizzle),
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B, driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )  # fmt: skip
        return ctypes.string_at(map_.getPtr(), DESCRIPTOR_BYTES)

    def copy_rows(self, to: int, to_pitch: int, source: int, source_pitch: int, width: int, rows: int, stream: Any) -> None:
        """Copy `rows` rows of `width` bytes that lie `pitch` bytes apart, device to device."""
        if rows == 1 or to_pitch == source_pitch == width:
            self.call("cuMemcpyDtoDAsync", to, source, width * rows, stream)
            return
        copy, device_memory = self.driver.CUDA_MEMCPY2D(), self.driver.CUmemorytype.CU_MEMORYTYPE_DEVICE
        copy.srcMemoryType, copy.srcDevice, copy.srcPitch = device_memory, source, source_pitch
        copy.dstMemoryType, copy.dstDevice, copy.dstPitch = device_memory, to, to_pitch
        copy.WidthInBytes, copy.Height = width, rows
        self.call("cuMemcpy2DAsync", copy, stream)

    def send(self, address: int, host: NDArray[np.uint8], stream: Any) -> None:
        """Host (pinned) to device; returns at once."""
        self.call("cuMemcpyHtoDAsync", address, host.ctypes.data, host.nbytes, stream)

    def fetch(self, host: NDArray[np.uint8], address: int, stream: Any) -> None:
        """Device to host (pinned); returns at once."""
        self.call("cuMemcpyDtoHAsync", host.ctypes.data, address, host.nbytes, stream)

    def pinned(self, nbytes: int) -> NDArray[np.uint8]:
        """Page-locked host memory, which copies run beside kernels from; given back by `unpin` or `close`."""
        address = int(self.call("cuMemHostAlloc", max(nbytes, 1), 0))
        self.allocations += 1
        self._pinned[address] = address
        block = (ctypes.c_uint8 * max(nbytes, 1)).from_address(address)
        return np.ctypeslib.as_array(block)

    def unpin(self, host: NDArray[np.uint8]) -> None:
        address = host.ctypes.data
        if self._pinned.pop(address, None) is not None:
            self.call("cuMemFreeHost", address)

    @contextlib.contextmanager
    def record(self, stream: Any) -> Iterator[list[Any]]:
        """Record what the enclosed calls enqueue on `stream` instead of running it; the list then holds the executable graph."""
        made: list[Any] = []
        self.call("cuStreamBeginCapture", stream, self.driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
        self.recording = stream
        try:
            yield made
        except BaseException:
            # The stream has to leave capture mode; the error that led here is the one to report.
            self.driver.cuStreamEndCapture(stream)
            raise
        finally:
            self.recording = None
        graph = self.call("cuStreamEndCapture", stream)
        try:
            made.append(self.call("cuGraphInstantiate", graph, 0))
        finally:
            self.call("cuGraphDestroy", graph)

    def close(self) -> None:
        if self._closed:
            return
        self.call("cuCtxSynchronize")
        for module in self._modules:
            self.call("cuModuleUnload", module)
        for stream in self._streams:
            self.call("cuStreamDestroy", stream)
        for address in self._pinned:
            self.call("cuMemFreeHost", address)
        self._pinned.clear()
        super().close()


def check_capability(device: Gpu, wanted: str | None) -> None:
    """Refuse a device of another architecture. Raises EngineError."""
    if device.capability != wanted:
        raise EngineError(f"the bundle's kernels are for {wanted}, and the GPU is {device.capability}; build a bundle for {device.capability}")
