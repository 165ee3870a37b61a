"""A stand-in for `cuda.bindings.driver` that checks every call and can run the launches.

Device memory is host memory, so addresses are real. A launch's parameters are read back from the raw pointers that the engine hands over, and
checked against the kernel's index entry. Work on different streams is checked for races with vector clocks.
"""

from __future__ import annotations

import ast
import ctypes
import itertools
from collections.abc import Callable, Iterable, Mapping
from types import SimpleNamespace
from typing import Any

from sanawm_kernels.aot.spec import block_of

Access = tuple[int, int, bool]  # first byte, byte after the last, written
SIZES = {"i32": (4, ctypes.c_int32), "i64": (8, ctypes.c_int64), "fp32": (4, ctypes.c_float), "u32": (4, ctypes.c_uint32)}
MEMORY_LIMIT = 2**31


class TensorMap:
    """A descriptor: its address, sizes, strides in bytes and box, innermost axis first, as text in 128 bytes."""

    def __init__(self, *facts: Any) -> None:
        self._bytes = ctypes.create_string_buffer(repr(facts).encode(), 128)

    def getPtr(self) -> int:
        return ctypes.addressof(self._bytes)


class DriverMisuse(AssertionError):
    """A call that a real driver would refuse or punish."""


def index_entry(variant: Any, arch: str) -> dict[str, Any]:
    """What compilation would write for a variant: parameters in order, each at its natural alignment, two hidden pointers."""
    arguments = [{"name": name, "type": kind} for name, kind in variant.signature.items()]
    sizes = [size for a in arguments for size in parameter_sizes(a["type"])] + [8, 8]
    boxes = {a["name"]: described for a in arguments if (described := block_of(a["type"])) is not None}
    descriptors = [{"argument": name, "box": [*shape[:-1], min(shape[-1], 64)], "swizzle": 3} for name, (_, shape) in boxes.items()]
    parameters, offset = [], 0
    for size in sizes:
        offset = -(-offset // min(size, 64)) * min(size, 64)
        parameters.append([offset, size])
        offset += size
    return {
        "name": variant.name, "file": f"{variant.name}.cubin", "entry": variant.kernel.rpartition(":")[2], "arch": arch, "arguments": arguments,
        "hidden": ["global_scratch", "profile_scratch"], "parameters": parameters, "num_warps": variant.num_warps, "shared_bytes": 1024,
        "descriptors": descriptors, "sha256": "0" * 64,
    }  # fmt: skip


def parameter_sizes(kind: str) -> list[int]:
    """Bytes of the parameters of an argument: a descriptor brings sizes and strides with it."""
    if (described := block_of(kind)) is not None:
        return [128] + [4] * len(described[1]) + [8] * len(described[1])
    return [8 if kind.startswith("*") else SIZES[kind.partition(":")[0]][0]]


class Launched(SimpleNamespace):
    """A launch as the driver saw it: kernel name, grid, values by argument name."""


class FakeDriver:
    """`kernels`: index entries by the bytes of their cubin. `writes`: arguments each kernel writes. `execute` runs a launch."""

    CUresult = SimpleNamespace(CUDA_SUCCESS=0)
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=SimpleNamespace(value=1))
    CUevent_flags = SimpleNamespace(CU_EVENT_DEFAULT=SimpleNamespace(value=0), CU_EVENT_DISABLE_TIMING=SimpleNamespace(value=2))
    CUevent_record_flags = SimpleNamespace(CU_EVENT_RECORD_DEFAULT=SimpleNamespace(value=0), CU_EVENT_RECORD_EXTERNAL=SimpleNamespace(value=1))
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1)
    CUmemorytype = SimpleNamespace(CU_MEMORYTYPE_DEVICE=2)
    CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8)
    CUdevice_attribute = SimpleNamespace(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=75, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=76)
    CUDA_MEMCPY2D = SimpleNamespace
    CUtensorMapDataType = SimpleNamespace(CU_TENSOR_MAP_DATA_TYPE_BFLOAT16=9, CU_TENSOR_MAP_DATA_TYPE_FLOAT32=7, CU_TENSOR_MAP_DATA_TYPE_UINT8=0)
    CUtensorMapInterleave = SimpleNamespace(CU_TENSOR_MAP_INTERLEAVE_NONE=0)
    CUtensorMapL2promotion = SimpleNamespace(CU_TENSOR_MAP_L2_PROMOTION_L2_128B=2)
    CUtensorMapFloatOOBfill = SimpleNamespace(CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE=0)
    CUtensorMapSwizzle = cuuint64_t = cuuint32_t = int

    def __init__(
        self,
        kernels: Mapping[bytes, dict[str, Any]],
        writes: Mapping[str, Iterable[str]],
        execute: Callable[[Launched], None] | None = None,
        capability: int = 90,
    ) -> None:
        self._kernels, self._writes, self._execute, self._capability = kernels, writes, execute, capability
        self._memory: dict[int, Any] = {}
        self._pinned: dict[int, Any] = {}
        self._streams: dict[int, dict[int, int]] = {}  # handle -> vector clock
        self._events: dict[int, dict[int, int]] = {}
        self._times: dict[int, float] = {}
        self._time = 0.0
        self._functions: dict[int, dict[str, Any]] = {}
        self._shared: dict[int, int] = {}
        self._modules: dict[int, dict[str, Any]] = {}
        self._graphs: dict[int, list[Any]] = {}
        self._capturing: dict[int, list[Any]] = {}
        self._history: list[tuple[int, int, Access, str]] = []
        self._next = 1000
        self.launches: list[Launched] = []
        self.calls: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("cu"):
            object.__getattribute__(self, "calls").append(name)
        return object.__getattribute__(self, name)

    def _handle(self) -> int:
        self._next += 1
        return self._next

    def _require(self, held: bool, message: str) -> None:
        if not held:
            raise DriverMisuse(message)

    # device

    def cuInit(self, flags: int) -> tuple[int]:
        return (0,)

    def cuDeviceGet(self, index: int) -> tuple[int, int]:
        return 0, 1

    def cuDevicePrimaryCtxRetain(self, device: int) -> tuple[int, int]:
        return 0, 2

    def cuDevicePrimaryCtxRelease(self, device: int) -> tuple[int]:
        self._require(not self._memory, f"{len(self._memory)} device allocations are left at the end")
        self._require(not self._pinned, f"{len(self._pinned)} pinned allocations are left at the end")
        return (0,)

    def cuCtxSetCurrent(self, context: int) -> tuple[int]:
        return (0,)

    def cuCtxSynchronize(self) -> tuple[int]:
        self._require(not self._capturing, "synchronised during capture")
        for handle in self._streams:
            self._reached(self._streams[handle])
        return (0,)

    def cuDeviceGetAttribute(self, attribute: int, device: int) -> tuple[int, int]:
        return 0, self._capability // 10 if attribute == 75 else self._capability % 10

    def cuMemGetInfo(self) -> tuple[int, int, int]:
        used = sum(len(block) for block in self._memory.values())
        return 0, MEMORY_LIMIT - used, MEMORY_LIMIT

    def cuDeviceGetName(self, length: int, device: int) -> tuple[int, bytes]:
        return 0, b"Pretended GPU\0"

    def cuDriverGetVersion(self) -> tuple[int, int]:
        return 0, 13010

    def cuGetErrorName(self, code: int) -> tuple[int, bytes]:
        return 0, b"CUDA_ERROR_OUT_OF_MEMORY"

    # memory

    def cuMemAlloc(self, size: int) -> tuple[int, int]:
        self._require(not self._capturing, "allocated during capture")
        if size > MEMORY_LIMIT:
            return 2, 0
        raw = (ctypes.c_uint8 * (size + 512))()
        ctypes.memset(raw, 0xFF, size + 512)
        address = -(-ctypes.addressof(raw) // 256) * 256
        self._memory[address] = memoryview((ctypes.c_uint8 * size).from_address(address))
        self._memory_owner = [*getattr(self, "_memory_owner", []), raw]
        return 0, address

    def cuMemFree(self, address: int) -> tuple[int]:
        self._require(address in self._memory, f"freed {address:#x}, which is not allocated")
        self.cuCtxSynchronize()
        del self._memory[address]
        return (0,)

    def cuMemHostAlloc(self, size: int, flags: int) -> tuple[int, int]:
        raw = (ctypes.c_uint8 * size)()
        self._pinned[ctypes.addressof(raw)] = raw
        return 0, ctypes.addressof(raw)

    def cuMemFreeHost(self, address: int) -> tuple[int]:
        self._require(address in self._pinned, "freed pinned memory that is not allocated")
        # The engine's views may outlive the block in this test; keep it.
        self._memory_owner = [*getattr(self, "_memory_owner", []), self._pinned.pop(address)]
        return (0,)

    def room(self, address: int) -> int:
        """Bytes from an address to the end of its allocation."""
        for start, block in self._memory.items():
            if start <= address < start + len(block):
                return start + len(block) - address
        raise DriverMisuse(f"{address:#x} is not in device memory")

    # streams, events, order

    def cuStreamCreate(self, flags: int) -> tuple[int, int]:
        handle = self._handle()
        self._streams[handle] = {}
        return 0, handle

    def cuStreamDestroy(self, stream: int) -> tuple[int]:
        del self._streams[stream]
        return (0,)

    def cuStreamSynchronize(self, stream: int) -> tuple[int]:
        self._require(not self._capturing, "synchronised during capture")
        self._reached(self._streams[stream])
        return (0,)

    def _reached(self, clock: Mapping[int, int]) -> None:
        """The host knows that everything before `clock` is done: whatever is enqueued from now on comes after it."""
        for other in self._streams.values():
            _merge(other, clock)

    def cuEventCreate(self, flags: int) -> tuple[int, int]:
        handle = self._handle()
        self._events[handle] = {}
        return 0, handle

    def cuEventDestroy(self, event: int) -> tuple[int]:
        del self._events[event]
        return (0,)

    def cuEventRecord(self, event: int, stream: int) -> tuple[int]:
        self._require(stream not in self._capturing, "an event was recorded during capture")
        self._events[event] = dict(self._streams[stream])
        return (0,)

    def cuEventRecordWithFlags(self, event: int, stream: int, flags: int) -> tuple[int]:
        """Time passes by one millisecond from one record to the next."""
        self._require((flags == 1) == (stream in self._capturing), "an event was recorded with the flags of the other mode")

        def action() -> None:
            self._time += 1.0
            self._times[event] = self._time

        self._work(stream, "timestamp", [], action)
        return (0,)

    def cuEventElapsedTime(self, start: int, end: int) -> tuple[int, float]:
        return 0, self._times[end] - self._times[start]

    def cuStreamWaitEvent(self, stream: int, event: int, flags: int) -> tuple[int]:
        _merge(self._streams[stream], self._events[event])
        return (0,)

    def cuEventSynchronize(self, event: int) -> tuple[int]:
        self._reached(self._events[event])
        return (0,)

    def _work(self, stream: int, what: str, accesses: list[Access], action: Callable[[], None]) -> None:
        """Enqueue: record while capturing, else check the order and run at once."""
        self._require(stream in self._streams, f"{what} on an unknown stream")
        if stream in self._capturing:
            self._capturing[stream].append((what, accesses, action))
            return
        clock = self._streams[stream]
        clock[stream] = clock.get(stream, 0) + 1
        for access in accesses:
            for other, time, past, label in self._history:
                if other != stream and time > clock.get(other, 0) and (access[2] or past[2]) and access[0] < past[1] and past[0] < access[1]:
                    raise DriverMisuse(f"{what} and {label} on another stream touch the same memory in no order")
            self._history.append((stream, clock[stream], access, what))
        del self._history[:-20000]
        action()

    # copies

    def cuMemcpyHtoDAsync(self, to: int, host: int, size: int, stream: int) -> tuple[int]:
        self._require(self.room(to) >= size, "copied beyond an allocation")
        self._require(any(s <= host and host + size <= s + len(b) for s, b in self._pinned.items()), "copied from memory that is not pinned")
        # A copy reads the host's memory when its turn comes.
        self._work(stream, "copy in", [(to, to + size, True), (host, host + size, False)], lambda: ctypes.memmove(to, host, size))  # type: ignore[arg-type, return-value]
        return (0,)

    def cuMemcpyDtoHAsync(self, host: int, source: int, size: int, stream: int) -> tuple[int]:
        self._require(self.room(source) >= size, "copied beyond an allocation")
        self._work(stream, "copy out", [(source, source + size, False), (host, host + size, True)], lambda: ctypes.memmove(host, source, size))  # type: ignore[arg-type, return-value]
        return (0,)

    def cuMemcpyDtoDAsync(self, to: int, source: int, size: int, stream: int) -> tuple[int]:
        self._require(self.room(to) >= size and self.room(source) >= size, "copied beyond an allocation")
        self._work(stream, "copy", [(source, source + size, False), (to, to + size, True)], lambda: ctypes.memmove(to, source, size))  # type: ignore[arg-type, return-value]
        return (0,)

    def cuMemcpy2DAsync(self, copy: Any, stream: int) -> tuple[int]:
        to, source, width, rows = copy.dstDevice, copy.srcDevice, copy.WidthInBytes, copy.Height
        self._require(width <= min(copy.srcPitch, copy.dstPitch), "a row is wider than its pitch")
        ends = (source + copy.srcPitch * (rows - 1) + width, to + copy.dstPitch * (rows - 1) + width)
        self._require(self.room(source) >= ends[0] - source and self.room(to) >= ends[1] - to, "copied beyond an allocation")

        def action() -> None:
            for row in range(rows):
                ctypes.memmove(to + row * copy.dstPitch, source + row * copy.srcPitch, width)

        self._work(stream, "row copy", [(source, ends[0], False), (to, ends[1], True)], action)
        return (0,)

    # kernels

    def cuModuleLoadData(self, image: bytes) -> tuple[int, int]:
        self._require(image in self._kernels, "an unknown cubin was loaded")
        handle = self._handle()
        self._modules[handle] = self._kernels[image]
        return 0, handle

    def cuModuleUnload(self, module: int) -> tuple[int]:
        del self._modules[module]
        return (0,)

    def cuModuleGetFunction(self, module: int, name: bytes) -> tuple[int, int]:
        entry = self._modules[module]
        self._require(name.decode() == entry["entry"], f"the cubin of {entry['name']} has no function {name!r}")
        handle = self._handle()
        self._functions[handle] = entry
        return 0, handle

    def cuFuncSetAttribute(self, function: int, attribute: int, value: int) -> tuple[int]:
        self._require(attribute == 8, "an unknown attribute was set")
        self._shared[function] = value
        return (0,)

    def cuTensorMapEncodeTiled(
        self, dtype: int, rank: int, address: int, sizes: list[int], strides: list[int], box: list[int], steps: list[int], interleave: int,
        swizzle: int, promotion: int, fill: int,
    ) -> tuple[int, TensorMap]:  # fmt: skip
        self._require(len(sizes) == len(box) == len(steps) == rank == len(strides) + 1, f"a descriptor of {rank} axes: {sizes}, {strides}, {box}")
        self._require(address % 16 == 0 and not any(s % 16 or s <= 0 for s in strides), f"a descriptor at {address} with strides {strides}")
        width = {9: 2, 7: 4, 0: 1}[dtype]
        self._require(all(0 < b <= 256 for b in box) and box[0] * width <= 128 and swizzle == 3, f"a box of {box} elements of {width} bytes")
        last = sum((n - 1) * s for n, s in zip(sizes[1:], strides)) + sizes[0] * width
        self._require(self.room(address) >= last, f"a descriptor reaches {last} bytes, its memory has {self.room(address)}")
        return 0, TensorMap(address, sizes, strides, box)

    def cuLaunchKernel(
        self, function: int, gx: int, gy: int, gz: int, bx: int, by: int, bz: int, shared: int, stream: int, parameters: int, extra: int
    ) -> tuple[int]:
        entry = self._functions[function]
        name = entry["name"]
        self._require((bx, by, bz) == (32 * entry["num_warps"], 1, 1), f"{name}: block of {(bx, by, bz)}")
        self._require(0 < gx < 2**31 and 0 < gy < 65536 and 0 < gz < 65536, f"{name}: grid {(gx, gy, gz)}")
        self._require(shared == entry["shared_bytes"] and self._shared.get(function, 0) >= shared, f"{name}: {shared} bytes of shared memory")
        pointers = iter((ctypes.c_void_p * len(entry["parameters"])).from_address(parameters))
        values: dict[str, Any] = {}
        accesses: list[Access] = []
        for argument in entry["arguments"]:
            first, *rest = itertools.islice(pointers, len(parameter_sizes(argument["type"])))
            pointer = ctypes.c_void_p(first)
            if rest:
                value, sizes, strides, _ = ast.literal_eval(ctypes.string_at(pointer).decode())
                given = [ctypes.c_int32.from_address(p).value for p in rest[: len(sizes)]]
                self._require(given == list(reversed(sizes)), f"{name}: {argument['name']} has sizes {sizes} and says {given}")
                apart = [ctypes.c_int64.from_address(p).value for p in rest[len(sizes) :]]
                width = strides[0] // apart[-2] if strides else 1
                self._require([s * width for s in apart[:-1]] == list(reversed(strides)) and apart[-1] == 1, f"{name}: strides {strides}, said {apart}")
                accesses.append((value, value + 1, argument["name"] in self._writes[name]))
                values[argument["name"]] = value
                continue
            base, _, promise = argument["type"].partition(":")
            kind = ctypes.c_uint64 if base.startswith("*") else SIZES[base][1]
            value = kind.from_address(first).value
            self._require(not promise or value % int(promise) == 0, f"{name}: {argument['name']} = {value} is no multiple of {promise}")
            if base.startswith("*"):
                room = self.room(value)
                accesses.append((value, value + 1, argument["name"] in self._writes[name]))
                self._require(room > 0, f"{name}: {argument['name']} points nowhere")
            values[argument["name"]] = value
        for hidden in pointers:
            self._require(ctypes.c_uint64.from_address(hidden).value == 0, f"{name}: hidden pointers must be null")  # type: ignore[arg-type]
        launched = Launched(kernel=name, grid=(gx, gy, gz), values=values, stream=stream)

        def action() -> None:
            self.launches.append(launched)
            if self._execute is not None:
                self._execute(launched)

        self._work(stream, name, accesses, action)
        return (0,)

    # graphs

    def cuStreamBeginCapture(self, stream: int, mode: int) -> tuple[int]:
        self._require(stream not in self._capturing, "capture began twice")
        self._capturing[stream] = []
        return (0,)

    def cuStreamEndCapture(self, stream: int) -> tuple[int, int]:
        handle = self._handle()
        self._graphs[handle] = self._capturing.pop(stream)
        return 0, handle

    def cuGraphInstantiate(self, graph: int, flags: int) -> tuple[int, int]:
        handle = self._handle()
        self._graphs[handle] = list(self._graphs[graph])
        return 0, handle

    def cuGraphDestroy(self, graph: int) -> tuple[int]:
        del self._graphs[graph]
        return (0,)

    def cuGraphExecDestroy(self, graph: int) -> tuple[int]:
        del self._graphs[graph]
        return (0,)

    def cuGraphLaunch(self, graph: int, stream: int) -> tuple[int]:
        for what, accesses, action in self._graphs[graph]:
            self._work(stream, what, accesses, action)
        return (0,)


def _merge(clock: dict[int, int], other: Mapping[int, int]) -> None:
    for stream, time in other.items():
        clock[stream] = max(clock.get(stream, 0), time)
