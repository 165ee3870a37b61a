"""Triton kernels of the causal VAE decoder: implicit-GEMM convolution with its epilogues, normalisation with SiLU, de-normalisation."""

from __future__ import annotations

import triton
import triton.language as tl

from sanawm_kernels.quant.triton import rounded
from sanawm_kernels.tiles import grouped_tile

# What a convolution does with its result.
PLAIN = tl.constexpr(0)
RESIDUAL = tl.constexpr(1)  # add a tensor of the same shape
UPSAMPLE = tl.constexpr(2)  # add the repeated input, depth to space
PIXELS = tl.constexpr(3)  # bytes of an image


@triton.jit
def latent_rows(z, mean, std, out, S, C, B: tl.constexpr):
    """Grid (cdiv(C, B), cdiv(S, B)). z (C, S) to out (S, C), times std plus mean of the channel."""
    channel = tl.program_id(0) * B + tl.arange(0, B)
    pixel = tl.program_id(1) * B + tl.arange(0, B)
    inside = (channel < C)[:, None] & (pixel < S)[None, :]
    value = tl.load(z + channel[:, None] * S + pixel[None, :], mask=inside, other=0.0).to(tl.float32)
    gain = tl.load(std + channel, mask=channel < C, other=0.0).to(tl.float32)
    offset = tl.load(mean + channel, mask=channel < C, other=0.0).to(tl.float32)
    value = value * gain[:, None] + offset[:, None]
    at = out + pixel[:, None] * C + channel[None, :]
    tl.store(at, tl.trans(value).to(out.dtype.element_ty), mask=(pixel < S)[:, None] & (channel < C)[None, :])


@triton.jit
def norm_silu(x, out, state, M, KEPT, C: tl.constexpr, P: tl.constexpr, R: tl.constexpr, EPS: tl.constexpr):
    """Grid (cdiv(M, R)). x, out (M, C); rows from KEPT on are stored in `state` (M - KEPT, C) as well, unless it is None."""
    row = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)
    channel = tl.arange(0, P)
    inside = (row < M)[:, None] & (channel < C)[None, :]
    at = row[:, None] * C + channel[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    value *= tl.math.rsqrt(tl.sum(value * value, 1) / C + EPS)[:, None]
    result = (value * tl.sigmoid(value)).to(out.dtype.element_ty)
    tl.store(out + at, result, mask=inside)
    if state is not None:
        tl.store(state + at - KEPT * C, result, mask=inside & (row >= KEPT)[:, None])


@triton.jit
def reflected(index, size):
    """Index of the element that stands for the one at `index`, at most one beyond the edges."""
    index = tl.where(index < 0, -index, index)
    return tl.where(index >= size, 2 * size - 2 - index, index)


@triton.jit
def image_bytes(acc, frame, y, column, channel, H: tl.constexpr, W: tl.constexpr, PATCH: tl.constexpr, BF16: tl.constexpr):
    """Places in the bytes (frames, PATCH * H, PATCH * W, 3) of an image of what a convolution made, and their values."""
    if BF16:
        acc = rounded(acc, tl.bfloat16)
    level = tl.minimum(tl.maximum((acc + 1.0) * 127.5, 0.0), 255.0)
    # Adding and taking away 1.5 * 2**23 rounds to the nearest integer, ties to even.
    level = (level + 12582912.0) - 12582912.0
    down, right, colour = channel // (3 * PATCH), channel // 3 % PATCH, channel % 3
    to = (frame * (H * PATCH) + y * PATCH) + down
    to = (to * (W * PATCH) + column * PATCH + right) * 3 + colour
    return to, level.to(tl.uint8)


@triton.jit
def causal_conv(
    x, past, weight, bias, residual, out, M,
    T: tl.constexpr, H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, N: tl.constexpr, PATCH: tl.constexpr, MODE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr, BF16: tl.constexpr,
):  # fmt: skip
    """One program a tile of M = T*H*W pixels by N channels; the 27 taps of C channels are the depth of a product that is never laid out.

    x (M, C); past (2*H*W, C) or None at the start of a clip, where frame 0 stands in; weight (N, 27 C) contiguous. Tiles are visited GROUP
    tile rows at a time.
    """
    tile_m, tile_n = grouped_tile(tl.program_id(0), M, N, BM, BN, GROUP)
    pixel = tile_m * BM + tl.arange(0, BM)
    channel = tile_n * BN + tl.arange(0, BN)
    present = pixel < M
    place = tl.where(present, pixel, 0)
    frame, y, column = place // (H * W), place // W % H, place % W
    wanted = tl.where(channel < N, channel, 0)
    inner = tl.arange(0, BK)
    STEPS: tl.constexpr = (C + BK - 1) // BK
    acc = tl.zeros((BM, BN), tl.float32)
    for step in range(0, 27 * STEPS):
        tap, part = step // STEPS, step % STEPS
        source = frame + tap // 9 - 2
        spot = reflected(y + tap // 3 % 3 - 1, H) * W + reflected(column + tap % 3 - 1, W)
        at = x + (tl.maximum(source, 0) * (H * W) + spot).to(tl.int64) * C
        if past is not None:
            at = tl.where(source < 0, past + (tl.minimum(source + 2, 1) * (H * W) + spot).to(tl.int64) * C, at)
        depth = part * BK + inner
        a = tl.load(at[:, None] + depth[None, :], mask=(depth < C)[None, :], other=0.0)
        b = tl.load(weight + wanted[None, :].to(tl.int64) * (27 * C) + tap * C + depth[:, None], mask=(depth < C)[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    acc += tl.load(bias + channel, mask=channel < N, other=0.0).to(tl.float32)[None, :]
    inside = present[:, None] & (channel < N)[None, :]
    if MODE == UPSAMPLE:
        HALF: tl.constexpr = N // 8
        sub, c = channel // HALF, channel % HALF
        acc += tl.load(x + pixel[:, None].to(tl.int64) * C + ((8 * c + sub) % C)[None, :], mask=inside, other=0.0).to(tl.float32)
        # A clip's first new frame is dropped.
        to = 2 * frame[:, None] + (sub // 4)[None, :]
        if past is None:
            to -= 1
        to = (to * (2 * H) + 2 * y[:, None] + (sub // 2 % 2)[None, :]) * (2 * W) + 2 * column[:, None] + (sub % 2)[None, :]
        tl.store(out + to.to(tl.int64) * HALF + c[None, :], acc.to(out.dtype.element_ty), mask=inside & (to >= 0))
    elif MODE == PIXELS:
        to, level = image_bytes(acc, frame[:, None], y[:, None], column[:, None], channel[None, :], H, W, PATCH, BF16)
        tl.store(out + to, level, mask=inside)
    else:
        at = pixel[:, None].to(tl.int64) * N + channel[None, :]
        if MODE == RESIDUAL:
            acc += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside)
