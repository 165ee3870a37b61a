"""Triton kernel of window attention.

A head of 112 channels sits in tiles of 128 whose last 16 lanes are neither read nor written: memory traffic is exact, 1/8 of the matrix work
multiplies zeros. Splitting a head as 64 + 32 + 16 would avoid those products, but its second product has 16- and 32-column instructions, which
read as much of the left operand as a 128-column one.

Keys come in up to three segments with their own pointers and strides, so that caches are never concatenated; one pipelined loop goes through the
blocks of all of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sanawm_kernels.gdn.transforms import camera_rotary_tile, ucpe
from sanawm_kernels.quant.triton import NO_CODES, NVFP4, nvfp4_blocks, rounded, saturate_e4m3, scale_offset

LOG2_E = tl.constexpr(1.4426950408889634)
# Probabilities in (0, 1] use the upper half of e4m3's range when they are multiplied by this power of two; it cancels in the division.
P_SHIFT = tl.constexpr(8.0)


@triton.jit
def _update(
    q, k_at, v_at, count, m, denominator, acc, scale,
    BN: tl.constexpr, P: tl.constexpr, D: tl.constexpr, FP8: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax over one block of `count` keys. k_at (P, BN), v_at (BN, P) or for FP8 (P, BN) pointers; scale includes log2(e)."""
    key, channel = tl.arange(0, BN), tl.arange(0, P)
    k = tl.load(k_at, mask=(channel < D)[:, None] & (key < count)[None, :], other=0.0)
    logits = tl.dot(q, k, input_precision=PRECISION)
    # The last block of a segment alone pays for masked logits.
    if count < BN:
        logits = tl.where((key < count)[None, :], logits, float("-inf"))
    m_new = tl.maximum(m, tl.max(logits, 1) * scale)
    p = tl.math.exp2(logits * scale - (m_new - P_SHIFT if FP8 else m_new)[:, None])
    old = tl.math.exp2(m - m_new)
    denominator = denominator * old + tl.sum(p, 1)
    if FP8:
        # Rows are padded to whole 16 bytes with finite numbers, whose probabilities are 0: the mask may end there, and loads stay wide.
        v = tl.load(v_at, mask=(channel < D)[:, None] & (key < (count + 15) // 16 * 16)[None, :], other=0.0)
        # Hopper adds e4m3 products with about 14 bits; only a block's own sum is left to it.
        acc = acc * old[:, None] + tl.dot(p.to(v.dtype), tl.trans(v))
    else:
        v = tl.load(v_at, mask=(key < count)[:, None] & (channel < D)[None, :], other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * old[:, None], input_precision=PRECISION)
    return m_new, denominator, acc


@triton.jit
def _pointers(k, k_row, v, v_row, start, BN: tl.constexpr, P: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Addresses of a block of keys (P, BN) and values, (BN, P) or (P, BN)."""
    # One 64-bit address a block and 32-bit offsets inside it, which do not change from block to block.
    key, channel = tl.arange(0, BN), tl.arange(0, P)
    k_at = k + tl.cast(start, tl.int64) * k_row + (channel[:, None] + key[None, :] * k_row)
    if TRANSPOSED:
        return k_at, v + start + (channel[:, None] * v_row + key[None, :])
    else:
        return k_at, v + tl.cast(start, tl.int64) * v_row + (key[:, None] * v_row + channel[None, :])


@triton.jit
def store_heads(
    acc, row, valid, head, out, codes, scales, quant_scale,
    BM: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, P: tl.constexpr, QUANT: tl.constexpr, SWIZZLED: tl.constexpr, NATIVE: tl.constexpr,
    BF16: tl.constexpr,
):  # fmt: skip
    """Store a head's output rows plain, quantized, or both; BF16 rounds to bfloat16 before anything else, as the plain output is."""
    channel = tl.arange(0, P)[None, :]
    mask = valid[:, None] & (channel < D)
    at = row[:, None] * (HEADS * D) + head * D + channel
    if BF16:
        acc = rounded(acc, tl.bfloat16)
    if out is not None:
        tl.store(out + at, acc.to(out.dtype.element_ty), mask=mask)
    if QUANT == NVFP4:
        packed, steps = nvfp4_blocks(acc, tl.load(quant_scale), BM, P // 16, NATIVE)
        byte, block = tl.arange(0, P // 2)[None, :], tl.arange(0, P // 16)[None, :]
        tl.store(codes + row[:, None] * (HEADS * D // 2) + head * (D // 2) + byte, packed, mask=valid[:, None] & (byte < D // 2))
        to = scale_offset(row[:, None], head * (D // 16) + block, HEADS * D // 16, SWIZZLED)
        tl.store(scales + to, steps, mask=valid[:, None] & (block < D // 16))
    elif QUANT != NO_CODES:
        tl.store(codes + at, saturate_e4m3(acc * tl.math.div_rn(1.0, tl.load(quant_scale))), mask=mask)


@triton.jit
def window_attention(
    q, q_row, q_batch, k0, k0_row, k0_batch, v0, v0_row, v0_batch, n0, k1, k1_row, k1_batch, v1, v1_row, v1_batch, n1,
    k2, k2_row, k2_batch, v2, v2_row, v2_batch, n2, q_scale, k_scale, v_scale, rays, cos, sin, out, codes, scales, quant_scale, N, softmax_scale,
    HEADS: tl.constexpr, D: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, RAYS: tl.constexpr,
    QUANT: tl.constexpr, SWIZZLED: tl.constexpr, NATIVE: tl.constexpr, BF16: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(N, BM), HEADS, batch). Segments 1 and 2 may be None. RAYS is N for one set of ray matrices a batch, 0 for a shared set."""
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    FP8: tl.constexpr = q_scale is not None
    token, channel = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, P)
    valid = token < N
    q_at = q + batch * q_batch + token[:, None].to(tl.int64) * q_row + head * D + channel[None, :]
    q_tile = tl.load(q_at, mask=valid[:, None] & (channel < D)[None, :], other=0.0)
    scale = softmax_scale * LOG2_E
    if FP8:
        scale = scale * tl.load(q_scale) * tl.load(k_scale)

    # Segments start at this head: e4m3 values are (head, channel, key), all others (key, head, channel).
    k0 += batch * k0_batch + head * D
    v0 += batch * v0_batch + head * D * (v0_row if FP8 else 1)
    blocks0 = tl.cdiv(n0, BN)
    blocks = blocks0
    blocks1 = blocks0
    if k1 is not None:
        k1 += batch * k1_batch + head * D
        v1 += batch * v1_batch + head * D * (v1_row if FP8 else 1)
        blocks1 += tl.cdiv(n1, BN)
        blocks = blocks1
    if k2 is not None:
        k2 += batch * k2_batch + head * D
        v2 += batch * v2_batch + head * D * (v2_row if FP8 else 1)
        blocks = blocks1 + tl.cdiv(n2, BN)

    m = tl.full((BM,), float("-inf"), tl.float32)
    denominator = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, P), tl.float32)
    for block in range(0, blocks):
        k, k_row, v, v_row, start, n = k0, k0_row, v0, v0_row, block, n0
        if k1 is not None:
            second = block >= blocks0
            k, v = tl.where(second, k1, k), tl.where(second, v1, v)
            k_row, v_row = tl.where(second, k1_row, k_row), tl.where(second, v1_row, v_row)
            start, n = tl.where(second, block - blocks0, start), tl.where(second, n1, n)
        if k2 is not None:
            third = block >= blocks1
            k, v = tl.where(third, k2, k), tl.where(third, v2, v)
            k_row, v_row = tl.where(third, k2_row, k_row), tl.where(third, v2_row, v_row)
            start, n = tl.where(third, block - blocks1, start), tl.where(third, n2, n)
        start *= BN
        k_at, v_at = _pointers(k, k_row, v, v_row, start, BN, P, FP8)
        m, denominator, acc = _update(q_tile, k_at, v_at, n - start, m, denominator, acc, scale, BN, P, D, FP8, PRECISION)

    acc = acc / denominator[:, None]
    if FP8:
        acc *= tl.load(v_scale)
    if rays is not None:
        c, s = camera_rotary_tile(cos, token, valid, P, D), camera_rotary_tile(sin, token, valid, P, D)
        acc = ucpe(acc, rays + (batch * RAYS + token) * 16, valid, c, -s, BM, P, D, False)
    store_heads(acc, batch * N + token, valid, head, out, codes, scales, quant_scale, BM, HEADS, D, P, QUANT, SWIZZLED, NATIVE, BF16)
