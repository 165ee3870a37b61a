"""Triton kernels of the matrix products: x @ weight^T with an epilogue, the same over three frame-shifted views, and the epilogue alone.

Tiles are visited in groups of GROUP tile rows, so that the tiles in flight share operands in the second-level cache; a program takes every
num_programs-th tile, so one code serves a grid of all tiles and a grid of one program a multiprocessor.
Rows and columns beyond the matrix read the first ones again (their results are not stored), which leaves the inner loop without masks; only a K
that BK does not divide needs one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sanawm_kernels.gemm.epilogue import finish_tile
from sanawm_kernels.tiles import frame_taps, grouped_tile


@triton.jit
def _within(index, size):
    """index, or 0 where it is past the end."""
    return tl.where(index < size, index, 0)


@triton.jit
def _block_scales(rows, first_block, BLOCKS: tl.constexpr, J: tl.constexpr, EVEN: tl.constexpr):
    """NVFP4 scales (R, J) from `first_block` on of the rows that start at `rows` (R,); BLOCKS blocks a row."""
    block = first_block + tl.arange(0, J)
    at = rows[:, None] + block[None, :]
    if EVEN:
        return tl.load(at)
    else:
        return tl.load(at, mask=(block < BLOCKS)[None, :], other=0.0)


@triton.jit
def _swizzled_scales(scales, tile, rows, first_block, BLOCKS: tl.constexpr, R: tl.constexpr, J: tl.constexpr, EVEN: tl.constexpr):
    """The same from the 128x4 tiles of `rows` rows: R is a multiple of 128, J of 4, and `tile` counts tiles of R rows."""
    tiles: tl.constexpr = (BLOCKS + 3) // 4
    across = first_block // 4 + tl.arange(0, J // 4)
    down = _within(tile * (R // 128) + tl.arange(0, R // 128), tl.cdiv(rows, 128))
    at = scales + ((down[:, None] * tiles + across[None, :]) * 512)[:, :, None] + tl.arange(0, 512)[None, None, :]
    if EVEN:
        flat = tl.load(at)
    else:
        flat = tl.load(at, mask=(across < tiles)[None, :, None], other=0.0)
    return tl.reshape(tl.trans(tl.reshape(flat, (R // 128, J // 4, 32, 4, 4)), (0, 3, 2, 1, 4)), (R, J))


@triton.jit
def gemm(
    a, a_row, a_scales, a_scale, b, b_scales, b_scale,
    bias, add, add_row, gate, gate_row, frame_gate, frame_gate_row, residual, residual_row, extra, extra_row,
    out, codes, scales, quant_scale, squares, M,
    N: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, SLICES: tl.constexpr,
    FP4: tl.constexpr, A_ROWS: tl.constexpr, B_ROWS: tl.constexpr, A_SWIZZLED: tl.constexpr, B_SWIZZLED: tl.constexpr, IMPRECISE: tl.constexpr,
    PRECISION: tl.constexpr, TOKENS: tl.constexpr, SILU: tl.constexpr, GLU: tl.constexpr, QUANT: tl.constexpr, SWIZZLED: tl.constexpr,
    NATIVE: tl.constexpr, BF16: tl.constexpr, PITCH: tl.constexpr,
):  # fmt: skip
    """One-dimensional grid over tiles. a (M, K) rows a_row apart, b (N, K) or with GLU (2N, K) rows PITCH numbers apart; NVFP4 operands are packed.

    a_scale, b_scale: float32 scales of the operands, one or (A_ROWS, B_ROWS) one a row, or None. a_scales, b_scales: NVFP4 block scales.
    IMPRECISE: products that may be added at the tensor core's own precision before float32 (matters for e4m3 on Hopper), None for its default.
    """
    PACK: tl.constexpr = 2 if FP4 else 1
    EVEN: tl.constexpr = K % BK == 0
    WIDTH: tl.constexpr = K // PACK
    STEP: tl.constexpr = BK // PACK
    tiles = tl.cdiv(M, BM) * tl.cdiv(N, BN)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        tile_m, tile_n = grouped_tile(tile, M, N, BM, BN, GROUP)
        row = _within(tile_m * BM + tl.arange(0, BM), M)
        column = _within(tile_n * BN + tl.arange(0, BN), N)
        inner = tl.arange(0, STEP)
        a_at = a + row[:, None].to(tl.int64) * a_row + inner[None, :]
        b_at = b + column[None, :].to(tl.int64) * (PITCH // PACK) + inner[:, None]
        acc = tl.zeros((BM, BN), tl.float32)
        acc_gate = acc
        for step in range(0, (K + BK - 1) // BK):
            if EVEN:
                x, w = tl.load(a_at), tl.load(b_at)
            else:
                rest = inner < WIDTH - step * STEP
                x, w = tl.load(a_at, mask=rest[None, :], other=0.0), tl.load(b_at, mask=rest[:, None], other=0.0)
            if FP4:
                block = step * (BK // 16)
                if A_SWIZZLED:
                    x_steps = _swizzled_scales(a_scales, tile_m, M, block, K // 16, BM, BK // 16, EVEN)
                else:
                    x_steps = _block_scales(a_scales + row * (K // 16), block, K // 16, BK // 16, EVEN)
                if B_SWIZZLED:
                    w_steps = _swizzled_scales(b_scales, tile_n, N, block, K // 16, BN, BK // 16, EVEN)
                else:
                    w_steps = _block_scales(b_scales + column * (PITCH // 16), block, K // 16, BK // 16, EVEN)
                acc = tl.dot_scaled(x, x_steps, "e2m1", w, w_steps, "e2m1", acc)
                if GLU:
                    g = tl.load(b_at + N * (PITCH // PACK), mask=inner[:, None] < WIDTH - step * STEP, other=0.0)
                    g_steps = _block_scales(b_scales + (column + N) * (PITCH // 16), block, K // 16, BK // 16, EVEN)
                    acc_gate = tl.dot_scaled(x, x_steps, "e2m1", g, g_steps, "e2m1", acc_gate)
            else:
                acc = tl.dot(x, w, acc, input_precision=PRECISION, max_num_imprecise_acc=IMPRECISE)
                if GLU:
                    if EVEN:
                        g = tl.load(b_at + N * (PITCH // PACK))
                    else:
                        g = tl.load(b_at + N * (PITCH // PACK), mask=inner[:, None] < WIDTH - step * STEP, other=0.0)
                    acc_gate = tl.dot(x, g, acc_gate, input_precision=PRECISION, max_num_imprecise_acc=IMPRECISE)
            a_at += STEP
            b_at += STEP
        finish_tile(
            acc, acc_gate, tile_m, tile_n, M, a_scale, b_scale, bias, add, add_row, None, 0, gate, gate_row, frame_gate, frame_gate_row,
            residual, residual_row, extra, extra_row, out, codes, scales, quant_scale, squares,
            N, BM, BN, SLICES, A_ROWS, B_ROWS, TOKENS, 1, SILU, GLU, QUANT, SWIZZLED, NATIVE, BF16,
        )  # fmt: skip


@triton.jit
def temporal_conv(
    a, a_row, a_scales, a_scale, b, b_scales, b_scale,
    add, add_row, carried, carried_row, frame_gate, frame_gate_row, residual, residual_row,
    out, codes, scales, quant_scale, M,
    N: tl.constexpr, C: tl.constexpr, FRAME: tl.constexpr, BATCH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, SLICES: tl.constexpr, FP4: tl.constexpr, A_ROWS: tl.constexpr, B_ROWS: tl.constexpr,
    IMPRECISE: tl.constexpr, PRECISION: tl.constexpr, QUANT: tl.constexpr, SWIZZLED: tl.constexpr, NATIVE: tl.constexpr, BF16: tl.constexpr,
):  # fmt: skip
    """Three taps along time as one product: [frame before | frame | frame after] (M, 3C) with b (N, 3C), without building the left operand.

    a (M, C) has BATCH tokens a batch, FRAME a frame; beyond a batch's frames come zeros, and `carried` (batches * FRAME, N), the products of the
    frame before the first one, is added to the first frame. A_ROWS cannot hold: the three taps of an output row have different scales.
    """
    PACK: tl.constexpr = 2 if FP4 else 1
    EVEN: tl.constexpr = C % BK == 0
    WIDTH: tl.constexpr = C // PACK
    STEP: tl.constexpr = BK // PACK
    STEPS: tl.constexpr = (C + BK - 1) // BK
    tl.static_assert(not A_ROWS, "row-wise scales of the activations cannot be factored out of a sum over three rows")
    tiles = tl.cdiv(M, BM) * tl.cdiv(N, BN)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        tile_m, tile_n = grouped_tile(tile, M, N, BM, BN, GROUP)
        row = _within(tile_m * BM + tl.arange(0, BM), M)
        column = _within(tile_n * BN + tl.arange(0, BN), N)
        token = row % BATCH
        inner = tl.arange(0, STEP)
        acc = tl.zeros((BM, BN), tl.float32)
        first, last = frame_taps(tile_m * BM, min(tile_m * BM + BM, M), FRAME, BATCH)
        for step in range(first * STEPS, last * STEPS):
            tap, part = step // STEPS, step % STEPS
            shifted = token + (tap - 1) * FRAME
            present = (shifted >= 0) & (shifted < BATCH)
            at = a + (row + (tap - 1) * FRAME).to(tl.int64) * a_row
            x_mask = present[:, None] & (inner < WIDTH - part * STEP)[None, :]
            x = tl.load(at[:, None] + part * STEP + inner[None, :], mask=x_mask, other=0.0)
            w_at = b + column[None, :].to(tl.int64) * (3 * WIDTH) + tap * WIDTH + part * STEP + inner[:, None]
            if EVEN:
                w = tl.load(w_at)
            else:
                w = tl.load(w_at, mask=inner[:, None] < WIDTH - part * STEP, other=0.0)
            if FP4:
                block = part * (BK // 16) + tl.arange(0, BK // 16)
                held = block < C // 16
                source = a_scales + (row + (tap - 1) * FRAME).to(tl.int64) * (C // 16)
                x_steps = tl.load(source[:, None] + block[None, :], mask=present[:, None] & held[None, :], other=0.0)
                w_steps = tl.load(
                    b_scales + column[:, None] * (3 * C // 16) + tap * (C // 16) + block[None, :], mask=held[None, :], other=0.0
                )
                acc = tl.dot_scaled(x, x_steps, "e2m1", w, w_steps, "e2m1", acc)
            else:
                acc = tl.dot(x, w, acc, input_precision=PRECISION, max_num_imprecise_acc=IMPRECISE)
        finish_tile(
            acc, acc, tile_m, tile_n, M, a_scale, b_scale, None, add, add_row, carried, carried_row, None, 0, frame_gate, frame_gate_row,
            residual, residual_row, None, 0, out, codes, scales, quant_scale, None,
            N, BM, BN, SLICES, A_ROWS, B_ROWS, FRAME, BATCH, False, False, QUANT, SWIZZLED, NATIVE, BF16,
        )  # fmt: skip


@triton.jit
def epilogue(
    product, product_row,
    bias, add, add_row, gate, gate_row, frame_gate, frame_gate_row, residual, residual_row, extra, extra_row,
    out, codes, scales, quant_scale, squares, M,
    N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    TOKENS: tl.constexpr, SILU: tl.constexpr, GLU: tl.constexpr, QUANT: tl.constexpr, SWIZZLED: tl.constexpr,
    NATIVE: tl.constexpr, BF16: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(M, BM), cdiv(N, BN)). The epilogue on a product that another library made, (M, N) or with GLU (M, 2N)."""
    tile_m, tile_n = tl.program_id(0), tl.program_id(1)
    row = tile_m * BM + tl.arange(0, BM)
    column = tile_n * BN + tl.arange(0, BN)
    inside = (row < M)[:, None] & (column < N)[None, :]
    at = product + row[:, None].to(tl.int64) * product_row + column[None, :]
    acc = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    acc_gate = acc
    if GLU:
        acc_gate = tl.load(at + N, mask=inside, other=0.0).to(tl.float32)
    finish_tile(
        acc, acc_gate, tile_m, tile_n, M, None, None, bias, add, add_row, None, 0, gate, gate_row, frame_gate, frame_gate_row, residual, residual_row,
        extra, extra_row, out, codes, scales, quant_scale, squares, N, BM, BN, 1, False, False, TOKENS, 1, SILU, GLU, QUANT, SWIZZLED, NATIVE, BF16,
    )  # fmt: skip
