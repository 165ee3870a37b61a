"""Which backend and which tile serves a product: frozen choices per architecture and shape, with the date and the reason of each row.

`MEASURED` holds what was timed (`benchmarks/kernels_gemm.py --propose` writes candidates); nothing was yet. Without a row for a product `choose`
takes the vendor's library where there is nothing to fuse and the Triton kernel with the tile of `TILES` elsewhere, and says that this is unmeasured.

Nothing here needs torch or triton.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from sanawm_kernels.gemm.plans import Config
from sanawm_kernels.tuning import Row
from sanawm_kernels.tuning import choose as choose_row

Backend = Literal["triton", "cublaslt"]


@dataclass(frozen=True)
class Measured:
    """A timed choice for products with N = `columns`, K = `depth` and at most `rows` rows, on compute capability `target`.

    `kind` of the operands ("bf16", "fp8", "nvfp4", "temporal.bf16", …); `plain`: the epilogue is none or a bias, which cuBLASLt has too.
    """

    target: int
    kind: str
    columns: int
    depth: int
    rows: int
    plain: bool
    backend: Backend
    config: Config | None
    date: str
    reason: str


@dataclass(frozen=True)
class Choice:
    """A backend, its tile (None for cuBLASLt), and why."""

    backend: Backend
    config: Config | None
    reason: str
    measured: bool


MEASURED: tuple[Measured, ...] = ()
UNMEASURED = "unmeasured"

_INTERPRETER = (0,)
_DATA_CENTRE = (100, 103)
_HOPPER = (90,)
_OTHERS = (80, 86, 89, 120, 121)
_DATE = "2026-11-23"
_INSPECTED = "not timed: chosen from registers, spills and shared memory of the compiled code, "
# 65,536 registers and 228 KiB a multiprocessor of sm_90; the others' registers hold 8 warps of these products once.
_TWO_PROGRAMS = "at most 128 registers and 104 KiB: two programs a multiprocessor"
_ONE_PROGRAM = "registers and 64 to 68 KiB: one program a multiprocessor"


def _tile(rows: int, columns: int, depth: int, slices: int, group: int = 8) -> dict[str, int]:
    return {"rows": rows, "columns": columns, "depth": depth, "slices": slices, "group": group}


TILES: tuple[Row, ...] = (
    Row("product", _INTERPRETER, _tile(128, 128, 64, 2, 3), 4, 1, _DATE, "one 128x4 tile of scales", {"kind": "nvfp4", "swizzled": True}),
    Row("product", _INTERPRETER, _tile(32, 32, 64, 2, 3), 4, 1, _DATE, "small enough for tests", {"kind": "nvfp4"}),
    Row("product", _INTERPRETER, _tile(32, 32, 32, 2, 3), 4, 1, _DATE, "small enough for tests"),
    Row("product", _DATA_CENTRE, _tile(128, 128, 64, 4), 8, 4, _DATE, _INSPECTED + "128 KiB", {"kind": "bf16"}),
    Row("product", _DATA_CENTRE, _tile(128, 128, 128, 4), 8, 4, _DATE, _INSPECTED + "128 KiB", {"kind": "fp8"}),
    Row("product", _DATA_CENTRE, _tile(128, 128, 128, 4), 8, 4, _DATE, _INSPECTED + "54 KiB", {"kind": "nvfp4"}),
    Row("product", _HOPPER, _tile(128, 128, 64, 4), 8, 3, _DATE, _INSPECTED + _TWO_PROGRAMS, {"kind": "bf16"}),
    Row(
        "product", _HOPPER, _tile(128, 128, 128, 4), 8, 3, _DATE,
        _INSPECTED + _TWO_PROGRAMS + "; one epilogue that also stores FP8 takes 144", {"kind": "fp8"},
    ),
    Row("product", _OTHERS, _tile(128, 128, 64, 4), 8, 3, _DATE, _INSPECTED + "130-194 " + _ONE_PROGRAM, {"kind": "bf16"}),
    Row("product", _OTHERS, _tile(128, 128, 128, 4), 8, 3, _DATE, _INSPECTED + "156-184 " + _ONE_PROGRAM, {"kind": "fp8"}),
    # sm_90 compiles this with Triton 3.9, which emulates it (`variants.emulated`): good for numerics, never for speed.
    Row("product", _HOPPER + _OTHERS, _tile(128, 128, 128, 4), 8, 4, _DATE, _INSPECTED + "54 KiB on sm_120", {"kind": "nvfp4"}),
    Row("product", _DATA_CENTRE + _HOPPER + _OTHERS, _tile(64, 64, 32, 1), 4, 2, _DATE, "float32 is for tests on a GPU", {"kind": "fp32"}),
)  # fmt: skip


def default_config(target: int, kind: str, *, glu: bool = False, swizzled: bool = False) -> Config:
    """Unmeasured tile for operands of `kind`; ValueError for an architecture without one."""
    row = choose_row(TILES, "product", target, kind="bf16" if kind == "fp16" else kind, swizzled=swizzled)
    config = Config(warps=row.num_warps, stages=row.num_stages, **row.settings)
    # A gated linear unit keeps two sums.
    return replace(config, columns=config.columns // 2, slices=2) if glu and target else config


def choose(
    target: int, kind: str, rows: int, columns: int, depth: int, *, plain: bool, glu: bool = False, swizzled: bool = False
) -> Choice:
    """The measured row with the fewest rows that covers this product, else the default."""
    fitting = [
        r for r in MEASURED if (r.target, r.kind, r.columns, r.depth, r.plain) == (target, kind, columns, depth, plain) and rows <= r.rows
    ]
    if fitting:
        best = min(fitting, key=lambda r: r.rows)
        return Choice(best.backend, best.config, f"{best.date}: {best.reason}", True)
    if plain and target and kind in ("bf16", "fp16", "fp8"):
        return Choice("cublaslt", None, f"{UNMEASURED}: nothing to fuse, so the vendor's library", False)
    config = default_config(target, kind.removeprefix("temporal."), glu=glu, swizzled=swizzled)
    return Choice("triton", config, f"{UNMEASURED}: a fused epilogue saves passes over memory", False)
