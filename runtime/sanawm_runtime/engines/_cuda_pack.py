"""Packed weights: how each tensor that the kernels read is made from the checkpoint's tensors.

A recipe is data, so that a bundle without weights can make them where it is opened. Packing is the same numpy code in both cases.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sanawm.bfloat16 import round_to, to_bits
from sanawm_runtime.engines._cuda_plan import ITEM_BYTES

Array = NDArray[Any]
# A checkpoint tensor in float32 by its official name and shape.
Read = Callable[[str, tuple[int, ...]], NDArray[np.float32]]
Op = Literal[
    "rows", "temporal", "taps", "composed", "modulation", "constant", "conv", "conv_upsample", "conv_pixels", "frame_conv", "gain", "calibrated"
]
Encoding = Literal["plain", "fp8_codes", "fp8_scales", "nvfp4_codes", "nvfp4_scales", "nvfp4_global"]

_NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16, "float8_e4m3fn": np.uint8, "uint8": np.uint8, "bool": np.uint8}
E4M3_MAX, E2M1_MAX, BLOCK = 448.0, 6.0, 16
# Elements that are rounded at once: few enough to stay in a core's cache.
PIECE = 1 << 18
# Operations that compute with the weights, which must be rounded first.
_SUMMED = ("composed", "frame_conv", "gain", "modulation")


@dataclass(frozen=True)
class Source:
    """A checkpoint tensor; without a name zeros of that shape."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Packed:
    """A packed tensor.

    op: `rows` stacks the sources along their first axis and pads with zeros; `temporal` turns a (C, C, 3, 1) convolution into (C, 3C);
    `taps` turns a depthwise (G, 1, 3, 3) kernel into (9, G); `composed` makes one linear layer of two, whose sources are weight and bias of the
    last one and then of the first: the product of the weights (N, K), or the bias (N,) along with it; `conv*` turn a (N, C, 3, 3, 3) convolution
    into (N, 27 C), or a bias along with it, with the output channels in the order in which an upsampling or an image's pixels are stored;
    `frame_conv` turns it into (N, 9 C) by summing its time taps, and keeps its first outputs where the packed tensor has fewer; `gain` adds 1 to a
    norm's weight; `modulation` computes the AdaLN rows of the timesteps in `values`; `constant` holds `values`; `calibrated` was quantized from the
    sources by the builder, which alone can make it. Weights are rounded to `rounding` before they are encoded.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    op: Op = "rows"
    sources: tuple[Source, ...] = ()
    values: tuple[float, ...] = ()
    encoding: Encoding = "plain"
    rounding: str = "bfloat16"

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    def make(self, read: Read) -> Array:
        """The tensor as an array of its storage type (bfloat16 as uint16 bits, e4m3 as uint8), shape `shape`.

        Raises ValueError for a `calibrated` one.
        """
        if self.op == "calibrated":
            raise ValueError(f"{self.name} was quantized with calibrated scales when the bundle was built and cannot be made from the weights")
        values = _ENCODINGS[self.encoding](self._float32(read))
        stored = _bits(values) if self.dtype == "bfloat16" else values.astype(_NUMPY[self.dtype], copy=False)
        return np.ascontiguousarray(stored).reshape(self.shape)

    def _float32(self, read: Read) -> NDArray[np.float32]:
        if self.op == "constant":
            return np.array(self.values, np.float32).reshape(self.shape)
        if self.op == "modulation":
            return modulation_rows(self, read)
        # What is only moved is rounded where it is stored: the largest tensor has 2 GB, and a copy less of it is worth a line.
        rounding = "float32" if self.dtype == self.rounding and self.encoding == "plain" and self.op not in _SUMMED else self.rounding
        parts = [_rounded(read(s.name, s.shape), rounding) if s.name else np.zeros(s.shape, np.float32) for s in self.sources]
        if self.op == "gain":
            return parts[0] + np.float32(1)
        if self.op == "frame_conv":
            return _frame_convolution(parts[0][: self.shape[0]])
        if self.op == "composed":
            return _composed(parts, bias=len(self.shape) == 1)
        if self.op == "temporal":
            return parts[0][..., 0].transpose(0, 2, 1).reshape(parts[0].shape[0], -1)
        if self.op == "taps":
            return np.ascontiguousarray(parts[0].reshape(-1, 9).T)
        if self.op.startswith("conv"):
            return _convolution(parts[0], self.op)
        if len(parts) == 1 and parts[0].shape == self.shape:
            return parts[0]
        rows = np.concatenate([p.reshape(p.shape[0], -1) for p in parts])
        missing = self._rows - len(rows)
        return np.concatenate((rows, np.zeros((missing, rows.shape[1]), np.float32))) if missing else rows

    @property
    def _rows(self) -> int:
        """Rows before encoding."""
        return sum(s.shape[0] for s in self.sources) if self.encoding == "nvfp4_global" else self.shape[0]


def _by_rows(values: NDArray[np.float32], dtype: Any, action: Callable[[NDArray[np.float32], slice], Array]) -> Array:
    """`action` on some rows at a time, given where they are: its own tensors would be many times as large as the result."""
    result = np.empty(values.shape, dtype)
    step = max(1, PIECE * len(values) // max(1, values.size))
    for start in range(0, len(values), step):
        rows = slice(start, start + step)
        result[rows] = action(values[rows], rows)
    return result


def _bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """bfloat16 bits."""
    return _by_rows(values, np.uint16, lambda rows, _: to_bits(rows))


def _rounded(values: NDArray[np.float32], dtype: str) -> NDArray[np.float32]:
    """What `round_to` gives."""
    return values if dtype == "float32" else _by_rows(values, np.float32, lambda rows, _: round_to(rows, dtype))


def _frame_convolution(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """A kernel (N, C, 3, 3, 3) that sees one frame three times as (N, 9 C) with channels innermost, or a bias (N,) as it is."""
    if x.ndim == 1:
        return x
    return (x[:, :, 0] + x[:, :, 1] + x[:, :, 2]).transpose(0, 2, 3, 1).reshape(len(x), -1)


def _composed(parts: list[NDArray[np.float32]], *, bias: bool) -> NDArray[np.float32]:
    """Weight (N, K) or bias (N,) of the layer (N, C), (N,) on what the layer (C, K, ...), (C,) makes, from the four; summed in float64."""
    last, last_bias, first, first_bias = (part.astype(np.float64) for part in parts)
    made = last @ first_bias + last_bias if bias else last @ first.reshape(len(first), -1)
    return made.astype(np.float32)


def _convolution(x: NDArray[np.float32], op: str) -> NDArray[np.float32]:
    """A kernel (N, C, 3, 3, 3) as rows of taps with channels innermost, or a bias (N,); N reordered for what follows."""
    rows = x if x.ndim == 1 else x.transpose(0, 2, 3, 4, 1).reshape(len(x), -1)
    if op == "conv_upsample":  # channel 8c + sub-pixel becomes sub-pixel * N/8 + c
        return np.ascontiguousarray(rows[np.arange(len(rows)).reshape(-1, 8).T.reshape(-1)])
    if op == "conv_pixels":  # colour, column, row in the patch becomes row, column, colour
        side = math.isqrt(len(rows) // 3)
        return np.ascontiguousarray(rows[np.arange(len(rows)).reshape(3, side, side).transpose(2, 1, 0).reshape(-1)])
    return rows


def modulation_rows(packed: Packed, read: Read) -> NDArray[np.float32]:
    """AdaLN rows of the timesteps `values`: for each, every block's 6C and the final layer's 2C (SANA-WM paper, arXiv 2605.15178).

    Sources: the two layers of the timestep MLP (weight, bias each), t_block's layer, every block's table, the final layer's table.
    """

    def take(source: Source) -> NDArray[np.float64]:
        return round_to(read(source.name, source.shape), packed.rounding).astype(np.float64)

    first, first_bias, second, second_bias, block, block_bias, *tables = packed.sources
    half = first.shape[1] // 2
    # The model computes the sinusoid's angle in float32.
    frequency = np.exp(np.arange(half, dtype=np.float32) * np.float32(-math.log(10000.0) / half)).astype(np.float32)
    angle = np.trunc(np.array(packed.values, np.float32))[:, None] * frequency
    wave = np.concatenate((np.cos(angle), np.sin(angle)), -1).astype(np.float64)
    hidden = wave @ take(first).T + take(first_bias)
    t = _silu(hidden) @ take(second).T + take(second_bias)
    shared = _silu(t) @ take(block).T + take(block_bias)
    *blocks, final = (take(table) for table in tables)
    rows = [shared + table.reshape(1, -1) for table in blocks]
    rows.append((t[:, None] + final[None]).reshape(len(t), -1))
    return np.concatenate(rows, 1).astype(np.float32)


def _silu(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return x / (1 + np.exp(-x))


@cache
def _e4m3_values() -> NDArray[np.float32]:
    """The 127 finite non-negative e4m3 numbers, ascending; an index is its code."""
    code = np.arange(127)
    exponent, mantissa = code >> 3, code & 7
    normal = (8 + mantissa) * 2.0 ** (exponent - 10)
    return np.where(exponent == 0, mantissa * 2.0**-9, normal).astype(np.float32)


def to_e4m3(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """float32 to e4m3 codes: nearest, ties to even, saturating; NaN stays NaN."""
    magnitude = np.minimum(np.abs(values), np.float32(E4M3_MAX))
    bits = magnitude.view(np.uint32)
    # The upper three bits of the mantissa stay; 120 is the difference of the exponents' biases.
    code = ((bits + (((bits >> 20) & 1) + np.uint32(0x7FFFF))) >> 20) - np.uint32(120 << 3)
    # Below the smallest normal number codes count 2**-9; numpy's rint rounds half to even.
    code = np.where(magnitude < np.float32(2.0**-6), np.rint(magnitude * np.float32(512)), code).astype(np.uint8)
    code = np.where(np.isnan(magnitude), np.uint8(127), code)
    return np.where(np.signbit(values), code | np.uint8(128), code)


def from_e4m3(codes: NDArray[np.uint8]) -> NDArray[np.float32]:
    """e4m3 codes to float32; the two NaN codes stay NaN."""
    table = np.append(_e4m3_values(), np.float32(np.nan))
    return table[codes & 127] * np.where(codes & 128, np.float32(-1), np.float32(1))


def _fp8_scales(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """One scale a row, its largest magnitude over 448; 1 for a row of zeros."""
    largest = np.abs(rows).max(1)
    return np.where(largest > 0, np.maximum(largest / np.float32(E4M3_MAX), np.finfo(np.float32).tiny), np.float32(1)).astype(np.float32)


def _fp8_codes(rows: NDArray[np.float32]) -> NDArray[np.uint8]:
    scales = _fp8_scales(rows)[:, None]
    return _by_rows(rows, np.uint8, lambda some, where: to_e4m3(some / scales[where]))


def _nvfp4_global(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    return (np.abs(rows).max() / np.float32(E2M1_MAX * E4M3_MAX)).astype(np.float32)


def _nvfp4_scales(rows: NDArray[np.float32]) -> NDArray[np.uint8]:
    blocks = np.abs(rows).reshape(len(rows), -1, BLOCK).max(-1)
    wanted = blocks / (np.float32(E2M1_MAX) * _nvfp4_global(rows))
    return to_e4m3(np.clip(wanted, np.float32(2.0**-9), np.float32(E4M3_MAX)))


def _nvfp4_codes(rows: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Two e2m1 codes a byte, the even column in the low half."""
    step = from_e4m3(_nvfp4_scales(rows)) * _nvfp4_global(rows)
    scaled = rows.reshape(len(rows), -1, BLOCK) / step[..., None]
    a = np.abs(scaled)
    code = (scaled < 0).astype(np.uint8) * np.uint8(8)
    # Thresholds between neighbours; `>` and `>=` alternate so that ties go to the even code.
    for threshold in (0.25, 1.25, 2.5, 5.0):
        code += a > threshold
    for threshold in (0.75, 1.75, 3.5):
        code += a >= threshold
    code = code.reshape(len(rows), -1)
    packed: NDArray[np.uint8] = code[:, 0::2] + code[:, 1::2] * np.uint8(16)
    return packed


_ENCODINGS: Mapping[str, Callable[[NDArray[np.float32]], Array]] = {
    "plain": lambda rows: rows,
    "fp8_codes": _fp8_codes,
    "fp8_scales": _fp8_scales,
    "nvfp4_codes": _nvfp4_codes,
    "nvfp4_scales": _nvfp4_scales,
    "nvfp4_global": _nvfp4_global,
}
