"""Compiled kernels: their index in a bundle, and the packing of their parameters."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sanawm.errors import BundleError, EngineError
from sanawm_runtime.bundle.strict_json import decode, parse_json
from sanawm_runtime.engines._cuda_plan import Argument, View

MAX_INDEX_BYTES = 16 * 2**20
MAX_GRID = (2**31 - 1, 65535, 65535)
MAX_THREADS = 1024
# Triton's kernels keep tensor map descriptors in scratch memory, at multiples of their size.
SCRATCH_ALIGNMENT = 128
_SIZES = {"i8": 1, "i32": 4, "u32": 4, "i64": 8, "fp32": 4, "fp64": 8}
_C_TYPES: Mapping[str, Any] = {
    "i8": ctypes.c_int8, "i32": ctypes.c_int32, "u32": ctypes.c_uint32, "i64": ctypes.c_int64, "fp32": ctypes.c_float, "fp64": ctypes.c_double,
}  # fmt: skip


@dataclass(frozen=True)
class Parameter:
    """A run-time argument: name and Triton type; a promise of alignment follows the type (`*bf16:16`)."""

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
    def size(self) -> int:
        return 8 if self.base.startswith("*") else _SIZES[self.base]


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel: file of its cubin, entry point, parameters with their places, hidden pointers that follow them.

    The first hidden pointer leads to `scratch_bytes` for each program of a launch; without these it is null, as the others are.
    """

    name: str
    file: str
    entry: str
    arch: str
    arguments: tuple[Parameter, ...]
    hidden: tuple[str, ...]
    parameters: tuple[tuple[int, ...], ...]
    num_warps: int
    shared_bytes: int
    scratch_bytes: int
    sha256: str

    def __post_init__(self) -> None:
        """BundleError where the parameters that the code has are not those of the arguments."""
        sizes = [a.size for a in self.arguments] + [8] * len(self.hidden)
        if [p[1] for p in self.parameters] != sizes:
            found = [p[1] for p in self.parameters]
            raise BundleError(f"kernel {self.name}: its code takes parameters of {found} bytes, its index lists {sizes}; rebuild the bundle")
        if self.scratch_bytes < 0 or (self.scratch_bytes and not self.hidden):
            raise BundleError(f"kernel {self.name}: {self.scratch_bytes} bytes of scratch memory without a pointer to them; rebuild the bundle")
        if not 0 < self.num_warps * 32 <= MAX_THREADS:
            raise BundleError(f"kernel {self.name}: {self.num_warps} warps do not make a block; rebuild the bundle")

    def scratch(self, grid: tuple[int, int, int]) -> int:
        """Bytes of scratch memory that a launch takes."""
        return self.scratch_bytes * math.prod(grid)

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


class Arguments:
    """Parameters of one launch in host memory; `address` is what the driver takes. `scratch` is the address of its scratch memory."""

    def __init__(self, kernel: Kernel, values: Sequence[int | float], scratch: int = 0) -> None:
        if len(values) != len(kernel.arguments):
            raise EngineError(f"kernel {kernel.name} takes {len(kernel.arguments)} arguments, found {len(values)}; rebuild the bundle")
        packed = [_value(kernel, parameter, value) for parameter, value in zip(kernel.arguments, values)]
        if kernel.scratch_bytes and (scratch <= 0 or scratch % SCRATCH_ALIGNMENT):
            raise EngineError(f"kernel {kernel.name} needs scratch memory aligned to {SCRATCH_ALIGNMENT}, found address {scratch}")
        hidden = [scratch if i == 0 and kernel.scratch_bytes else None for i in range(len(kernel.hidden))]
        self._values = packed + [ctypes.c_void_p(address) for address in hidden]
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


def pack(
    kernel: Kernel, arguments: Mapping[str, Argument], place: Callable[[View], int], scalars: Mapping[str, int | float], scratch: int = 0
) -> Arguments:
    """Parameters of a launch: views at the addresses that `place` gives, numbers as they are or as `scalars` says. Raises EngineError."""
    if set(arguments) != {p.name for p in kernel.arguments}:
        wrong = sorted(set(arguments) ^ {p.name for p in kernel.arguments})
        raise EngineError(f"kernel {kernel.name} and the plan differ in {', '.join(wrong)}; rebuild the bundle")
    values: list[int | float] = []
    for parameter in kernel.arguments:
        value = arguments[parameter.name]
        values.append(place(value) if isinstance(value, View) else scalars.get(parameter.name, value))
    return Arguments(kernel, values, scratch)


def check_grid(kernel: Kernel, grid: tuple[int, int, int]) -> None:
    """Raises EngineError for a grid that the driver would refuse."""
    if any(not 0 < size <= limit for size, limit in zip(grid, MAX_GRID)):
        raise EngineError(f"kernel {kernel.name}: grid {grid} is not possible; rebuild the bundle")
