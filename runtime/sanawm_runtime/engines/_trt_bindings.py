"""An engine's inputs and outputs against a program's signature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

from sanawm.errors import BundleError, EngineError


class Tensor(Protocol):
    """What a signature says of a tensor; `sanawm.programs.TensorSpec` and a manifest's entry both do."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


@cache
def dtype_names(trt: Any) -> dict[Any, str]:
    """The library's data types by our names."""
    kinds = trt.DataType
    names = {
        "float32": kinds.FLOAT, "float16": kinds.HALF, "bfloat16": kinds.BF16, "int64": kinds.INT64, "int32": kinds.INT32, "int8": kinds.INT8,
        "uint8": kinds.UINT8, "bool": kinds.BOOL,
    }  # fmt: skip
    return {kind: name for name, kind in names.items()}


@dataclass(frozen=True)
class Binding:
    """One input or output of an engine."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    is_input: bool


def read_bindings(trt: Any, engine: Any) -> tuple[Binding, ...]:
    """The I/O table of a deserialized engine, in its order."""
    names = dtype_names(trt)
    found = []
    for i in range(engine.num_io_tensors):
        name = engine.get_tensor_name(i)
        dtype, is_input = engine.get_tensor_dtype(name), engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
        found.append(Binding(name, names.get(dtype, str(dtype)), tuple(engine.get_tensor_shape(name)), is_input))
    return tuple(found)


def check_bindings(program: str, table: Sequence[Binding], inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    """Refuse an engine whose I/O table is not the program's. Raises BundleError."""
    wanted = {(t.name, t.dtype, tuple(t.shape), is_input) for is_input, side in ((True, inputs), (False, outputs)) for t in side}
    found = {(b.name, b.dtype, b.shape, b.is_input) for b in table}
    if wanted == found:
        return
    name = min(entry[0] for entry in wanted ^ found)
    sides = [next((f"{e[1]}{list(e[2])}" for e in side if e[0] == name), "nothing") for side in (wanted, found)]
    raise BundleError(f"program {program}: the manifest has {sides[0]} for '{name}', and the engine {sides[1]}; rebuild the bundle")


def addresses(program: str, table: Sequence[Binding], buffers: Mapping[str, Any]) -> tuple[int, ...]:
    """Device addresses in the table's order. `buffers` have `spec` and `address`. Raises EngineError for a missing or unsuitable buffer."""
    found = []
    for binding in table:
        buffer = buffers.get(binding.name)
        if buffer is None or not hasattr(buffer, "address"):
            raise EngineError(f"{program} needs a buffer for '{binding.name}', and none was bound")
        if (buffer.spec.dtype, tuple(buffer.spec.shape)) != (binding.dtype, binding.shape):
            given = f"{buffer.spec.dtype}{list(buffer.spec.shape)}"
            raise EngineError(f"{program} takes {binding.dtype}{list(binding.shape)} for '{binding.name}', found {given}")
        found.append(buffer.address)
    return tuple(found)
