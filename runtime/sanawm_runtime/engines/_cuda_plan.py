"""Launch plans of the CUDA engine: kernels over named buffers, as a bundle stores them.

A plan is one program with static shapes. Its inputs and outputs are bound at run time, weights are shared by all programs of a part, and
everything else lies in one arena at offsets that were chosen when the plan was made.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from sanawm.errors import BundleError
from sanawm_runtime.bundle.manifest import ProgramEntry
from sanawm_runtime.bundle.strict_json import decode, parse_json

FORMAT = 1
MAX_PLAN_BYTES = 64 * 2**20
ALIGNMENT = 256
# Weight buffers are named by this and the packed weight.
WEIGHT_PREFIX = "weights/"

Role = Literal["input", "output", "weight", "arena"]
ITEM_BYTES = {
    "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "uint8": 1, "bool": 1, "int32": 4, "int64": 8,
}  # fmt: skip
# Triton's names of the same types.
TRITON_TYPES = {
    "float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float8_e4m3fn": "fp8e4nv", "uint8": "u8", "bool": "u8", "int32": "i32", "int64": "i64",
}  # fmt: skip
DTYPES = {value: key for key, value in TRITON_TYPES.items() if key != "bool"}


@dataclass(frozen=True)
class Buffer:
    """A contiguous tensor; `offset` is its place in the arena (0 for other roles)."""

    name: str
    role: Role
    dtype: str
    shape: tuple[int, ...]
    offset: int = 0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class View:
    """A strided tensor inside a buffer: `offset` in bytes, `strides` in elements."""

    buffer: str
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the distinct elements; an axis of stride 0 counts once."""
        return math.prod(n for n, s in zip(self.shape, self.strides) if s or n == 0) * ITEM_BYTES[self.dtype]

    @property
    def end(self) -> int:
        """Offset of the byte after the last element."""
        if 0 in self.shape:
            return self.offset
        return self.offset + (sum((n - 1) * s for n, s in zip(self.shape, self.strides)) + 1) * ITEM_BYTES[self.dtype]

    @property
    def contiguous(self) -> bool:
        return self.strides == dense(self.shape)

    def narrow(self, axis: int, start: int, size: int) -> View:
        """`size` entries from `start` on along an axis."""
        if start < 0 or size < 0 or start + size > self.shape[axis]:
            raise ValueError(f"{self.buffer}: entries {start} to {start + size} of an axis of {self.shape[axis]}")
        shape = tuple(size if i == axis % len(self.shape) else n for i, n in enumerate(self.shape))
        return replace(self, shape=shape, offset=self.offset + start * self.strides[axis] * ITEM_BYTES[self.dtype])

    def last(self, size: int, axis: int = 0) -> View:
        """The last `size` entries along an axis."""
        return self.narrow(axis, self.shape[axis] - size, size)

    def reshape(self, *shape: int) -> View:
        """The same elements under another shape; the view must be contiguous."""
        if not self.contiguous or math.prod(shape) != math.prod(self.shape):
            raise ValueError(f"{self.buffer}: {self.shape} with strides {self.strides} cannot become {shape} without a copy")
        return replace(self, shape=shape, strides=dense(shape))

    def repeat_rows(self, rows: int) -> View:
        """One row, (1, n), as `rows` equal rows."""
        if self.shape[0] != 1:
            raise ValueError(f"{self.buffer}: expected one row to repeat, found {self.shape}")
        return replace(self, shape=(rows, *self.shape[1:]), strides=(0, *self.strides[1:]))


def dense(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a contiguous tensor."""
    strides = [1] * len(shape)
    for i in range(len(shape) - 2, -1, -1):
        strides[i] = strides[i + 1] * shape[i + 1]
    return tuple(strides)


Argument = View | int | float


@dataclass(frozen=True)
class Launch:
    """One kernel launch.

    `group` numbers the operation it is part of (an operation of several kernels has consecutive launches of one group). `arguments` by name
    in the kernel's order; `writes` names those it writes. `flops` run on tensor cores in `unit` ("bf16", "fp8", "nvfp4", "tf32", "fp32").
    `gathered` names tables, of which a launch reads no more than it writes.
    """

    group: int
    label: str
    kernel: str
    grid: tuple[int, int, int]
    arguments: Mapping[str, Argument]
    writes: tuple[str, ...]
    flops: int = 0
    unit: str = ""
    gathered: tuple[str, ...] = ()

    def views(self) -> Iterator[tuple[View, bool]]:
        """Each view and whether it is written."""
        for name, value in self.arguments.items():
            if isinstance(value, View):
                yield value, name in self.writes

    @property
    def read_bytes(self) -> int:
        read = {n: v.nbytes for n, v in self.arguments.items() if isinstance(v, View) and n not in self.writes}
        return sum(min(size, self.write_bytes) if name in self.gathered else size for name, size in read.items())

    @property
    def write_bytes(self) -> int:
        return sum(v.nbytes for v, written in self.views() if written)


@dataclass(frozen=True)
class Copy:
    """A copy of rows on the device: source and target of one shape and dtype, with adjacent elements along the last axis."""

    group: int
    label: str
    source: View
    target: View
    flops: int = 0
    unit: str = ""

    def views(self) -> Iterator[tuple[View, bool]]:
        yield self.source, False
        yield self.target, True

    @property
    def read_bytes(self) -> int:
        return self.source.nbytes

    @property
    def write_bytes(self) -> int:
        return self.target.nbytes


Step = Launch | Copy


@dataclass(frozen=True)
class Plan:
    """A program as a list of steps. `arena` is the size of its scratch memory in bytes."""

    program: str
    buffers: Mapping[str, Buffer]
    steps: tuple[Step, ...]
    arena: int

    def __post_init__(self) -> None:
        for held in self.buffers.values():
            if held.role == "arena" and (held.offset < 0 or held.offset % ALIGNMENT or held.offset + held.nbytes > self.arena):
                raise BundleError(f"{self.program}: buffer {held.name} lies outside of the arena; build the bundle again")
        for step in self.steps:
            for view, written in step.views():
                buffer = self.buffers.get(view.buffer)
                if buffer is None or view.offset < 0 or view.end > buffer.nbytes or len(view.shape) != len(view.strides):
                    raise BundleError(f"{self.program}: {step.label} reaches outside of buffer '{view.buffer}'; build the bundle again")
                if written and buffer.role in ("input", "weight"):
                    raise BundleError(f"{self.program}: {step.label} writes the {buffer.role} '{view.buffer}'; build the bundle again")

    def kernels(self) -> list[str]:
        """Names of the kernels that are launched, sorted."""
        return sorted({step.kernel for step in self.steps if isinstance(step, Launch)})

    def to_json(self) -> bytes:
        """The plan as JSON; repeated views are stored once."""
        views: dict[View, int] = {}

        def number(view: View) -> int:
            return views.setdefault(view, len(views))

        steps: list[list[Any]] = []
        for s in self.steps:
            if isinstance(s, Copy):
                steps.append(["copy", s.group, s.label, number(s.source), number(s.target)])
                continue
            arguments = {n: {"view": number(v)} if isinstance(v, View) else v for n, v in s.arguments.items()}
            steps.append(["launch", s.group, s.label, s.kernel, list(s.grid), arguments, list(s.writes), s.flops, s.unit, list(s.gathered)])
        buffers = [[b.name, b.role, b.dtype, list(b.shape), b.offset] for b in self.buffers.values()]
        stored = [[v.buffer, v.dtype, list(v.shape), list(v.strides), v.offset] for v in views]
        document = {"format": FORMAT, "program": self.program, "arena": self.arena, "buffers": buffers, "views": stored, "steps": steps}
        return json.dumps(document, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, data: bytes, what: str = "plan") -> Plan:
        """Inverse of `to_json`. Raises BundleError for what it did not write."""
        document = decode(_Document, parse_json(data, what, max_bytes=MAX_PLAN_BYTES), what)
        if document.format != FORMAT:
            raise BundleError(f"{what}: expected plan format {FORMAT}, found {document.format}; rebuild the bundle with this version of sanawm")
        try:
            buffers = [Buffer(n, r, d, tuple(s), o) for n, r, d, s, o in document.buffers]
            views = [View(b, d, tuple(s), tuple(t), o) for b, d, s, t, o in document.views]
            steps = tuple(_step(entry, views) for entry in document.steps)
            if any(b.dtype not in ITEM_BYTES for b in buffers) or any(v.dtype not in ITEM_BYTES for v in views):
                raise ValueError("unknown dtype")
            return cls(document.program, {b.name: b for b in buffers}, steps, document.arena)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise BundleError(f"{what}: not a launch plan ({error}); copy the bundle again or rebuild it") from None


@dataclass(frozen=True)
class _Document:
    format: int
    program: str
    arena: int
    buffers: tuple[Any, ...]
    views: tuple[Any, ...]
    steps: tuple[Any, ...]


def _step(entry: Any, views: list[View]) -> Step:
    if entry[0] == "copy":
        _, group, label, source, target = entry
        return Copy(group, label, views[source], views[target])
    kind, group, label, kernel, grid, arguments, writes, flops, unit, gathered = entry
    if kind != "launch" or len(grid) != 3:
        raise ValueError(f"step {kind!r}")
    values: dict[str, Argument] = {n: views[v["view"]] if isinstance(v, dict) else v for n, v in arguments.items()}
    if bad := [n for n, v in values.items() if not isinstance(v, View) and type(v) not in (int, float)]:
        raise ValueError(f"argument {bad[0]} of {label}")
    return Launch(group, label, kernel, (grid[0], grid[1], grid[2]), values, tuple(writes), flops, unit, tuple(gathered))


def stream_of(weights: str) -> str:
    """Which stream a part's programs run on, by its weight table."""
    return "transformer" if weights.rpartition("/")[2].startswith("dit") else "other"


def largest_arenas(programs: Mapping[str, ProgramEntry]) -> dict[str, int]:
    """Bytes of scratch memory for each stream: the most that any of its programs needs. Raises BundleError where the manifest does not say."""
    found: dict[str, int] = {}
    for name, entry in programs.items():
        size = entry.extras.get("arena")
        if type(size) is not int or size < 0:
            raise BundleError(f"{name}: the manifest gives no size of its scratch memory; rebuild the bundle")
        stream = stream_of(str(entry.extras.get("weights", "")))
        found[stream] = max(found.get(stream, 0), size)
    return found
