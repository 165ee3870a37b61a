"""Tensors on the device, their memory, and copies of them that are under way to the host."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sanawm.bfloat16 import from_bits
from sanawm.errors import EngineError
from sanawm.programs import TensorSpec
from sanawm_runtime.engines._cuda_device import Event, Gpu
from sanawm_runtime.engines._cuda_staging import Block, Staging
from sanawm_runtime.engines.base import Buffer, Pending

STORAGE: Mapping[str, Any] = {"float32": np.float32, "bfloat16": np.uint16, "int64": np.int64, "bool": np.bool_, "uint8": np.uint8}


# Its number, its address, and the points at which it was last written and read.
_Piece = tuple[int, int, Event | None, dict[int, Event]]


class Memory:
    """Device memory of tensors. What a tensor gave back is kept for the next one of the same name and size, until the device has no room for others.

    Of several pieces the first that was made is lent first. So a stream that follows another one has the addresses of the one before, tensor by
    tensor, and the graphs that were recorded for them.
    """

    def __init__(self, device: Gpu) -> None:
        self.device = device
        self._made = 0
        self._free: dict[tuple[str, int], list[_Piece]] = {}

    def take(self, spec: TensorSpec) -> _Piece:
        """Raises EngineError when there is not enough."""
        kept = self._free.get((spec.name, spec.nbytes))
        if kept:
            return heapq.heappop(kept)
        self._made += 1
        try:
            address = self.device.allocate(spec.nbytes, spec.name)
        except EngineError:
            self.release()
            address = self.device.allocate(spec.nbytes, spec.name)
        return self._made, address, None, {}

    def give(self, spec: TensorSpec, piece: _Piece) -> None:
        heapq.heappush(self._free.setdefault((spec.name, spec.nbytes), []), piece)

    def release(self) -> None:
        """Give the device what no tensor has."""
        for kept in self._free.values():
            while kept:
                self.device.free(kept.pop()[1])  # the driver waits until nothing uses it


class CudaBuffer(Buffer):
    """Device memory of a tensor, with the last points at which it was written and read, by the tensor before it if need be."""

    def __init__(self, spec: TensorSpec, memory: Memory) -> None:
        super().__init__(spec)
        self._memory = memory
        self._number, self.address, self.written, self.readers = memory.take(spec)

    def __del__(self) -> None:
        if hasattr(self, "address") and not self._memory.device.closed:
            self._memory.give(self.spec, (self._number, self.address, self.written, self.readers))


class PendingRead(Pending):
    """A copy to the host under way."""

    def __init__(self, spec: TensorSpec, staging: Staging, block: Block, done: Event) -> None:
        self._spec, self._staging, self._done = spec, staging, done
        self._block: Block | None = block

    def result(self, out: NDArray | None = None) -> NDArray:
        if self._block is None:
            raise EngineError(f"{self._spec.name} was read already")
        self._done.synchronize()
        stored = self._block[: self._spec.nbytes].view(STORAGE[self._spec.dtype]).reshape(self._spec.shape)
        values = from_bits(stored) if self._spec.dtype == "bfloat16" else stored
        if out is None:
            out = np.array(values)
        else:
            out[...] = values
        self._staging.give(self._block)
        self._block = None
        return out

    def __del__(self) -> None:
        if self._block is not None:
            self._staging.give(self._block, self._done)


def own(buffer: Buffer) -> CudaBuffer:
    if not isinstance(buffer, CudaBuffer):
        raise EngineError(f"{buffer.spec.name} is a buffer of another engine")
    return buffer
