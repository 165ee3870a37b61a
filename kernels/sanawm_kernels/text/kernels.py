"""Triton kernels of the Gemma-2 text encoder between its matrix products."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _normed(value, gain, channel, C: tl.constexpr, EPS: tl.constexpr):
    """A row (of zeros beyond C) over the root of its mean square, times `gain`, in float32."""
    inverse = tl.math.rsqrt(tl.sum(value * value, 0) / C + EPS)
    return value * inverse * tl.load(gain + channel, mask=channel < C, other=0.0)


@triton.jit
def embed_rows(ids, table, gain, updated, out, scale, C: tl.constexpr, P: tl.constexpr, EPS: tl.constexpr):
    """Grid (tokens). ids int64; table (V, C); gain (C,) float32; updated, out (tokens, C)."""
    row = tl.program_id(0)
    channel = tl.arange(0, P)
    inside = channel < C
    value = tl.load(table + tl.load(ids + row) * C + channel, mask=inside, other=0.0).to(tl.float32) * scale
    rounded = value.to(updated.dtype.element_ty)
    at = row.to(tl.int64) * C + channel
    tl.store(updated + at, rounded, mask=inside)
    tl.store(out + at, _normed(rounded.to(tl.float32), gain, channel, C, EPS).to(out.dtype.element_ty), mask=inside)


@triton.jit
def add_normed(x, branch, post, pre, updated, out, C: tl.constexpr, P: tl.constexpr, EPS: tl.constexpr):
    """Grid (rows). x, branch, updated, out (rows, C); gains post, pre (C,) float32. Without `updated` (None) the sum is not stored."""
    at = tl.program_id(0).to(tl.int64) * C + tl.arange(0, P)
    channel = tl.arange(0, P)
    inside = channel < C
    update = _normed(tl.load(branch + at, mask=inside, other=0.0).to(tl.float32), post, channel, C, EPS)
    rounded = (tl.load(x + at, mask=inside, other=0.0).to(tl.float32) + update).to(out.dtype.element_ty)
    if updated is not None:
        tl.store(updated + at, rounded, mask=inside)
    tl.store(out + at, _normed(rounded.to(tl.float32), pre, channel, C, EPS).to(out.dtype.element_ty), mask=inside)


@triton.jit
def rotate_halves(x, x_row, frequencies, out, L, HEADS: tl.constexpr, D: tl.constexpr, P: tl.constexpr, R: tl.constexpr):
    """Grid (cdiv(L, R), HEADS). x: rows x_row apart with HEADS heads of D channels; out (L, HEADS * D). P lanes cover half a head."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    pair = tl.arange(0, P)
    inside = (row < L)[:, None] & (pair < D // 2)[None, :]
    angle = row.to(tl.float32)[:, None] * tl.load(frequencies + pair, mask=pair < D // 2, other=0.0)[None, :]
    c, s = tl.cos(angle), tl.sin(angle)
    head = tl.program_id(1) * D
    row = row.to(tl.int64)
    source = x + row[:, None] * x_row + head + pair[None, :]
    a = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(source + D // 2, mask=inside, other=0.0).to(tl.float32)
    to = out + row[:, None] * (HEADS * D) + head + pair[None, :]
    tl.store(to, (a * c - b * s).to(out.dtype.element_ty), mask=inside)
    tl.store(to + D // 2, (b * c + a * s).to(out.dtype.element_ty), mask=inside)


@triton.jit
def causal_attention(
    q, q_row, k, k_row, v, v_row, mask, out, L, softmax_scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CAP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(L, BM), HEADS). GROUP query heads share a key head; mask (L,) int64, 0 for padding; out (L, HEADS * D).

    Programs are started from the last queries on, which have the most keys.
    """
    block, head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    token, channel = block * BM + tl.arange(0, BM), tl.arange(0, P)
    inside = (token < L)[:, None] & (channel < D)[None, :]
    q_tile = tl.load(q + token[:, None].to(tl.int64) * q_row + head * D + channel[None, :], mask=inside, other=0.0)
    k += head // GROUP * D
    v += head // GROUP * D
    m = tl.full((BM,), float("-inf"), tl.float32)
    denominator = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, P), tl.float32)
    for start in range(0, min(L, (block + 1) * BM), BN):
        key = start + tl.arange(0, BN)
        real = tl.load(mask + key, mask=key < L, other=0) != 0
        k_at = k + key[None, :].to(tl.int64) * k_row + channel[:, None]
        k_tile = tl.load(k_at, mask=(channel < D)[:, None] & (key < L)[None, :], other=0.0)
        logits = tl.dot(q_tile, k_tile, input_precision=PRECISION) * softmax_scale
        # tanh(a) is 2 sigmoid(2a) - 1.
        logits = (CAP * LOG2_E) * (2.0 * tl.sigmoid(logits * (2.0 / CAP)) - 1.0)
        logits = tl.where(real[None, :] & (key[None, :] <= token[:, None]), logits, float("-inf"))
        m_new = tl.maximum(m, tl.max(logits, 1))
        # A row that has met no visible token yet keeps -inf; 0 in its place avoids -inf - -inf.
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.math.exp2(logits - shift[:, None])
        old = tl.math.exp2(m - shift)
        v_at = v + key[:, None].to(tl.int64) * v_row + channel[None, :]
        v_tile = tl.load(v_at, mask=(key < L)[:, None] & (channel < D)[None, :], other=0.0)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * old[:, None], input_precision=PRECISION)
        denominator = denominator * old + tl.sum(p, 1)
        m = m_new
    acc = acc / tl.where(denominator == 0.0, 1.0, denominator)[:, None]
    to = out + token[:, None].to(tl.int64) * (HEADS * D) + head * D + channel[None, :]
    tl.store(to, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def gelu_gated(x, out, SIZE, G: tl.constexpr, B: tl.constexpr):
    """Grid (cdiv(SIZE, B)). x (rows, 2G), out (rows, G) of SIZE elements. 1 + tanh(a) is 2 sigmoid(2a)."""
    at = tl.program_id(0) * B + tl.arange(0, B)
    inside = at < SIZE
    source = x + (at // G).to(tl.int64) * (2 * G) + at % G
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + G, mask=inside, other=0.0).to(tl.float32)
    active = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    tl.store(out + at, (active * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def token_mask(mask, out, L, K, B: tl.constexpr):
    """Grid (cdiv(K, B)). out (K,) bytes: 1 where the first and the last K - 1 of mask (L,) int64 are not 0."""
    token = tl.program_id(0) * B + tl.arange(0, B)
    inside = token < K
    value = tl.load(mask + tl.where(token == 0, 0, L - K + token), mask=inside, other=0)
    tl.store(out + token, (value != 0).to(out.dtype.element_ty), mask=inside)
