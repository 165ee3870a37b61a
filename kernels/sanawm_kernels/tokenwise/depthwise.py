"""Triton kernel of the FFN's depthwise 3x3 convolution with bias and gated linear unit, channels last.

A program walks down BX columns of one frame and one block of channels, value half and gate half together. Of each input row it reads the tile
shifted by -1, 0 and +1 columns (the second and third from the first-level cache) and adds it to the three output rows it touches, two of which
wait in registers: nine products an element from three reads, each input byte once from memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sanawm_kernels.quant.triton import NO_CODES, NVFP4, nvfp4_blocks, saturate_e4m3, scale_offset


@triton.jit
def _load_row(x, y, first_pixel, x_row, column, channel, present, H: tl.constexpr, W: tl.constexpr):
    """Row y of the frame as (left, centre, right), zero outside the image; column (BX, 1), channel and present (1, BC)."""
    at = x + (first_pixel + y * W + column).to(tl.int64) * x_row + channel
    inside = (y >= 0) & (y < H) & (column < W) & present
    left = tl.load(at - x_row, mask=inside & (column > 0), other=0.0)
    centre = tl.load(at, mask=inside, other=0.0)
    right = tl.load(at + x_row, mask=inside & (column < W - 1), other=0.0)
    return left, centre, right


@triton.jit
def _kernel_row(taps, K: tl.constexpr, channel, present, G: tl.constexpr):
    """Row K of the 3x3 kernels as three (1, BC) float32 vectors."""
    at = taps + 3 * K * 2 * G + channel
    w0 = tl.load(at, mask=present, other=0.0).to(tl.float32)
    w1 = tl.load(at + 2 * G, mask=present, other=0.0).to(tl.float32)
    w2 = tl.load(at + 4 * G, mask=present, other=0.0).to(tl.float32)
    return w0, w1, w2


@triton.jit
def _weighted(row, w):
    return row[0].to(tl.float32) * w[0] + row[1].to(tl.float32) * w[1] + row[2].to(tl.float32) * w[2]


@triton.jit
def depthwise_glu(
    x, x_row, taps, bias, out, codes, scales, quant_scale,
    H: tl.constexpr, W: tl.constexpr, G: tl.constexpr, BX: tl.constexpr, BC: tl.constexpr, STRIP: tl.constexpr,
    STAGES: tl.constexpr, QUANT: tl.constexpr, SWIZZLED: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(G, BC), cdiv(W, BX) * cdiv(H, STRIP), frames). x (frames * H * W, 2G), taps (9, 2G), bias (2G,); STRIP output rows a program."""
    channel = tl.program_id(0) * BC + tl.arange(0, BC)[None, :]
    tiles = (W + BX - 1) // BX
    column = tl.program_id(1) % tiles * BX + tl.arange(0, BX)[:, None]
    y0 = tl.program_id(1) // tiles * STRIP
    first_pixel = tl.program_id(2) * (H * W)
    present = channel < G
    v0, g0 = _kernel_row(taps, 0, channel, present, G), _kernel_row(taps, 0, channel + G, present, G)
    v1, g1 = _kernel_row(taps, 1, channel, present, G), _kernel_row(taps, 1, channel + G, present, G)
    v2, g2 = _kernel_row(taps, 2, channel, present, G), _kernel_row(taps, 2, channel + G, present, G)
    v_bias = tl.load(bias + channel, mask=present, other=0.0).to(tl.float32)
    g_bias = tl.load(bias + G + channel, mask=present, other=0.0).to(tl.float32)

    # v_above waits for output row y - 1, v_here for row y, when input row y arrives.
    v_above = tl.zeros((BX, BC), tl.float32)
    g_above = tl.zeros((BX, BC), tl.float32)
    v_here = v_above + v_bias
    g_here = g_above + g_bias
    for step in tl.range(0, STRIP + 2, num_stages=STAGES):
        y = y0 - 1 + step
        v_row = _load_row(x, y, first_pixel, x_row, column, channel, present, H, W)
        g_row = _load_row(x, y, first_pixel, x_row, column, channel + G, present, H, W)
        value = v_above + _weighted(v_row, v2)
        gate = g_above + _weighted(g_row, g2)
        v_above = v_here + _weighted(v_row, v1)
        g_above = g_here + _weighted(g_row, g1)
        v_here = v_bias + _weighted(v_row, v0)
        g_here = g_bias + _weighted(g_row, g0)
        if (step >= 2) & (y <= H):
            pixel = (first_pixel + (y - 1) * W + column).to(tl.int64)
            mask = (column < W) & present
            result = (value * gate * tl.sigmoid(gate)).to(x.dtype.element_ty)
            if out is not None:
                tl.store(out + pixel * G + channel, result, mask=mask)
            if QUANT == NVFP4:
                packed, steps = nvfp4_blocks(result.to(tl.float32), tl.load(quant_scale), BX, BC // 16, NATIVE)
                byte = tl.program_id(0) * (BC // 2) + tl.arange(0, BC // 2)[None, :]
                tl.store(codes + pixel * (G // 2) + byte, packed, mask=(column < W) & (byte < G // 2))
                block = tl.program_id(0) * (BC // 16) + tl.arange(0, BC // 16)[None, :]
                tl.store(scales + scale_offset(pixel, block, G // 16, SWIZZLED), steps, mask=(column < W) & (block < G // 16))
            elif QUANT != NO_CODES:
                inverse = tl.math.div_rn(1.0, tl.load(quant_scale))
                tl.store(codes + pixel * G + channel, saturate_e4m3(result.to(tl.float32) * inverse), mask=mask)
