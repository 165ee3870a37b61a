"""How the decoder's kernels are specialised. Nothing here needs torch or triton."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Literal

from sanawm_kernels.aot.spec import KernelVariant, blocks
from sanawm_kernels.tokenwise.block_plans import power_of_two
from sanawm_kernels.tokenwise.plans import arguments, pointer
from sanawm_kernels.tuning import Row, choose

KERNELS = "sanawm_kernels.conv.kernels"
TMA_KERNELS = "sanawm_kernels.conv.tma"
FRAMES = "sanawm_kernels.conv.frames"
NORM_EPS = 1e-8
Mode = Literal["plain", "residual", "upsample", "pixels"]
MODES: dict[Mode, int] = {"plain": 0, "residual": 1, "upsample": 2, "pixels": 3}

# Architectures that convolve with descriptors, where the rows of every tensor start at multiples of 16 bytes.
_DESCRIBED = (90,)
_BYTES = {"bf16": 2, "fp32": 4}
# Frames of results start at multiples of so many pixels, the most that a tile has.
PIXELS = 256

_DATE = "2026-11-23"
_ALL = (80, 86, 89, 90, 100, 103, 120, 121)
_INSPECTED = "not timed: chosen from registers, spills and shared memory of the compiled code"
_TODAY = "2026-11-27"
_SHARED = "not timed: 48 KiB from the second-level cache a step for as much work as 64 KiB in tiles of 128 x 128"


def _tile(rows: int, columns: int, depth: int, slices: int, splits: int = 1, group: int = 8) -> dict[str, int]:
    return {"rows": rows, "columns": columns, "depth": depth, "slices": slices, "splits": splits, "group": group}


TABLE: tuple[Row, ...] = (
    Row("conv", (0,), {"rows": 32, "columns": 32, "depth": 16}, 4, 1, _DATE, "small enough for tests"),
    Row("conv", _ALL, {"rows": 128, "columns": 128, "depth": 32}, 8, 3, _DATE, _INSPECTED, {"kind": "bf16"}),
    Row("conv", _ALL, {"rows": 32, "columns": 32, "depth": 16}, 4, 1, _DATE, "float32 is for tests on a GPU", {"kind": "fp32"}),
    Row("described", _DESCRIBED, _tile(256, 64, 32, 1), 8, 1, _TODAY, "float32 is for tests: few steps", {"kind": "fp32"}),
    Row("described", _DESCRIBED, _tile(256, 64, 64, 2), 8, 4, _TODAY, "not timed: few channels, so many pixels", {"kind": "bf16", "mode": "pixels"}),
    Row(
        "described", _DESCRIBED, _tile(128, 256, 64, 4, splits=4), 8, 4, _TODAY, "not timed: 128 parts of tiles for 132 multiprocessors",
        {"kind": "bf16", "channels": 1024, "columns": 1024},
    ),
    Row("described", _DESCRIBED, _tile(256, 128, 64, 2), 8, 4, _TODAY, _SHARED, {"kind": "bf16", "columns": 128}),
    Row(
        "described", _DESCRIBED, _tile(128, 128, 64, 1), 8, 5, _TODAY, "not timed: 64 tiles, and a depth too small to share out",
        {"kind": "bf16", "channels": 128, "columns": 1024},
    ),
    Row("described", _DESCRIBED, _tile(128, 256, 64, 4), 8, 4, _TODAY, _SHARED, {"kind": "bf16"}),
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Tile of a convolution with descriptors: pixels, output channels, depth, slices of its epilogue, parts of the depth, tile rows visited together.

    `persistent` programs a multiprocessor.
    """

    rows: int
    columns: int
    depth: int
    slices: int = 1
    splits: int = 1
    group: int = 8
    warps: int = 8
    stages: int = 4
    persistent: int = 1


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


def described(kind: str, target: int, channels: Iterable[int]) -> bool:
    """Whether convolutions of tensors with these channels go through descriptors."""
    return target in _DESCRIBED and all(count * _BYTES[kind] % 16 == 0 for count in channels)


def config(kind: str, target: int, channels: int, out_channels: int, mode: Mode) -> Config:
    """Tile of a convolution with descriptors on compute capability `target`."""
    row = choose(TABLE, "described", target, kind=kind, mode=mode, channels=channels, columns=out_channels)
    return Config(warps=row.num_warps, stages=row.num_stages, **row.settings)


def frame_stride(height: int, width: int) -> int:
    """Pixels from a frame of a result to the next one; its rows are width + 2 pixels apart."""
    return -(-height * (width + 2) // PIXELS) * PIXELS


@cache
def padded(kind: str, frames: int, height: int, width: int, channels: int, first: bool, norm: bool) -> KernelVariant:
    """Padded frames of a convolution and its new state: from results, normalised or not."""
    return _padded(kind, frames, height, width, channels, first, norm, width + 2, frame_stride(height, width), "")


@cache
def padded_latent(kind: str, height: int, width: int, channels: int, first: bool) -> KernelVariant:
    """The same of the latent, whose pixels follow each other."""
    return _padded(kind, 1, height, width, channels, first, False, width, height * width, "latent.")


def _padded(
    kind: str, frames: int, height: int, width: int, channels: int, first: bool, norm: bool, pitch: int, stride: int, label: str
) -> KernelVariant:
    signature, absent = arguments({"x": pointer(kind), "past": pointer(None if first else kind), "out": pointer(kind), "state": pointer(kind)})
    lanes = power_of_two(channels, 16)
    sizes = {"T": frames, "H": height, "W": width, "PITCH": pitch, "STRIDE": stride, "C": channels}
    return KernelVariant(
        name=f"conv.padded.{label}{frames}x{height}x{width}.c{channels}.{'norm.' if norm else ''}{'first.' if first else ''}{kind}",
        kernel=f"{FRAMES}:padded", signature=signature,
        constexprs=absent | sizes | {"P": lanes, "R": max(1, 4096 // lanes), "NORM": norm, "EPS": NORM_EPS},
        grid=("cdiv((T + 2) * (H + 2) * (W + 2), R)", "1", "1"), num_warps=4, num_stages=1,
    )  # fmt: skip


@cache
def selection(kind: str, channels: int, out_channels: int, mode: Mode) -> KernelVariant:
    """The matrix that picks what `mode` adds to each output channel."""
    signature, _ = arguments({"out": pointer(kind)})
    return KernelVariant(
        name=f"conv.selection.c{channels}.n{out_channels}.{mode}.{kind}", kernel=f"{FRAMES}:selection", signature=signature,
        constexprs={"N": out_channels, "C": channels, "UPSAMPLE": mode == "upsample", "B": power_of_two(channels, 16)},
        grid=("N", "cdiv(C, B)", "1"), num_warps=4, num_stages=1,
    )  # fmt: skip


@cache
def described_conv(
    kind: str, frames: int, height: int, width: int, channels: int, out_channels: int, mode: Mode, first: bool, tile: Config, patch: int = 1
) -> KernelVariant:
    """Convolution of padded frames; in parts of the depth it leaves bias and residual to `summed`. Only an upsampling asks whether a clip starts.

    Raises ValueError where the depth does not divide into parts, or the epilogue is not a sum.
    """
    steps = 27 * -(-channels // tile.depth)
    parts = tile.splits > 1
    if parts and (steps % tile.splits or mode not in ("plain", "residual")):
        raise ValueError(f"convolution: expected parts of {steps} steps and a result that is a sum, found {tile.splits} and {mode}")
    added = mode in ("residual", "upsample") and not parts
    columns = min(tile.columns, power_of_two(out_channels, 16))
    pixels, channel_rows = blocks(kind, tile.rows, tile.depth), blocks(kind, columns, tile.depth)
    out = pointer("u8" if mode == "pixels" else kind)
    if mode not in ("pixels", "upsample"):
        out = blocks("fp32" if parts else kind, tile.rows, columns // tile.slices)
    signature, absent = arguments({
        "x": pixels, "weight": channel_rows, "bias": pointer(None if parts else kind), "skip": pixels if added else None,
        "select": channel_rows if added else None, "out": out,
    })  # fmt: skip
    starts = first and mode == "upsample"
    sizes = {
        "T": frames, "H": height, "W": width, "STRIDE": frame_stride(height, width), "C": channels, "N": out_channels,
        "MADE": frame_stride(2 * height, 2 * width), "FIRST": starts, "PATCH": patch if mode == "pixels" else 1,
        "MODE": MODES["plain" if parts else mode],
    }  # fmt: skip
    tiles = {
        "BM": tile.rows, "BN": columns, "BK": tile.depth, "GROUP": tile.group, "SLICES": tile.slices,
        "SPLITS": tile.splits,
    }  # fmt: skip
    label = f"parts{tile.splits}" if parts else f"{mode}{'.first' if starts else ''}"
    count = "T * cdiv(H * (W + 2), BM) * cdiv(N, BN) * SPLITS"
    return KernelVariant(
        name=f"conv.causal.{frames}x{height}x{width}.c{channels}.n{out_channels}.{label}.{kind}.tma",
        kernel=f"{TMA_KERNELS}:causal_conv", signature=signature, constexprs=absent | sizes | tiles | {"PRECISION": "ieee", "BF16": kind == "bf16"},
        grid=(f"min({count}, {tile.persistent} * SMS)", "1", "1"), grid_sizes=("SMS",),
        num_warps=tile.warps, num_stages=tile.stages, hot=True,
    )  # fmt: skip


@cache
def summed(kind: str, rows: int, out_channels: int, splits: int, residual: bool) -> KernelVariant:
    """Sum of a convolution's parts over `rows` pixels, its bias and its residual."""
    entries = {"parts": pointer("fp32"), "bias": pointer(kind), "residual": pointer(kind if residual else None), "out": pointer(kind)}
    signature, absent = arguments(entries)
    return KernelVariant(
        name=f"conv.summed.m{rows}.n{out_channels}.parts{splits}.{'residual.' if residual else ''}{kind}", kernel=f"{FRAMES}:summed",
        signature=signature, constexprs=absent | {"ROWS": rows, "N": out_channels, "SPLITS": splits, "B": 1024},
        grid=("cdiv(ROWS * N, B)", "1", "1"), num_warps=4, num_stages=1,
    )  # fmt: skip
