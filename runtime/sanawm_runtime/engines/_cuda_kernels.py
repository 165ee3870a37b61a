"""Compiled kernels: their index in a bundle, and the packing of their parameters."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sanawm.errors import BundleError, EngineError
from sanawm_runtime.bundle.strict_json import decode, parse_json
from sanawm_runtime.engines._cuda_plan import ITEM_BYTES, TRITON_TYPES, Argument, View

MAX_INDEX_BYTES = 16 * 2**20
MAX_GRID = (2**31 - 1, 65535, 65535)
MAX_THREADS = 1024
_SIZES = {"i8": 1, "i32": 4, "u32": 4, "i64": 8, "fp32": 4, "fp64": 8}
_C_TYPES: Mapping[str, Any] = {
    "i8": ctypes.c_int8, "i32": ctypes.c_int32, "u32": ctypes.c_uint32, "i64": ctypes.c_int64, "fp32": ctypes.c_float, "fp64": ctypes.c_double,
}  # fmt: skip


_BLOCKS = re.compile(r"tensordesc<(\w+)\[(\d+(?:, \d+)*)\]>")
DESCRIPTOR_BYTES = 128


@dataclass(frozen=True)
class Parameter:
    """A run-time argument: name and Triton type; a promise of alignment follows the type (`*bf16:16`).

    `tensordesc<bf16[128, 64]>` is a tensor that the kernel takes through a descriptor, in blocks of that shape.
    """

    name: str
    type: str

    @property
    def base(self) -> str:
        return self.type.partition(":")[0]

    @property
    def promise(self) -> int:
        """What the value is a multiple of."""
        return int(self.type.partition(":")[2] or 1)

    @property
    def blocks(self) -> tuple[str, int] | None:
        """Element type and rank of a tensor with a descriptor; None for anything else."""
        found = _BLOCKS.fullmatch(self.type)
        return None if found is None else (found[1], found[2].count(",") + 1)

    @property
    def sizes(self) -> list[int]:
        """Bytes of the parameters that stand for it: a descriptor is followed by the tensor's sizes and strides."""
        if self.blocks is not None:
            return [DESCRIPTOR_BYTES] + [4] * self.blocks[1] + [8] * self.blocks[1]
        return [8 if self.base.startswith("*") else _SIZES[self.base]]


@dataclass(frozen=True)
class Descriptor:
    """How an argument's descriptor is made: the box that one instruction copies, and its swizzle (CUtensorMapSwizzle)."""

    argument: str
    box: tuple[int, ...]
    swizzle: int


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel: file of its cubin, entry point, parameters with their places, and hidden pointers that follow them, which are null."""

    name: str
    file: str
    entry: str
    arch: str
    arguments: tuple[Parameter, ...]
    hidden: tuple[str, ...]
    parameters: tuple[tuple[int, ...], ...]
    num_warps: int
    shared_bytes: int
    descriptors: tuple[Descriptor, ...]
    sha256: str

    def __post_init__(self) -> None:
        """BundleError where the parameters that the code has are not those of the arguments."""
        sizes = [size for a in self.arguments for size in a.sizes] + [8] * len(self.hidden)
        if [p[1] for p in self.parameters] != sizes:
            found = [p[1] for p in self.parameters]
            raise BundleError(f"kernel {self.name}: its code takes parameters of {found} bytes, its index lists {sizes}; rebuild the bundle")
        described = {a.name: a.blocks[1] for a in self.arguments if a.blocks is not None}
        if {d.argument: len(d.box) for d in self.descriptors} != described:
            given = len(self.descriptors)
            raise BundleError(f"kernel {self.name}: its index describes {given} of {len(described)} tensors in blocks; rebuild the bundle")
        if not 0 < self.num_warps * 32 <= MAX_THREADS:
            raise BundleError(f"kernel {self.name}: {self.num_warps} warps do not make a block; rebuild the bundle")

    @property
    def threads(self) -> int:
        return 32 * self.num_warps


_FIELDS = frozenset(Kernel.__dataclass_fields__)


def read_index(data: bytes, what: str) -> dict[str, Kernel]:
    """Kernels of an index by name. Raises BundleError."""
    document = parse_json(data, what, max_bytes=MAX_INDEX_BYTES)
    if not isinstance(document, dict) or not isinstance(document.get("kernels"), list):
        raise BundleError(f"{what}: expected an object with a list of kernels; rebuild the bundle")
    kernels = {}
    for i, entry in enumerate(document["kernels"]):
        if not isinstance(entry, dict):
            raise BundleError(f"{what}.kernels[{i}]: expected an object; rebuild the bundle")
        # An index also holds what compilation found (registers, spills), which a launch does not need.
        kernel = decode(Kernel, {name: value for name, value in entry.items() if name in _FIELDS}, f"{what}.kernels[{i}]")
        kernels[kernel.name] = kernel
    return kernels


@dataclass(frozen=True)
class Described:
    """A tensor behind a descriptor: the descriptor's bytes, sizes, and strides in elements."""

    descriptor: bytes
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def parameters(self) -> list[Any]:
        sizes = [ctypes.c_int32(n) for n in self.shape]
        return [(ctypes.c_uint8 * DESCRIPTOR_BYTES).from_buffer_copy(self.descriptor), *sizes, *map(ctypes.c_int64, self.strides)]


Value = int | float | Described


class Arguments:
    """Parameters of one launch in host memory; `address` is what the driver takes."""

    def __init__(self, kernel: Kernel, values: Sequence[Value]) -> None:
        if len(values) != len(kernel.arguments):
            raise EngineError(f"kernel {kernel.name} takes {len(kernel.arguments)} arguments, found {len(values)}; rebuild the bundle")
        self._values: list[Any] = []
        for parameter, value in zip(kernel.arguments, values):
            self._values += value.parameters() if isinstance(value, Described) else [_value(kernel, parameter, value)]
        self._values += [ctypes.c_void_p(None) for _ in kernel.hidden]
        self._array = (ctypes.c_void_p * len(self._values))(*(ctypes.addressof(v) for v in self._values))
        self.address = ctypes.addressof(self._array)


def _value(kernel: Kernel, parameter: Parameter, value: int | float) -> Any:
    if parameter.base == "fp32" or parameter.base == "fp64":
        return _C_TYPES[parameter.base](value)
    if not isinstance(value, int) or value % parameter.promise:
        raise EngineError(f"kernel {kernel.name}: {parameter.name} must be a multiple of {parameter.promise}, found {value}; rebuild the bundle")
    if parameter.base.startswith("*"):
        if value <= 0:
            raise EngineError(f"kernel {kernel.name}: {parameter.name} has no address; rebuild the bundle")
        return ctypes.c_void_p(value)
    packed = _C_TYPES[parameter.base](value)
    if packed.value != value:
        raise EngineError(f"kernel {kernel.name}: {parameter.name} = {value} does not fit {parameter.base}; rebuild the bundle")
    return packed


# Makes a descriptor: address, dtype, sizes, strides in elements, box, swizzle.
Describe = Callable[[int, str, tuple[int, ...], tuple[int, ...], tuple[int, ...], int], bytes]


def pack(
    kernel: Kernel, arguments: Mapping[str, Argument], place: Callable[[View], int], scalars: Mapping[str, int | float], describe: Describe
) -> Arguments:
    """Parameters of a launch: views at the addresses that `place` gives, numbers as they are or as `scalars` says. Raises EngineError."""
    if set(arguments) != {p.name for p in kernel.arguments}:
        wrong = sorted(set(arguments) ^ {p.name for p in kernel.arguments})
        raise EngineError(f"kernel {kernel.name} and the plan differ in {', '.join(wrong)}; rebuild the bundle")
    made = {d.argument: d for d in kernel.descriptors}
    values: list[Value] = []
    for parameter in kernel.arguments:
        value, descriptor = arguments[parameter.name], made.get(parameter.name)
        if not isinstance(value, View):
            values.append(scalars.get(parameter.name, value))
        elif descriptor is None:
            values.append(place(value))
        else:
            values.append(_described(kernel, parameter, value, descriptor, place(value), describe))
    return Arguments(kernel, values)


def _described(kernel: Kernel, parameter: Parameter, view: View, descriptor: Descriptor, address: int, describe: Describe) -> Described:
    """A view behind a descriptor, which wants rows of adjacent elements at multiples of 16 bytes."""
    size = ITEM_BYTES[view.dtype]
    fits = len(view.shape) == len(descriptor.box) and view.strides[-1:] == (1,) and not any(s * size % 16 for s in view.strides[:-1])
    if not fits or address % 16 or parameter.blocks is None or TRITON_TYPES[view.dtype] != parameter.blocks[0]:
        raise EngineError(
            f"kernel {kernel.name}: {parameter.name} must be {parameter.type} in rows at multiples of 16 bytes, found {view.dtype} {view.shape} "
            f"with strides {view.strides}; rebuild the bundle"
        )
    return Described(describe(address, view.dtype, view.shape, view.strides, descriptor.box, descriptor.swizzle), view.shape, view.strides)


def check_grid(kernel: Kernel, grid: tuple[int, int, int]) -> None:
    """Raises EngineError for a grid that the driver would refuse."""
    if any(not 0 < size <= limit for size, limit in zip(grid, MAX_GRID)):
        raise EngineError(f"kernel {kernel.name}: grid {grid} is not possible; rebuild the bundle")
