"""Execution of a launch plan on the CPU by the kernels' plain definitions: the judge of a lowering.

Every launch reads and writes the very views that the plan binds, inside one arena. Bytes of the arena that hold no living tensor are NaN, so a
tensor that was overwritten or never written shows in the outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from sanawm_export.cuda.arena import lifetimes
from sanawm_export.cuda.definitions import DEFINITIONS
from sanawm_export.cuda.tape import Lowered
from sanawm_runtime.engines._cuda_plan import WEIGHT_PREFIX, Argument, Copy, Launch, Step, View

# All bits set: NaN in every float type of the kernels.
POISON = 0xFF

Execute = Callable[[list[Launch], list[dict[str, Any]]], None]


class Memory:
    """A plan's buffers as bytes: the arena, and one tensor for each input, output and weight."""

    def __init__(self, lowered: Lowered, inputs: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
        self.plan = lowered.plan
        self.arena = torch.full((lowered.plan.arena,), POISON, dtype=torch.uint8)
        self._own: dict[str, Tensor] = {}
        for name, buffer in lowered.plan.buffers.items():
            if buffer.role == "input":
                self._own[name] = self._checked(name, inputs[name])
            elif buffer.role == "weight":
                self._own[name] = self._checked(name, weights[name.removeprefix(WEIGHT_PREFIX)])
            elif buffer.role == "output":
                self._own[name] = torch.full((buffer.nbytes,), POISON, dtype=torch.uint8)

    def _checked(self, name: str, tensor: Tensor) -> Tensor:
        buffer = self.plan.buffers[name]
        if tuple(tensor.shape) != buffer.shape or tensor.dtype != getattr(torch, buffer.dtype):
            raise ValueError(f"{name}: expected {buffer.dtype} of shape {buffer.shape}, found {tensor.dtype} of shape {tuple(tensor.shape)}")
        return tensor.contiguous().reshape(-1).view(torch.uint8)

    def _bytes(self, name: str) -> Tensor:
        buffer = self.plan.buffers[name]
        return self.arena[buffer.offset : buffer.offset + buffer.nbytes] if buffer.role == "arena" else self._own[name]

    def tensor(self, view: View) -> Tensor:
        """The view as a tensor that shares memory with its buffer."""
        flat = self._bytes(view.buffer).view(torch.uint8)
        dtype = getattr(torch, view.dtype)
        typed = flat.view(dtype)
        return typed.as_strided(view.shape, view.strides, typed.storage_offset() + view.offset // dtype.itemsize)

    def poison(self, name: str) -> None:
        self._bytes(name).fill_(POISON)

    def output(self, name: str) -> Tensor:
        buffer = self.plan.buffers[name]
        return self._own[name].view(getattr(torch, buffer.dtype)).reshape(buffer.shape)


def by_definition(lowered: Lowered) -> Execute:
    """Runs operations by the plain definition of their last kernel."""

    def execute(launches: list[Launch], arguments: list[dict[str, Any]]) -> None:
        variants = [lowered.variants[launch.kernel] for launch in launches]
        merged: dict[str, Any] = {}
        for values in arguments:
            merged |= values
        constants: dict[str, Any] = {}
        # Where launches of one operation differ (a later one no longer convolves), the first one's constants describe the operation.
        for variant in reversed(variants):
            constants |= variant.constexprs
        DEFINITIONS[variants[-1].kernel](merged, constants)

    return execute


def run(
    lowered: Lowered, inputs: Mapping[str, Tensor], weights: Mapping[str, Tensor], execute: Execute | None = None
) -> dict[str, Tensor]:
    """Outputs of a plan by name. `inputs` by name, `weights` by packed name; `execute` runs one operation, by default its plain definition.

    Raises ValueError where an operation leaves NaN in a tensor that it writes, which names the first one that went wrong.
    """
    memory = Memory(lowered, inputs, weights)
    execute = execute or by_definition(lowered)
    alive = lifetimes(lowered.plan.buffers, lowered.plan.steps)
    for group, steps in _groups(lowered.plan.steps):
        for name, life in alive.items():
            if life.first == group:
                memory.poison(name)
        if isinstance(steps[0], Copy):
            memory.tensor(steps[0].target).copy_(memory.tensor(steps[0].source))
        else:
            launches = [step for step in steps if isinstance(step, Launch)]
            execute(launches, [{n: _value(memory, v) for n, v in launch.arguments.items()} for launch in launches])
        _check_written(memory, steps)
        for name, life in alive.items():
            if life.last == group:
                memory.poison(name)
    return {name: memory.output(name) for name, buffer in lowered.plan.buffers.items() if buffer.role == "output"}


def _groups(steps: tuple[Step, ...]) -> Iterator[tuple[int, list[Step]]]:
    for group, members in groupby(steps, key=lambda step: step.group):
        yield group, list(members)


def _value(memory: Memory, value: Argument) -> Any:
    return memory.tensor(value) if isinstance(value, View) else value


def _check_written(memory: Memory, steps: list[Step]) -> None:
    read = {view.buffer for step in steps for view, written in step.views() if not written}
    for view, written in steps[-1].views():
        if not written or view.buffer in read:
            continue
        values = memory.tensor(view)
        if values.is_floating_point() and values.float().isnan().any():
            raise ValueError(f"{memory.plan.program}: {steps[-1].label} leaves NaN in {view.buffer}")


def by_kernels(lowered: Lowered) -> Execute:
    """Runs every launch with its own Triton kernel on its own grid: compiled where the tensors are on a GPU, else by Triton's interpreter."""
    from sanawm_kernels.aot.compile import load

    def execute(launches: list[Launch], arguments: list[dict[str, Any]]) -> None:
        for launch, values in zip(launches, arguments):
            variant = lowered.variants[launch.kernel]
            options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, **variant.options}
            load(variant.kernel)[launch.grid](**values, **variant.constexprs, **options)

    return execute
