"""Triton kernel of window attention of a softmax block's two branches in one launch, for GPUs with a tensor memory accelerator.

Half of the programs serve the main branch, half the camera branch; each takes every num_programs-th tile of queries of its branch, so that the tiles
of both fill the GPU together. Keys and values come through descriptors, whose blocks of 128 channels are filled with zeros from a head's width on.

Probabilities are relative to the largest logit of a row's first block of keys, not of all keys so far: nothing is scaled again from block to block,
and a product with the values runs on while the next logits are made. Such sums cannot vanish, as the first block holds a one, but they could become
too large for float32. A tile that ends with such a sum is computed again with a running maximum; normalised queries and keys never get there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sanawm_kernels.attention.kernels import LOG2_E, store_heads
from sanawm_kernels.gdn.transforms import camera_rotary_tile, ucpe

# Sums of probabilities up to here leave float32 room for their products with values.
LARGEST = tl.constexpr(2.0**96)


@triton.jit
def _descriptors(k, k_row, v, v_row, n, HEADS: tl.constexpr, D: tl.constexpr, P: tl.constexpr, BN: tl.constexpr):
    keys = tl.make_tensor_descriptor(k, [n, HEADS, D], [k_row, D, 1], [BN, 1, P])
    return keys, tl.make_tensor_descriptor(v, [n, HEADS, D], [v_row, D, 1], [BN, 1, P])


@triton.jit
def _products(q, keys, start, n, head, BN: tl.constexpr, P: tl.constexpr, PRECISION: tl.constexpr):
    """Products of the queries with a block of keys, -inf past the segment's n keys."""
    logits = tl.dot(q, keys.load([start, head, 0]).reshape(BN, P).T, input_precision=PRECISION)
    return tl.where((start + tl.arange(0, BN) < n)[None, :], logits, float("-inf"))


@triton.jit
def _segment(q, keys, values, n, head, m, total, acc, scale, BN: tl.constexpr, P: tl.constexpr, PRECISION: tl.constexpr):
    """Sums over a segment with probabilities relative to m, the power of two of a logit; scale includes log2(e)."""
    for start in tl.range(0, n, BN):
        p = tl.math.exp2(_products(q, keys, start, n, head, BN, P, PRECISION) * scale - m[:, None])
        v = values.load([start, head, 0]).reshape(BN, P)
        total += tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return total, acc


@triton.jit
def _segment_again(q, keys, values, n, head, m, total, acc, scale, BN: tl.constexpr, P: tl.constexpr, PRECISION: tl.constexpr):
    """The same relative to the running maximum."""
    for start in tl.range(0, n, BN):
        products = _products(q, keys, start, n, head, BN, P, PRECISION)
        new = tl.maximum(m, tl.max(products, 1) * scale)
        p, old = tl.math.exp2(products * scale - new[:, None]), tl.math.exp2(m - new)
        v = values.load([start, head, 0]).reshape(BN, P)
        total = total * old + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * old[:, None], input_precision=PRECISION)
        m = new
    return m, total, acc


@triton.jit
def window_pair(
    main_q, main_q_row, camera_q, camera_q_row,
    main_k0, main_k0_row, main_v0, main_v0_row, camera_k0, camera_k0_row, camera_v0, camera_v0_row, n0,
    main_k1, main_k1_row, main_v1, main_v1_row, camera_k1, camera_k1_row, camera_v1, camera_v1_row, n1,
    main_k2, main_k2_row, main_v2, main_v2_row, camera_k2, camera_k2_row, camera_v2, camera_v2_row, n2,
    rays, cos, sin, main_out, camera_out, codes, scales, quant_scale, N, main_scale, camera_scale,
    HEADS: tl.constexpr, D: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    QUANT: tl.constexpr, SWIZZLED: tl.constexpr, NATIVE: tl.constexpr, BF16: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (programs, 2). One batch; q (N, HEADS, D), segments of n keys as many heads, rows apart as given; segments 1 and 2 may be None.

    The camera branch leaves ray space (rays (N, 4, 4), cos and sin (N, D/4)) and may be quantized: `codes` and the rest are its own.
    """
    camera = tl.program_id(1) == 1
    first, scale = tl.program_id(0), main_scale
    if camera:
        # From the other end, so that the tiles left over at the end of both branches go to different multiprocessors.
        first, scale = tl.num_programs(0) - 1 - first, camera_scale
        main_q, main_q_row = camera_q, camera_q_row
        main_k0, main_k0_row, main_v0, main_v0_row = camera_k0, camera_k0_row, camera_v0, camera_v0_row
        if main_k1 is not None:
            main_k1, main_k1_row, main_v1, main_v1_row = camera_k1, camera_k1_row, camera_v1, camera_v1_row
        if main_k2 is not None:
            main_k2, main_k2_row, main_v2, main_v2_row = camera_k2, camera_k2_row, camera_v2, camera_v2_row
    scale *= LOG2_E
    queries = tl.make_tensor_descriptor(main_q, [N, HEADS, D], [main_q_row, D, 1], [BM, 1, P])
    keys0, values0 = _descriptors(main_k0, main_k0_row, main_v0, main_v0_row, n0, HEADS, D, P, BN)
    if main_k1 is not None:
        keys1, values1 = _descriptors(main_k1, main_k1_row, main_v1, main_v1_row, n1, HEADS, D, P, BN)
    if main_k2 is not None:
        keys2, values2 = _descriptors(main_k2, main_k2_row, main_v2, main_v2_row, n2, HEADS, D, P, BN)
    rows = tl.cdiv(N, BM)
    for tile in range(first, rows * HEADS, tl.num_programs(0)):
        head, start = tile // rows, tile % rows * BM
        q = queries.load([start, head, 0]).reshape(BM, P)
        m = tl.max(_products(q, keys0, 0, n0, head, BN, P, PRECISION), 1) * scale
        total = tl.zeros((BM,), tl.float32)
        acc = tl.zeros((BM, P), tl.float32)
        total, acc = _segment(q, keys0, values0, n0, head, m, total, acc, scale, BN, P, PRECISION)
        if main_k1 is not None:
            total, acc = _segment(q, keys1, values1, n1, head, m, total, acc, scale, BN, P, PRECISION)
        if main_k2 is not None:
            total, acc = _segment(q, keys2, values2, n2, head, m, total, acc, scale, BN, P, PRECISION)
        # Not a number counts as too large, and stays what it is.
        if tl.max((~(total < LARGEST)).to(tl.int32), 0) > 0:
            m = tl.full((BM,), float("-inf"), tl.float32)
            total = tl.zeros((BM,), tl.float32)
            acc = tl.zeros((BM, P), tl.float32)
            m, total, acc = _segment_again(q, keys0, values0, n0, head, m, total, acc, scale, BN, P, PRECISION)
            if main_k1 is not None:
                m, total, acc = _segment_again(q, keys1, values1, n1, head, m, total, acc, scale, BN, P, PRECISION)
            if main_k2 is not None:
                m, total, acc = _segment_again(q, keys2, values2, n2, head, m, total, acc, scale, BN, P, PRECISION)
        acc = acc / total[:, None]
        token = start + tl.arange(0, BM)
        valid = token < N
        if camera:
            c, s = camera_rotary_tile(cos, token, valid, P, D), camera_rotary_tile(sin, token, valid, P, D)
            acc = ucpe(acc, rays + token.to(tl.int64) * 16, valid, c, -s, BM, P, D, False)
            store_heads(
                acc, token.to(tl.int64), valid, head, camera_out, codes, scales, quant_scale, BM, HEADS, D, P, QUANT, SWIZZLED, NATIVE, BF16
            )
        else:
            store_heads(acc, token.to(tl.int64), valid, head, main_out, None, None, None, BM, HEADS, D, P, 0, False, False, BF16)
