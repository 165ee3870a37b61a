"""Launch lists: compiled kernels with everything that is needed to launch them, as they travel inside an engine.

A list is resolved for fixed shapes. What remains open at run time is where inputs, outputs and workspace lie.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sanawm.errors import EngineError
from sanawm.programs import ITEM_SIZES

FORMAT = 1
# Triton's kernels end with pointers to scratch memory that these do not use.
HIDDEN_POINTERS = 2

Source = Literal["input", "output", "workspace", "i32", "i64", "u32", "fp32"]
_SOURCES = ("input", "output", "workspace", "i32", "i64", "u32", "fp32")
_EM_CUDA = 190


@dataclass(frozen=True)
class Argument:
    """One kernel argument: a pointer `value` bytes into input or output number `index` or into the workspace, or a number."""

    source: Source
    value: int | float
    index: int = 0


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel; `shared` is its dynamic shared memory in bytes."""

    name: str
    symbol: str
    threads: int
    shared: int
    registers: int
    cubin: bytes = dataclasses.field(repr=False)


@dataclass(frozen=True)
class Launch:
    """A kernel by number, its grid and its arguments."""

    kernel: int
    grid: tuple[int, int, int]
    arguments: tuple[Argument, ...]


@dataclass(frozen=True)
class Operand:
    """An input or output: dtype name and static shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]


@dataclass(frozen=True)
class LaunchList:
    """Kernels compiled for `capability` ("sm_120") and the launches that turn the inputs into the outputs, in order.

    `workspace`: bytes of scratch memory, aligned to 256.
    """

    name: str
    capability: str
    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    workspace: int
    kernels: tuple[Kernel, ...]
    launches: tuple[Launch, ...]

    def __post_init__(self) -> None:
        for launch in self.launches:
            self._check(launch)
        for kernel in self.kernels:
            found = architecture(kernel.cubin)
            if found != self.capability:
                raise EngineError(f"{self.name}: kernel {kernel.name} is compiled for {found} and the engine for {self.capability}; compile it again")

    def _check(self, launch: Launch) -> None:
        if not 0 <= launch.kernel < len(self.kernels) or any(not 0 < size < 2**31 for size in launch.grid):
            raise EngineError(f"{self.name}: a launch names kernel {launch.kernel} with grid {launch.grid}; build the engine again")
        for argument in launch.arguments:
            if argument.source not in _SOURCES:
                raise EngineError(f"{self.name}: an argument comes from '{argument.source}'; build the engine again")
            if argument.source in ("input", "output", "workspace") and not 0 <= argument.value < self._size(argument):
                raise EngineError(f"{self.name}: an argument points outside of {argument.source} {argument.index}; build the engine again")

    def _size(self, argument: Argument) -> int:
        if argument.source == "workspace":
            return self.workspace
        operands = self.inputs if argument.source == "input" else self.outputs
        return operands[argument.index].nbytes if 0 <= argument.index < len(operands) else 0

    def to_fields(self) -> tuple[str, bytes]:
        """A JSON description and the cubins one after another: what an engine stores."""
        kernels = [
            {**{f: getattr(k, f) for f in ("name", "symbol", "threads", "shared", "registers")}, "size": len(k.cubin), "sha256": _digest(k.cubin)}
            for k in self.kernels
        ]
        launches = [[launch.kernel, list(launch.grid), [[a.source, a.value, a.index] for a in launch.arguments]] for launch in self.launches]
        operands = {side: [[o.dtype, list(o.shape)] for o in getattr(self, side)] for side in ("inputs", "outputs")}
        fixed = {"format": FORMAT, "name": self.name, "capability": self.capability, "workspace": self.workspace}
        return json.dumps({**fixed, **operands, "kernels": kernels, "launches": launches}), b"".join(k.cubin for k in self.kernels)

    @classmethod
    def from_fields(cls, description: str, cubins: bytes) -> LaunchList:
        """Inverse of `to_fields`. Raises EngineError for what it did not write."""
        try:
            data = json.loads(description)
            if data["format"] != FORMAT:
                raise EngineError(f"a plugin's launch list has format {data['format']}, this version reads {FORMAT}; build the engine again")
            kernels, start = [], 0
            for entry in data["kernels"]:
                size, sha256 = entry.pop("size"), entry.pop("sha256")
                cubin = cubins[start : start + size]
                if _digest(cubin) != sha256:
                    raise EngineError(f"{data['name']}: the code of kernel {entry['name']} changed; build the engine again")
                kernels.append(Kernel(**entry, cubin=cubin))
                start += size
            launches = tuple(Launch(k, (g[0], g[1], g[2]), tuple(Argument(s, v, i) for s, v, i in a)) for k, g, a in data["launches"])
            inputs, outputs = (tuple(Operand(d, tuple(s)) for d, s in data[side]) for side in ("inputs", "outputs"))
            return cls(data["name"], data["capability"], inputs, outputs, data["workspace"], tuple(kernels), launches)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise EngineError(f"a plugin's launch list cannot be read ({error}); build the engine again") from error


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def architecture(cubin: bytes) -> str:
    """The compute capability that a cubin is compiled for, "sm_120", from its ELF header. Raises EngineError for anything else."""
    if len(cubin) < 64 or cubin[:5] != b"\x7fELF\x02" or struct.unpack_from("<H", cubin, 18)[0] != _EM_CUDA:
        raise EngineError("expected a 64-bit CUDA ELF image, found something else; compile the kernels again")
    # CUDA 13's toolchain writes version 8 of its ELF for sm_100 and later, with the number one byte higher.
    flags = struct.unpack_from("<I", cubin, 48)[0]
    return f"sm_{flags >> 8 & 0xFF if cubin[8] >= 8 else flags & 0xFF}"


def aligned_offsets(sizes: Sequence[int], alignment: int = 256) -> tuple[list[int], int]:
    """Offsets of buffers placed one after another, each aligned, and the bytes in all."""
    offsets, total = [], 0
    for size in sizes:
        offsets.append(total)
        total += -(-size // alignment) * alignment
    return offsets, total


def describe(launches: LaunchList) -> list[dict[str, Any]]:
    """Rows for a manifest: name, architecture, registers, shared memory and size of each kernel."""
    return [
        {"name": k.name, "capability": launches.capability, "registers": k.registers, "shared": k.shared, "threads": k.threads, "bytes": len(k.cubin)}
        for k in launches.kernels
    ]
