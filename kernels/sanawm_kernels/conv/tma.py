"""Triton kernels of the decoder's convolutions for GPUs with a tensor memory accelerator (Hopper and later).

Activations come padded: two frames before the first, and a reflected pixel around each frame (`frames.padded`). A tile is BM pixels of a padded
frame that follow each other, so each of the 27 taps is a block of rows of one matrix, and the depth loop that of a product. Results keep the padded
rows' pitch: the two pixels between a row and the next one are computed like the others and never read. What is added to a result is a product too,
of the tensor to add with a matrix of zeros and ones, at the end of the depth: its tiles then arrive like those of the taps.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sanawm_kernels.conv.kernels import PIXELS, UPSAMPLE, image_bytes
from sanawm_kernels.gemm.epilogue import halves
from sanawm_kernels.tiles import grouped_tile


@triton.jit
def causal_conv(
    x, weight, bias, skip, select, out,
    T: tl.constexpr, H: tl.constexpr, W: tl.constexpr, STRIDE: tl.constexpr, C: tl.constexpr, N: tl.constexpr,
    MADE: tl.constexpr, FIRST: tl.constexpr, PATCH: tl.constexpr, MODE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, SLICES: tl.constexpr, SPLITS: tl.constexpr,
    PRECISION: tl.constexpr, BF16: tl.constexpr,
):  # fmt: skip
    """One-dimensional grid. Descriptors of matrices: x (T + 2 padded frames' pixels, C) and skip (T STRIDE, C) or None in blocks (BM, BK), weight
    (N, 27 C) and select (N, C) in (BN, BK).

    out: (T STRIDE, N), a descriptor too, blocks (BM, BN / SLICES); with SPLITS (SPLITS T STRIDE, N) sums of that many parts of the depth, without
    bias. Pointers: UPSAMPLE: frames of MADE rows at twice the size; PIXELS: bytes.
    """
    AREA: tl.constexpr = (H + 2) * (W + 2)
    EACH: tl.constexpr = (H * (W + 2) + BM - 1) // BM
    STEPS: tl.constexpr = (C + BK - 1) // BK
    # A residual's tile of channels needs no other channels.
    EXTRA: tl.constexpr = 0 if skip is None else STEPS if MODE == UPSAMPLE else (BN + BK - 1) // BK
    PART: tl.constexpr = (27 * STEPS + EXTRA) // SPLITS
    tl.static_assert(PART * SPLITS == 27 * STEPS + EXTRA, "parts of the depth differ")
    tl.static_assert(SPLITS == 1 or skip is None, "a part of the depth adds nothing")
    tiles = T * EACH * tl.cdiv(N, BN)
    for unit in tl.range(tl.program_id(0), tiles * SPLITS, tl.num_programs(0), flatten=True):
        tile_m, tile_n = grouped_tile(unit % tiles, T * EACH * BM, N, BM, BN, GROUP)
        split = unit // tiles
        frame, pixel = tile_m // EACH, tile_m % EACH * BM
        acc = tl.zeros((BM, BN), tl.float32)
        for step in range(0, PART):
            tap, part = (split * PART + step) // STEPS, (split * PART + step) % STEPS
            row = (frame + tap // 9) * AREA + tap // 3 % 3 * (W + 2) + tap % 3 + pixel
            # A tap's last block reads on into the next tap, against the zeros that x has there.
            depth, column = part * BK, tap * C + part * BK
            a_tiles, b_tiles = x, weight
            if skip is not None:
                start = 0 if MODE == UPSAMPLE else tile_n * BN
                if tap >= 27:
                    a_tiles, b_tiles = skip, select
                    row, depth = frame * STRIDE + pixel, start + (step - 27 * STEPS) * BK
                    column = depth
            a, b = a_tiles.load([row, depth]), b_tiles.load([tile_n * BN, column])
            acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
        _finish(acc, bias, out, split * T + frame, pixel, tile_n, H, W, STRIDE, N, MADE, FIRST, PATCH, MODE, BM, BN, SLICES, BF16)


@triton.jit
def _finish(
    acc, bias, out, frame, pixel, tile_n,
    H: tl.constexpr, W: tl.constexpr, STRIDE: tl.constexpr, N: tl.constexpr, MADE: tl.constexpr, FIRST: tl.constexpr, PATCH: tl.constexpr,
    MODE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SLICES: tl.constexpr, BF16: tl.constexpr,
):  # fmt: skip
    """Add the bias and store, a slice of the columns after the other."""
    if SLICES > 1:
        left, right = halves(acc, BM, BN)
        _finish(left, bias, out, frame, pixel, 2 * tile_n, H, W, STRIDE, N, MADE, FIRST, PATCH, MODE, BM, BN // 2, SLICES // 2, BF16)
        _finish(right, bias, out, frame, pixel, 2 * tile_n + 1, H, W, STRIDE, N, MADE, FIRST, PATCH, MODE, BM, BN // 2, SLICES // 2, BF16)
    else:
        channel = tile_n * BN + tl.arange(0, BN)
        if bias is not None:
            acc += tl.load(bias + channel, mask=channel < N, other=0.0).to(tl.float32)[None, :]
        if MODE != UPSAMPLE and MODE != PIXELS:
            out.store([frame * STRIDE + pixel, tile_n * BN], acc.to(out.dtype))
        else:
            place = pixel + tl.arange(0, BM)
            y, column = place // (W + 2), place % (W + 2)
            inside = ((y < H) & (column < W))[:, None] & (channel < N)[None, :]
            if MODE == UPSAMPLE:
                HALF: tl.constexpr = N // 8
                sub, c = channel // HALF, channel % HALF
                # A clip's first new frame is dropped.
                made = 2 * frame + sub // 4 - (1 if FIRST else 0)
                to = made[None, :] * MADE + (2 * y * (2 * W + 2) + 2 * column)[:, None] + (sub // 2 % 2 * (2 * W + 2) + sub % 2)[None, :]
                tl.store(out + to.to(tl.int64) * HALF + c[None, :], acc.to(out.dtype.element_ty), mask=inside & (made >= 0)[None, :])
            else:
                to, level = image_bytes(acc, frame, y[:, None], column[:, None], channel[None, :], H, W, PATCH, BF16)
                tl.store(out + to, level, mask=inside)
