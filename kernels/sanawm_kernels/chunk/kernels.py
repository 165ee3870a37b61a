"""Triton kernels of the operations around the blocks."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def transpose(x, x_row, out, R, C, B: tl.constexpr):
    """Grid (cdiv(R, B), cdiv(C, B)). x (R, C), rows x_row apart, to out (C, R), contiguous, in out's dtype."""
    row = tl.program_id(0) * B + tl.arange(0, B)
    column = tl.program_id(1) * B + tl.arange(0, B)
    inside = (row < R)[:, None] & (column < C)[None, :]
    tile = tl.load(x + row[:, None].to(tl.int64) * x_row + column[None, :], mask=inside, other=0.0)
    at = out + column[:, None].to(tl.int64) * R + row[None, :]
    tl.store(at, tl.trans(tile).to(out.dtype.element_ty), mask=(column < C)[:, None] & (row < R)[None, :])


@triton.jit
def modulation_rows(timestep, steps, table, out, WIDTH, K: tl.constexpr, B: tl.constexpr):
    """Grid (cdiv(WIDTH, B), frames). Copies the row of `table` whose entry of `steps` is the frame's timestep; NaN where there is none."""
    frame = tl.program_id(1)
    column = tl.program_id(0) * B + tl.arange(0, B)
    wanted = tl.load(timestep + frame).to(tl.int32)
    value = tl.full((B,), float("nan"), tl.float32)
    for k in tl.static_range(K):
        found = tl.load(steps + k).to(tl.int32) == wanted
        row = tl.load(table + k * WIDTH + column, mask=(column < WIDTH) & found, other=0.0).to(tl.float32)
        value = tl.where(found, row, value)
    tl.store(out + frame * WIDTH + column, value.to(out.dtype.element_ty), mask=column < WIDTH)


@triton.jit
def _unit(x, y, z):
    length = tl.maximum(tl.sqrt_rn(x * x + y * y + z * z), 1e-6)
    return tl.math.div_rn(x, length), tl.math.div_rn(y, length), tl.math.div_rn(z, length)


@triton.jit
def _row(at, valid, a, b, c, d):
    tl.store(at, a, mask=valid)
    tl.store(at + 1, b, mask=valid)
    tl.store(at + 2, c, mask=valid)
    tl.store(at + 3, d, mask=valid)


@triton.jit
def ray_matrices(camera, rays, inverse, H: tl.constexpr, W: tl.constexpr, B: tl.constexpr):
    """Grid (cdiv(H * W, B), frames). camera (frames, 20); rays, inverse (frames * H * W, 4, 4), float32."""
    frame = tl.program_id(1)
    token = tl.program_id(0) * B + tl.arange(0, B)
    valid = token < H * W
    pose = camera + frame * 20
    r00, r01, r02, ox = tl.load(pose), tl.load(pose + 1), tl.load(pose + 2), tl.load(pose + 3)
    r10, r11, r12, oy = tl.load(pose + 4), tl.load(pose + 5), tl.load(pose + 6), tl.load(pose + 7)
    r20, r21, r22, oz = tl.load(pose + 8), tl.load(pose + 9), tl.load(pose + 10), tl.load(pose + 11)
    u = tl.math.div_rn((token % W).to(tl.float32) - tl.load(pose + 18), tl.load(pose + 16) + tl.zeros((B,), tl.float32))
    v = tl.math.div_rn((token // W).to(tl.float32) - tl.load(pose + 19), tl.load(pose + 17) + tl.zeros((B,), tl.float32))
    lx, ly, lz = _unit(u, v, tl.full((B,), 1.0, tl.float32))
    zx, zy, zz = _unit(r00 * lx + r01 * ly + r02 * lz, r10 * lx + r11 * ly + r12 * lz, r20 * lx + r21 * ly + r22 * lz)
    # The camera's down axis crossed with the ray, then the ray crossed with that.
    xx, xy, xz = _unit(r11 * zz - r21 * zy, r21 * zx - r01 * zz, r01 * zy - r11 * zx)
    yx, yy, yz = _unit(zy * xz - zz * xy, zz * xx - zx * xz, zx * xy - zy * xx)
    tx, ty, tz = -(xx * ox + xy * oy + xz * oz), -(yx * ox + yy * oy + yz * oz), -(zx * ox + zy * oy + zz * oz)
    ix, iy, iz = -(xx * tx + yx * ty + zx * tz), -(xy * tx + yy * ty + zy * tz), -(xz * tx + yz * ty + zz * tz)
    bad = (zx != zx) | (zy != zy) | (zz != zz)
    one, zero = tl.full((B,), 1.0, tl.float32), tl.zeros((B,), tl.float32)
    at = rays + (frame * H * W + token).to(tl.int64) * 16
    _row(at, valid, tl.where(bad, one, xx), tl.where(bad, zero, xy), tl.where(bad, zero, xz), tl.where(bad, zero, tx))
    _row(at + 4, valid, tl.where(bad, zero, yx), tl.where(bad, one, yy), tl.where(bad, zero, yz), tl.where(bad, zero, ty))
    _row(at + 8, valid, tl.where(bad, zero, zx), tl.where(bad, zero, zy), tl.where(bad, one, zz), tl.where(bad, zero, tz))
    _row(at + 12, valid, zero, zero, zero, one)
    at = inverse + (frame * H * W + token).to(tl.int64) * 16
    _row(at, valid, tl.where(bad, one, xx), tl.where(bad, zero, yx), tl.where(bad, zero, zx), tl.where(bad, zero, ix))
    _row(at + 4, valid, tl.where(bad, zero, xy), tl.where(bad, one, yy), tl.where(bad, zero, zy), tl.where(bad, zero, iy))
    _row(at + 8, valid, tl.where(bad, zero, xz), tl.where(bad, zero, yz), tl.where(bad, one, zz), tl.where(bad, zero, iz))
    _row(at + 12, valid, zero, zero, zero, one)


@triton.jit
def rope_table(
    time, rows, columns, out, N, H: tl.constexpr, W: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, R: tl.constexpr,
    K0: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr, B: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(N, B)). time (frames, P), rows (H, Q), columns (W, R) to out (N, K0 + K1 + K2); L lanes cover a row of it."""
    token = tl.program_id(0) * B + tl.arange(0, B)
    lane = tl.arange(0, L)
    frame, y, x = token // (H * W), token // W % H, token % W
    valid = (token < N)[:, None]
    in_time, in_rows, in_columns = lane < K0, (lane >= K0) & (lane < K0 + K1), (lane >= K0 + K1) & (lane < K0 + K1 + K2)
    value = tl.load(time + frame[:, None] * P + lane[None, :], mask=valid & in_time[None, :], other=0.0)
    value += tl.load(rows + y[:, None] * Q + (lane - K0)[None, :], mask=valid & in_rows[None, :], other=0.0)
    value += tl.load(columns + x[:, None] * R + (lane - K0 - K1)[None, :], mask=valid & in_columns[None, :], other=0.0)
    tl.store(out + token[:, None] * (K0 + K1 + K2) + lane[None, :], value, mask=valid & (lane < K0 + K1 + K2)[None, :])


@triton.jit
def gelu(x, out, SIZE, B: tl.constexpr):
    """Grid (cdiv(SIZE, B)). GELU by its tanh form; 1 + tanh(a) is 2 sigmoid(2a)."""
    at = tl.program_id(0) * B + tl.arange(0, B)
    value = tl.load(x + at, mask=at < SIZE, other=0.0).to(tl.float32)
    inner = 1.5957691216057308 * (value + 0.044715 * value * value * value)
    tl.store(out + at, (value * tl.sigmoid(inner)).to(out.dtype.element_ty), mask=at < SIZE)


@triton.jit
def euler_step(latents, velocity, size, SIZE, KEPT, S: tl.constexpr, T: tl.constexpr, B: tl.constexpr):
    """Grid (cdiv(SIZE, B)). latents (C, T, S) -= size * velocity, in place; frames before KEPT stay as they are."""
    at = tl.program_id(0) * B + tl.arange(0, B)
    moves = (at < SIZE) & (at // S % T >= KEPT)
    x = tl.load(latents + at, mask=moves, other=0.0).to(tl.float32)
    v = tl.load(velocity + at, mask=moves, other=0.0).to(tl.float32)
    tl.store(latents + at, (x - size * v).to(latents.dtype.element_ty), mask=moves)
