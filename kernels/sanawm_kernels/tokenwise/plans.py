"""How each token-wise kernel is specialised: constants, grid, warps. One function a kernel, used by the wrappers and by `variants` alike.

Nothing here needs torch or triton. Types are Triton's names ("bf16", "fp32"); a quantization is None, "fp8", "fp8_rows" or "nvfp4".
"""

from __future__ import annotations

from functools import cache

from sanawm_kernels.aot.spec import TARGETS, KernelVariant

QUANT_CODES = {None: 0, "fp8": 1, "fp8_rows": 2, "nvfp4": 3}
ROWS = "sanawm_kernels.tokenwise.rows"
# The first architecture with e2m1 conversion instructions.
NATIVE_FP4 = 100


# LayerNorm's, and that of the norms of queries and keys. A variant's name says its epsilon where it is another one.
LAYER_EPS, HEAD_EPS = 1e-6, 1e-5


# e4m3 conversion instructions start at compute capability 8.9.
FP8_TARGETS = tuple(t for t in TARGETS if t >= 89)


def targets_of(quant: str | None) -> tuple[int, ...]:
    """Architectures that can run a kernel with a quantization."""
    return TARGETS if quant is None else FP8_TARGETS


def cover(channels: int) -> tuple[int, int]:
    """Two power-of-two tiles over a row: the largest within it, and the smallest over the rest (at least 16, also where nothing rests)."""
    first = 1 << (channels.bit_length() - 1)
    return first, max(16, 1 << (channels - first - 1).bit_length())


def pointer(kind: str | None) -> str | None:
    """Signature entry of a 16-byte aligned pointer, None for an absent operand."""
    return None if kind is None else f"*{kind}:16"


def stride(channels: int) -> str:
    """Signature entry of a row stride: a multiple of 16 where the rows' length is one, so that rows can be read 16 bytes at a time."""
    return "i32:16" if channels % 16 == 0 else "i32"


def arguments(entries: dict[str, str | None]) -> tuple[dict[str, str], dict[str, None]]:
    """Signature of the present operands, and None constants for the absent ones."""
    return {name: kind for name, kind in entries.items() if kind is not None}, {
        name: None for name, kind in entries.items() if kind is None
    }


def quant_entries(quant: str | None) -> dict[str, str | None]:
    """Signature entries of a kernel's quantized outputs."""
    codes = {None: None, "fp8": "*fp8e4nv:16", "fp8_rows": "*fp8e4nv:16", "nvfp4": "*u8:16"}[quant]
    scales = {None: None, "fp8": None, "fp8_rows": "*fp32:16", "nvfp4": "*fp8e4nv:16"}[quant]
    return {"codes": codes, "scales": scales, "quant_scale": "*fp32" if quant in ("fp8", "nvfp4") else None}


def native_fp4(quant: str | None, native: bool) -> bool:
    """Whether a kernel uses instructions for NVFP4; what it does not quantize so has one form on all architectures."""
    return native and quant == "nvfp4"


def quant_name(quant: str | None, swizzled: bool, keep: bool) -> str:
    """Suffix of a variant's name that says what it writes."""
    if quant is None:
        return ""
    return f".{quant}{'_swizzled' if swizzled else ''}{'_keep' if keep else ''}"


def other(kind: str, usual: str, what: str) -> str:
    """Suffix of a variant's name for an operand whose dtype is not the usual one: `.fp32_weight`."""
    return "" if kind == usual else f".{kind}_{what}"


def eps_name(eps: float, usual: float | None = None) -> str:
    """Suffix of a variant's name for an epsilon that is not the usual one: `.eps100000` for 1e-5."""
    return "" if eps == usual else f".eps{round(1 / eps)}"


def _row_warps(channels: int) -> int:
    return 4 if channels >= 1024 else 1


def rows_of(tokens: int) -> int:
    """Rows of a program that modulates, where `tokens` share their modulation: four, or as many of them as divide the tokens."""
    return next(rows for rows in (4, 2, 1) if tokens % rows == 0)


@cache
def update_rows(
    kind: str,
    channels: int,
    tokens: int,
    *,
    branch: bool = False,
    gate: bool = False,
    extra: bool = False,
    modulate: bool = False,
    modulation: str | None = None,
    keep: bool = True,
    quant: str | None = None,
    swizzled: bool = False,
    native: bool = False,
    eps: float = LAYER_EPS,
) -> KernelVariant:
    """Residual update, modulation, quantization of rows.

    `tokens` rows share a row of gate, shift and scale, whose dtype is `modulation` (default: `kind`); `keep` stores the plain result.
    Raises ValueError for a gate without the branch that it multiplies.
    """
    if gate and not branch:
        raise ValueError("update_rows: expected a branch with the gate that multiplies it, found a gate alone")
    modulation = modulation or kind
    stream = branch or extra
    framed = gate or modulate
    entries: dict[str, str | None] = {"x": pointer(kind), "x_row": stride(channels)}
    for name, present, dtype in (("branch", branch, kind), ("gate", gate, modulation), ("extra", extra, kind)):
        entries |= {name: pointer(dtype if present else None), f"{name}_row": stride(channels) if present else None}
    for name in ("shift", "scale"):
        entries |= {name: pointer(modulation if modulate else None), f"{name}_row": stride(channels) if modulate else None}
    entries |= {"updated": pointer(kind if stream else None), "out": pointer(kind if keep and modulate else None)}
    entries |= quant_entries(quant)
    signature, absent = arguments(entries)
    c0, c1 = cover(channels)
    warps = _row_warps(channels)
    rows = rows_of(tokens) if modulate else 1
    constants = {
        "TOKENS": tokens if framed else 1,
        "R": rows,
        "STAGES": rows if quant is None else min(rows, 3),
        "LANES": 32 * warps,
        "C": channels,
        "C0": c0,
        "C1": c1,
        "EPS": eps if modulate else None,
        "QUANT": QUANT_CODES[quant],
        "SWIZZLED": swizzled,
        "NATIVE": native_fp4(quant, native),
    }
    parts = [name for name, on in (("gated", gate), ("branch", branch and not gate), ("extra", extra), ("modulate", modulate)) if on]
    return KernelVariant(
        name=f"tokenwise.rows.c{channels}{f'.s{tokens}' if framed else ''}.{'_'.join(parts) or 'quantize'}.{kind}"
        f"{other(modulation, kind, 'modulation') if framed else ''}{eps_name(eps, LAYER_EPS) if modulate else ''}"
        f"{quant_name(quant, swizzled, keep and modulate)}",
        kernel=f"{ROWS}:update_rows",
        signature=signature,
        constexprs=absent | constants,
        grid=("cdiv(ROWS, R)", "1", "1"),
        grid_sizes=("ROWS",),
        num_warps=warps,
        num_stages=1,
        targets=targets_of(quant),
        hot=True,
        spill_reason="8 bytes in Triton 3.7 on sm_90, whose assembler prefers 72 registers" if rows > 1 and quant is None else None,
    )


@cache
def gate_rows(
    kind: str,
    channels: int,
    *,
    camera: bool = True,
    keep: bool = True,
    quant: str | None = None,
    swizzled: bool = False,
    native: bool = False,
) -> KernelVariant:
    """Output gate of the sum of branches."""
    entries: dict[str, str | None] = {"main": pointer(kind), "main_row": stride(channels)}
    entries |= {"camera": pointer(kind if camera else None), "camera_row": stride(channels) if camera else None}
    entries |= {"gate": pointer(kind), "gate_row": stride(channels), "out": pointer(kind if keep else None)} | quant_entries(quant)
    signature, absent = arguments(entries)
    c0, c1 = cover(channels)
    return KernelVariant(
        name=f"tokenwise.output_gate.c{channels}.{'sum' if camera else 'main'}.{kind}{quant_name(quant, swizzled, keep)}",
        kernel=f"{ROWS}:gate_rows",
        signature=signature,
        constexprs=absent
        | {"LANES": 32 * _row_warps(channels), "C": channels, "C0": c0, "C1": c1}
        | {"QUANT": QUANT_CODES[quant], "SWIZZLED": swizzled, "NATIVE": native_fp4(quant, native)},
        grid=("ROWS", "1", "1"),
        grid_sizes=("ROWS",),
        num_warps=_row_warps(channels),
        num_stages=1,
        targets=targets_of(quant),
        hot=True,
    )


@cache
def norm_rows(kind: str, weight: str, channels: int, eps: float) -> KernelVariant:
    """Root-mean-square norm of rows; `weight` is the dtype of the weight."""
    c0, c1 = cover(channels)
    return KernelVariant(
        name=f"tokenwise.rms_norm.c{channels}{eps_name(eps)}.{kind}{other(weight, kind, 'weight')}",
        kernel=f"{ROWS}:norm_rows",
        signature={"x": f"*{kind}:16", "x_row": stride(channels), "weight": f"*{weight}:16", "out": f"*{kind}:16"},
        constexprs={"LANES": 32 * _row_warps(channels), "C": channels, "C0": c0, "C1": c1, "EPS": eps},
        grid=("ROWS", "1", "1"),
        grid_sizes=("ROWS",),
        num_warps=_row_warps(channels),
        num_stages=1,
        hot=True,
    )
