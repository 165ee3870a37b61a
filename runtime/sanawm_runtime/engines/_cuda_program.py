"""A plan bound to addresses: everything that has to be enqueued, ready to go."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sanawm.errors import EngineError
from sanawm_runtime.engines._cuda_device import Gpu
from sanawm_runtime.engines._cuda_kernels import Arguments, Kernel, check_grid, pack
from sanawm_runtime.engines._cuda_plan import ITEM_BYTES, WEIGHT_PREFIX, Copy, Plan, View


@dataclass(frozen=True)
class Loaded:
    """A kernel and its handle on the device."""

    kernel: Kernel
    function: Any


@dataclass(frozen=True)
class _Launch:
    loaded: Loaded
    grid: tuple[int, int, int]
    arguments: Arguments

    def enqueue(self, device: Gpu, stream: Any) -> None:
        kernel = self.loaded.kernel
        device.launch(self.loaded.function, self.grid, kernel.threads, kernel.shared_bytes, stream, self.arguments.address)


@dataclass(frozen=True)
class _Rows:
    to: int
    to_pitch: int
    source: int
    source_pitch: int
    width: int
    rows: int

    def enqueue(self, device: Gpu, stream: Any) -> None:
        device.copy_rows(self.to, self.to_pitch, self.source, self.source_pitch, self.width, self.rows, stream)


class BoundProgram:
    """A plan's launches with their arguments packed for given buffers."""

    def __init__(
        self,
        device: Gpu,
        plan: Plan,
        kernels: Callable[[str], Loaded],
        addresses: Mapping[str, int],
        weights: Mapping[str, int],
        arena: int,
        scalars: Mapping[str, int | float] | None = None,
    ) -> None:
        """`addresses` of inputs and outputs by name, `weights` by packed name; `scalars` replace numbers of the plan by argument name."""

        def place(view: View) -> int:
            buffer = plan.buffers[view.buffer]
            if buffer.role == "arena":
                return arena + buffer.offset + view.offset
            table, name = (weights, view.buffer.removeprefix(WEIGHT_PREFIX)) if buffer.role == "weight" else (addresses, view.buffer)
            if name not in table:
                raise EngineError(f"{plan.program} needs {buffer.role} '{name}', and there is none; rebuild the bundle")
            return table[name] + view.offset

        self._steps: list[_Launch | _Rows] = []
        for step in plan.steps:
            if isinstance(step, Copy):
                self._steps.append(_rows(place(step.target), place(step.source), step))
                continue
            loaded = kernels(step.kernel)
            check_grid(loaded.kernel, step.grid)
            self._steps.append(_Launch(loaded, step.grid, pack(loaded.kernel, step.arguments, place, scalars or {}, device.describe)))

    def enqueue(self, device: Gpu, stream: Any) -> None:
        for step in self._steps:
            step.enqueue(device, stream)

    def __iter__(self) -> Iterator[_Launch | _Rows]:
        return iter(self._steps)

    def __len__(self) -> int:
        return len(self._steps)


def _rows(to: int, source: int, step: Copy) -> _Rows:
    """A copy as rows of bytes: leading axes must make evenly spaced rows."""
    size = ITEM_BYTES[step.source.dtype]
    if len(step.source.shape) != 2 or step.source.strides[1] != 1 or step.target.strides[1] != 1:
        raise EngineError(f"{step.label}: expected rows to copy, found shape {step.source.shape}; rebuild the bundle")
    rows, width = step.source.shape
    return _Rows(to, step.target.strides[0] * size, source, step.source.strides[0] * size, width * size, rows)
