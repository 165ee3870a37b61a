"""Recording of a program as launches over named buffers."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from sanawm.programs import Program
from sanawm_export.cuda.arena import place
from sanawm_kernels.aot.spec import KernelVariant, block_of
from sanawm_runtime.engines._cuda_plan import (
    DTYPES,
    ITEM_BYTES,
    TRITON_TYPES,
    WEIGHT_PREFIX,
    Argument,
    Buffer,
    Copy,
    Launch,
    Plan,
    Role,
    Step,
    View,
    dense,
)


@dataclass(frozen=True)
class Lowered:
    """A plan and the kernel variants that its launches name."""

    plan: Plan
    variants: Mapping[str, KernelVariant]


class Tape:
    """Collects the buffers and steps of one program.

    Operations inside `group` count as one: a buffer that any of its launches touches lives through all of them.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.variants: dict[str, KernelVariant] = {}
        self._buffers: dict[str, Buffer] = {}
        self._steps: list[Step] = []
        self._scope: list[str] = []
        self._groups = 0
        self._grouped = False

    # buffers

    def _add(self, name: str, role: Role, dtype: str, shape: tuple[int, ...]) -> View:
        known = self._buffers.get(name)
        if known is None:
            self._buffers[name] = Buffer(name, role, dtype, shape)
        elif (known.role, known.dtype, known.shape) != (role, dtype, shape) or role == "arena":
            raise ValueError(f"{self.program.name}: buffer {name} is declared twice")
        return View(name, dtype, shape, dense(shape))

    def input(self, name: str) -> View:
        spec = self.program.input(name)
        return self._add(name, "input", spec.dtype, spec.shape)

    def output(self, name: str) -> View:
        spec = self.program.output(name)
        return self._add(name, "output", spec.dtype, spec.shape)

    def weight(self, name: str, dtype: str, shape: tuple[int, ...]) -> View:
        """A packed weight; its buffer is named `weights/<name>`."""
        return self._add(f"{WEIGHT_PREFIX}{name}", "weight", dtype, shape)

    def tensor(self, name: str, shape: tuple[int, ...], dtype: str) -> View:
        """A new tensor in the arena; the current scope comes before its name."""
        return self._add(self._label(name), "arena", dtype, shape)

    # steps

    @contextlib.contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Prefix for the labels and tensor names recorded inside."""
        self._scope.append(name)
        yield
        self._scope.pop()

    @contextlib.contextmanager
    def group(self) -> Iterator[None]:
        """One operation of several launches."""
        self._grouped = True
        yield
        self._grouped = False
        self._groups += 1

    def _label(self, name: str) -> str:
        return ".".join((*self._scope, name))

    def _next_group(self) -> int:
        number = self._groups
        if not self._grouped:
            self._groups += 1
        return number

    def launch(
        self,
        label: str,
        variant: KernelVariant,
        bindings: Mapping[str, Any],
        writes: Collection[str],
        *,
        flops: int = 0,
        unit: str = "",
        gathered: tuple[str, ...] = (),
        **grid_sizes: int,
    ) -> None:
        """Record a launch of `variant`; of `bindings` those that its signature names are taken. Raises ValueError for what does not fit it."""
        arguments: dict[str, Argument] = {}
        for name, kind in variant.signature.items():
            value = bindings.get(name)
            if value is None:
                raise ValueError(f"{self._label(label)}: {variant.name} takes {name}, and nothing is bound to it")
            arguments[name] = _checked(f"{self._label(label)}: {name}", kind, value)
        integers = {name: value for name, value in arguments.items() if isinstance(value, int)}
        grid = variant.launch_grid({**integers, **grid_sizes})
        if (known := self.variants.setdefault(variant.name, variant)) != variant:
            changed = [n for n in variant.constexprs if known.constexprs.get(n) != variant.constexprs[n]]
            raise ValueError(f"{self._label(label)}: two kernels are named {variant.name}; they differ in {', '.join(changed) or 'their signature'}")
        written = tuple(name for name in arguments if name in writes)
        self._steps.append(Launch(self._next_group(), self._label(label), variant.name, grid, arguments, written, flops, unit, gathered))

    def copy(self, label: str, source: View, target: View) -> None:
        """Record a copy of rows."""
        if source.shape != target.shape or source.dtype != target.dtype or source.strides[-1] != 1 or target.strides[-1] != 1:
            raise ValueError(f"{self._label(label)}: expected one shape and dtype, found {source} and {target}")
        self._steps.append(Copy(self._next_group(), self._label(label), source, target))

    def finish(self) -> Lowered:
        """The plan, with every tensor placed in the arena. Raises ValueError where an output is never written."""
        written = {v.buffer for step in self._steps for v, w in step.views() if w}
        if missing := [t.name for t in self.program.outputs if t.name not in written]:
            raise ValueError(f"{self.program.name}: nothing writes {', '.join(missing[:4])}")
        offsets, arena = place(self._buffers, self._steps)
        buffers = {name: replace(b, offset=offsets.get(name, 0)) for name, b in self._buffers.items()}
        return Lowered(Plan(self.program.name, buffers, tuple(self._steps), arena), dict(self.variants))


def _checked(what: str, kind: str, value: Argument) -> Argument:
    """A value that keeps the promises of its signature entry."""
    base, _, promise = kind.partition(":")
    if (described := block_of(kind)) is not None:
        if not isinstance(value, View) or TRITON_TYPES[value.dtype] != described[0] or len(value.shape) != len(described[1]):
            raise ValueError(f"{what}: expected a tensor of {described[0]} with {len(described[1])} axes, found {value}")
        size = ITEM_BYTES[value.dtype]
        if value.strides[-1] != 1 or value.offset % 16 or any(stride * size % 16 for stride in value.strides[:-1]):
            raise ValueError(f"{what}: expected rows of adjacent elements at multiples of 16 bytes, found {value}")
        return value
    if base.startswith("*"):
        if not isinstance(value, View) or (DTYPES.get(base[1:]) != value.dtype and TRITON_TYPES[value.dtype] != base[1:]):
            raise ValueError(f"{what}: expected a tensor of {base[1:]}, found {value}")
        if promise and value.offset % int(promise):
            raise ValueError(f"{what}: expected an address that is a multiple of {promise}, found offset {value.offset}")
        return value
    if base == "fp32":
        if isinstance(value, View):
            raise ValueError(f"{what}: expected a number, found a tensor")
        return float(value)
    bits = int(base[1:])
    if type(value) is not int or not -(2 ** (bits - 1)) <= value < 2 ** (bits - 1) or (promise and value % int(promise)):
        raise ValueError(f"{what}: expected {kind}, found {value}")
    return value


def row_stride(view: View) -> int:
    """Distance between rows of a (rows, columns) view with adjacent columns."""
    if len(view.shape) != 2 or view.strides[1] != 1:
        raise ValueError(f"{view.buffer}: expected rows of adjacent elements, found shape {view.shape} with strides {view.strides}")
    return view.strides[0]
