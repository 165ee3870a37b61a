"""Tiles of the attention kernels. Nothing here needs torch or triton."""

from __future__ import annotations

from dataclasses import dataclass

from sanawm_kernels.tuning import Row, choose


@dataclass(frozen=True)
class Tile:
    """Queries and keys of a tile, warps, pipeline stages."""

    queries: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class PairTile:
    """Settings of `pair.window_pair`: consumers of 64 queries each, keys of a block, pipeline stages, parts of a divided tile, and its switches."""

    consumers: int
    keys: int
    stages: int
    parts: int
    turns: bool
    tie: bool

    @property
    def queries(self) -> int:
        return 64 * self.consumers


_INTERPRETER = (0,)
_HOPPER = (90,)
_DATA_CENTRE = (100, 103)
# 99 KiB of shared memory a block, or no wgmma.
_OTHERS = (80, 86, 89, 120, 121)
_ALL = _HOPPER + _DATA_CENTRE + _OTHERS
_DATE = "2026-11-23"
_INSPECTED = "not timed: chosen from registers, spills and shared memory of the compiled code, "


def _tile(queries: int, keys: int) -> dict[str, int]:
    return {"queries": queries, "keys": keys}


def _pair(consumers: int, keys: int, parts: int, turns: bool = True, tie: bool = True) -> dict[str, int | bool]:
    return {"consumers": consumers, "keys": keys, "parts": parts, "turns": turns, "tie": tie}


TABLE: tuple[Row, ...] = (
    Row("window", _INTERPRETER, _tile(32, 32), 4, 1, _DATE, "small enough for tests, with tails at small sizes"),
    Row("cross", _INTERPRETER, _tile(32, 32), 4, 1, _DATE, "small enough for tests, with tails at small sizes"),
    Row("pair", _INTERPRETER, _pair(2, 32, 2), 4, 2, _DATE, "what `finish_pair` completes there; the interpreter does not run Gluon"),
    Row("pair", _HOPPER, _pair(3, 64, 4), 4, 4, "2026-11-27", "573.6 us both branches on an H200, two consumers and 128 keys 606, no roles 893"),
    Row("window", _HOPPER, _tile(128, 128), 8, 2, _DATE, _INSPECTED + "160 KiB, none spilled", {"kind": "bf16"}),
    Row("window", _HOPPER, _tile(128, 128), 8, 3, _DATE, _INSPECTED + "112 KiB, none spilled", {"kind": "fp8e4nv"}),
    Row("window", _DATA_CENTRE, _tile(128, 64), 8, 3, _DATE, _INSPECTED + "128 keys spill in the loop"),
    Row("window", _OTHERS, _tile(128, 32), 8, 2, _DATE, _INSPECTED + "64 keys spill in the loop", {"kind": "bf16"}),
    Row("window", _OTHERS, _tile(128, 64), 8, 2, _DATE, _INSPECTED + "215 registers", {"kind": "fp8e4nv"}),
    Row("window", _ALL, _tile(32, 32), 4, 1, _DATE, "other dtypes are for tests on a GPU"),
    Row("cross", _HOPPER, _tile(64, 64), 4, 3, "2026-11-27", "45.1 us on an H200, 32 keys 47.7", {"quant": None}),
    Row("cross", _ALL, _tile(32, 64), 4, 2, _DATE, _INSPECTED + "64 queries spill where blocks of NVFP4 are made", {"quant": "nvfp4"}),
    Row("cross", _ALL, _tile(64, 32), 4, 2, _DATE, _INSPECTED + "64 keys spill"),
)


def tile(kernel: str, target: int, kind: str, quant: str | None = None) -> Tile:
    """Tile of "window" or "cross" attention for operands of `kind`; ValueError for an architecture without a row."""
    row = choose(TABLE, kernel, target, kind="bf16" if kind == "fp16" else kind, quant=quant)
    return Tile(row.settings["queries"], row.settings["keys"], row.num_warps, row.num_stages)


def pair_tile(target: int) -> PairTile:
    """Settings of both branches' attention in one launch, where `paired` says so and, for tests of `finish_pair`, in the interpreter."""
    row = choose(TABLE, "pair", target)
    return PairTile(**row.settings, stages=row.num_stages)


def paired(target: int, kind: str) -> bool:
    """Whether both branches of a softmax block run in one launch there."""
    return target in _HOPPER and kind == "bf16"
