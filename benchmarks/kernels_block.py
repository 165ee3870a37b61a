"""Whole blocks and a whole forward of the streaming transformer, composed from the CUDA engine's launch plan and run by its executor.

    python benchmarks/kernels_block.py                # on a GPU: times, launch counts, result file
    python benchmarks/kernels_block.py --dry-run      # anywhere: the cases, their launches and their minimal work

A block is the part of the steady denoising plan between two residual streams. The forward is that whole plan; blocks of a kind share one set of
weights and one state there, which are larger than the second-level cache.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent))

from kernel_timing import Case, Work, main

from sanawm.bfloat16 import from_bits, to_bits
from sanawm.config import WorldConfig
from sanawm.model.checkpoint.values import synth_tensor
from sanawm.programs import Geometry, programs
from sanawm_export.cuda.build import compiled
from sanawm_export.cuda.dit import lower_dit
from sanawm_export.cuda.formats import formats_for
from sanawm_export.cuda.lower import dit_weights
from sanawm_export.cuda.tape import Lowered
from sanawm_runtime.bundle.strict_json import decode
from sanawm_runtime.engines._cuda_device import Gpu
from sanawm_runtime.engines._cuda_kernels import Kernel
from sanawm_runtime.engines._cuda_pack import Packed
from sanawm_runtime.engines._cuda_plan import WEIGHT_PREFIX, Buffer, Launch, Plan, Step
from sanawm_runtime.engines._cuda_program import BoundProgram, Loaded

PROGRAM = "denoise_steady"
PRECISIONS = ("bf16", "fp8")
# Peaks that can be measured with torch; work in other units counts its traffic alone.
MEASURED = ("bf16", "fp8")
FIELDS = frozenset(Kernel.__dataclass_fields__)
Tensors = Mapping[str, Packed]


def kinds(world: WorldConfig) -> dict[str, int]:
    """The first block of each kind."""
    return {"gdn": next(i for i in range(world.dit.depth) if not world.dit.is_softmax(i)),
            "softmax": next(i for i in range(world.dit.depth) if world.dit.is_softmax(i))}  # fmt: skip


@cache
def forward(world: WorldConfig, precision: str, target: int, dtype: str = "bfloat16") -> tuple[Lowered, Tensors]:
    """The steady denoising plan and its packed weights by name."""
    geometry = Geometry(world, world.dit.text_tokens, 4, dtype)
    weights = dit_weights(geometry, formats_for(world.dit, precision))
    return lower_dit(programs(geometry, ("dit",))[PROGRAM], weights, target), weights.tensors


def block_of(plan: Plan, block: int) -> Plan:
    """The steps of one block. What it reads from steps before, the residual stream and the AdaLN rows, becomes an input; what it leaves an output."""
    steps = tuple(step for step in plan.steps if step.label.startswith(f"blocks.{block}."))
    if not steps:
        raise ValueError(f"{plan.program} has no block {block}")
    buffers: dict[str, Buffer] = {}
    written: set[str] = set()
    for step in steps:
        for view, writes in sorted(step.views(), key=lambda pair: pair[1]):
            held = plan.buffers[view.buffer]
            if held.role == "arena" and not writes and held.name not in written:
                held = replace(held, role="input", offset=0)
            buffers.setdefault(held.name, held)
            written |= {held.name} if writes else set()
    left = written_last(steps)
    buffers[left] = replace(buffers[left], role="output", offset=0)
    return Plan(f"{plan.program}.{block}", buffers, steps, plan.arena)


def written_last(steps: Sequence[Step]) -> str:
    """Name of the buffer that the last step writes."""
    return next(view.buffer for view, written in steps[-1].views() if written)


def work(plan: Plan) -> tuple[Work, ...]:
    """Minimal traffic and arithmetic of each launch."""
    return tuple(Work(s.read_bytes + s.write_bytes, s.flops if s.unit in MEASURED else 0, s.unit if s.unit in MEASURED else "bf16") for s in plan.steps)


class Stage:
    """A plan on a GPU with fresh random inputs and weights; `aliases` says whose memory a buffer takes instead of its own."""

    def __init__(self, plan: Plan, tensors: Tensors, kernels: Callable[[str], Loaded], device: Gpu, aliases: Callable[[str], str] = str) -> None:
        self.plan, self._device, self._aliases, self._tensors = plan, device, aliases, tensors
        self.random = torch.Generator().manual_seed(int.from_bytes(os.urandom(4), "little"))
        self._stream = device.new_stream()
        self._memory: dict[str, int] = {}
        addresses = {name: self._place(name) for name, b in plan.buffers.items() if b.role in ("input", "output")}
        weights = {name.removeprefix(WEIGHT_PREFIX): self._place(name) for name, b in plan.buffers.items() if b.role == "weight"}
        self._arena = device.allocate(plan.arena, "scratch memory")
        self.bound = BoundProgram(device, plan, kernels, addresses, weights, self._arena)
        device.call("cuCtxSynchronize")

    def _place(self, name: str) -> int:
        owner = self._aliases(name)
        if owner not in self._memory:
            buffer = self.plan.buffers[owner]
            self._memory[owner] = self._device.allocate(buffer.nbytes, owner)
            if buffer.role != "output":
                self._send(self._memory[owner], self._values(buffer))
        return self._memory[owner]

    def _values(self, buffer: Buffer) -> NDArray[Any]:
        if buffer.role == "weight":
            return weight_values(buffer.name.removeprefix(WEIGHT_PREFIX), self._tensors, self.random)
        return input_values(buffer, self.random)

    def _send(self, address: int, values: NDArray[Any]) -> None:
        host = self._device.pinned(values.nbytes)
        host[:] = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        self._device.send(address, host, self._stream)
        self._device.call("cuStreamSynchronize", self._stream)
        self._device.unpin(host)

    def enqueue(self, stream: Any) -> None:
        self.bound.enqueue(self._device, stream)

    def result(self) -> NDArray[np.float32]:
        """What the last step wrote, after everything enqueued is done."""
        buffer = self.plan.buffers[written_last(self.plan.steps)]
        host = self._device.pinned(buffer.nbytes)
        self._device.call("cuCtxSynchronize")
        self._device.fetch(host, self._memory[buffer.name], self._stream)
        self._device.call("cuStreamSynchronize", self._stream)
        stored = host[: buffer.nbytes].copy()
        self._device.unpin(host)
        return from_bits(stored.view(np.uint16)) if buffer.dtype == "bfloat16" else stored.view(np.float32)

    def close(self) -> None:
        for address in (*self._memory.values(), self._arena):
            self._device.free(address)
        self._memory.clear()


def normal(shape: tuple[int, ...], random: torch.Generator, scale: float = 1.0) -> NDArray[np.float32]:
    found: NDArray[np.float32] = (torch.randn(shape, generator=random) * scale).numpy()
    return found


def input_values(buffer: Buffer, random: torch.Generator) -> NDArray[Any]:
    """Random values that an input could have, in its storage type."""
    name, shape = buffer.name.rpartition(".")[2], buffer.shape
    if buffer.dtype in ("bool", "uint8"):
        return np.ones(shape, np.uint8)
    if buffer.name == "timestep":
        values = np.full(shape, 960, np.float32)
    elif name in ("rays", "rays_inverse"):
        values = np.eye(4, dtype=np.float32) + normal(shape, random, 0.1)
    elif name.endswith(("cos", "sin")):
        values = np.cos(normal(shape, random, 3.0))
    elif name == "z":
        values = np.abs(normal(shape, random))
    else:
        values = normal(shape, random)
    return to_bits(values) if buffer.dtype == "bfloat16" else values.astype(np.float32)


def weight_values(name: str, tensors: Tensors, random: torch.Generator) -> NDArray[Any]:
    """A packed weight of random numbers. Those of products are made in their storage type: packing them from float32 takes minutes."""
    packed = tensors[name]
    product, _, part = name.rpartition(".")
    codes = tensors.get(f"{product}.codes", tensors.get(f"{product}.weight"))
    if part not in ("codes", "scales", "weight") or codes is None or codes.op == "constant" or f"{product}.blocks" in tensors:
        return packed.make(lambda source, shape: synth_tensor(source, shape, random.initial_seed()))
    depth = codes.shape[-1]
    if part == "codes":
        return (torch.randn(packed.shape, generator=random) * 120).clamp_(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    if part == "scales":
        return np.full(packed.shape, 1 / (120 * depth**0.5), np.float32)
    values = normal(packed.shape, random, depth**-0.5)
    return to_bits(values) if packed.dtype == "bfloat16" else values


def shared_blocks(world: WorldConfig) -> Callable[[str], str]:
    """Buffers of the first block of each kind stand for those of all its kind."""
    first = kinds(world)

    def owner(name: str) -> str:
        parts = name.split(".")
        at = 1 if parts[0] in ("blocks", f"{WEIGHT_PREFIX}blocks", "past", "sink", "plucker", "keys", "values") else 0
        if not at or len(parts) < 2 or not re.fullmatch(r"\d+", parts[1]):
            return name
        parts[1] = str(first["softmax" if world.dit.is_softmax(int(parts[1])) else "gdn"])
        return ".".join(parts)

    return owner


@cache
def device() -> Gpu:
    return Gpu()


@cache
def loaded(precision: str, target: int) -> dict[str, Loaded]:
    """The forward's kernels, compiled here and loaded."""
    lowered, _ = forward(WorldConfig(), precision, target)
    found = {}
    for entry, image in compiled(lowered.variants, target):
        kernel = decode(Kernel, {n: v for n, v in entry.items() if n in FIELDS}, entry["name"])
        found[kernel.name] = Loaded(kernel, device().function(image, kernel.entry, kernel.shared_bytes))
    return found


def target() -> int:
    """The GPU's compute capability; 90 without one, where only the work is listed."""
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    return major * 10 + minor


_stages: list[Stage] = []


def _prepared(plan: Plan, precision: str, aliases: Callable[[str], str] = str) -> tuple[Callable[[], None], dict[str, Callable[[], Any]]]:
    while _stages:
        _stages.pop().close()
    torch.cuda.init()
    stage = Stage(plan, forward(WorldConfig(), precision, target())[1], loaded(precision, target()).__getitem__, device(), aliases)
    _stages.append(stage)
    stage.enqueue(torch.cuda.current_stream().cuda_stream)
    if not np.isfinite(stage.result()).all():
        raise SystemExit(f"{plan.program} in {precision} gives numbers that are not finite: its kernels are wrong, a time means nothing")
    return lambda: stage.enqueue(torch.cuda.current_stream().cuda_stream), {}


def cases() -> Sequence[Case]:
    """block.<kind>.<precision> and forward.<precision>, a steady denoising step of 3 frames at 704x1280."""
    world, found = WorldConfig(), []
    for precision in PRECISIONS:
        plan = forward(world, precision, target())[0].plan
        parts = {f"block.{kind}": block_of(plan, i) for kind, i in kinds(world).items()} | {"forward": plan}
        for name, part in parts.items():
            aliases = shared_blocks(world) if name == "forward" else str
            launches = sum(isinstance(step, Launch) for step in part.steps)
            found.append(Case(
                f"{name}.{precision}", lambda part=part, precision=precision, aliases=aliases: _prepared(part, precision, aliases),
                includes=f"{launches} launches in one graph" + (", without text and camera programs" if name == "forward" else ""),
                needs=89 if precision == "fp8" else 80, extra={"launches": launches}, work=work(part),
            ))  # fmt: skip
    return found


def extrapolate(rows: list[dict[str, Any]]) -> None:
    """Beside each forward's time: the sum of its blocks' times, with the blocks of a kind as long as the one that was timed."""
    world, times = WorldConfig(), {row["case"]: row["value"] for row in rows}
    softmax = sum(world.dit.is_softmax(i) for i in range(world.dit.depth))
    for row in rows:
        name, _, precision = row["case"].partition(".")
        blocks = [times.get(f"block.{kind}.{precision}") for kind in ("gdn", "softmax")]
        if name == "forward" and None not in blocks:
            row["blocks"] = (world.dit.depth - softmax) * blocks[0] + softmax * blocks[1]


if __name__ == "__main__":
    main("kernels-block", cases, "whole blocks and a forward, 3 frames at 704x1280, random inputs and weights", finish=extrapolate)
