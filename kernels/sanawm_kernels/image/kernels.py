"""Triton kernels of the video encoder on a single frame: patches, 3x3 convolution with its epilogues, space to depth with its skip."""

from __future__ import annotations

import triton
import triton.language as tl

from sanawm_kernels.tiles import grouped_tile

# What a convolution does with its result.
PLAIN = tl.constexpr(0)
RESIDUAL = tl.constexpr(1)  # add a tensor of the same shape
LATENT = tl.constexpr(2)  # normalise, store channel-major


@triton.jit
def patches(image, out, H: tl.constexpr, W: tl.constexpr, PATCH: tl.constexpr, P: tl.constexpr, R: tl.constexpr):
    """Grid (cdiv(H * W, R)). image (3, PATCH * H, PATCH * W) float32, out (H * W, 3 PATCH^2); P lanes cover its channels."""
    pixel = tl.program_id(0) * R + tl.arange(0, R)
    channel = tl.arange(0, P)
    inside = (pixel < H * W)[:, None] & (channel < 3 * PATCH * PATCH)[None, :]
    colour, across, down = channel // (PATCH * PATCH), channel // PATCH % PATCH, channel % PATCH
    row = (pixel // W * PATCH)[:, None] + down[None, :]
    column = (pixel % W * PATCH)[:, None] + across[None, :]
    value = tl.load(image + colour[None, :] * (H * W * PATCH * PATCH) + row * (W * PATCH) + column, mask=inside, other=0.0)
    tl.store(out + pixel[:, None] * (3 * PATCH * PATCH) + channel[None, :], value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def frame_conv(
    x, weight, bias, residual, mean, std, out,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, N: tl.constexpr, MODE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program a tile of H*W pixels by N channels; the 9 taps of C channels are the depth of a product that is never laid out.

    x (H*W, C); weight (N, 9 C) contiguous; out (H*W, N), for LATENT (N, H*W). Beyond the edges are zeros. Tiles are visited GROUP tile rows at
    a time.
    """
    M: tl.constexpr = H * W
    tile_m, tile_n = grouped_tile(tl.program_id(0), M, N, BM, BN, GROUP)
    pixel = tile_m * BM + tl.arange(0, BM)
    channel = tile_n * BN + tl.arange(0, BN)
    present = pixel < M
    y, column = pixel // W, pixel % W
    wanted = tl.where(channel < N, channel, 0)
    inner = tl.arange(0, BK)
    STEPS: tl.constexpr = (C + BK - 1) // BK
    acc = tl.zeros((BM, BN), tl.float32)
    for step in range(0, 9 * STEPS):
        tap, part = step // STEPS, step % STEPS
        down, right = y + tap // 3 - 1, column + tap % 3 - 1
        there = present & (down >= 0) & (down < H) & (right >= 0) & (right < W)
        at = x + tl.where(there, down * W + right, 0).to(tl.int64) * C
        depth = part * BK + inner
        a = tl.load(at[:, None] + depth[None, :], mask=there[:, None] & (depth < C)[None, :], other=0.0)
        b = tl.load(weight + wanted[None, :].to(tl.int64) * (9 * C) + tap * C + depth[:, None], mask=(depth < C)[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    acc += tl.load(bias + channel, mask=channel < N, other=0.0).to(tl.float32)[None, :]
    inside = present[:, None] & (channel < N)[None, :]
    if MODE == LATENT:
        centre = tl.load(mean + channel, mask=channel < N, other=0.0)
        spread = tl.load(std + channel, mask=channel < N, other=1.0)
        acc = tl.math.div_rn(acc - centre[None, :], tl.broadcast_to(spread[None, :], (BM, BN)))
        tl.store(out + channel[None, :].to(tl.int64) * M + pixel[:, None], acc.to(out.dtype.element_ty), mask=inside)
    else:
        to = pixel[:, None].to(tl.int64) * N + channel[None, :]
        if MODE == RESIDUAL:
            acc += tl.load(residual + to, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + to, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def downsample(
    y, x, out, SIZE,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, N: tl.constexpr, ST: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr,
    G: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(SIZE, B)). y (H*W, N), x (H*W, C), out (H/SY * W/SX, N * ST*SY*SX) of SIZE elements; a skip's mean is over G channels."""
    VOLUME: tl.constexpr = ST * SY * SX
    at = (tl.program_id(0) * B + tl.arange(0, B)).to(tl.int64)
    inside = at < SIZE
    channel, pixel = at % (N * VOLUME), at // (N * VOLUME)
    row, column = pixel // (W // SX) * SY, pixel % (W // SX) * SX
    sub = channel % VOLUME
    source = (row + sub // SX % SY) * W + column + sub % SX
    value = tl.load(y + source * N + channel // VOLUME, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((B,), tl.float32)
    for i in tl.static_range(G):
        entry = channel * G + i
        part = entry % VOLUME
        source = (row + part // SX % SY) * W + column + part % SX
        total += tl.load(x + source * C + entry // VOLUME, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, (value + total / G).to(out.dtype.element_ty), mask=inside)
