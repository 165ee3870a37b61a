"""Exact NVFP4 and FP8 number formats in plain torch.

NVFP4: e2m1 values in blocks of 16 along the last axis, one e4m3 scale a block, one float32 scale a tensor. The numerics are those of NVIDIA's model
optimizer and of the ONNX FLOAT4E2M1 type (specification of the format: "Introducing NVFP4", NVIDIA 2025; OCP Microscaling Formats v1.0 for e2m1):
global scale = amax / (6 * 448); block scale = e4m3(block amax / (6 * global scale)) clamped to [2^-9, 448]; e2m1 rounds to nearest even; the even
element of a pair is the low nibble. FP8: e4m3 values with one scale a tensor or a row, scale = amax / 448.

Shapes: M rows, K columns (the contraction axis), R and J the 128-row and 4-block tiles of a swizzled scale tensor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

BLOCK = 16
E2M1_MAX = 6.0
E4M3_MAX = 448.0
E4M3_SMALLEST = 2.0**-9
# The eight magnitudes of e2m1 by code; bit 3 is the sign.
E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Magnitudes half-way between two codes. A tie goes to the even code: at an odd position of this list that is the upper one.
E2M1_MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)

Layout = Literal["rows", "swizzled"]


@dataclass(frozen=True)
class Fp8Tensor:
    """e4m3 values (..., K) and their float32 scale: () for the tensor, or (...,) one a row. value = scale * e4m3."""

    values: Tensor
    scale: Tensor

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The represented numbers (..., K); exact in float64."""
        scale = self.scale.to(dtype)
        return self.values.to(dtype) * (scale if scale.dim() == 0 else scale.unsqueeze(-1))


@dataclass(frozen=True)
class Nvfp4Tensor:
    """Packed e2m1 values (..., K/2) uint8, e4m3 block scales, and the float32 global scale (). value = global * block scale * e2m1.

    `layout` of the scales: "rows" is (..., K/16); "swizzled" is (R, J, 32, 4, 4), what tcgen05 and cuBLASLt read, of all rows flattened.
    """

    packed: Tensor
    scales: Tensor
    global_scale: Tensor
    layout: Layout = "rows"

    def block_scales(self) -> Tensor:
        """Block scales in row layout, (..., K/16) e4m3."""
        if self.layout == "rows":
            return self.scales
        *lead, width = self.packed.shape
        return unswizzle_scales(self.scales, math.prod(lead), width * 2 // BLOCK).view(*lead, -1)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The represented numbers (..., K); exact in float64."""
        values = decode_e2m1(unpack_e2m1(self.packed), dtype).unflatten(-1, (-1, BLOCK))
        scales = self.block_scales().to(dtype) * self.global_scale.to(dtype)
        return (values * scales.unsqueeze(-1)).flatten(-2)

    def swizzled(self) -> Nvfp4Tensor:
        """The same tensor with its scales in the 128x4 layout."""
        if self.layout == "swizzled":
            return self
        return Nvfp4Tensor(self.packed, swizzle_scales(self.scales.flatten(0, -2)), self.global_scale, "swizzled")


def _finite_amax(x: Tensor) -> Tensor:
    """Largest magnitude of x as a float32 scalar; raises ValueError where x is empty or has an infinity or NaN."""
    if x.numel() == 0:
        raise ValueError(f"expected a tensor with elements to quantize, found shape {tuple(x.shape)}")
    amax = x.abs().amax().float()
    if not torch.isfinite(amax):
        raise ValueError("expected finite values to quantize, found an infinity or NaN; look for the layer that made it")
    return amax


def _scale_of(amax: Tensor, largest: float) -> Tensor:
    """amax / largest, 1 where amax is 0, never below the smallest normal float32 (a division by it must stay finite)."""
    # Division by a number is a product with its reciprocal on CUDA, which may be off by a unit in the last place; by a tensor it is exact.
    scale = (amax / torch.full_like(amax, largest)).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.where(amax > 0, scale, torch.ones_like(scale))


def _check_scale(scale: Tensor) -> None:
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise ValueError("expected positive finite scales, found zero, a negative number, an infinity or NaN; calibrate again")


def to_e4m3(x: Tensor) -> Tensor:
    """x rounded to e4m3, nearest even, saturating at 448."""
    return x.float().clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def quantize_fp8(x: Tensor, scale: Tensor | None = None, *, per_row: bool = False) -> Fp8Tensor:
    """x (..., K) to e4m3.

    Without `scale` it is amax / 448 of the tensor, or of each row with `per_row`; a given scale (a calibrated one: () or (...,)) saturates what
    exceeds it. Raises ValueError for an infinity or NaN in x and for a scale that is not positive.
    """
    _finite_amax(x)
    x = x.float()
    if scale is None:
        scale = _scale_of(x.abs().amax(-1) if per_row else x.abs().amax(), E4M3_MAX)
    scale = scale.float()
    if scale.dim() and scale.shape != x.shape[:-1]:
        raise ValueError(
            f"expected a scale of shape () or {tuple(x.shape[:-1])} for values of shape {tuple(x.shape)}, found {tuple(scale.shape)}"
        )
    _check_scale(scale)
    return Fp8Tensor(to_e4m3(x / (scale.unsqueeze(-1) if scale.dim() else scale)), scale)


def round_e2m1(x: Tensor) -> Tensor:
    """Codes 0..15 (uint8) of the e2m1 numbers nearest to x, ties to the even code, saturating at 6. Zero and what rounds to it from above is 0."""
    magnitude = x.abs()
    code = torch.zeros_like(magnitude, dtype=torch.uint8)
    for position, midpoint in enumerate(E2M1_MIDPOINTS):
        code += magnitude >= midpoint if position % 2 else magnitude > midpoint
    return code | ((x < 0).to(torch.uint8) << 3)


def decode_e2m1(codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers of e2m1 codes 0..15, same shape."""
    table = torch.tensor(E2M1_MAGNITUDES + tuple(-v for v in E2M1_MAGNITUDES), dtype=dtype, device=codes.device)
    return table[codes.int()]


def pack_e2m1(codes: Tensor) -> Tensor:
    """Codes (..., K) to bytes (..., K/2): element 2i in the low nibble, 2i + 1 in the high one. Raises ValueError for an odd K."""
    if codes.shape[-1] % 2:
        raise ValueError(f"expected an even number of e2m1 codes in a row, found {codes.shape[-1]}")
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_e2m1(packed: Tensor) -> Tensor:
    """Bytes (..., K/2) to codes (..., K)."""
    return torch.stack((packed & 0xF, packed >> 4), -1).flatten(-2)


def nvfp4_global_scale(x: Tensor) -> Tensor:
    """amax / (6 * 448), float32 (); 1 for a tensor of zeros. Raises ValueError for an infinity or NaN."""
    return _scale_of(_finite_amax(x), E2M1_MAX * E4M3_MAX)


def nvfp4_block_scales(x: Tensor, global_scale: Tensor) -> Tensor:
    """e4m3 scales (..., K/16) of x (..., K) under a global scale: nearest even, clamped to [2^-9, 448]."""
    amax = x.float().unflatten(-1, (-1, BLOCK)).abs().amax(-1)
    return to_e4m3((amax / (E2M1_MAX * global_scale)).clamp(E4M3_SMALLEST, E4M3_MAX))


def quantize_nvfp4(
    x: Tensor, global_scale: Tensor | None = None, block_scales: Tensor | None = None, *, layout: Layout = "rows"
) -> Nvfp4Tensor:
    """x (..., K), K a multiple of 16, to NVFP4.

    `global_scale` (): a calibrated one, or None for amax / 2688 of x itself. `block_scales` (..., K/16) e4m3: a searched set, or None for the block
    maxima. Raises ValueError for an infinity or NaN, a K that is not a multiple of 16, and scales that are not positive.
    """
    if x.dim() == 0 or x.shape[-1] % BLOCK:
        raise ValueError(
            f"expected a last axis that is a multiple of {BLOCK}, found shape {tuple(x.shape)}; pad the contraction axis with zeros"
        )
    amax = _finite_amax(x)
    global_scale = _scale_of(amax, E2M1_MAX * E4M3_MAX) if global_scale is None else global_scale.float()
    if global_scale.dim():
        raise ValueError(f"expected one global scale (), found shape {tuple(global_scale.shape)}")
    _check_scale(global_scale)
    scales = nvfp4_block_scales(x, global_scale) if block_scales is None else block_scales
    if scales.dtype != torch.float8_e4m3fn or scales.shape != (*x.shape[:-1], x.shape[-1] // BLOCK):
        raise ValueError(f"expected e4m3 block scales {(*x.shape[:-1], x.shape[-1] // BLOCK)}, found {tuple(scales.shape)} {scales.dtype}")
    _check_scale(scales.float())
    scaled = x.float().unflatten(-1, (-1, BLOCK)) / (scales.float() * global_scale).unsqueeze(-1)
    result = Nvfp4Tensor(pack_e2m1(round_e2m1(scaled.flatten(-2))), scales, global_scale)
    return result.swizzled() if layout == "swizzled" else result


def swizzle_scales(scales_MJ: Tensor) -> Tensor:
    """Block scales (M, K/16) to the 128x4 tiles that tcgen05 and cuBLASLt read, (ceil(M/128), ceil(K/64), 32, 4, 4), padded with zero bytes.

    A tile holds 128 rows by 4 blocks; the element of row r and block j is at [r % 32, r // 32, j] (cuBLAS documentation, "1D block scaling
    factors layout").
    """
    if scales_MJ.dim() != 2:
        raise ValueError(
            f"expected two-dimensional block scales to swizzle, found shape {tuple(scales_MJ.shape)}; flatten the leading axes"
        )
    rows, blocks = scales_MJ.shape
    R, J = -(-rows // 128), -(-blocks // 4)
    padded = torch.zeros(R * 128, J * 4, dtype=torch.uint8, device=scales_MJ.device)
    padded[:rows, :blocks] = scales_MJ.view(torch.uint8)
    return padded.reshape(R, 4, 32, J, 4).permute(0, 3, 2, 1, 4).contiguous().view(scales_MJ.dtype)


def unswizzle_scales(swizzled: Tensor, rows: int, blocks: int) -> Tensor:
    """Inverse of `swizzle_scales`: (R, J, 32, 4, 4) to (rows, blocks). Raises ValueError where the tiles do not hold that many."""
    if swizzled.dim() != 5 or swizzled.shape != (-(-rows // 128), -(-blocks // 4), 32, 4, 4):
        raise ValueError(f"expected swizzled scales of {rows} rows and {blocks} blocks, found shape {tuple(swizzled.shape)}")
    R, J = swizzled.shape[:2]
    flat = swizzled.view(torch.uint8).permute(0, 3, 2, 1, 4).reshape(R * 128, J * 4)
    return flat[:rows, :blocks].contiguous().view(swizzled.dtype)
