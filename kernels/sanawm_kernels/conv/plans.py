"""How the decoder's kernels are specialised. Nothing here needs torch or triton."""

from __future__ import annotations

from functools import cache
from typing import Literal

from sanawm_kernels.aot.spec import KernelVariant
from sanawm_kernels.tokenwise.block_plans import power_of_two
from sanawm_kernels.tokenwise.plans import arguments, pointer
from sanawm_kernels.tuning import Row, choose

KERNELS = "sanawm_kernels.conv.kernels"
NORM_EPS = 1e-8
Mode = Literal["plain", "residual", "upsample", "pixels"]
MODES: dict[Mode, int] = {"plain": 0, "residual": 1, "upsample": 2, "pixels": 3}

_DATE = "2026-11-23"
_ALL = (80, 86, 89, 90, 100, 103, 120, 121)
_INSPECTED = "not timed: chosen from registers, spills and shared memory of the compiled code"
TABLE: tuple[Row, ...] = (
    Row("conv", (0,), {"rows": 32, "columns": 32, "depth": 16}, 4, 1, _DATE, "small enough for tests"),
    Row("conv", _ALL, {"rows": 128, "columns": 128, "depth": 32}, 8, 3, _DATE, _INSPECTED, {"kind": "bf16"}),
    Row("conv", _ALL, {"rows": 32, "columns": 32, "depth": 16}, 4, 1, _DATE, "float32 is for tests on a GPU", {"kind": "fp32"}),
)


def tiling(kind: str, target: int, channels: int, out_channels: int) -> tuple[Row, dict[str, int]]:
    """The tuning row of a convolution on compute capability `target`, and its tile constants."""
    tuned = choose(TABLE, "conv", target, kind=kind)
    rows, columns, depth = (tuned.settings[name] for name in ("rows", "columns", "depth"))
    return tuned, {"BM": rows, "BN": min(columns, power_of_two(out_channels, 16)), "BK": min(depth, power_of_two(channels, 16)), "GROUP": 8}


@cache
def latent_rows(kind: str) -> KernelVariant:
    """De-normalised, transposed latent."""
    return KernelVariant(
        name=f"conv.latent_rows.{kind}", kernel=f"{KERNELS}:latent_rows",
        signature={"z": f"*{kind}:16", "mean": "*fp32:16", "std": "*fp32:16", "out": f"*{kind}:16", "S": "i32", "C": "i32"},
        constexprs={"B": 32}, grid=("cdiv(C, B)", "cdiv(S, B)", "1"), num_warps=4, num_stages=1,
    )  # fmt: skip


@cache
def norm_silu(kind: str, channels: int, state: bool) -> KernelVariant:
    """Normalisation and SiLU of pixels; `state` keeps the last rows apart."""
    signature, absent = arguments(
        {"x": pointer(kind), "out": pointer(kind), "state": pointer(kind if state else None), "M": "i32", "KEPT": "i32"}
    )
    width = power_of_two(channels, 16)
    return KernelVariant(
        name=f"conv.norm_silu.c{channels}.{'state.' if state else ''}{kind}", kernel=f"{KERNELS}:norm_silu", signature=signature,
        constexprs=absent | {"C": channels, "P": width, "R": max(1, 4096 // width), "EPS": NORM_EPS},
        grid=("cdiv(M, R)", "1", "1"), num_warps=4, num_stages=1,
    )  # fmt: skip


@cache
def causal_conv(
    kind: str, target: int, frames: int, height: int, width: int, channels: int, out_channels: int, mode: Mode, first: bool, patch: int = 1
) -> KernelVariant:
    """Convolution of `frames` frames; `first` at the start of a clip. `patch` is the side of a pixel patch."""
    tuned, tiles = tiling(kind, target, channels, out_channels)
    signature, absent = arguments({
        "x": pointer(kind), "past": pointer(None if first else kind), "weight": pointer(kind), "bias": pointer(kind),
        "residual": pointer(kind if mode == "residual" else None), "out": pointer("u8" if mode == "pixels" else kind), "M": "i32",
    })  # fmt: skip
    sizes = {"T": frames, "H": height, "W": width, "C": channels, "N": out_channels, "PATCH": patch if mode == "pixels" else 1, "MODE": MODES[mode]}
    return KernelVariant(
        name=f"conv.causal.{frames}x{height}x{width}.c{channels}.n{out_channels}.{mode}{'.first' if first else ''}.{kind}",
        kernel=f"{KERNELS}:causal_conv", signature=signature,
        constexprs=absent | sizes | tiles | {"PRECISION": "ieee", "BF16": kind == "bf16"},
        grid=("cdiv(M, BM) * cdiv(N, BN)", "1", "1"), num_warps=tuned.num_warps, num_stages=tuned.num_stages, hot=True,
    )  # fmt: skip
