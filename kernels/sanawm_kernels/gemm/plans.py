"""How the products are specialised. Nothing here needs torch or triton."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

from sanawm_kernels.aot.spec import TARGETS, KernelVariant, blocks
from sanawm_kernels.tokenwise.plans import (
    FP8_TARGETS,
    QUANT_CODES,
    arguments,
    native_fp4,
    other,
    pointer,
    quant_entries,
    quant_name,
    stride,
)

Form = Literal["pointers", "descriptors", "pingpong", "wide"]
MODULES: dict[Form, str] = {
    "pointers": "sanawm_kernels.gemm.kernels", "descriptors": "sanawm_kernels.gemm.tma", "pingpong": "sanawm_kernels.gemm.pingpong",
    "wide": "sanawm_kernels.gemm.wide",
}  # fmt: skip
# What kernels with pointers take and the others do not: NVFP4 operands, gated linear units, rows of weights that lie apart.
_POINTERS_ONLY = ("a_scales", "b_scales", "FP4", "A_SWIZZLED", "B_SWIZZLED", "GLU", "PITCH")
_EPILOGUE_SPILLS = "8 bytes in Triton 3.9, in the epilogue; the loop over the depth has none"
# Operands of an epilogue that are as large as the result.
_WHOLE = ("add", "gate", "residual", "extra")
# Forms whose warps have roles. How many of those operands they have room for in shared memory, and rows that may belong to two frames and no more.
ROLES: tuple[Form, ...] = ("pingpong", "wide")
ROLES_OPERANDS = 2
ROLES_ROWS = 128
# Rows of a tile of the `wide` form that a consumer has.
WIDE_ROWS = 64
# Architectures with instructions for NVFP4 products; Triton from 3.9 on also compiles them for sm_90, where it emulates them with bfloat16.
FP4_TARGETS = tuple(t for t in TARGETS if t >= 100)
EMULATED_FP4 = 90
# Its products are instructions of Hopper alone.
ROLES_TARGETS = (90,)


@dataclass(frozen=True)
class Config:
    """Tile of a product: rows, columns, depth, tile rows visited together, warps, pipeline stages, column slices of the epilogue.

    `persistent` starts that many programs a multiprocessor, 0 one a tile. `form`: how operands arrive, and whether two consumers take turns or three
    share a wide tile; then epilogues work on chunks of `chunk` columns, `ring` of them in flight. `exact` adds e4m3 products to the float32 sum after
    every `depth` of them, which Hopper does not do by itself.
    """

    rows: int
    columns: int
    depth: int
    group: int = 8
    warps: int = 8
    stages: int = 3
    slices: int = 1
    persistent: int = 0
    form: Form = "pointers"
    chunk: int = 0
    ring: int = 0
    exact: bool = False

    @property
    def squares_width(self) -> int:
        """Columns of a partial sum of squares: a tile's where consumers take turns, half of a wide tile's, else a slice's."""
        return self.columns // {"pingpong": 1, "wide": 2}.get(self.form, self.slices)


@dataclass(frozen=True)
class Operand:
    """How an operand arrives: kind "bf16", "fp16", "fp32", "fp8" or "nvfp4"; FP8 with one scale or one a row; layout of NVFP4 block scales."""

    kind: str
    row_scales: bool = False
    swizzled: bool = False

    @property
    def type(self) -> str:
        return {"fp8": "*fp8e4nv:16", "nvfp4": "*u8:16"}.get(self.kind, f"*{self.kind}:16")

    @property
    def scale_entries(self) -> tuple[str | None, str | None]:
        """Types of block scales and of float32 scales."""
        return "*fp8e4nv:16" if self.kind == "nvfp4" else None, "*fp32" if self.kind in ("fp8", "nvfp4") else None

    @property
    def name(self) -> str:
        return self.kind + ("_rows" if self.row_scales else "") + ("_swizzled" if self.swizzled else "")


@dataclass(frozen=True)
class Finish:
    """Which epilogue: the present operands, by name, and the outputs. Dtypes are Triton's names; summands and gates share the output's."""

    out: str = "bf16"
    keep: bool = True
    bias: bool = False
    silu: bool = False
    glu: bool = False
    add: bool = False
    gate: bool = False
    frame_gate: str | None = None
    residual: bool = False
    extra: bool = False
    squares: bool = False
    quant: str | None = None
    swizzled: bool = False
    native: bool = False
    weight: str = "bf16"

    @property
    def bare(self) -> bool:
        """Whether the product is stored as it is."""
        return self == Finish(out=self.out, weight=self.weight)

    @property
    def name(self) -> str:
        parts = [n for n in ("bias", "silu", "glu", "add", "gate", "frame_gate", "residual", "extra", "squares") if getattr(self, n)]
        gate = other(self.frame_gate, self.out, "frame_gate") if self.frame_gate else ""
        bias = other(self.weight, self.out, "bias") if self.bias else ""
        return ("_".join(parts) or "plain") + f".{self.out}{gate}{bias}" + quant_name(self.quant, self.swizzled, self.keep)

    def entries(self, columns: int, *, conv: bool = False, carried: bool = False) -> dict[str, str | None]:
        """Signature entries in the kernels' order; `carried` rows exist for temporal convolutions alone."""
        row = stride(columns)
        result: dict[str, str | None] = {} if conv else {"bias": pointer(self.weight if self.bias else None)}
        operands = [
            ("add", self.add, self.out),
            ("frame_gate", self.frame_gate, self.frame_gate or ""),
            ("residual", self.residual, self.out),
        ]
        if not conv:
            operands.insert(1, ("gate", self.gate, self.out))
            operands.append(("extra", self.extra, self.out))
        else:
            operands.insert(1, ("carried", carried, self.out))
        for name, present, kind in operands:
            result |= {name: pointer(kind if present else None), f"{name}_row": row if present else None}
        result |= {"out": pointer(self.out if self.keep else None)} | quant_entries(self.quant)
        return result if conv else result | {"squares": "*fp32:16" if self.squares else None}

    def constants(self, *, conv: bool = False) -> dict[str, object]:
        shared: dict[str, object] = {
            "QUANT": QUANT_CODES[self.quant],
            "SWIZZLED": self.swizzled,
            "NATIVE": native_fp4(self.quant, self.native),
            "BF16": self.out == "bf16",
        }
        return shared if conv else shared | {"SILU": self.silu, "GLU": self.glu}


def _operand_entries(prefix: str, operand: Operand, row: str | None) -> dict[str, str | None]:
    blocks, scale = operand.scale_entries
    entries: dict[str, str | None] = {prefix: operand.type}
    if row is not None:
        entries[f"{prefix}_row"] = row
    return entries | {f"{prefix}_scales": blocks, f"{prefix}_scale": scale}


def _in_blocks(entries: dict[str, str | None], a: Operand, finish: Finish, config: Config) -> dict[str, str | None]:
    """Entries of the kernels with descriptors: operands and result arrive in blocks, which know their rows' distance."""
    kind = {"fp8": "fp8e4nv"}.get(a.kind, a.kind)
    rows = WIDE_ROWS if config.form == "wide" else config.rows
    described = {"a": blocks(kind, rows, config.depth), "b": blocks(kind, config.columns, config.depth)}
    left_out: tuple[str, ...] = ("a_row", *_POINTERS_ONLY)
    if config.form in ROLES:
        whole = blocks(finish.out, rows, config.chunk)
        described |= {name: whole for name in ("out", *_WHOLE) if entries.get(name) is not None}
        left_out += (*(f"{name}_row" for name in _WHOLE), "codes", "scales", "quant_scale")
    elif finish.keep:
        described["out"] = blocks(finish.out, config.rows, config.columns // config.slices)
    return {name: described.get(name, entry) for name, entry in entries.items() if name not in left_out}


def _grid(config: Config) -> tuple[tuple[str, str, str], tuple[str, ...]]:
    tiles = "cdiv(M, BM) * cdiv(N, BN)"
    return ((f"min({tiles}, {config.persistent} * SMS)", "1", "1"), ("SMS",)) if config.persistent else ((tiles, "1", "1"), ())


def _targets(*kinds: str | None) -> tuple[int, ...]:
    if kinds[0] == "nvfp4":
        return FP4_TARGETS
    return FP8_TARGETS if any(k in ("fp8", "fp8_rows", "nvfp4") for k in kinds) else TARGETS


def _tile_constants(config: Config, a: Operand, b: Operand) -> dict[str, object]:
    return {
        "BM": config.rows, "BN": config.columns, "BK": config.depth, "GROUP": config.group, "SLICES": config.slices,
        "FP4": a.kind == "nvfp4", "A_ROWS": a.row_scales, "B_ROWS": b.row_scales,
        "IMPRECISE": config.depth if config.exact else None, "PRECISION": "ieee",
    }  # fmt: skip


def _suffix(config: Config) -> str:
    """The forms of a kernel compute the same; a name says which is meant."""
    return {"pointers": "", "descriptors": ".tma", "pingpong": ".pingpong", "wide": ".wide"}[config.form]


def _taken(constants: dict[str, object], config: Config) -> dict[str, object]:
    """Those of the constants that the kernels of `config` have."""
    if config.form == "pointers":
        return constants
    return {name: value for name, value in constants.items() if name not in _POINTERS_ONLY}


def roles_fit(kind: str, finish: Finish, tokens: int) -> bool:
    """Whether the kernels whose warps have roles take operands of `kind` and that epilogue; `tokens` rows share a frame gate."""
    fits = finish.keep and finish.quant is None and finish.out == "bf16" and not finish.glu and (not finish.frame_gate or tokens >= ROLES_ROWS)
    return fits and kind in ("bf16", "fp8") and sum(bool(getattr(finish, name)) for name in _WHOLE) <= ROLES_OPERANDS


def _with_roles(
    name: str, entries: dict[str, str | None], a: Operand, b: Operand, columns: int, depth: int, taps: int, tokens: int, batch: int, finish: Finish,
    config: Config,
) -> KernelVariant:  # fmt: skip
    """A kernel whose warps have roles, of one or three taps."""
    absent_here = ("bias", "carried", "carried_row", "gate", "extra", "squares")
    signature, absent = arguments(dict.fromkeys(absent_here) | _in_blocks(entries, a, finish, config) | {"M": "i32"})
    return KernelVariant(
        name=f"{name}{_suffix(config)}",
        kernel=f"{MODULES[config.form]}:gemm",
        signature=signature,
        constexprs=absent | {
            "N": columns, "K": depth, "TAPS": taps, "TOKENS": tokens, "BATCH": batch, "BM": config.rows, "BN": config.columns, "BK": config.depth,
            "CW": config.chunk, "GROUP": config.group, "STAGES": config.stages, "RING": config.ring, "SLICE": config.columns // config.slices,
            "A_ROWS": a.row_scales, "B_ROWS": b.row_scales, "SILU": finish.silu,
        },
        grid=_grid(config)[0],
        grid_sizes=("SMS",),
        # Of the first consumer; the compiler adds the other roles' warps.
        num_warps=4,
        targets=ROLES_TARGETS,
        hot=True,
    )  # fmt: skip


@cache
def gemm(a: Operand, b: Operand, columns: int, depth: int, tokens: int, finish: Finish, config: Config, pitch: int | None = None) -> KernelVariant:
    """x (M, depth) @ weight (columns, depth)^T; `tokens` rows share a frame gate.

    `pitch`: numbers from one row of the weight to the next, where they are not its depth. Raises ValueError for operands that do not go together.
    """
    check(a, b, depth, tokens, finish, config)
    if pitch is not None and b.swizzled:
        raise ValueError("product: expected rows of block scales for a weight whose rows lie apart, found swizzled ones")
    entries = (
        _operand_entries("a", a, stride(depth // (2 if a.kind == "nvfp4" else 1)))
        | _operand_entries("b", b, None)
        | finish.entries(columns)
    )
    if pitch and entries["a_scales"]:
        # These are a chunk's last frame, whose block scales may start anywhere.
        entries["a_scales"] = "*fp8e4nv"
    kinds = a.name if a == b else f"{a.name}_x_{b.name}"
    apart = f"of{pitch}" if pitch else ""
    name = f"gemm.n{columns}.k{depth}{apart}{f'.s{tokens}' if finish.frame_gate else ''}.{kinds}.{finish.name}"
    tokens = tokens if finish.frame_gate else 1
    if config.form in ROLES:
        return _with_roles(name, entries, a, b, columns, depth, 1, tokens, tokens, finish, config)
    signature, absent = arguments((entries if config.form == "pointers" else _in_blocks(entries, a, finish, config)) | {"M": "i32"})
    grid, sizes = _grid(config)
    constants = absent | _tile_constants(config, a, b) | finish.constants() | {
        "N": columns, "K": depth, "TOKENS": tokens, "A_SWIZZLED": a.swizzled, "B_SWIZZLED": b.swizzled, "PITCH": pitch or depth,
    }  # fmt: skip
    return KernelVariant(
        name=f"{name}{_suffix(config)}",
        kernel=f"{MODULES[config.form]}:gemm",
        signature=signature,
        constexprs=_taken(constants, config),
        grid=grid,
        grid_sizes=sizes,
        num_warps=config.warps,
        num_stages=config.stages,
        targets=_targets(a.kind, finish.quant),
        hot=True,
        spill_reason=_EPILOGUE_SPILLS if config.form == "descriptors" and finish.gate else None,
    )  # fmt: skip


@cache
def temporal_conv(
    a: Operand, b: Operand, columns: int, channels: int, frame: int, batch: int, carried: bool, finish: Finish, config: Config
) -> KernelVariant:
    """Three frame-shifted views of (M, channels) times weight (columns, 3 * channels); `frame` tokens a frame, `batch` tokens a batch.

    With `carried` the products of the frame before the first one are an operand. A kernel with descriptors takes one batch alone.
    """
    check(a, b, channels, frame, finish, config)
    if a.row_scales or a.swizzled or b.swizzled:
        raise ValueError("temporal_conv: expected one activation scale and block scales in rows: frames do not start at tiles of 128 rows")
    if config.form != "pointers" and batch % frame:
        raise ValueError(f"temporal_conv: expected whole frames of {frame} tokens, found {batch}")
    entries = _operand_entries("a", a, stride(channels // (2 if a.kind == "nvfp4" else 1)))
    entries |= _operand_entries("b", b, None) | finish.entries(columns, conv=True, carried=carried)
    kinds = a.name if a == b else f"{a.name}_x_{b.name}"
    name = f"gemm.temporal.n{columns}.c{channels}.{batch // frame}x{frame}.{kinds}{'' if carried else '.first'}.{finish.name}"
    if config.form in ROLES:
        return _with_roles(name, entries, a, b, columns, channels, 3, frame, batch, finish, config)
    signature, absent = arguments((entries if config.form == "pointers" else _in_blocks(entries, a, finish, config)) | {"M": "i32"})
    grid, sizes = _grid(config)
    return KernelVariant(
        name=f"{name}{_suffix(config)}",
        kernel=f"{MODULES[config.form]}:temporal_conv",
        signature=signature,
        constexprs=_taken(absent | _tile_constants(config, a, b) | finish.constants(conv=True), config)
        | {"N": columns, "C": channels, "FRAME": frame, "BATCH": batch},
        grid=grid,
        grid_sizes=sizes,
        num_warps=config.warps,
        num_stages=config.stages,
        targets=_targets(a.kind, finish.quant),
        hot=True,
    )  # fmt: skip


@cache
def epilogue(columns: int, tokens: int, kind: str, finish: Finish, rows: int = 32, width: int = 128) -> KernelVariant:
    """The epilogue alone, on a product of dtype `kind`."""
    entries = {"product": pointer(kind), "product_row": stride(columns)} | finish.entries(columns)
    signature, absent = arguments(entries | {"M": "i32"})
    return KernelVariant(
        name=f"gemm.epilogue.n{columns}{f'.s{tokens}' if finish.frame_gate else ''}.{kind}.{finish.name}",
        kernel=f"{MODULES['pointers']}:epilogue",
        signature=signature,
        constexprs=absent | finish.constants() | {"N": columns, "BM": rows, "BN": width, "TOKENS": tokens if finish.frame_gate else 1},
        grid=("cdiv(M, BM)", "cdiv(N, BN)", "1"),
        num_warps=4,
        num_stages=1,
        targets=_targets(None, finish.quant),
        hot=True,
    )


def check(a: Operand, b: Operand, depth: int, tokens: int, finish: Finish, config: Config) -> None:
    """ValueError where a product of these operands does not exist."""
    if config.form in ROLES and not roles_fit(a.kind, finish, tokens):
        raise ValueError("product: expected bf16 or FP8 operands, a plain bf16 result and at most two operands as large for warps with roles")
    if config.form != "pointers" and (a.kind not in ("bf16", "fp16", "fp8", "fp32") or finish.glu or not config.persistent):
        raise ValueError("product: expected plain or FP8 operands, no gated linear unit and a persistent grid for kernels with descriptors")
    if a.kind != b.kind:
        raise ValueError(f"product: expected operands of one kind, found {a.kind} and {b.kind}")
    if a.kind == "nvfp4" and (depth % 16 or config.depth % 64):
        raise ValueError(
            f"product: expected a depth that is a multiple of 16 and tiles of a multiple of 64 for NVFP4, found {depth} and {config.depth}"
        )
    if (a.swizzled and config.rows % 128) or (b.swizzled and config.columns % 128):
        raise ValueError(f"product: expected tiles of a multiple of 128 for swizzled scales, found {config.rows} x {config.columns}")
    if finish.glu and b.swizzled:
        raise ValueError(
            "product: expected row scales on the weight of a gated linear unit: its two halves need not start at tiles of 128 rows"
        )
    if finish.quant == "fp8_rows":
        raise ValueError("product: expected a calibrated scale for a quantized output, found fp8_rows; no tile sees a whole row")
