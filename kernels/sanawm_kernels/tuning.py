"""Frozen tuning tables: launch settings per kernel and architecture, each row with its date and reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """Settings of one kernel.

    kernel: the kernel's short name. targets: compute capabilities (major * 10 + minor; 0 is Triton's interpreter) the row holds for.
    when: facts that must hold, such as `{"precision": "bf16"}`. settings: tile sizes and switches by constant name.
    date (YYYY-MM-DD) and reason: what the choice rests on, and whether it was measured.
    """

    kernel: str
    targets: tuple[int, ...]
    settings: Mapping[str, Any]
    num_warps: int
    num_stages: int
    date: str
    reason: str
    when: Mapping[str, Any] = field(default_factory=dict)


def choose(table: Sequence[Row], kernel: str, target: int, **facts: Any) -> Row:
    """First row for `kernel` on `target` whose `when` agrees with `facts`; ValueError when the table has none."""
    for row in table:
        if row.kernel == kernel and target in row.targets and all(facts.get(name) == value for name, value in row.when.items()):
            return row
    given = ", ".join(f"{name}={value}" for name, value in facts.items())
    raise ValueError(f"no tuning row for {kernel} on compute capability {target / 10:.1f} with {given or 'no further facts'}")
