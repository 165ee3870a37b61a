"""Triton phase C of the gated delta network: states applied to queries.

Per tile of tokens, head and branch: normalise, rectify and rotate the raw queries, multiply by the sum of the forward and backward states,
then divide by the normaliser (main) or undo UCPE (camera), and write the output in its final layout. A program keeps one state for several
tiles and reads the next tile while it works on one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sanawm_kernels.gdn.transforms import camera_rotary_tile, operand, product, relu, rms_clamp, rotary_tile, rotate_pairs, ucpe


@triton.jit
def _queries(q, q_scale, q_norm, token, valid, channel, row, D: tl.constexpr):
    inside = channel < D
    x = tl.load(q + token[:, None] * row + channel[None, :], mask=valid[:, None] & inside[None, :], other=0.0).to(tl.float32)
    inverse = tl.load(q_scale + token, mask=valid, other=0.0)
    weight = tl.load(q_norm + channel, mask=inside, other=0.0).to(tl.float32)
    return relu(x * inverse[:, None] * weight[None, :])


@triton.jit
def _state(applied, applied_scale, slot, D: tl.constexpr, P: tl.constexpr, SCALED: tl.constexpr):
    """The state at `slot` (P, P) key x value, and the factors of its columns (P,)."""
    value, key = tl.arange(0, P), tl.arange(0, P)
    element = value[:, None] * D + key[None, :]
    matrix = tl.trans(tl.load(applied + slot.to(tl.int64) * (D * D) + element, mask=(value < D)[:, None] & (key < D)[None, :], other=0.0))
    if SCALED:
        return matrix, tl.load(applied_scale + slot * D + value, mask=value < D, other=0.0)
    else:
        return matrix, tl.zeros((P,), tl.float32)


@triton.jit
def _apply_state(query, matrix, scale, R: tl.constexpr, D: tl.constexpr, P: tl.constexpr, PRECISION: tl.constexpr):
    """query (R, P) @ state.

    With 16-bit operands both are half precision, the query relative to the largest element of its row, the state to that of its column
    (`scale`): as fast as bfloat16, eight times more exact, and safe from overflow.
    """
    # The mask changes nothing; it keeps the compiler from repeating the query's rotation in every warp that multiplies by it.
    query = tl.where((tl.arange(0, P) < D)[None, :], query, 0.0)
    if PRECISION == "bf16":
        size = tl.maximum(tl.max(tl.abs(query), 1), 1e-30) / 1024
        return tl.dot((query / size[:, None]).to(tl.float16), matrix) * size[:, None] * scale[None, :]
    else:
        return product(operand(query, PRECISION), operand(matrix, PRECISION), tl.zeros((R, P), tl.float32), PRECISION)


@triton.jit
def apply(
    main_q, main_q_norm, main_row, main_batch, cos, sin, main_out, main_out_row, main_out_batch,
    camera_q, camera_q_norm, camera_row, camera_batch, rays, rays_batch, camera_cos, camera_sin,
    camera_out, camera_out_row, camera_out_batch, q_scale, applied, applied_scale, applied_z,
    B: tl.constexpr, H: tl.constexpr, T: tl.constexpr, S: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
    R: tl.constexpr, TILES: tl.constexpr, EPS: tl.constexpr, PRECISION: tl.constexpr,
    MAIN: tl.constexpr, CAMERA: tl.constexpr, CLAMP: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(S, R*TILES), B*H*T, branches), camera first. Writes the outputs (B, N, C), rows `out_row` apart."""
    slot = tl.program_id(1)
    head, frame = slot // T, slot % T
    batch, first = (head // H).to(tl.int64), (head % H) * D
    start = tl.program_id(0) * (R * TILES)
    stop = tl.minimum(start + R * TILES, S)
    channel = tl.arange(0, P)
    tokens = batch * (T * S)

    if CAMERA:  # noqa: SIM102  (decided when compiling, the next when running)
        if tl.program_id(2) == 0:
            q = camera_q + batch * camera_batch + first
            row, out_row = camera_row.to(tl.int64), camera_out_row.to(tl.int64)
            matrix, scale = _state(applied, applied_scale, slot, D, P, PRECISION == "bf16")
            for s in range(start, stop, R):
                position = s + tl.arange(0, R)
                valid = position < stop
                token = frame * S + position
                plain = _queries(q, q_scale + tokens, camera_q_norm + first, token, valid, channel, row, D)
                ray = rays + batch * rays_batch + token * 16
                turn_cos = camera_rotary_tile(camera_cos, token, valid, P, D)
                turn_sin = camera_rotary_tile(camera_sin, token, valid, P, D)
                query = ucpe(plain, ray, valid, turn_cos, turn_sin, R, P, D, True)
                if CLAMP:
                    query = rms_clamp(query, plain, D)
                seen = _apply_state(query, matrix, scale, R, D, P, PRECISION)
                # Matrices and angles are read a second time (from cache): the barrier keeps the compiler from holding them in registers.
                tl.debug_barrier()
                turn_cos = camera_rotary_tile(camera_cos, token, valid, P, D)
                turn_sin = camera_rotary_tile(camera_sin, token, valid, P, D)
                out = ucpe(seen, ray, valid, turn_cos, -turn_sin, R, P, D, False)
                to = camera_out + batch * camera_out_batch + token[:, None] * out_row + first + channel[None, :]
                tl.store(to, out.to(camera_out.dtype.element_ty), mask=valid[:, None] & (channel < D)[None, :])
    if MAIN:  # noqa: SIM102
        if tl.program_id(2) == CAMERA:
            q = main_q + batch * main_batch + first
            row, out_row = main_row.to(tl.int64), main_out_row.to(tl.int64)
            matrix, scale = _state(applied, applied_scale, B * H * T + slot, D, P, PRECISION == "bf16")
            z = tl.load(applied_z + slot * D + channel, mask=channel < D, other=0.0)
            for s in range(start, stop, R):
                position = s + tl.arange(0, R)
                valid = position < stop
                token = frame * S + position
                plain = _queries(q, q_scale + B * T * S + tokens, main_q_norm + first, token, valid, channel, row, D)
                query = rotate_pairs(plain, rotary_tile(cos, token, valid, P, D), rotary_tile(sin, token, valid, P, D), R, P)
                numerator = _apply_state(query, matrix, scale, R, D, P, PRECISION)
                denominator = tl.sum(plain * z[None, :], 1) + EPS
                to = main_out + batch * main_out_batch + token[:, None] * out_row + first + channel[None, :]
                out = (numerator / denominator[:, None]).to(main_out.dtype.element_ty)
                tl.store(to, out, mask=valid[:, None] & (channel < D)[None, :])
