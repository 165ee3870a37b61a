"""Triton kernels of the softmax blocks' heads: norm with RoPE, norm with UCPE, UCPE alone, transposed FP8 values.

A program holds R tokens and goes through the heads twice, first for the mean square over all channels, then to transform: the second reading
hits the first-level cache, and the tables of the tokens' angles and matrices are read once for all heads. A head of 112 channels sits in a tile of
128 lanes whose last 16 read and write nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sanawm_kernels.gdn.transforms import camera_rotary_tile, rms_clamp, rotary_tile, rotate_pairs, ucpe
from sanawm_kernels.quant.triton import saturate_e4m3


@triton.jit
def _inverse_rms(x, x_row, row, valid, HEADS: tl.constexpr, D: tl.constexpr, P: tl.constexpr, EPS: tl.constexpr):
    channel = tl.arange(0, P)[None, :]
    mask = valid[:, None] & (channel < D)
    squares = tl.zeros((row.shape[0], P), tl.float32)
    for head in range(HEADS):
        value = tl.load(x + row[:, None] * x_row + head * D + channel, mask=mask, other=0.0).to(tl.float32)
        squares += value * value
    return tl.math.rsqrt(tl.sum(squares, 1) / (HEADS * D) + EPS)


@triton.jit
def _store_head(value, out, row, head, mask, fp8_scale, HEADS: tl.constexpr, D: tl.constexpr, P: tl.constexpr):
    at = out + row[:, None] * (HEADS * D) + head * D + tl.arange(0, P)[None, :]
    if fp8_scale is not None:
        tl.store(at, saturate_e4m3(value * tl.math.div_rn(1.0, tl.load(fp8_scale))), mask=mask)
    else:
        tl.store(at, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _rope(
    x,
    x_row,
    weight,
    out,
    fp8_scale,
    row,
    valid,
    cos,
    sin,
    R: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    EPS: tl.constexpr,
):
    inverse = _inverse_rms(x, x_row, row, valid, HEADS, D, P, EPS)
    channel = tl.arange(0, P)
    mask = valid[:, None] & (channel < D)[None, :]
    for head in range(HEADS):
        value = tl.load(x + row[:, None] * x_row + head * D + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        gain = tl.load(weight + head * D + channel, mask=channel < D, other=0.0).to(tl.float32)
        turned = rotate_pairs(value * inverse[:, None] * gain[None, :], cos, sin, R, P)
        _store_head(turned, out, row, head, mask, fp8_scale, HEADS, D, P)


@triton.jit
def rope_heads(
    q, q_row, k, k_row, q_norm, k_norm, cos, sin, q_out, k_out, q_scale, k_scale, ROWS,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, P: tl.constexpr, R: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(ROWS, R), 2): queries, then keys. q, k (ROWS, HEADS * D), rows q_row and k_row apart; cos, sin (TOKENS, D/2), outputs contiguous.

    TOKENS tokens a batch share the tables; q_scale, k_scale: float32 scales of e4m3 outputs, or None.
    """
    row = tl.program_id(0) * R + tl.arange(0, R)
    valid = row < ROWS
    token = row % TOKENS
    row = row.to(tl.int64)
    c, s = rotary_tile(cos, token, valid, P, D), rotary_tile(sin, token, valid, P, D)
    if tl.program_id(1) == 0:
        _rope(q, q_row, q_norm, q_out, q_scale, row, valid, c, s, R, HEADS, D, P, EPS)
    else:
        _rope(k, k_row, k_norm, k_out, k_scale, row, valid, c, s, R, HEADS, D, P, EPS)


@triton.jit
def _ucpe(
    x, x_row, weight, out, fp8_scale, row, valid, matrix, cos, sin,
    R: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, P: tl.constexpr, EPS: tl.constexpr, TRANSPOSE: tl.constexpr, CLAMP: tl.constexpr,
):  # fmt: skip
    channel = tl.arange(0, P)
    mask = valid[:, None] & (channel < D)[None, :]
    inverse = tl.full((R,), 1.0, tl.float32)
    if weight is not None:
        inverse = _inverse_rms(x, x_row, row, valid, HEADS, D, P, EPS)
    for head in range(HEADS):
        value = tl.load(x + row[:, None] * x_row + head * D + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        if weight is not None:
            gain = tl.load(weight + head * D + channel, mask=channel < D, other=0.0).to(tl.float32)
            value = value * inverse[:, None] * gain[None, :]
        turned = ucpe(value, matrix, valid, cos, sin, R, P, D, TRANSPOSE)
        if CLAMP:
            turned = rms_clamp(turned, value, D)
        _store_head(turned, out, row, head, mask, fp8_scale, HEADS, D, P)


@triton.jit
def ucpe_heads(
    q, q_row, k, k_row, v, v_row, q_norm, k_norm, rays, rays_inverse, cos, sin, q_out, k_out, v_out, q_scale, k_scale, v_scale, ROWS,
    TOKENS: tl.constexpr, RAYS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, P: tl.constexpr, R: tl.constexpr, EPS: tl.constexpr,
    CLAMP: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(ROWS, R), 3): queries, keys, values.

    rays, rays_inverse (RAYS, 4, 4), one set a batch where RAYS is not TOKENS; cos, sin (TOKENS, D/4).
    """
    row = tl.program_id(0) * R + tl.arange(0, R)
    valid = row < ROWS
    token, ray = row % TOKENS, row % RAYS
    row = row.to(tl.int64)
    c, s = camera_rotary_tile(cos, token, valid, P, D), camera_rotary_tile(sin, token, valid, P, D)
    if tl.program_id(1) == 0:
        _ucpe(q, q_row, q_norm, q_out, q_scale, row, valid, rays + ray * 16, c, s, R, HEADS, D, P, EPS, True, CLAMP)
    elif tl.program_id(1) == 1:
        _ucpe(k, k_row, k_norm, k_out, k_scale, row, valid, rays_inverse + ray * 16, c, s, R, HEADS, D, P, EPS, False, CLAMP)
    else:
        _ucpe(v, v_row, None, v_out, v_scale, row, valid, rays_inverse + ray * 16, c, s, R, HEADS, D, P, EPS, False, CLAMP)


@triton.jit
def inverse_ucpe(
    x, x_row, rays, cos, sin, out, ROWS,
    TOKENS: tl.constexpr, RAYS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, P: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(ROWS, R)). UCPE of attention outputs with the ray matrices themselves and negated angles."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    valid = row < ROWS
    token, ray = row % TOKENS, row % RAYS
    c, s = camera_rotary_tile(cos, token, valid, P, D), camera_rotary_tile(sin, token, valid, P, D)
    _ucpe(x, x_row, None, out, None, row.to(tl.int64), valid, rays + ray * 16, c, -s, R, HEADS, D, P, 0.0, False, False)


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
