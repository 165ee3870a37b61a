"""Triton kernels of the matrix products for GPUs with a tensor memory accelerator (Hopper and later): bf16, half precision and FP8 operands.

They compute what `kernels.gemm` and `kernels.temporal_conv` do. Tiles of both operands come through descriptors, which need no addresses in
registers and fill what lies outside of a matrix with zeros; each program takes every num_programs-th tile, in one loop with the tiles' depth, so that
the next tile's operands arrive during an epilogue. Descriptors are parameters: where programs make their own, a launch takes 6 us more.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sanawm_kernels.gemm.epilogue import finish_tile
from sanawm_kernels.tiles import frame_taps, grouped_tile


@triton.jit
def gemm(
    a, a_scale, b, b_scale,
    bias, add, add_row, gate, gate_row, frame_gate, frame_gate_row, residual, residual_row, extra, extra_row,
    out, codes, scales, quant_scale, squares, M,
    N: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, SLICES: tl.constexpr,
    A_ROWS: tl.constexpr, B_ROWS: tl.constexpr, IMPRECISE: tl.constexpr, PRECISION: tl.constexpr,
    TOKENS: tl.constexpr, SILU: tl.constexpr, QUANT: tl.constexpr, SWIZZLED: tl.constexpr, NATIVE: tl.constexpr, BF16: tl.constexpr,
):  # fmt: skip
    """One-dimensional grid. Descriptors: a (M, K) in blocks (BM, BK), b (N, K) in (BN, BK), out (M, N) in (BM, BN / SLICES); scales as in
    `kernels.gemm`."""
    tiles = tl.cdiv(M, BM) * tl.cdiv(N, BN)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        tile_m, tile_n = grouped_tile(tile, M, N, BM, BN, GROUP)
        acc = tl.zeros((BM, BN), tl.float32)
        for step in range(0, (K + BK - 1) // BK):
            x, w = a.load([tile_m * BM, step * BK]), b.load([tile_n * BN, step * BK])
            acc = tl.dot(x, w.T, acc, input_precision=PRECISION, max_num_imprecise_acc=IMPRECISE)
        finish_tile(
            acc, acc, tile_m, tile_n, M, a_scale, b_scale, bias, add, add_row, None, 0, gate, gate_row, frame_gate, frame_gate_row,
            residual, residual_row, extra, extra_row, out, codes, scales, quant_scale, squares,
            N, BM, BN, SLICES, A_ROWS, B_ROWS, TOKENS, 1, SILU, False, QUANT, SWIZZLED, NATIVE, BF16,
        )  # fmt: skip


@triton.jit
def temporal_conv(
    a, a_scale, b, b_scale,
    add, add_row, carried, carried_row, frame_gate, frame_gate_row, residual, residual_row,
    out, codes, scales, quant_scale, M,
    N: tl.constexpr, C: tl.constexpr, FRAME: tl.constexpr, BATCH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, SLICES: tl.constexpr, A_ROWS: tl.constexpr, B_ROWS: tl.constexpr, IMPRECISE: tl.constexpr, PRECISION: tl.constexpr,
    QUANT: tl.constexpr, SWIZZLED: tl.constexpr, NATIVE: tl.constexpr, BF16: tl.constexpr,
):  # fmt: skip
    """Three taps along time of one batch: output rows of frame f add the products of frames f - 1, f and f + 1 with a third of b (N, 3C) each.

    Descriptors as in `gemm`. Frames that a (M, C) does not have are zeros, whose products are left out; `carried` as in `kernels.temporal_conv`.
    """
    tl.static_assert(not A_ROWS, "row-wise scales of the activations cannot be factored out of a sum over three rows")
    STEPS: tl.constexpr = (C + BK - 1) // BK
    tiles = tl.cdiv(M, BM) * tl.cdiv(N, BN)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        tile_m, tile_n = grouped_tile(tile, M, N, BM, BN, GROUP)
        acc = tl.zeros((BM, BN), tl.float32)
        first, last = frame_taps(tile_m * BM, min(tile_m * BM + BM, M), FRAME, BATCH)
        for step in range(first * STEPS, last * STEPS):
            tap, part = step // STEPS, step % STEPS
            x = a.load([tile_m * BM + (tap - 1) * FRAME, part * BK])
            # A tap's last block reads on into the next tap, against the zeros that x has there.
            w = b.load([tile_n * BN, tap * C + part * BK])
            acc = tl.dot(x, w.T, acc, input_precision=PRECISION, max_num_imprecise_acc=IMPRECISE)
        finish_tile(
            acc, acc, tile_m, tile_n, M, a_scale, b_scale, None, add, add_row, carried, carried_row, None, 0, frame_gate, frame_gate_row,
            residual, residual_row, None, 0, out, codes, scales, quant_scale, None,
            N, BM, BN, SLICES, A_ROWS, B_ROWS, FRAME, BATCH, False, False, QUANT, SWIZZLED, NATIVE, BF16,
        )  # fmt: skip
