"""Triton kernel of the cross-attention over text: query norm, attention over all keys, mask, quantization of the output."""

from __future__ import annotations

import triton
import triton.language as tl

from sanawm_kernels.attention.kernels import LOG2_E, store_heads


@triton.jit
def cross_attention(
    q, q_row, q_batch, k, v, k_row, k_batch, v_row, v_batch, mask, q_norm, squares, out, codes, scales, quant_scale, N, L, softmax_scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr, BP: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, EPS: tl.constexpr, QUANT: tl.constexpr, SWIZZLED: tl.constexpr, NATIVE: tl.constexpr,
    BF16: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(N, BM), HEADS / GROUP, batch). A program normalises its rows once for GROUP heads.

    squares (rows, PARTS): partial sums of the rows' squares; None measures them here, from all channels. mask (batch, L) bytes, 0 for padding.
    """
    batch = tl.program_id(2).to(tl.int64)
    token, channel = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, P)
    valid = token < N
    inside = valid[:, None] & (channel < D)[None, :]
    q_at = q + batch * q_batch + token[:, None].to(tl.int64) * q_row + channel[None, :]
    if squares is not None:
        part = tl.arange(0, BP)
        at = squares + (batch * N + token)[:, None] * PARTS + part[None, :]
        total = tl.sum(tl.load(at, mask=valid[:, None] & (part < PARTS)[None, :], other=0.0), 1)
    else:
        sums = tl.zeros((BM, P), tl.float32)
        for head in range(HEADS):
            value = tl.load(q_at + head * D, mask=inside, other=0.0).to(tl.float32)
            sums += value * value
        total = tl.sum(sums, 1)
    inverse = tl.math.rsqrt(total / (HEADS * D) + EPS)
    for index in range(GROUP):
        head = tl.program_id(1) * GROUP + index
        weight = tl.load(q_norm + head * D + channel, mask=channel < D, other=0.0).to(tl.float32)
        value = tl.load(q_at + head * D, mask=inside, other=0.0).to(tl.float32) * inverse[:, None] * weight[None, :]
        q_tile = value.to(q.dtype.element_ty)
        m = tl.full((BM,), float("-inf"), tl.float32)
        denominator = tl.zeros((BM,), tl.float32)
        acc = tl.zeros((BM, P), tl.float32)
        key = tl.arange(0, BN)
        k_at = k + batch * k_batch + head * D + (channel[:, None] + key[None, :] * k_row)
        v_at = v + batch * v_batch + head * D + (key[:, None] * v_row + channel[None, :])
        real = mask + batch * L + key
        # Bytes of the mask are loaded a step ahead: they are too narrow to be copied ahead to shared memory as keys and values are.
        present = tl.load(real, mask=key < L, other=0) != 0
        for start in range(0, L, BN):
            left = L - start
            k_tile = tl.load(k_at + tl.cast(start, tl.int64) * k_row, mask=(channel < D)[:, None] & (key < left)[None, :], other=0.0)
            logits = tl.dot(q_tile, k_tile, input_precision=PRECISION) * (softmax_scale * LOG2_E)
            logits = tl.where(present[None, :], logits, float("-inf"))
            present = tl.load(real + start + BN, mask=key < left - BN, other=0) != 0
            m_new = tl.maximum(m, tl.max(logits, 1))
            # A row that has met no real token yet keeps -inf; 0 in its place avoids -inf - -inf.
            shift = tl.where(m_new == float("-inf"), 0.0, m_new)
            p = tl.math.exp2(logits - shift[:, None])
            old = tl.math.exp2(m - shift)
            v_tile = tl.load(v_at + tl.cast(start, tl.int64) * v_row, mask=(key < left)[:, None] & (channel < D)[None, :], other=0.0)
            acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * old[:, None], input_precision=PRECISION)
            denominator = denominator * old + tl.sum(p, 1)
            m = m_new
        acc = acc / tl.where(denominator == 0.0, 1.0, denominator)[:, None]
        store_heads(acc, batch * N + token, valid, head, out, codes, scales, quant_scale, BM, HEADS, D, P, QUANT, SWIZZLED, NATIVE, BF16)
