"""Triton building blocks of the gated delta network: rotations, UCPE, gates, products.

Shapes: R tokens of a tile, P head width padded to a power of two, D head width.
"""

from __future__ import annotations

import triton
import triton.language as tl

# What `prepare` hands to `summarize` is half precision at a 64th of its size: exact to 2**-12 where above 0.004, within 4 million.
SHRINK = tl.constexpr(0.015625)


@triton.jit
def relu(x):
    """max(x, 0) that keeps NaN, as torch does: a broken projection must not look like a silent one."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def round_tf32(x):
    """float32 rounded to the 10 mantissa bits of tf32, ties away from zero. The tensor cores alone would cut the other bits off, and every
    product would come out too small by about 2**-11."""
    nearest = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return tl.where(x == x, nearest, x)


@triton.jit
def saturate(x):
    """x within the range of half precision; NaN stays."""
    return tl.clamp(x, -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def operand(x, PRECISION: tl.constexpr):
    """x rounded as an operand of `product`: `bf16`, `fp16` (saturating) and `tf32` for the tensor cores, `ieee` float32 as it is."""
    if PRECISION == "bf16":
        return x.to(tl.bfloat16)
    elif PRECISION == "fp16":
        return x if x.dtype == tl.float16 else saturate(x.to(tl.float32)).to(tl.float16)
    elif PRECISION == "tf32":
        return round_tf32(x.to(tl.float32))
    else:
        return x.to(tl.float32)


@triton.jit
def product(a, b, accumulator, PRECISION: tl.constexpr):
    """accumulator + a @ b, of operands already rounded."""
    if PRECISION == "bf16" or PRECISION == "fp16":
        return tl.dot(a, b, accumulator)
    else:
        return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def rotate_pairs(x, cos, sin, R: tl.constexpr, P: tl.constexpr):
    """Adjacent channel pairs of x (R, P) times exp(i * angle); cos, sin (R, P/2)."""
    even, odd = tl.split(tl.reshape(x, (R, P // 2, 2)))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (R, P))


@triton.jit
def _ray(m, valid, ENTRY: tl.constexpr):
    """An entry, counted row by row, of 4x4 matrices m of any kind that `ucpe` takes."""
    if isinstance(m, tl.tensor):
        return tl.load(m + ENTRY) if valid is None else tl.load(m + ENTRY, mask=valid, other=0.0)[:, None]
    else:
        return m[ENTRY]


@triton.jit
def rays_at(m, valid):
    """The entries of the matrices at m, which `ucpe` takes in the place of m: read here, once for many calls."""
    entries = ()
    for i in tl.static_range(16):
        entries = entries + (_ray(m, valid, i),)  # type: ignore[assignment] # noqa: RUF005
    return entries


@triton.jit
def _matrix_row(c0, c1, c2, c3, m, valid, ROW: tl.constexpr, TRANSPOSE: tl.constexpr):
    FIRST: tl.constexpr = ROW if TRANSPOSE else 4 * ROW
    STEP: tl.constexpr = 4 if TRANSPOSE else 1
    y = _ray(m, valid, FIRST) * c0 + _ray(m, valid, FIRST + STEP) * c1
    return y + _ray(m, valid, FIRST + 2 * STEP) * c2 + _ray(m, valid, FIRST + 3 * STEP) * c3


@triton.jit
def ucpe(x, m, valid, cos, sin, R: tl.constexpr, P: tl.constexpr, D: tl.constexpr, TRANSPOSE: tl.constexpr):
    """Unified camera positional encoding of x (R, P).

    Groups of four channels in the first half of the head are multiplied by 4x4 matrices (transposed with TRANSPOSE), pairs in the second half are
    rotated by cos, sin (R or 1, P/2), which hold zeros for the pairs of the first half. m: R pointers, one matrix a row, read where `valid`; or one
    pointer and `valid` None, a matrix for all rows; or what `rays_at` has read, `valid` then unused.
    Groups stay in one thread: no data moves between threads.
    """
    even, odd = tl.split(tl.reshape(x, (R, P // 4, 2, 2)))
    c0, c2 = tl.split(even)
    c1, c3 = tl.split(odd)
    cos_01, cos_23 = tl.split(tl.reshape(cos, (cos.shape[0], P // 4, 2)))
    sin_01, sin_23 = tl.split(tl.reshape(sin, (sin.shape[0], P // 4, 2)))
    first = (tl.arange(0, P // 4) < D // 8)[None, :]
    y0 = tl.where(first, _matrix_row(c0, c1, c2, c3, m, valid, 0, TRANSPOSE), c0 * cos_01 - c1 * sin_01)
    y1 = tl.where(first, _matrix_row(c0, c1, c2, c3, m, valid, 1, TRANSPOSE), c0 * sin_01 + c1 * cos_01)
    y2 = tl.where(first, _matrix_row(c0, c1, c2, c3, m, valid, 2, TRANSPOSE), c2 * cos_23 - c3 * sin_23)
    y3 = tl.where(first, _matrix_row(c0, c1, c2, c3, m, valid, 3, TRANSPOSE), c2 * sin_23 + c3 * cos_23)
    return tl.reshape(tl.join(tl.join(y0, y2), tl.join(y1, y3)), (R, P))


@triton.jit
def rms_clamp(after, before, D: tl.constexpr):
    """Scale the rows of `after` (R, P) down to the root mean square of `before`'s where it is larger."""
    rms_before = tl.sqrt(tl.sum(before * before, 1) / D + 1e-6)
    rms_after = tl.maximum(tl.sqrt(tl.sum(after * after, 1) / D + 1e-6), 1e-6)
    return after * tl.minimum(rms_before / rms_after, 1.0)[:, None]


@triton.jit
def rotary_tile(table, token, valid, P: tl.constexpr, D: tl.constexpr):
    """Rows `token` of a (N, D/2) table as (R, P/2)."""
    pair = tl.arange(0, P // 2)[None, :]
    return tl.load(table + token[:, None] * (D // 2) + pair, mask=valid[:, None] & (pair < D // 2), other=0.0)


@triton.jit
def camera_rotary_tile(table, token, valid, P: tl.constexpr, D: tl.constexpr):
    """Rows `token` of a (N, D/4) table as (R, P/2), at the pairs of the head's second half."""
    pair = tl.arange(0, P // 2)[None, :]
    inside = valid[:, None] & (pair >= D // 4) & (pair < D // 2)
    return tl.load(table + token[:, None] * (D // 4) + pair - D // 4, mask=inside, other=0.0)


@triton.jit
def rotary_row(table, token, P: tl.constexpr, D: tl.constexpr):
    """Row `token` of a (N, D/2) table as (1, P/2)."""
    pair = tl.arange(0, P // 2)[None, :]
    return tl.load(table + token * (D // 2) + pair, mask=pair < D // 2, other=0.0)


@triton.jit
def camera_rotary_row(table, token, P: tl.constexpr, D: tl.constexpr):
    """Row `token` of a (N, D/4) table as (1, P/2), at the pairs of the head's second half."""
    pair = tl.arange(0, P // 2)[None, :]
    return tl.load(table + token * (D // 4) + pair - D // 4, mask=(pair >= D // 4) & (pair < D // 2), other=0.0)


@triton.jit
def root_strength(logits):
    """Square root of the write strength sigmoid(logits)."""
    return tl.sqrt(tl.sigmoid(logits.to(tl.float32)))


@triton.jit
def decay_factor(logits, A_log, dt_bias):
    """exp(-exp(A_log) * softplus(logits + dt_bias)), all float32 scalars."""
    x = logits + dt_bias
    softplus = tl.where(x > 20.0, x, tl.log(1.0 + tl.exp(tl.minimum(x, 20.0))))
    return tl.exp(-tl.exp(A_log) * softplus)
