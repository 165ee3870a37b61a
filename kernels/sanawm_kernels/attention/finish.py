"""Triton kernel that completes what `window_pair` leaves: sums of divided tiles, tiles whose sums became too large, and the camera's ray space."""

from __future__ import annotations

import triton
import triton.language as tl

from sanawm_kernels.attention.kernels import LOG2_E, store_heads
from sanawm_kernels.gdn.transforms import camera_rotary_tile, ucpe

# Sums of probabilities up to here leave float32 room for their products with values.
LARGEST = tl.constexpr(2.0**96)


@triton.jit
def undivided(N, programs, HEADS: tl.constexpr, BM: tl.constexpr):
    """Tiles of BM queries that a branch has, and how many of them its programs take whole: those of full rounds."""
    tiles = tl.cdiv(N, BM) * HEADS
    return tiles, tiles // programs * programs


@triton.jit
def _rows(x, x_row, start, n, head, R: tl.constexpr, D: tl.constexpr, P: tl.constexpr):
    """R rows of a head from `start` on, zeros past row n and channel D."""
    row, channel = start + tl.arange(0, R), tl.arange(0, P)
    at = row[:, None].to(tl.int64) * x_row + head * D + channel[None, :]
    return tl.load(x + at, mask=(row < n)[:, None] & (channel < D)[None, :], other=0.0)


@triton.jit
def _segment(
    q, k, k_row, v, v_row, n, head, m, total, acc, scale, BN: tl.constexpr, D: tl.constexpr, P: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Sums over a segment relative to the running maximum m, the power of two of a logit; scale includes log2(e)."""
    for start in tl.range(0, n, BN):
        products = tl.dot(q, _rows(k, k_row, start, n, head, BN, D, P).T, input_precision=PRECISION)
        products = tl.where((start + tl.arange(0, BN) < n)[None, :], products, float("-inf"))
        new = tl.maximum(m, tl.max(products, 1) * scale)
        p, old = tl.math.exp2(products * scale - new[:, None]), tl.math.exp2(m - new)
        values = _rows(v, v_row, start, n, head, BN, D, P)
        total = total * old + tl.sum(p, 1)
        acc = tl.dot(p.to(values.dtype), values, acc * old[:, None], input_precision=PRECISION)
        m = new
    return m, total, acc


@triton.jit
def finish_pair(
    main_q_at, main_q_row, camera_q_at, camera_q_row,
    main_k0_at, main_k0_row, main_v0_at, main_v0_row, camera_k0_at, camera_k0_row, camera_v0_at, camera_v0_row, n0,
    main_k1_at, main_k1_row, main_v1_at, main_v1_row, camera_k1_at, camera_k1_row, camera_v1_at, camera_v1_row, n1,
    main_k2_at, main_k2_row, main_v2_at, main_v2_row, camera_k2_at, camera_k2_row, camera_v2_at, camera_v2_row, n2,
    seen, sums, parts, part_sums, rays, cos, sin, main_out, camera_out, codes, scales, quant_scale, N, programs, main_scale, camera_scale,
    HEADS: tl.constexpr, D: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr,
    QUANT: tl.constexpr, SWIZZLED: tl.constexpr, NATIVE: tl.constexpr, BF16: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(N, ROWS), HEADS, 2), the branch last. BM, a multiple of ROWS, and what goes by the name of an argument of `window_pair` are its.

    *_at: queries, keys and values, rows apart as given, for what is computed again; segments 1 and 2 may be None. The camera branch leaves ray space
    (rays (N, 4, 4), cos and sin (N, D/4)) and may be quantized: camera_out, codes, scales and quant_scale are its own.
    """
    head, camera = tl.program_id(1), tl.program_id(2) == 1
    start = tl.program_id(0) * ROWS
    token = start + tl.arange(0, ROWS)
    valid = token < N
    channel = tl.arange(0, P)
    tiles, whole = undivided(N, programs, HEADS, BM)
    divided = head * tl.cdiv(N, BM) + start // BM - whole
    acc = tl.zeros((ROWS, P), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    if divided >= 0:
        slot = (tl.program_id(2) * (tiles - whole) + divided) * PARTS
        row = start % BM + tl.arange(0, ROWS)
        for part in range(PARTS):
            at = (slot + part) * BM + row
            total += tl.load(part_sums + at, mask=valid, other=1.0)
            acc += tl.load(parts + at[:, None] * D + channel[None, :], mask=valid[:, None] & (channel < D)[None, :], other=0.0)
        acc = acc / total[:, None]
    else:
        total = tl.load(sums + (tl.program_id(2) * HEADS + head) * N + token, mask=valid, other=1.0)
        if camera:
            acc = _rows(seen, HEADS * D, start, N, head, ROWS, D, P).to(tl.float32)
    # Not a number counts as too large, and stays what it is.
    again = tl.max((~(total < LARGEST)).to(tl.int32), 0) > 0
    if again:
        scale = main_scale
        if camera:
            scale = camera_scale
            main_q_at, main_q_row = camera_q_at, camera_q_row
            main_k0_at, main_k0_row, main_v0_at, main_v0_row = camera_k0_at, camera_k0_row, camera_v0_at, camera_v0_row
            if main_k1_at is not None:
                main_k1_at, main_k1_row, main_v1_at, main_v1_row = camera_k1_at, camera_k1_row, camera_v1_at, camera_v1_row
            if main_k2_at is not None:
                main_k2_at, main_k2_row, main_v2_at, main_v2_row = camera_k2_at, camera_k2_row, camera_v2_at, camera_v2_row
        scale *= LOG2_E
        q = _rows(main_q_at, main_q_row, start, N, head, ROWS, D, P)
        m = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        acc = tl.zeros((ROWS, P), tl.float32)
        m, total, acc = _segment(q, main_k0_at, main_k0_row, main_v0_at, main_v0_row, n0, head, m, total, acc, scale, BN, D, P, PRECISION)
        if main_k1_at is not None:
            m, total, acc = _segment(q, main_k1_at, main_k1_row, main_v1_at, main_v1_row, n1, head, m, total, acc, scale, BN, D, P, PRECISION)
        if main_k2_at is not None:
            m, total, acc = _segment(q, main_k2_at, main_k2_row, main_v2_at, main_v2_row, n2, head, m, total, acc, scale, BN, D, P, PRECISION)
        acc = acc / total[:, None]
    if camera:
        c, s = camera_rotary_tile(cos, token, valid, P, D), camera_rotary_tile(sin, token, valid, P, D)
        acc = ucpe(acc, rays + token.to(tl.int64) * 16, valid, c, -s, ROWS, P, D, False)
        store_heads(acc, token.to(tl.int64), valid, head, camera_out, codes, scales, quant_scale, ROWS, HEADS, D, P, QUANT, SWIZZLED, NATIVE, BF16)
    elif again or divided >= 0:
        store_heads(acc, token.to(tl.int64), valid, head, main_out, None, None, None, ROWS, HEADS, D, P, 0, False, False, BF16)
