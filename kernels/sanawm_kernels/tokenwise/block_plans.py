"""How the kernels around the attention and the FFN are specialised. Nothing here needs torch or triton."""

from __future__ import annotations

from functools import cache
from typing import Any

from sanawm_kernels.aot.spec import KernelVariant
from sanawm_kernels.tokenwise.plans import (
    FP8_TARGETS,
    HEAD_EPS,
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

HEADS = "sanawm_kernels.tokenwise.heads"


def power_of_two(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least n and `least`."""
    return max(least, 1 << (n - 1).bit_length())


@cache
def depthwise_glu(
    kind: str,
    weight: str,
    height: int,
    width: int,
    gated: int,
    *,
    keep: bool = True,
    quant: str | None = None,
    swizzled: bool = False,
    native: bool = False,
) -> KernelVariant:
    """Depthwise 3x3 with gated linear unit; `gated` is G, half the input's width, `weight` the dtype of taps and bias."""
    entries: dict[str, str | None] = {"x": pointer(kind), "x_row": stride(gated), "taps": pointer(weight), "bias": pointer(weight)}
    entries |= {"out": pointer(kind if keep else None)} | quant_entries(quant)
    signature, absent = arguments(entries)
    # A warp's 64 channels are lines of 128 bytes; 8 columns divide the latent width of 40, and their sums leave room for 12 warps a multiprocessor.
    tiles = {"BX": min(8, width), "BC": min(64, power_of_two(gated, 16)), "STRIP": height}
    return KernelVariant(
        name=f"tokenwise.depthwise_glu.{height}x{width}.g{gated}.{kind}{other(weight, kind, 'weight')}{quant_name(quant, swizzled, keep)}",
        kernel="sanawm_kernels.tokenwise.depthwise:depthwise_glu",
        signature=signature,
        constexprs=absent
        | tiles
        | {"H": height, "W": width, "G": gated, "QUANT": QUANT_CODES[quant], "SWIZZLED": swizzled, "NATIVE": native_fp4(quant, native)},
        grid=("cdiv(G, BC)", "cdiv(W, BX) * cdiv(H, STRIP)", "FRAMES"),
        grid_sizes=("FRAMES",),
        num_warps=1,
        num_stages=1,
        targets=targets_of(quant),
        hot=True,
    )


HOPPER_COLUMNS, HOPPER_CHANNELS = 8, 64


def hopper_fits(target: int, kind: str, width: int, gated: int, row: int, quant: str | None) -> bool:
    """Whether `depthwise_glu_hopper` serves an input whose rows are `row` elements apart."""
    whole = width % HOPPER_COLUMNS == 0 and gated % HOPPER_CHANNELS == 0 and row == 2 * gated
    return target == 90 and kind == "bf16" and whole and quant in (None, "fp8")


@cache
def depthwise_glu_hopper(weight: str, height: int, width: int, gated: int, *, keep: bool = True, quant: str | None = None) -> KernelVariant:
    """The same on Hopper in bfloat16, where `hopper_fits`."""
    entries: dict[str, str | None] = {"x": "*bf16:16", "taps": pointer(weight), "bias": pointer(weight), "out": pointer("bf16" if keep else None)}
    entries |= quant_entries(quant)
    del entries["scales"]
    signature, absent = arguments(entries)
    # 12 warps a multiprocessor, which hold 10 KiB each: three rows of ten columns are on their way to every one.
    tiles = {"BX": HOPPER_COLUMNS, "BC": HOPPER_CHANNELS, "STAGES": 4}
    return KernelVariant(
        name=f"tokenwise.depthwise_glu.{height}x{width}.g{gated}.bf16{other(weight, 'bf16', 'weight')}{quant_name(quant, False, keep)}.hopper",
        kernel="sanawm_kernels.tokenwise.depthwise_hopper:depthwise_glu",
        signature=signature,
        constexprs=absent | tiles | {"H": height, "W": width, "G": gated, "QUANT": QUANT_CODES[quant]},
        grid=("G // BC", "W // BX", "FRAMES"),
        grid_sizes=("FRAMES",),
        num_warps=1,
        num_stages=1,
        targets=(90,),
        hot=True,
    )


def depthwise_glu_for(
    target: int, kind: str, weight: str, height: int, width: int, gated: int, row: int, *, aligned: bool = True, keep: bool, **form: Any
) -> KernelVariant:
    """The kernel of a target for an input whose rows are `row` elements apart; `aligned`: whether it begins at a multiple of 16 bytes.

    form: how results are quantized, as `depthwise_glu` takes it.
    """
    if aligned and hopper_fits(target, kind, width, gated, row, form.get("quant")):
        return depthwise_glu_hopper(weight, height, width, gated, keep=keep, quant=form.get("quant"))
    return depthwise_glu(kind, weight, height, width, gated, keep=keep, **form)


def _head_constants(heads: int, width: int, tokens: int) -> dict[str, int]:
    first = 1 << (heads.bit_length() - 1)
    rest = heads - first
    return {"TOKENS": tokens, "HEADS": heads, "H0": first, "H1": power_of_two(rest) if rest else 0, "D": width, "P": power_of_two(width, 16)}


def _head_name(kind: str, weight: str, eps: float, fp8: bool) -> str:
    return f"{other(weight, kind, 'weight')}{eps_name(eps, HEAD_EPS)}{'.fp8' if fp8 else ''}"


def _rays_name(rays: int, tokens: int) -> str:
    return "" if rays == tokens else f".rays{rays}"


@cache
def rope_heads(kind: str, weight: str, heads: int, width: int, tokens: int, eps: float, fp8: bool = False) -> KernelVariant:
    """Norm and RoPE of queries and keys; `tokens` of a batch share the tables."""
    out = "*fp8e4nv:16" if fp8 else pointer(kind)
    scale = "*fp32" if fp8 else None
    row = stride(heads * width)
    entries = {
        "q": pointer(kind), "q_row": row, "k": pointer(kind), "k_row": row, "q_norm": pointer(weight), "k_norm": pointer(weight),
        "cos": "*fp32:16", "sin": "*fp32:16", "q_out": out, "k_out": out, "q_scale": scale, "k_scale": scale, "ROWS": "i32",
    }  # fmt: skip
    signature, absent = arguments(entries)
    return KernelVariant(
        name=f"tokenwise.rope_heads.h{heads}.d{width}.n{tokens}.{kind}{_head_name(kind, weight, eps, fp8)}",
        kernel=f"{HEADS}:rope_heads",
        signature=signature,
        constexprs=absent | _head_constants(heads, width, tokens) | {"EPS": eps},
        grid=("ROWS", "2", "1"),
        num_stages=1,
        targets=targets_of("fp8" if fp8 else None),
        hot=True,
    )


@cache
def ucpe_heads(
    kind: str, weight: str, heads: int, width: int, tokens: int, rays: int, eps: float, clamp: bool, fp8: bool = False
) -> KernelVariant:
    """Norm and UCPE of camera queries, keys and values; `rays` matrices, repeated over the batch where fewer than rows."""
    out, scale, row = "*fp8e4nv:16" if fp8 else pointer(kind), "*fp32" if fp8 else None, stride(heads * width)
    entries = {
        "q": pointer(kind), "q_row": row, "k": pointer(kind), "k_row": row, "v": pointer(kind), "v_row": row,
        "q_norm": pointer(weight), "k_norm": pointer(weight), "rays": "*fp32:16", "rays_inverse": "*fp32:16", "cos": "*fp32:16", "sin": "*fp32:16",
        # Values stay in the input's dtype: FP8 attention wants them transposed, which is another kernel's work.
        "q_out": out, "k_out": out, "v_out": pointer(kind), "q_scale": scale, "k_scale": scale, "v_scale": None, "ROWS": "i32",
    }  # fmt: skip
    signature, absent = arguments(entries)
    return KernelVariant(
        name=f"tokenwise.ucpe_heads.h{heads}.d{width}.n{tokens}{_rays_name(rays, tokens)}.{kind}{'.clamp' if clamp else ''}"
        f"{_head_name(kind, weight, eps, fp8)}",
        kernel=f"{HEADS}:ucpe_heads",
        signature=signature,
        constexprs=absent | _head_constants(heads, width, tokens) | {"RAYS": rays, "EPS": eps, "CLAMP": clamp},
        grid=("ROWS", "3", "1"),
        num_stages=1,
        targets=targets_of("fp8" if fp8 else None),
        hot=True,
    )


@cache
def inverse_ucpe(kind: str, heads: int, width: int, tokens: int, rays: int) -> KernelVariant:
    """UCPE of the camera attention's output."""
    return KernelVariant(
        name=f"tokenwise.inverse_ucpe.h{heads}.d{width}.n{tokens}{_rays_name(rays, tokens)}.{kind}",
        kernel=f"{HEADS}:inverse_ucpe",
        signature={
            "x": f"*{kind}:16", "x_row": stride(heads * width), "rays": "*fp32:16", "cos": "*fp32:16", "sin": "*fp32:16",
            "out": f"*{kind}:16", "ROWS": "i32",
        },
        constexprs=_head_constants(heads, width, tokens) | {"RAYS": rays},
        grid=("ROWS", "1", "1"),
        num_stages=1,
        hot=True,
    )  # fmt: skip


@cache
def transpose_values(kind: str, heads: int, width: int) -> KernelVariant:
    """Values to e4m3, keys adjacent."""
    return KernelVariant(
        name=f"tokenwise.transpose_values.h{heads}.d{width}.{kind}",
        kernel=f"{HEADS}:transpose_values",
        signature={
            "v": f"*{kind}:16", "v_row": stride(heads * width), "v_batch": "i64:16", "scale": "*fp32", "out": "*fp8e4nv:16",
            "TOKENS": "i32", "out_row": "i32:16",
        },
        constexprs={"HEADS": heads, "D": width, "P": power_of_two(width, 16), "R": 64},
        grid=("cdiv(TOKENS, R)", "HEADS", "BATCH"),
        grid_sizes=("BATCH",),
        num_stages=1,
        targets=FP8_TARGETS,
        hot=True,
    )  # fmt: skip
