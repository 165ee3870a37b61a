"""Triton phase C of the gated delta network: states applied to queries.

Per tile of tokens, head and branch: normalise, rectify and rotate the raw queries, multiply by the sum of the forward and backward states, then
divide by the normaliser (main) or undo UCPE (camera), and write the output in its final layout.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sanawm_kernels.gdn.transforms import camera_rotary_tile, product, rms_clamp, rotary_tile, rotate_pairs, ucpe


@triton.jit
def _queries(q, q_scale, q_norm, token, valid, channel, row, D: tl.constexpr):
    inside = channel < D
    x = tl.load(q + token[:, None] * row + channel[None, :], mask=valid[:, None] & inside[None, :], other=0.0).to(tl.float32)
    inverse = tl.load(q_scale + token, mask=valid, other=0.0)
    weight = tl.load(q_norm + channel, mask=inside, other=0.0).to(tl.float32)
    return tl.maximum(x * inverse[:, None] * weight[None, :], 0.0)


@triton.jit
def _apply_state(query, state, R: tl.constexpr, D: tl.constexpr, P: tl.constexpr, PRECISION: tl.constexpr):
    """query (R, P) @ state (D, D) key x value."""
    key, value = tl.arange(0, P)[:, None], tl.arange(0, P)[None, :]
    matrix = tl.load(state + key * D + value, mask=(key < D) & (value < D), other=0.0)
    return product(query, matrix, tl.zeros((R, P), tl.float32), PRECISION)


@triton.jit
def apply(
    main_q, main_q_norm, main_row, main_batch, cos, sin, main_out, main_out_row, main_out_batch,
    camera_q, camera_q_norm, camera_row, camera_batch, rays, rays_batch, camera_cos, camera_sin, camera_out, camera_out_row, camera_out_batch,
    q_scale, applied, applied_z,
    B: tl.constexpr, H: tl.constexpr, T: tl.constexpr, S: tl.constexpr, D: tl.constexpr, P: tl.constexpr, R: tl.constexpr,
    EPS: tl.constexpr, PRECISION: tl.constexpr, MAIN: tl.constexpr, CAMERA: tl.constexpr, CLAMP: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(S, R), B*H*T, branches), camera first. Writes the outputs (B, N, C), rows `out_row` apart."""
    head, frame = tl.program_id(1) // T, tl.program_id(1) % T
    batch, first = (head // H).to(tl.int64), (head % H) * D
    position = tl.program_id(0) * R + tl.arange(0, R)
    valid = position < S
    token = frame * S + position
    channel = tl.arange(0, P)
    stored = valid[:, None] & (channel < D)[None, :]
    state = applied + (head * T + frame).to(tl.int64) * (D * D)
    tokens = batch * (T * S)

    if CAMERA:
        if tl.program_id(2) == 0:
            q = camera_q + batch * camera_batch + first
            plain = _queries(q, q_scale + tokens, camera_q_norm + first, token, valid, channel, camera_row.to(tl.int64), D)
            matrix = rays + batch * rays_batch + token * 16
            turn_cos = camera_rotary_tile(camera_cos, token, valid, P, D)
            turn_sin = camera_rotary_tile(camera_sin, token, valid, P, D)
            query = ucpe(plain, matrix, valid, turn_cos, turn_sin, R, P, D, True)
            if CLAMP:
                query = rms_clamp(query, plain, D)
            seen = _apply_state(query, state, R, D, P, PRECISION)
            # Matrices and angles are read a second time (from cache): the barrier keeps the compiler from holding them in registers meanwhile.
            tl.debug_barrier()
            turn_cos = camera_rotary_tile(camera_cos, token, valid, P, D)
            turn_sin = camera_rotary_tile(camera_sin, token, valid, P, D)
            out = ucpe(seen, matrix, valid, turn_cos, -turn_sin, R, P, D, False)
            to = camera_out + batch * camera_out_batch + token[:, None] * camera_out_row.to(tl.int64) + first + channel[None, :]
            tl.store(to, out.to(camera_out.dtype.element_ty), mask=stored)
    if MAIN:
        if tl.program_id(2) == CAMERA:
            q = main_q + batch * main_batch + first
            plain = _queries(q, q_scale + B * T * S + tokens, main_q_norm + first, token, valid, channel, main_row.to(tl.int64), D)
            query = rotate_pairs(plain, rotary_tile(cos, token, valid, P, D), rotary_tile(sin, token, valid, P, D), R, P)
            query = tl.where((channel < D)[None, :], query, 0.0)
            numerator = _apply_state(query, state + tl.cast(B * H * T, tl.int64) * (D * D), R, D, P, PRECISION)
            z = tl.load(applied_z + (head * T + frame) * D + channel, mask=channel < D, other=0.0)
            denominator = tl.sum(plain * z[None, :], 1) + EPS
            to = main_out + batch * main_out_batch + token[:, None] * main_out_row.to(tl.int64) + first + channel[None, :]
            tl.store(to, (numerator / denominator[:, None]).to(main_out.dtype.element_ty), mask=stored)
