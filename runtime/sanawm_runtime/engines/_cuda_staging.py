"""Page-locked host memory that copies pass through."""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

from sanawm_runtime.engines._cuda_device import Event, Gpu

Block = NDArray[np.uint8]


class Staging:
    """Blocks of one size, which are lent and given back. A larger request makes the size grow; smaller blocks go as they come back."""

    def __init__(self, device: Gpu, least: int, size: int = 0) -> None:
        """Up to `least` blocks are made before one is waited for; more only while all are lent."""
        self._device, self._least, self._size = device, least, size
        self._made = 0
        self._free: deque[tuple[Block, Event | None]] = deque()

    def take(self, nbytes: int) -> Block:
        """A block of at least that size which no copy uses any more."""
        self._size = max(self._size, nbytes)
        while self._free and self._made >= self._least:
            block, used = self._free.popleft()
            if used is not None:
                used.synchronize()
            if len(block) >= self._size:
                return block
            self._device.unpin(block)
            self._made -= 1
        self._made += 1
        return self._device.pinned(self._size)

    def give(self, block: Block, used: Event | None = None) -> None:
        """Give a block back; the copy that ends at `used` may still be under way."""
        self._free.append((block, used))
