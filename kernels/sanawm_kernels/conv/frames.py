"""Triton kernels around the convolutions of `tma`: padded frames, sums of parts, matrices of zeros and ones."""

from __future__ import annotations

import triton
import triton.language as tl

from sanawm_kernels.conv.kernels import reflected


@triton.jit
def padded(
    x, past, out, state,
    T: tl.constexpr, H: tl.constexpr, W: tl.constexpr, PITCH: tl.constexpr, STRIDE: tl.constexpr, C: tl.constexpr,
    P: tl.constexpr, R: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv((T + 2) * (H + 2) * (W + 2), R)). Frames with two before them and a reflected pixel around, and the last two of them as the state.

    x: T frames STRIDE pixels apart, rows PITCH pixels apart; with NORM normalised, through SiLU. past (2, H, W, C), taken as it is, or None, where
    frame 0 stands in. out (T + 2, H + 2, W + 2, C), state (2, H, W, C).
    """
    row = tl.program_id(0) * R + tl.arange(0, R)
    channel = tl.arange(0, P)
    frame, y, column = row // ((H + 2) * (W + 2)), row // (W + 2) % (H + 2) - 1, row % (W + 2) - 1
    border = (y < 0) | (y >= H) | (column < 0) | (column >= W)
    y, column = reflected(y, H), reflected(column, W)
    inside = (frame < T + 2)[:, None] & (channel < C)[None, :]
    new = inside
    if past is not None:
        new &= (frame >= 2)[:, None]
    at = (tl.maximum(frame - 2, 0) * STRIDE + y * PITCH + column).to(tl.int64) * C
    value = tl.load(x + at[:, None] + channel[None, :], mask=new, other=0.0)
    if NORM:
        wide = value.to(tl.float32)
        wide *= tl.math.rsqrt(tl.sum(wide * wide, 1) / C + EPS)[:, None]
        value = (wide * tl.sigmoid(wide)).to(out.dtype.element_ty)
    if past is not None:
        at = ((frame * H + y) * W + column).to(tl.int64) * C
        before = tl.load(past + at[:, None] + channel[None, :], mask=inside & (frame < 2)[:, None], other=0.0)
        value = tl.where((frame < 2)[:, None], before, value)
    tl.store(out + row.to(tl.int64)[:, None] * C + channel[None, :], value, mask=inside)
    at = (((frame - T) * H + y) * W + column).to(tl.int64) * C
    tl.store(state + at[:, None] + channel[None, :], value, mask=inside & ((frame >= T) & ~border)[:, None])


@triton.jit
def summed(parts, bias, residual, out, ROWS: tl.constexpr, N: tl.constexpr, SPLITS: tl.constexpr, B: tl.constexpr):
    """Grid (cdiv(ROWS * N, B)). out, residual (or None) (ROWS, N): the sum of parts (SPLITS, ROWS, N) in float32, bias and residual."""
    at = tl.program_id(0) * B + tl.arange(0, B)
    inside = at < ROWS * N
    acc = tl.load(bias + at % N).to(tl.float32)
    for split in tl.static_range(SPLITS):
        acc += tl.load(parts + split * ROWS * N + at, mask=inside, other=0.0)
    if residual is not None:
        acc += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def selection(out, N: tl.constexpr, C: tl.constexpr, UPSAMPLE: tl.constexpr, B: tl.constexpr):
    """Grid (N, cdiv(C, B)). out (N, C): a one in each row, at the channel that is added to the row's channel of a result."""
    row = tl.program_id(0)
    channel = tl.program_id(1) * B + tl.arange(0, B)
    wanted = row
    if UPSAMPLE:
        wanted = (8 * (row % (N // 8)) + row // (N // 8)) % C
    tl.store(out + row * C + channel, (channel == wanted).to(out.dtype.element_ty), mask=channel < C)
