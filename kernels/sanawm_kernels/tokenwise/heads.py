"""Triton kernels of the softmax blocks' heads: norm with RoPE, norm with UCPE, UCPE alone, transposed FP8 values.

A program holds one token of one tensor: all its heads, in a tile of H0 heads (the largest power of two within them) and one of H1: 20 = 16 + 4. The
token is read once, its angles and its ray matrix are those of all heads. A head of 112 channels has 128 lanes, whose last 16 read and write
nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sanawm_kernels.gdn.transforms import camera_rotary_row, rms_clamp, rotary_row, rotate_pairs, ucpe
from sanawm_kernels.quant.triton import saturate_e4m3


@triton.jit
def _places(FIRST: tl.constexpr, R: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, P: tl.constexpr):
    """Channels of R heads from FIRST on, (R, P), and which of them exist."""
    head, channel = FIRST + tl.arange(0, R)[:, None], tl.arange(0, P)[None, :]
    return head * D + channel, (head < HEADS) & (channel < D)


@triton.jit
def _normalised(x, weight, place, inside, inverse):
    if weight is None:
        return x
    else:
        return x * inverse * tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(value, out, place, inside, fp8_scale):
    if fp8_scale is not None:
        tl.store(out + place, saturate_e4m3(value * tl.math.div_rn(1.0, tl.load(fp8_scale))), mask=inside)
    else:
        tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _turned(
    value, matrix, cos, sin, R: tl.constexpr, P: tl.constexpr, D: tl.constexpr, TRANSPOSE: tl.constexpr, CLAMP: tl.constexpr
):
    """UCPE with the token's ray matrix, RoPE where there is none."""
    if matrix is None:
        return rotate_pairs(value, cos, sin, R, P)
    else:
        turned = ucpe(value, matrix, None, cos, sin, R, P, D, TRANSPOSE)
        if CLAMP:
            turned = rms_clamp(turned, value, D)
        return turned


@triton.jit
def _token(
    x, weight, out, fp8_scale, matrix, cos, sin,
    HEADS: tl.constexpr, H0: tl.constexpr, H1: tl.constexpr, D: tl.constexpr, P: tl.constexpr, EPS: tl.constexpr,
    TRANSPOSE: tl.constexpr, CLAMP: tl.constexpr,
):  # fmt: skip
    """All heads of a token at `x`: norm with `weight` if given, rotation, store at `out`."""
    place_a, inside_a = _places(0, H0, HEADS, D, P)
    place_b, inside_b = _places(H0, H1 if H1 > 0 else 1, HEADS, D, P)
    a = tl.load(x + place_a, mask=inside_a, other=0.0).to(tl.float32)
    b = a
    if H1 > 0:
        b = tl.load(x + place_b, mask=inside_b, other=0.0).to(tl.float32)
    inverse = 1.0
    if weight is not None:
        total = tl.sum(a * a)
        if H1 > 0:
            total += tl.sum(b * b)
        inverse = tl.math.rsqrt(total / (HEADS * D) + EPS)
    a = _turned(_normalised(a, weight, place_a, inside_a, inverse), matrix, cos, sin, H0, P, D, TRANSPOSE, CLAMP)
    _store(a, out, place_a, inside_a, fp8_scale)
    if H1 > 0:
        b = _turned(_normalised(b, weight, place_b, inside_b, inverse), matrix, cos, sin, H1, P, D, TRANSPOSE, CLAMP)
        _store(b, out, place_b, inside_b, fp8_scale)


@triton.jit
def rope_heads(
    q, q_row, k, k_row, q_norm, k_norm, cos, sin, q_out, k_out, q_scale, k_scale, ROWS,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, H0: tl.constexpr, H1: tl.constexpr, D: tl.constexpr, P: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """Grid (ROWS, 2): queries, then keys. q, k (ROWS, HEADS * D), rows q_row and k_row apart; cos, sin (TOKENS, D/2), outputs contiguous.

    TOKENS tokens a batch share the tables; q_scale, k_scale: float32 scales of e4m3 outputs, or None.
    """
    token = tl.program_id(0) % TOKENS
    row = tl.program_id(0).to(tl.int64)
    c, s = rotary_row(cos, token, P, D), rotary_row(sin, token, P, D)
    if tl.program_id(1) == 0:
        _token(q + row * q_row, q_norm, q_out + row * (HEADS * D), q_scale, None, c, s, HEADS, H0, H1, D, P, EPS, False, False)
    else:
        _token(k + row * k_row, k_norm, k_out + row * (HEADS * D), k_scale, None, c, s, HEADS, H0, H1, D, P, EPS, False, False)


@triton.jit
def ucpe_heads(
    q, q_row, k, k_row, v, v_row, q_norm, k_norm, rays, rays_inverse, cos, sin, q_out, k_out, v_out, q_scale, k_scale, v_scale, ROWS,
    TOKENS: tl.constexpr, RAYS: tl.constexpr, HEADS: tl.constexpr, H0: tl.constexpr, H1: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
    EPS: tl.constexpr, CLAMP: tl.constexpr,
):  # fmt: skip
    """Grid (ROWS, 3): queries, keys, values.

    rays, rays_inverse (RAYS, 4, 4), one set a batch where RAYS is not TOKENS; cos, sin (TOKENS, D/4).
    """
    token, ray = tl.program_id(0) % TOKENS, tl.program_id(0) % RAYS * 16
    row = tl.program_id(0).to(tl.int64)
    to = row * (HEADS * D)
    c, s = camera_rotary_row(cos, token, P, D), camera_rotary_row(sin, token, P, D)
    if tl.program_id(1) == 0:
        _token(q + row * q_row, q_norm, q_out + to, q_scale, rays + ray, c, s, HEADS, H0, H1, D, P, EPS, True, CLAMP)
    elif tl.program_id(1) == 1:
        _token(k + row * k_row, k_norm, k_out + to, k_scale, rays_inverse + ray, c, s, HEADS, H0, H1, D, P, EPS, False, CLAMP)
    else:
        _token(v + row * v_row, None, v_out + to, v_scale, rays_inverse + ray, c, s, HEADS, H0, H1, D, P, EPS, False, CLAMP)


@triton.jit
def inverse_ucpe(
    x, x_row, rays, cos, sin, out, ROWS,
    TOKENS: tl.constexpr, RAYS: tl.constexpr, HEADS: tl.constexpr, H0: tl.constexpr, H1: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Grid (ROWS). UCPE of attention outputs with the ray matrices themselves and negated angles."""
    token, ray = tl.program_id(0) % TOKENS, tl.program_id(0) % RAYS * 16
    row = tl.program_id(0).to(tl.int64)
    c, s = camera_rotary_row(cos, token, P, D), camera_rotary_row(sin, token, P, D)
    _token(x + row * x_row, None, out + row * (HEADS * D), None, rays + ray, c, -s, HEADS, H0, H1, D, P, 0.0, False, False)


@triton.jit
def transpose_values(
    v, v_row, v_batch, scale, out, TOKENS, out_row, HEADS: tl.constexpr, D: tl.constexpr, P: tl.constexpr, R: tl.constexpr
):
    """Grid (cdiv(TOKENS, R), HEADS, batch). v (batch, TOKENS, HEADS * D) to e4m3 (batch, HEADS, D, out_row), out_row >= TOKENS."""
    token = tl.program_id(0) * R + tl.arange(0, R)
    head, batch = tl.program_id(1), tl.program_id(2)
    channel = tl.arange(0, P)
    at = v + batch.to(tl.int64) * v_batch + token[:, None].to(tl.int64) * v_row + head * D + channel[None, :]
    value = tl.load(at, mask=(token[:, None] < TOKENS) & (channel[None, :] < D), other=0.0).to(tl.float32)
    codes = tl.trans(saturate_e4m3(value * tl.math.div_rn(1.0, tl.load(scale))))
    to = out + ((batch * HEADS + head) * D + channel[:, None]).to(tl.int64) * out_row + token[None, :]
    tl.store(to, codes, mask=(channel[:, None] < D) & (token[None, :] < out_row))
