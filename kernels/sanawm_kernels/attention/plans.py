"""How the attention kernels are specialised. Nothing here needs torch or triton."""

from __future__ import annotations

from functools import cache

from sanawm_kernels.aot.spec import KernelVariant, blocks
from sanawm_kernels.attention.table import PairTile, Tile
from sanawm_kernels.tokenwise.block_plans import power_of_two
from sanawm_kernels.tokenwise.plans import (
    LAYER_EPS,
    QUANT_CODES,
    arguments,
    eps_name,
    native_fp4,
    other,
    pointer,
    quant_entries,
    quant_name,
    stride,
    targets_of,
)

WINDOW = "sanawm_kernels.attention.kernels:window_attention"
CROSS = "sanawm_kernels.attention.cross:cross_attention"
# Keys of a block of the cross-attention with roles, and how many logits of a row its consumers hold in registers.
ROLES_BLOCK, ROLES_KEYS = 128, 320


@cache
def window_attention(
    kind: str,
    heads: int,
    width: int,
    segments: int,
    tile: Tile,
    *,
    out: str | None = None,
    ucpe: bool = False,
    rays_batched: int = 0,
    keep: bool = True,
    quant: str | None = None,
    swizzled: bool = False,
    native: bool = False,
) -> KernelVariant:
    """Attention over `segments` runs of keys. `kind` fp8e4nv takes scales and transposed values; `out` is then the output's dtype.

    rays_batched: tokens of a batch where every batch has its own ray matrices, 0 where they share one set.
    """
    fp8 = kind == "fp8e4nv"
    # What FP8 operands give is the model's own dtype, which is bfloat16 where nothing else is said.
    usual = "bf16" if fp8 else kind
    out = out or usual
    row = stride(heads * width)
    entries: dict[str, str | None] = {"q": pointer(kind), "q_row": row, "q_batch": "i64:16"}
    for i in range(3):
        here = i < segments
        entries |= {f"k{i}": pointer(kind if here else None), f"k{i}_row": row if here else None, f"k{i}_batch": "i64:16" if here else None}
        entries |= {f"v{i}": pointer(kind if here else None), f"v{i}_row": ("i32:16" if fp8 else row) if here else None}
        entries |= {f"v{i}_batch": "i64:16" if here else None, f"n{i}": "i32" if here else None}
    entries |= dict.fromkeys(("q_scale", "k_scale", "v_scale"), "*fp32" if fp8 else None)
    entries |= dict.fromkeys(("rays", "cos", "sin"), "*fp32:16" if ucpe else None)
    entries |= {"out": pointer(out if keep else None)} | quant_entries(quant) | {"N": "i32", "softmax_scale": "fp32"}
    signature, absent = arguments(entries)
    constants = {
        "HEADS": heads, "D": width, "P": power_of_two(width, 16), "BM": tile.queries, "BN": tile.keys, "RAYS": rays_batched,
        "QUANT": QUANT_CODES[quant], "SWIZZLED": swizzled, "NATIVE": native_fp4(quant, native), "BF16": out == "bf16", "PRECISION": "ieee",
    }  # fmt: skip
    short = {"fp8e4nv": "fp8"}.get(kind, kind)
    return KernelVariant(
        name=f"attention.window{'_ucpe' if ucpe else ''}.h{heads}.d{width}.s{segments}"
        f"{f'.rays{rays_batched}' if rays_batched else ''}.{short}{other(out, usual, 'out')}{quant_name(quant, swizzled, keep)}",
        kernel=WINDOW,
        signature=signature,
        constexprs=absent | constants,
        grid=("cdiv(N, BM)", "HEADS", "BATCH"),
        grid_sizes=("BATCH",),
        num_warps=tile.warps,
        num_stages=tile.stages,
        targets=targets_of("fp8" if fp8 else quant),
        hot=True,
        spill_reason="a few registers around the ray-space transform, once a program; the loop over keys has no local memory access"
        if ucpe
        else None,
    )


@cache
def window_pair(heads: int, width: int, segments: int, tile: PairTile) -> KernelVariant:
    """Attention of both branches over `segments` runs of keys in one launch, in bfloat16; `finish_pair` has to follow."""
    queries, keys = blocks("bf16", 64, 1, 128), blocks("bf16", tile.keys, 1, 128)
    entries: dict[str, str | None] = {"main_q": queries, "camera_q": queries}
    for i in range(3):
        here = i < segments
        entries |= dict.fromkeys(_segment(i), keys if here else None) | {f"n{i}": "i32" if here else None}
    entries |= {"main_out": pointer("bf16"), "seen": pointer("bf16")} | dict.fromkeys(("sums", "parts", "part_sums"), pointer("fp32"))
    entries |= {"N": "i32", "programs": "i32", "main_scale": "fp32", "camera_scale": "fp32"}
    signature, absent = arguments(entries)
    constants = {
        "HEADS": heads, "D": width, "BM": tile.queries, "BN": tile.keys, "STAGES": tile.stages, "PARTS": tile.parts, "TURNS": tile.turns,
        "TIE": tile.tie,
    }  # fmt: skip
    return KernelVariant(
        name=f"attention.pair.h{heads}.d{width}.s{segments}.bf16",
        kernel="sanawm_kernels.attention.pair:window_pair",
        signature=signature,
        constexprs=absent | constants,
        # One program a multiprocessor.
        grid=("2 * programs", "1", "1"),
        # A consumer's; the kernel adds the others and the loader.
        num_warps=4,
        targets=(90,),
        hot=True,
        spill_reason="a few sizes and addresses, once a tile of queries; the loops over keys have no local memory access",
    )


@cache
def finish_pair(
    heads: int, width: int, segments: int, tile: PairTile, *, keep: bool = True, quant: str | None = None, swizzled: bool = False,
    native: bool = False,
) -> KernelVariant:  # fmt: skip
    """What follows `window_pair` of that tile; the camera branch's output may be quantized."""
    row = stride(heads * width)
    entries: dict[str, str | None] = {}
    for name in ("main_q", "camera_q"):
        entries |= {f"{name}_at": pointer("bf16"), f"{name}_row": row}
    for i in range(3):
        here = i < segments
        for name in _segment(i):
            entries |= {f"{name}_at": pointer("bf16" if here else None), f"{name}_row": row if here else None}
        entries[f"n{i}"] = "i32" if here else None
    entries |= {"seen": pointer("bf16")} | dict.fromkeys(("sums", "parts", "part_sums", "rays", "cos", "sin"), pointer("fp32"))
    entries |= {"main_out": pointer("bf16"), "camera_out": pointer("bf16" if keep else None)} | quant_entries(quant)
    entries |= {"N": "i32", "programs": "i32", "main_scale": "fp32", "camera_scale": "fp32"}
    signature, absent = arguments(entries)
    constants = {
        "HEADS": heads, "D": width, "P": power_of_two(width, 16), "BM": tile.queries, "PARTS": tile.parts, "ROWS": 16,
        "GROUP": max(g for g in (4, 2, 1) if heads % g == 0), "BN": 32, "QUANT": QUANT_CODES[quant], "SWIZZLED": swizzled,
        "NATIVE": native_fp4(quant, native), "BF16": True, "PRECISION": "ieee",
    }  # fmt: skip
    return KernelVariant(
        name=f"attention.pair_finish.h{heads}.d{width}.s{segments}.bf16{quant_name(quant, swizzled, keep)}",
        kernel="sanawm_kernels.attention.finish:finish_pair",
        signature=signature,
        constexprs=absent | constants,
        grid=("cdiv(N, ROWS)", "HEADS // GROUP", "1"),
        num_warps=8,
        num_stages=1,
        targets=(90,),
        hot=True,
    )


def _segment(i: int) -> list[str]:
    """Names of the i-th segment's keys and values of both branches."""
    return [f"{branch}_{x}{i}" for branch in ("main", "camera") for x in "kv"]


def pair_scratch(N: int, heads: int, width: int, tile: PairTile, programs: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of what `window_pair` with `programs` programs a branch leaves to `finish_pair`, by argument."""
    divided = max(1, -(-N // tile.queries) * heads % programs)
    return {
        "seen": ((N, heads * width), "bfloat16"),
        "sums": ((2, heads, N), "float32"),
        "parts": ((2, divided, tile.parts, tile.queries, width), "float32"),
        "part_sums": ((2, divided, tile.parts, tile.queries), "float32"),
    }


@cache
def cross_attention(
    kind: str,
    weight: str,
    heads: int,
    width: int,
    eps: float,
    tile: Tile,
    *,
    parts: int = 0,
    keep: bool = True,
    quant: str | None = None,
    swizzled: bool = False,
    native: bool = False,
) -> KernelVariant:
    """Cross-attention with the query norm; `parts` partial sums of squares a row, 0 to measure them."""
    row = stride(heads * width)
    entries: dict[str, str | None] = {
        "q": pointer(kind), "q_row": row, "q_batch": "i64:16", "k": pointer(kind), "v": pointer(kind),
        "k_row": row, "k_batch": "i64:16", "v_row": row, "v_batch": "i64:16", "mask": "*u8", "q_norm": pointer(weight),
        "squares": "*fp32:16" if parts else None, "out": pointer(kind if keep else None),
    }  # fmt: skip
    entries |= quant_entries(quant) | {"N": "i32", "L": "i32", "softmax_scale": "fp32"}
    signature, absent = arguments(entries)
    # Measuring the squares reads all channels of the rows once a program: heads share a program, so that they share the reading.
    group = 1 if parts else max(g for g in (5, 4, 3, 2, 1) if heads % g == 0)
    constants = {
        "HEADS": heads, "GROUP": group, "PARTS": parts, "BP": power_of_two(max(parts, 1)), "D": width, "P": power_of_two(width, 16),
        "BM": tile.queries, "BN": tile.keys, "EPS": eps, "QUANT": QUANT_CODES[quant], "SWIZZLED": swizzled, "NATIVE": native_fp4(quant, native),
        "BF16": kind == "bf16", "PRECISION": "ieee",
    }  # fmt: skip
    return KernelVariant(
        name=f"attention.cross.h{heads}.d{width}.{'parts' + str(parts) if parts else 'norm'}.{kind}"
        f"{other(weight, kind, 'weight')}{eps_name(eps, LAYER_EPS)}{quant_name(quant, swizzled, keep)}",
        kernel=CROSS,
        signature=signature,
        constexprs=absent | constants,
        grid=("cdiv(N, BM)", "HEADS // GROUP", "BATCH"),
        grid_sizes=("BATCH",),
        num_warps=tile.warps,
        num_stages=tile.stages,
        targets=targets_of(quant),
        hot=True,
        spill_reason="8 bytes in Triton 3.9, once a tile; the loop over keys has no local memory access",
    )


@cache
def cross_roles(weight: str, heads: int, width: int, keys: int, eps: float, parts: int) -> KernelVariant:
    """The same on Hopper for one batch in bfloat16, where `roles_fit`; `parts` partial sums of squares a row."""
    last = power_of_two(keys - (keys - 1) // ROLES_BLOCK * ROLES_BLOCK, 16)
    cached = blocks("bf16", ROLES_BLOCK, 1, 128)
    return KernelVariant(
        name=f"attention.cross_roles.h{heads}.d{width}.l{keys}.parts{parts}.bf16{other(weight, 'bf16', 'weight')}{eps_name(eps, LAYER_EPS)}",
        kernel="sanawm_kernels.attention.cross_roles:cross_attention",
        signature={
            "q": blocks("bf16", 64, 1, 128), "k": cached, "v": cached, "mask": "*u8", "q_norm": f"*{weight}:16", "squares": "*fp32:16",
            "out": "*bf16:16", "N": "i32", "softmax_scale": "fp32",
        },
        constexprs={
            "HEADS": heads, "KEYS": keys, "PARTS": parts, "BP": power_of_two(parts, 8), "D": width, "BN": ROLES_BLOCK, "TAIL": last, "EPS": eps,
        },
        # As many programs a head as there are multiprocessors for; any number of them is right.
        grid=("HEADS * max(1, SMS // HEADS)", "1", "1"),
        grid_sizes=("SMS",),
        # A consumer's; the kernel adds the other one and the loader.
        num_warps=4,
        targets=(90,),
        hot=True,
        spill_reason="addresses that the compiler makes before the loop, read between products, and a few of a thread's 160 logits",
    )  # fmt: skip


def roles_fit(target: int, kind: str, width: int, keys: int, parts: int, quant: str | None, batch: int) -> bool:
    """Whether `cross_roles` serves a cross-attention."""
    whole = (keys - 1) // ROLES_BLOCK * ROLES_BLOCK
    fits = whole + power_of_two(keys - whole, 16) <= ROLES_KEYS and width % 16 == 0 and width <= 128
    return target == 90 and kind == "bf16" and fits and parts > 0 and quant is None and batch == 1
