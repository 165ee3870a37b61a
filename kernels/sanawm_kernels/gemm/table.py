"""Which backend and which tile serves a product: frozen choices per architecture and shape, with the date and the reason of each row.

`MEASURED` holds what was timed (`benchmarks/kernels_gemm.py` times both). Without a row for a product `choose` takes the vendor's library where there
is nothing to fuse and the Triton kernel elsewhere, and says that this is unmeasured. `TILES` are the Triton kernels'. The CUDA engine has no library.

Nothing here needs torch or triton.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from sanawm_kernels.gemm.plans import Config, Finish, roles_fit
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
    date: str
    reason: str


@dataclass(frozen=True)
class Choice:
    """A backend, and why."""

    backend: Backend
    reason: str
    measured: bool


def _on_h200(kind: str, columns: int, depth: int, plain: bool, backend: Backend, reason: str) -> Measured:
    return Measured(90, kind, columns, depth, 2640, plain, backend, "2026-11-28", f"{reason} on an H200")


# Microseconds of a chunk's 2640 rows. What cuBLASLt's epilogues lack is a pass of its own there; FP8 has a scale a row.
MEASURED: tuple[Measured, ...] = (
    _on_h200("bf16", 15744, 2240, True, "triton", "251.5 us, cuBLASLt 243.1; in another run 243.5 and 252.1"),
    _on_h200("bf16", 2240, 2240, True, "cublaslt", "38.5 us, Triton 38.9"),
    _on_h200("bf16", 2240, 6720, True, "triton", "102.7 us, cuBLASLt 107.4"),
    _on_h200("bf16", 2240, 2240, False, "triton", "47.0 us with gate, residual and summand, cuBLASLt 52.8"),
    _on_h200("bf16", 13440, 2240, False, "triton", "237.7 us with SiLU, cuBLASLt 241.7"),
    _on_h200("fp8", 15744, 2240, True, "triton", "154.3 us, cuBLASLt 160.8"),
    _on_h200("fp8", 2240, 2240, True, "triton", "25.7 us, cuBLASLt 27.7"),
    _on_h200("fp8", 2240, 6720, True, "triton", "58.4 us, cuBLASLt 72.2"),
    _on_h200("fp8", 2240, 2240, False, "triton", "30.0 us with gate, residual and summand, cuBLASLt 43.5"),
    _on_h200("fp8", 13440, 2240, False, "triton", "126.5 us with SiLU, cuBLASLt 185.8"),
)
UNMEASURED = "unmeasured"
# Multiprocessors that a persistent grid of a launch plan counts on, of the largest GPU with that capability; it is right on any number of them.
MULTIPROCESSORS = {90: 132}
# Products with at least so many output channels have enough tiles of 256 columns to fill a GPU.
WIDE = 4096

# Rows that fill a GPU with tiles of 192 rows.
MANY = 2048
# Products with at most so many have few tiles, and smaller ones give more programs.
NARROW = 128

_INTERPRETER = (0,)
_DATA_CENTRE = (100, 103)
_HOPPER = (90,)
_OTHERS = (80, 86, 89, 120, 121)
_DATE, _NEW = "2026-11-23", "2026-11-27"
_INSPECTED = "not timed: chosen from registers, spills and shared memory of the compiled code, "
# 65,536 registers and 228 KiB a multiprocessor of sm_90; the others' registers hold 8 warps of these products once.
_TIMED = "fastest of 24 tiles at the block's shapes on an H200"
_TURNS = " on an H200, one after the other {}"
_NARROW = "not timed: a quarter of a large tile, so that 2640 rows are 42 programs"
_TWO_PROGRAMS = "at most 128 registers and 104 KiB: two programs a multiprocessor"
_ONE_PROGRAM = "registers and 64 to 68 KiB: one program a multiprocessor"


def _tile(rows: int, columns: int, depth: int, slices: int, group: int = 8) -> dict[str, int]:
    return {"rows": rows, "columns": columns, "depth": depth, "slices": slices, "group": group}


def _described(columns: int, depth: int) -> dict[str, Any]:
    """A tile of the kernels with descriptors, one program on a multiprocessor. A wide product visits all tile rows of a chunk together."""
    wide = columns == 256
    return {**_tile(128, columns, depth, 4 if wide else 1, group=21 if wide else 4), "form": "descriptors", "persistent": 1}


def _turns(depth: int, chunk: int, ring: int, slices: int = 2, group: int = 8) -> dict[str, Any]:
    """A tile of the kernel whose consumers take turns."""
    return {**_tile(128, 128, depth, slices, group), "form": "pingpong", "persistent": 1, "chunk": chunk, "ring": ring}


def _shared(depth: int) -> dict[str, Any]:
    """A tile that three consumers share."""
    return {**_tile(192, 256, depth, 8, group=14), "form": "wide", "persistent": 1, "chunk": 64, "ring": 2}


TILES: tuple[Row, ...] = (
    Row("product", _INTERPRETER, _tile(128, 128, 64, 2, 3), 4, 1, _DATE, "one 128x4 tile of scales", {"kind": "nvfp4", "swizzled": True}),
    Row("product", _INTERPRETER, _tile(32, 32, 64, 2, 3), 4, 1, _DATE, "small enough for tests", {"kind": "nvfp4"}),
    Row("product", _INTERPRETER, _tile(32, 32, 32, 2, 3), 4, 1, _DATE, "small enough for tests"),
    Row(
        "product", _HOPPER, {**_tile(64, 64, 128, 1), "form": "descriptors", "persistent": 1}, 4, 4, _NEW, _NARROW,
        {"kind": "bf16", "descriptors": True, "narrow": True},
    ),
    Row("product", _DATA_CENTRE + _HOPPER + _OTHERS, _tile(64, 64, 64, 1), 4, 4, _NEW, _NARROW, {"kind": "bf16", "narrow": True}),
    Row("product", _DATA_CENTRE, _tile(128, 128, 64, 4), 8, 4, _DATE, _INSPECTED + "128 KiB", {"kind": "bf16"}),
    Row("product", _DATA_CENTRE, _tile(128, 128, 128, 4), 8, 4, _DATE, _INSPECTED + "128 KiB", {"kind": "fp8"}),
    Row("product", _DATA_CENTRE, _tile(128, 128, 128, 4), 8, 4, _DATE, _INSPECTED + "54 KiB", {"kind": "nvfp4"}),
    # Nothing beside the product: the FFN's second one, 6720 deep, whose tiles of 128 x 128 are short of shared memory and of power.
    Row("product", _HOPPER, _shared(64), 4, 3, _NEW, "116.4 us in place in a step, in turns 120.0", {"kind": "bf16", "roles": True, "bare": True}),
    Row("product", _HOPPER, _shared(128), 4, 3, _NEW, "62.8 us in place in a step, in turns 67.9", {"kind": "fp8", "roles": True, "bare": True}),
    # bf16 products at full power, where an H200 slows down to 1.6 GHz: the best of half a second. A wide plain one is not faster in turns (284.6 us).
    Row("product", _HOPPER, _turns(64, 128, 1), 4, 5, _NEW, "131.1 us" + _TURNS.format("141.4"), {"kind": "bf16", "roles": True, "taps": 3}),
    Row(
        "product", _HOPPER, _turns(64, 64, 1, group=21), 4, 6, _NEW, "246.2 us" + _TURNS.format("267.8"),
        {"kind": "bf16", "roles": True, "silu": True},
    ),
    Row("product", _HOPPER, _described(256, 64), 8, 4, _NEW, "281.3 us; " + _TIMED, {"kind": "bf16", "descriptors": True, "wide": True}),
    Row("product", _HOPPER, _turns(64, 64, 1), 4, 6, _NEW, "residual 51.1 us" + _TURNS.format("57.6"), {"kind": "bf16", "roles": True}),
    Row("product", _HOPPER, _described(128, 64), 8, 5, _NEW, _TIMED, {"kind": "bf16", "descriptors": True}),
    Row("product", _HOPPER, _turns(128, 64, 1), 4, 6, _NEW, "126.9 us" + _TURNS.format("165.0"), {"kind": "fp8", "roles": True, "silu": True}),
    Row("product", _HOPPER, _described(256, 128), 8, 4, _NEW, _TIMED, {"kind": "fp8", "descriptors": True, "wide": True}),
    Row("product", _HOPPER, _turns(128, 64, 1), 4, 6, _NEW, "residual 29.7 us" + _TURNS.format("38.8"), {"kind": "fp8", "roles": True}),
    Row("product", _HOPPER, _described(128, 128), 8, 5, _NEW, _TIMED, {"kind": "fp8", "descriptors": True}),
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


def default_config(
    target: int, kind: str, columns: int, finish: Finish | None = None, *, tokens: int = 1, taps: int = 1, swizzled: bool = False,
    batched: bool = False, rows: int = 0,
) -> Config:  # fmt: skip
    """Tile of a product with operands of `kind`, that many output channels and an epilogue; ValueError for an architecture without one.

    tokens: rows that share a frame gate. taps: 3 for a temporal convolution, `batched` if it is one of several batches, whose rows no single
    descriptor covers. rows: of the activations, as far as they matter: a chunk's are enough for large tiles, a frame's and a prompt's are not.
    """
    finish = finish or Finish()
    glu, described = finish.glu, not (finish.glu or batched)
    roles = described and roles_fit(kind, finish, tokens)
    facts = {
        "kind": "bf16" if kind == "fp16" else kind, "swizzled": swizzled, "descriptors": described, "roles": roles, "taps": taps, "silu": finish.silu,
        "wide": columns >= WIDE, "narrow": columns <= NARROW and not finish.squares, "bare": roles and finish.bare and rows >= MANY,
    }  # fmt: skip
    row = choose_row(TILES, "product", target, **facts)
    config = Config(warps=row.num_warps, stages=row.num_stages, **row.settings)
    # A gated linear unit keeps two sums.
    return replace(config, columns=config.columns // 2, slices=2) if glu and target else config


def choose(target: int, kind: str, rows: int, columns: int, depth: int, *, plain: bool, glu: bool = False) -> Choice:
    """The measured row with the fewest rows that covers this product; without one the vendor's library if nothing is fused.

    Raises ValueError for an architecture that has no tile.
    """
    default_config(target, "bf16", columns)
    fitting = [
        r for r in MEASURED if (r.target, r.kind, r.columns, r.depth, r.plain) == (target, kind, columns, depth, plain) and rows <= r.rows
    ]
    if fitting and not glu:
        best = min(fitting, key=lambda r: r.rows)
        return Choice(best.backend, f"{best.date}: {best.reason}", True)
    if plain and target and kind in ("bf16", "fp16", "fp8"):
        return Choice("cublaslt", f"{UNMEASURED}: nothing to fuse, so the vendor's library", False)
    return Choice("triton", f"{UNMEASURED}: a fused epilogue saves passes over memory", False)
