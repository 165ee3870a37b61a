"""What a session needs from an engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from sanawm.errors import EngineError
from sanawm.programs import TensorSpec


class Buffer:
    """A tensor that lives where the engine computes. Engines derive their own kind; sessions only pass it around.

    Its memory is given back when the last reference to it goes.
    """

    def __init__(self, spec: TensorSpec) -> None:
        self.spec = spec


class Pending:
    """A read that was begun, of values that are there already; engines that copy beside their work derive their own kind."""

    def __init__(self, values: NDArray) -> None:
        self._values = values

    def result(self, out: NDArray | None = None) -> NDArray:
        """The content, once: in `out` (same shape) where it is given. Waits for the device."""
        if out is None:
            return self._values
        out[...] = self._values
        return out


class Engine(ABC):
    """Runs programs on buffers bound by name.

    Calls on one engine are made by one thread at a time, but not always by the same; `run` may return before the device is done, `read`
    waits. bfloat16 tensors are float32 arrays on the host side and are rounded on the way in.
    """

    # Whether `run_chunk` serves; else sessions run a chunk's programs one by one.
    whole_chunks = False

    def activate(self) -> None:
        """Called at the start of a turn in the thread that makes its calls, for engines that keep state of a thread (a CUDA context)."""
        return

    def free_bytes(self) -> int | None:
        """Memory that the device has left, where it has its own."""
        return None

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

    def read_later(self, buffer: Buffer) -> Pending:
        """Begin to read; work that is enqueued later does not change what is read."""
        return Pending(self.read(buffer))

    def copy(self, source: Buffer, target: Buffer) -> None:
        """Copy a buffer into another one of the same spec, bit for bit."""
        self.write(target, self.read(source))

    def run_chunk(
        self, kind: str, buffers: Mapping[str, Buffer], timesteps: NDArray[np.float32], sizes: Sequence[float], keep_first: bool
    ) -> None:
        """A chunk's denoising steps and its clean pass at once: what `denoise_<kind>` and `euler` step by step and `commit_<kind>` do.

        buffers: all inputs and outputs of both programs; `latents` are denoised in place, `timestep` and `velocity` are scratch. timesteps
        (steps, frames); sizes: sigma - sigma_next of each step.
        """
        raise EngineError("this engine runs a chunk's programs one by one")

    def copy_frame(self, source: Buffer, index: int, target: Buffer) -> None:
        """Copy one latent frame, `source[:, :, index]`, into `target` (1, C, 1, h, w)."""
        self.write(target, self.read(source)[:, :, index : index + 1])

    def euler(self, latents: Buffer, velocity: Buffer, size: float, keep_first: bool) -> None:
        """latents -= size * velocity in float32, rounded to the latents' dtype; with `keep_first` frame 0 stays bit-identical."""
        x = np.asarray(self.read(latents), np.float32)
        stepped = x - np.float32(size) * np.asarray(self.read(velocity), np.float32)
        if keep_first:
            stepped[:, :, 0] = x[:, :, 0]
        self.write(latents, stepped)
