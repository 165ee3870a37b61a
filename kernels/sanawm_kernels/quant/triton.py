"""Triton building blocks that round to FP8 and NVFP4.

They give the codes of `formats`, except that elements are multiplied by the reciprocal of their scale instead of divided by it: a number within
two units in the last place of a tie may go to the other side.

Shapes: R rows of a tile, J blocks of 16 in a row.
"""

from __future__ import annotations

import triton
import triton.language as tl

# What a kernel writes beside its plain output.
NO_CODES = tl.constexpr(0)
FP8 = tl.constexpr(1)  # one given scale
FP8_ROWS = tl.constexpr(2)  # a scale a row, from the row's maximum
NVFP4 = tl.constexpr(3)  # block scales under one given global scale

_PACK_NATIVE = tl.constexpr("""{
    .reg .b8 b0, b1, b2, b3;
    cvt.rn.satfinite.e2m1x2.f32 b0, $5, $1;
    cvt.rn.satfinite.e2m1x2.f32 b1, $6, $2;
    cvt.rn.satfinite.e2m1x2.f32 b2, $7, $3;
    cvt.rn.satfinite.e2m1x2.f32 b3, $8, $4;
    mov.b32 $0, {b0, b1, b2, b3};
}""")


ROUND_PAIR = tl.constexpr("""{
    .reg .b32 pair;
    cvt.rn.bf16x2.f32 pair, $3, $2;
    shl.b32 $0, pair, 16;
    and.b32 $1, pair, 0xffff0000;
}""")


@triton.jit
def rounded(x, KIND: tl.constexpr):
    """float32 x rounded to the numbers of a dtype, in float32.

    To bfloat16 two at once: of `x.to(KIND).to(tl.float32)` the compiler makes conversions of single elements, each an instruction of the unit for
    conversions and roots.
    """
    if tl.bfloat16 == KIND:
        return tl.inline_asm_elementwise(ROUND_PAIR, "=f,=f,f,f", [x], dtype=tl.float32, is_pure=True, pack=2)
    else:
        return x.to(KIND).to(tl.float32)


@triton.jit
def e2m1_codes(x):
    """Codes 0..15 (uint8) of float32 x: nearest, ties to the even code, saturating."""
    a = tl.abs(x)
    code = (a > 0.25).to(tl.uint8) + (a >= 0.75).to(tl.uint8) + (a > 1.25).to(tl.uint8) + (a >= 1.75).to(tl.uint8)
    code += (a > 2.5).to(tl.uint8) + (a >= 3.5).to(tl.uint8) + (a > 5.0).to(tl.uint8)
    return tl.where(x < 0.0, code + 8, code).to(tl.uint8)


@triton.jit
def e2m1_bytes(low, high, NATIVE: tl.constexpr):
    """Two e2m1 codes a byte. NATIVE uses the conversion instruction of Blackwell, whose code of -0 is 8."""
    if NATIVE:
        return tl.inline_asm_elementwise(_PACK_NATIVE, "=r,f,f,f,f,f,f,f,f", [low, high], dtype=tl.uint8, is_pure=True, pack=4)
    else:
        return e2m1_codes(low) | (e2m1_codes(high) << 4)


@triton.jit
def nvfp4_blocks(x, global_scale, R: tl.constexpr, J: tl.constexpr, NATIVE: tl.constexpr):
    """x (R, 16 J) float32 to packed bytes (R, 8 J) and e4m3 scales (R, J) under a float32 global scale."""
    blocks = tl.reshape(x, (R, J, 16))
    amax = tl.max(tl.abs(blocks), 2)
    wanted = tl.math.div_rn(amax, 6.0 * global_scale)
    scales = tl.minimum(tl.maximum(wanted, 0.001953125), 448.0).to(tl.float8e4nv)
    inverse = tl.math.div_rn(1.0, scales.to(tl.float32) * global_scale)
    low, high = tl.split(tl.reshape(blocks * inverse[:, :, None], (R, J, 8, 2)))
    return tl.reshape(e2m1_bytes(low, high, NATIVE), (R, 8 * J)), scales


@triton.jit
def scale_offset(row, block, blocks, SWIZZLED: tl.constexpr):
    """Element offset of the scale of (row, block) in a tensor with `blocks` blocks a row, in rows or in 128x4 tiles."""
    if SWIZZLED:
        tile = (row // 128) * ((blocks + 3) // 4) + block // 4
        return tile * 512 + (row % 32) * 16 + (row % 128) // 32 * 4 + block % 4
    else:
        return row * blocks + block


@triton.jit
def saturate_e4m3(x):
    """float32 x to e4m3, nearest even; the conversion (`cvt.rn.satfinite`) saturates at 448 and keeps NaN."""
    return x.to(tl.float8e4nv)


@triton.jit
def store_row(
    x, codes, scales, scale, row, column, blocks, inside, W: tl.constexpr, QUANT: tl.constexpr, SWIZZLED: tl.constexpr, NATIVE: tl.constexpr
):
    """Quantize and store W float32 elements x of a row, which start at `column` (a multiple of 16); `inside` masks the row's end, or is None.

    scale: the float32 scale of FP8, the row's own scale of FP8_ROWS, the global scale of NVFP4; blocks: 16-element blocks of a whole row.
    """
    if QUANT == NVFP4:
        packed, steps = nvfp4_blocks(tl.reshape(x, (1, W)), scale, 1, W // 16, NATIVE)
        byte = column // 2 + tl.arange(0, W // 2)
        tl.store(codes + row * (8 * blocks) + byte, tl.reshape(packed, (W // 2,)), mask=byte < 8 * blocks)
        block = column // 16 + tl.arange(0, W // 16)
        tl.store(scales + scale_offset(row, block, blocks, SWIZZLED), tl.reshape(steps, (W // 16,)), mask=block < blocks)
    else:
        inverse = tl.math.div_rn(1.0, scale)
        tl.store(codes + row * (16 * blocks) + column + tl.arange(0, W), saturate_e4m3(x * inverse), mask=inside)
