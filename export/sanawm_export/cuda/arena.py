"""Static memory plan: lifetimes of a program's tensors, and their places in one arena."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sanawm_runtime.engines._cuda_plan import ALIGNMENT, Buffer, Plan, Step


@dataclass(frozen=True)
class Lifetime:
    """First and last operation (both included) that touch a tensor."""

    first: int
    last: int

    def overlaps(self, other: Lifetime) -> bool:
        return self.first <= other.last and other.first <= self.last


def lifetimes(buffers: Mapping[str, Buffer], steps: Sequence[Step]) -> dict[str, Lifetime]:
    """Lifetime of every arena tensor, in operation numbers. Raises ValueError for one that is read before it is written."""
    found: dict[str, Lifetime] = {}
    for step in steps:
        # What a launch writes is born with the group: a scratch tensor may be written and read by one launch.
        for view, written in sorted(step.views(), key=lambda pair: not pair[1]):
            if view.buffer not in buffers or buffers[view.buffer].role != "arena":
                continue
            if view.buffer not in found:
                if not written:
                    raise ValueError(f"{step.label} reads {view.buffer} before anything writes it")
                found[view.buffer] = Lifetime(step.group, step.group)
            else:
                found[view.buffer] = Lifetime(found[view.buffer].first, step.group)
    return found


def place(buffers: Mapping[str, Buffer], steps: Sequence[Step]) -> tuple[dict[str, int], int]:
    """Offsets of the arena tensors and the arena's size.

    Tensors are placed from the largest to the smallest, equals in the order of their birth, each at the lowest place that is free during its
    whole life: that keeps the arena within a few per cent of the largest sum of sizes alive at one time.
    """
    alive = lifetimes(buffers, steps)
    placed: list[tuple[int, int, Lifetime]] = []
    offsets: dict[str, int] = {}
    for name in sorted(alive, key=lambda n: (-buffers[n].nbytes, alive[n].first, n)):
        size = -(-buffers[name].nbytes // ALIGNMENT) * ALIGNMENT
        offset = 0
        for start, end, life in sorted(placed, key=lambda entry: entry[0]):
            if life.overlaps(alive[name]):
                if offset + size <= start:
                    break
                offset = max(offset, end)
        offsets[name] = offset
        placed.append((offset, offset + size, alive[name]))
    return offsets, max((end for _, end, _ in placed), default=0)


def check(plan: Plan) -> None:
    """Raise ValueError where two tensors share bytes of the arena while both are alive."""
    alive = lifetimes(plan.buffers, plan.steps)
    ordered = sorted(alive, key=lambda name: plan.buffers[name].offset)
    for i, name in enumerate(ordered):
        a = plan.buffers[name]
        for other in ordered[i + 1 :]:
            b = plan.buffers[other]
            if b.offset >= a.offset + a.nbytes:
                break
            if alive[name].overlaps(alive[other]):
                raise ValueError(f"{plan.program}: {name} and {other} are alive together and share bytes of the arena")


def peak(plan: Plan) -> int:
    """Largest sum of tensor sizes alive at one operation: no placement needs less."""
    alive = lifetimes(plan.buffers, plan.steps)
    change: dict[int, int] = {}
    for name, life in alive.items():
        size = plan.buffers[name].nbytes
        change[life.first] = change.get(life.first, 0) + size
        change[life.last + 1] = change.get(life.last + 1, 0) - size
    total = best = 0
    for group in sorted(change):
        total += change[group]
        best = max(best, total)
    return best
