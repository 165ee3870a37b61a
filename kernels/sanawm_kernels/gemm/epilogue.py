"""Triton epilogue that every product shares: from float32 sums to stored, gated, residual and quantized outputs.

In order: the operands' scales, bias, SiLU or a gated linear unit, a summand, what the first frame carries, the product with SiLU of a gate, the
gate of the frame, the residual stream, an extra summand. Absent operands are None. Whatever reads the result again (a quantization, a sum of squares)
reads it as it is stored, after its rounding.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sanawm_kernels.quant.triton import NO_CODES, NVFP4, nvfp4_blocks, rounded, saturate_e4m3, scale_offset


@triton.jit
def halves(x, BM: tl.constexpr, BN: tl.constexpr):
    """The left and the right half of the columns of x (BM, BN)."""
    return tl.split(tl.permute(tl.reshape(x, (BM, 2, BN // 2)), (0, 2, 1)))


@triton.jit
def _descale(acc, row, column, M, N: tl.constexpr, a_scale, b_scale, A_ROWS: tl.constexpr, B_ROWS: tl.constexpr):
    """Multiply sums by the operands' float32 scales: None, one, or (A_ROWS, B_ROWS) one a row of the operand."""
    if a_scale is not None:
        if A_ROWS:
            acc *= tl.load(a_scale + row, mask=row < M, other=0.0)[:, None]
        else:
            acc *= tl.load(a_scale)
    if b_scale is not None:
        if B_ROWS:
            acc *= tl.load(b_scale + column, mask=column < N, other=0.0)[None, :]
        else:
            acc *= tl.load(b_scale)
    return acc


@triton.jit
def finish_tile(
    acc, acc_gate, tile_m, tile_n, M, a_scale, b_scale,
    bias, add, add_row, carried, carried_row, gate, gate_row, frame_gate, frame_gate_row, residual, residual_row, extra, extra_row,
    out, codes, scales, quant_scale, squares,
    N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SLICES: tl.constexpr,
    A_ROWS: tl.constexpr, B_ROWS: tl.constexpr, TOKENS: tl.constexpr, BATCH: tl.constexpr, SILU: tl.constexpr, GLU: tl.constexpr,
    QUANT: tl.constexpr, SWIZZLED: tl.constexpr, NATIVE: tl.constexpr, BF16: tl.constexpr,
):  # fmt: skip
    """Finish and store the tile (tile_m, tile_n) of an (M, N) result in SLICES (1, 2 or 4) column slices, one after the other.

    A slice's operands are dead before the next one's are read, which keeps the registers of a wide tile free. `out` is a pointer, or a descriptor
    of blocks as large as a slice.
    """
    if SLICES == 1:
        _finish(
            acc, acc_gate, tile_m, tile_n, M, a_scale, b_scale,
            bias, add, add_row, carried, carried_row, gate, gate_row, frame_gate, frame_gate_row, residual, residual_row, extra, extra_row,
            out, codes, scales, quant_scale, squares, N, BM, BN, A_ROWS, B_ROWS, TOKENS, BATCH, SILU, GLU, QUANT, SWIZZLED, NATIVE, BF16,
        )  # fmt: skip
    else:
        left, right = halves(acc, BM, BN)
        left_gate, right_gate = left, right
        if GLU:
            left_gate, right_gate = halves(acc_gate, BM, BN)
        finish_tile(
            left, left_gate, tile_m, 2 * tile_n, M, a_scale, b_scale,
            bias, add, add_row, carried, carried_row, gate, gate_row, frame_gate, frame_gate_row, residual, residual_row, extra, extra_row,
            out, codes, scales, quant_scale, squares,
            N, BM, BN // 2, SLICES // 2, A_ROWS, B_ROWS, TOKENS, BATCH, SILU, GLU, QUANT, SWIZZLED, NATIVE, BF16,
        )  # fmt: skip
        finish_tile(
            right, right_gate, tile_m, 2 * tile_n + 1, M, a_scale, b_scale,
            bias, add, add_row, carried, carried_row, gate, gate_row, frame_gate, frame_gate_row, residual, residual_row, extra, extra_row,
            out, codes, scales, quant_scale, squares,
            N, BM, BN // 2, SLICES // 2, A_ROWS, B_ROWS, TOKENS, BATCH, SILU, GLU, QUANT, SWIZZLED, NATIVE, BF16,
        )  # fmt: skip


@triton.jit
def _finish(
    acc, acc_gate, tile_m, tile_n, M, a_scale, b_scale,
    bias, add, add_row, carried, carried_row, gate, gate_row, frame_gate, frame_gate_row, residual, residual_row, extra, extra_row,
    out, codes, scales, quant_scale, squares,
    N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    A_ROWS: tl.constexpr, B_ROWS: tl.constexpr, TOKENS: tl.constexpr, BATCH: tl.constexpr, SILU: tl.constexpr, GLU: tl.constexpr,
    QUANT: tl.constexpr, SWIZZLED: tl.constexpr, NATIVE: tl.constexpr, BF16: tl.constexpr,
):  # fmt: skip
    """Finish and store one slice; acc_gate holds the gates of GLU. TOKENS rows share a frame gate, squares is (M, cdiv(N, BN)).

    The first TOKENS rows of each BATCH add the rows of `carried`, (batches * TOKENS, N).
    """
    row = tile_m * BM + tl.arange(0, BM)
    column = tile_n * BN + tl.arange(0, BN)
    inside = (row < M)[:, None] & (column < N)[None, :]
    row = row.to(tl.int64)
    acc = _descale(acc, row, column, M, N, a_scale, b_scale, A_ROWS, B_ROWS)
    if GLU:
        acc_gate = _descale(acc_gate, row, N + column, M, 2 * N, a_scale, b_scale, A_ROWS, B_ROWS)
    if bias is not None:
        acc += tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
        if GLU:
            acc_gate += tl.load(bias + N + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    if GLU:
        acc = acc * acc_gate * tl.sigmoid(acc_gate)
    elif SILU:
        acc = acc * tl.sigmoid(acc)
    if add is not None:
        acc += tl.load(add + row[:, None] * add_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if carried is not None:
        first = inside & (row % BATCH < TOKENS)[:, None]
        at = carried + (row // BATCH * TOKENS + row % BATCH)[:, None] * carried_row + column[None, :]
        acc += tl.load(at, mask=first, other=0.0).to(tl.float32)
    if gate is not None:
        g = tl.load(gate + row[:, None] * gate_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
        acc = acc * g * tl.sigmoid(g)
    if frame_gate is not None:
        at = frame_gate + (row // TOKENS)[:, None] * frame_gate_row + column[None, :]
        acc *= tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        acc += tl.load(residual + row[:, None] * residual_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if extra is not None:
        acc += tl.load(extra + row[:, None] * extra_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if BF16:
        acc = rounded(acc, tl.bfloat16)
    if isinstance(out, tl.tensor_descriptor):
        out.store([tile_m * BM, tile_n * BN], acc.to(out.dtype))
    elif out is not None:
        tl.store(out + row[:, None] * N + column[None, :], acc.to(out.dtype.element_ty), mask=inside)
    if squares is not None:
        sums = tl.sum(tl.where(inside, acc * acc, 0.0), 1)
        # The last slices of an overhanging tile have no column, and no place in `squares`.
        tl.store(squares + row * ((N + BN - 1) // BN) + tile_n, sums, mask=(row < M) & (tile_n * BN < N))
    if QUANT == NVFP4:
        packed, steps = nvfp4_blocks(tl.where(inside, acc, 0.0), tl.load(quant_scale), BM, BN // 16, NATIVE)
        byte = tile_n * (BN // 2) + tl.arange(0, BN // 2)
        tl.store(codes + row[:, None] * (N // 2) + byte[None, :], packed, mask=(row < M)[:, None] & (byte < N // 2)[None, :])
        block = tile_n * (BN // 16) + tl.arange(0, BN // 16)
        to = scale_offset(row[:, None], block[None, :], N // 16, SWIZZLED)
        tl.store(scales + to, steps, mask=(row < M)[:, None] & (block < N // 16)[None, :])
    elif QUANT != NO_CODES:
        inverse = tl.math.div_rn(1.0, tl.load(quant_scale))
        tl.store(codes + row[:, None] * N + column[None, :], saturate_e4m3(acc * inverse), mask=inside)
