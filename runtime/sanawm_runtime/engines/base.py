"""What a session needs from an engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from sanawm.programs import TensorSpec


class Buffer:
    """A tensor that lives where the engine computes. Engines derive their own kind; sessions only pass it around.

    Its memory is given back when the last reference to it goes.
    """

    def __init__(self, spec: TensorSpec) -> None:
        self.spec = spec


class Engine(ABC):
    """Runs programs on buffers bound by name.

    Calls on one engine are made by one thread at a time, but not always by the same; `run` may return before the device is done, `read`
    waits. bfloat16 tensors are float32 arrays on the host side and are rounded on the way in.
    """

    def activate(self) -> None:
        """Called at the start of a turn in the thread that makes its calls, for engines that keep state of a thread (a CUDA context)."""
        return

    @abstractmethod
    def allocate(self, spec: TensorSpec) -> Buffer:
        """A buffer with undefined content."""

    @abstractmethod
    def write(self, buffer: Buffer, values: NDArray) -> None:
        """Copy `values` (the buffer's shape) in."""

    @abstractmethod
    def read(self, buffer: Buffer) -> NDArray:
        """A copy of the content; bfloat16 comes as float32."""

    @abstractmethod
    def load(self, program: str) -> None:
        """Make a program ready to run; nothing if it already is. Raises BundleError or EngineError."""

    @abstractmethod
    def run(self, program: str, buffers: Mapping[str, Buffer]) -> None:
        """Run a program on all its inputs and outputs by name. Raises EngineError; the contents of outputs are then undefined."""

    @abstractmethod
    def unload(self, program: str) -> None:
        """Give back the memory of a program that is not needed for a while."""

    @abstractmethod
    def close(self) -> None:
        """Give everything back. Further calls raise EngineError."""

    def copy(self, source: Buffer, target: Buffer) -> None:
        """Copy a buffer into another one of the same spec, bit for bit."""
        self.write(target, self.read(source))

    def euler(self, latents: Buffer, velocity: Buffer, size: float, keep_first: bool) -> None:
        """latents -= size * velocity in float32, rounded to the latents' dtype; with `keep_first` frame 0 stays bit-identical."""
        x = np.asarray(self.read(latents), np.float32)
        stepped = x - np.float32(size) * np.asarray(self.read(velocity), np.float32)
        if keep_first:
            stepped[:, :, 0] = x[:, :, 0]
        self.write(latents, stepped)
