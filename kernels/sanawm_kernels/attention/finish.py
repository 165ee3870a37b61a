"""Triton kernel that completes what `window_pair` leaves: sums of divided tiles, tiles whose sums became too large, and the camera's ray space."""

from __future__ import annotations

import triton
import triton.language as tl

from sanawm_kernels.attention.kernels import LOG2_E, store_heads
from sanawm_kernels.gdn.transforms import camera_rotary_tile, rays_at, ucpe

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
def _added(parts, part_sums, slot, row, valid, PARTS: tl.constexpr, BM: tl.constexpr, R: tl.constexpr, D: tl.constexpr, P: tl.constexpr):
    """Sums over a divided tile's parts, all read before the first is added: (R,) of probabilities and (R, P) of values."""
    channel = tl.arange(0, P)
    sums, values = (), ()
    for part in tl.static_range(PARTS):
        at = (slot + part) * BM + row
        sums = sums + (tl.load(part_sums + at, mask=valid, other=1.0),)  # type: ignore[assignment] # noqa: RUF005
        there = tl.load(parts + at[:, None] * D + channel[None, :], mask=valid[:, None] & (channel < D)[None, :], other=0.0)
        values = values + (there,)  # type: ignore[assignment] # noqa: RUF005
    total, acc = sums[0], values[0]  # type: ignore[misc]
    for part in tl.static_range(1, PARTS):
        total += sums[part]  # type: ignore[misc]
        acc += values[part]  # type: ignore[misc]
    return total, acc


@triton.jit
def _complete(
    main_q_at, main_q_row, camera_q_at, camera_q_row,
    main_k0_at, main_k0_row, main_v0_at, main_v0_row, camera_k0_at, camera_k0_row, camera_v0_at, camera_v0_row, n0,
    main_k1_at, main_k1_row, main_v1_at, main_v1_row, camera_k1_at, camera_k1_row, camera_v1_at, camera_v1_row, n1,
    main_k2_at, main_k2_row, main_v2_at, main_v2_row, camera_k2_at, camera_k2_row, camera_v2_at, camera_v2_row, n2,
    seen, sums, parts, part_sums, rays, cos, sin, main_out, camera_out, codes, scales, quant_scale, N, programs, main_scale, camera_scale,
    start, head, branch,
    HEADS: tl.constexpr, D: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr,
    QUANT: tl.constexpr, SWIZZLED: tl.constexpr, NATIVE: tl.constexpr, BF16: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One branch of one head from row `start` on: adds what is divided, computes again what has to be, and leaves ray space. Arguments as below."""
    camera = branch == 1
    token = start + tl.arange(0, ROWS)
    valid = token < N
    tiles, whole = undivided(N, programs, HEADS, BM)
    divided = head * tl.cdiv(N, BM) + start // BM - whole
    acc = tl.zeros((ROWS, P), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    if divided >= 0:
        slot = (branch * (tiles - whole) + divided) * PARTS
        row = start % BM + tl.arange(0, ROWS)
        total, acc = _added(parts, part_sums, slot, row, valid, PARTS, BM, ROWS, D, P)
        acc = acc / total[:, None]
    else:
        total = tl.load(sums + (branch * HEADS + head) * N + token, mask=valid, other=1.0)
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


@triton.jit
def finish_pair(
    main_q_at, main_q_row, camera_q_at, camera_q_row,
    main_k0_at, main_k0_row, main_v0_at, main_v0_row, camera_k0_at, camera_k0_row, camera_v0_at, camera_v0_row, n0,
    main_k1_at, main_k1_row, main_v1_at, main_v1_row, camera_k1_at, camera_k1_row, camera_v1_at, camera_v1_row, n1,
    main_k2_at, main_k2_row, main_v2_at, main_v2_row, camera_k2_at, camera_k2_row, camera_v2_at, camera_v2_row, n2,
    seen, sums, parts, part_sums, rays, cos, sin, main_out, camera_out, codes, scales, quant_scale, N, programs, main_scale, camera_scale,
    HEADS: tl.constexpr, D: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr,
    BN: tl.constexpr, QUANT: tl.constexpr, SWIZZLED: tl.constexpr, NATIVE: tl.constexpr, BF16: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(N, ROWS), HEADS // GROUP): GROUP heads of both branches. BM, a multiple of ROWS, and arguments named as `window_pair`'s are its.

    *_at: queries, keys and values, rows apart as given, for what is computed again; segments 1 and 2 may be None. The camera branch leaves ray space
    (rays (N, 4, 4), cos and sin (N, D/4)) and may be quantized: camera_out, codes, scales and quant_scale are its own.
    A program asks at once for all that the usual case needs: the camera's rows and both branches' sums. Where a tile is divided or a sum too large,
    it takes its heads and branches one after the other; the last heads, which alone are divided, come first.
    """
    start = tl.program_id(0) * ROWS
    head0 = HEADS - GROUP - tl.program_id(1) * GROUP
    token = start + tl.arange(0, ROWS)
    valid = token < N
    tiles, whole = undivided(N, programs, HEADS, BM)
    divided = (head0 + GROUP - 1) * tl.cdiv(N, BM) + start // BM - whole
    worst = tl.zeros((ROWS,), tl.float32)
    rows = ()
    for g in tl.static_range(GROUP):
        rows = rows + (_rows(seen, HEADS * D, start, N, head0 + g, ROWS, D, P),)  # type: ignore[assignment] # noqa: RUF005
    for g in tl.static_range(GROUP):
        for branch in tl.static_range(2):
            total = tl.load(sums + (branch * HEADS + head0 + g) * N + token, mask=valid, other=1.0)
            worst = tl.maximum(worst, total, propagate_nan=tl.PropagateNan.ALL)
    c, s = camera_rotary_tile(cos, token, valid, P, D), camera_rotary_tile(sin, token, valid, P, D)
    m = rays_at(rays + token.to(tl.int64) * 16, valid)
    # Not a number counts as too large, and stays what it is.
    if (divided >= 0) | (tl.max((~(worst < LARGEST)).to(tl.int32), 0) > 0):
        for item in range(2 * GROUP):
            _complete(
                main_q_at, main_q_row, camera_q_at, camera_q_row,
                main_k0_at, main_k0_row, main_v0_at, main_v0_row, camera_k0_at, camera_k0_row, camera_v0_at, camera_v0_row, n0,
                main_k1_at, main_k1_row, main_v1_at, main_v1_row, camera_k1_at, camera_k1_row, camera_v1_at, camera_v1_row, n1,
                main_k2_at, main_k2_row, main_v2_at, main_v2_row, camera_k2_at, camera_k2_row, camera_v2_at, camera_v2_row, n2,
                seen, sums, parts, part_sums, rays, cos, sin, main_out, camera_out, codes, scales, quant_scale, N, programs, main_scale, camera_scale,
                start, head0 + item // 2, item % 2,
                HEADS, D, P, BM, PARTS, ROWS, BN, QUANT, SWIZZLED, NATIVE, BF16, PRECISION,
            )  # fmt: skip
    else:
        back = -s
        for g in tl.static_range(GROUP):
            turned = ucpe(rows[g].to(tl.float32), m, valid, c, back, ROWS, P, D, False)  # type: ignore[misc]
            store_heads(
                turned, token.to(tl.int64), valid, head0 + g, camera_out, codes, scales, quant_scale, ROWS, HEADS, D, P, QUANT, SWIZZLED, NATIVE, BF16
            )
