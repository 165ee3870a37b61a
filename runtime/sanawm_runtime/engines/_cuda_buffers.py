"""Tensors on the device, and copies of them that are under way to the host."""

from __future__ import annotations

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


class CudaBuffer(Buffer):
    """Device memory of a tensor, with the last points at which it was written and read."""

    def __init__(self, spec: TensorSpec, device: Gpu) -> None:
        super().__init__(spec)
        self._device = device
        self.address = device.allocate(spec.nbytes)
        self.written: Event | None = None
        self.readers: dict[int, Event] = {}

    def __del__(self) -> None:
        if hasattr(self, "address") and not self._device.closed:
            self._device.free(self.address)  # the driver waits until nothing uses it


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
