"""Triton phase A of the gated delta network: each frame's effect on the state.

The delta update of a frame is affine, S -> S g (I - A) + U with A = sum_s beta k k^T and U = sum_s beta v k^T (k, v: the token's transformed
key and value), and z -> g (I - A') z + b with the unrotated keys. This phase sums A, U, A' and b over a frame's tokens; frames, heads, splits
of the tokens and jobs are independent. Jobs, the heavy ones first: camera (A, U and the keys' inflation), main (A, U), normaliser (A', b).
FUSED jobs sum A and U together and transform each key once; without it A and U are jobs of their own, which need half the registers.

D = 112 is covered by 128-wide tiles whose last 16 columns are masked: masked lanes load nothing, so the padding costs no memory traffic, only
idle tensor-core columns; the alternative, 64 + 32 + 16, needs nine small products for one large one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sanawm_kernels.gdn.transforms import camera_rotary_tile, operand, product, relu, rms_clamp, rotary_tile, rotate_pairs, ucpe


@triton.jit
def _head_tile(x, token, valid, channel, row, D: tl.constexpr):
    """(R, P) float32 tile of a head's channels at rows `token`."""
    return tl.load(x + token[:, None] * row + channel[None, :], mask=valid[:, None] & (channel < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _filter_again(
    source, frame, position, valid, channel, row,
    T: tl.constexpr, S: tl.constexpr, C: tl.constexpr, D: tl.constexpr, KEY_SCALE: tl.constexpr, CARRY: tl.constexpr,
):  # fmt: skip
    """Finished keys from raw ones, exactly as in `prepare`, for a tile of one head."""
    k, offset, _, k_scale, token_offset, tail, tail_offset, conv, norm, head_channel = source
    k += offset
    conv += head_channel * 4
    inside = (channel < D)[None, :]
    y = _head_tile(k, frame * S + position, valid, channel, row, D)
    y *= tl.load(conv + channel * 4 + 3, mask=channel < D, other=0.0).to(tl.float32)[None, :]
    for j in tl.static_range(1, 4):
        mixed = _head_tile(k, (frame - j) * S + position, valid & (frame >= j), channel, row, D)
        mixed += _head_tile(k, (frame + j) * S + position, valid & (frame + j < T), channel, row, D)
        if CARRY:
            before = tail + tail_offset + ((frame - j + 3) * S + position)[:, None] * C + channel[None, :]
            mixed += tl.load(before, mask=valid[:, None] & inside & (frame < j), other=0.0).to(tl.float32)
        y += mixed * tl.load(conv + channel * 4 + (3 - j), mask=channel < D, other=0.0).to(tl.float32)[None, :]
    weight = tl.load(norm + head_channel + channel, mask=channel < D, other=0.0).to(tl.float32) * KEY_SCALE
    inverse = tl.load(k_scale + token_offset + frame * S + position, mask=valid, other=0.0)
    return relu(y * inverse[:, None] * weight[None, :])


@triton.jit
def _keys(
    source, frame, position, valid, channel, row,
    T: tl.constexpr, S: tl.constexpr, C: tl.constexpr, D: tl.constexpr, KEY_SCALE: tl.constexpr, CARRY: tl.constexpr, STORED: tl.constexpr,
):  # fmt: skip
    """Finished keys of a tile of one head.

    source: raw keys and offset, stored keys, reciprocal RMS and the batch's first token, tail and offset, taps, norm, the head's first channel.
    """
    if STORED:
        return _head_tile(source[2] + source[4] * C + source[9], frame * S + position, valid, channel, C, D) * KEY_SCALE
    else:
        return _filter_again(source, frame, position, valid, channel, row, T, S, C, D, KEY_SCALE, CARRY)


@triton.jit
def _logits(beta, frame, position, stop, beta_row, S: tl.constexpr):
    """Write-strength logits of a tile of tokens. Loops load them a step ahead: elements of 16 bits are too narrow to be copied ahead to shared
    memory as the tiles are."""
    return tl.load(beta + (frame * S + position) * beta_row, mask=position < stop, other=0.0)


@triton.jit
def _strength(logits, valid):
    return tl.where(valid, tl.sigmoid(logits.to(tl.float32)), 0.0)[:, None]


@triton.jit
def _store_square(to, slot, x, D: tl.constexpr, P: tl.constexpr):
    i, j = tl.arange(0, P)[:, None], tl.arange(0, P)[None, :]
    tl.store(to + slot.to(tl.int64) * (D * D) + i * D + j, x, mask=(i < D) & (j < D))


@triton.jit
def _camera_job(
    source, v, beta, beta_row, rays_inverse, cos, sin, row, frame, start, stop, gram, update, inflation, slot,
    T: tl.constexpr, S: tl.constexpr, C: tl.constexpr, D: tl.constexpr, P: tl.constexpr, R: tl.constexpr, KEY_SCALE: tl.constexpr,
    PRECISION: tl.constexpr, CLAMP: tl.constexpr, CARRY: tl.constexpr, STORED: tl.constexpr, GRAM: tl.constexpr, UPDATE: tl.constexpr,
):  # fmt: skip
    channel = tl.arange(0, P)
    outer = tl.zeros((P, P), tl.float32)
    written = tl.zeros((P, P), tl.float32)
    growth = tl.zeros((R,), tl.float32)
    logits = _logits(beta, frame, start + tl.arange(0, R), stop, beta_row, S)
    for s in range(start, stop, R):
        position = s + tl.arange(0, R)
        valid = position < stop
        token = frame * S + position
        plain = _keys(source, frame, position, valid, channel, row, T, S, C, D, KEY_SCALE, CARRY, STORED)
        turn_cos = camera_rotary_tile(cos, token, valid, P, D)
        turn_sin = camera_rotary_tile(sin, token, valid, P, D)
        matrix = rays_inverse + token * 16
        key = ucpe(plain, matrix, valid, turn_cos, turn_sin, R, P, D, False)
        if CLAMP:
            key = rms_clamp(key, plain, D)
        if GRAM:
            ratio = tl.maximum(tl.sum(key * key, 1), 1e-12) / tl.maximum(tl.sum(plain * plain, 1), 1e-12)
            growth += tl.where(valid, ratio, 0.0)
        weighted = operand(key * _strength(logits, valid), PRECISION)
        logits = _logits(beta, frame, position + R, stop, beta_row, S)
        key = operand(key, PRECISION)
        # Both transforms come before both products, so that no product's operand waits in registers.
        if UPDATE:
            raw = _head_tile(v, token, valid, channel, row, D)
            value = ucpe(raw, matrix, valid, turn_cos, turn_sin, R, P, D, False)
            if CLAMP:
                value = rms_clamp(value, raw, D)
        if GRAM:
            outer = product(tl.trans(key), weighted, outer, PRECISION)
        if UPDATE:
            written = product(tl.trans(operand(value, PRECISION)), weighted, written, PRECISION)
    if GRAM:
        _store_square(gram, slot, outer, D, P)
        tl.store(inflation + slot, tl.sum(growth, 0))
    if UPDATE:
        _store_square(update, slot, written, D, P)


@triton.jit
def _main_job(
    source, v, beta, beta_row, cos, sin, row, frame, start, stop, gram, update, slot,
    T: tl.constexpr, S: tl.constexpr, C: tl.constexpr, D: tl.constexpr, P: tl.constexpr, R: tl.constexpr, KEY_SCALE: tl.constexpr,
    PRECISION: tl.constexpr, CARRY: tl.constexpr, STORED: tl.constexpr, GRAM: tl.constexpr, UPDATE: tl.constexpr,
):  # fmt: skip
    channel = tl.arange(0, P)
    outer = tl.zeros((P, P), tl.float32)
    written = tl.zeros((P, P), tl.float32)
    logits = _logits(beta, frame, start + tl.arange(0, R), stop, beta_row, S)
    for s in range(start, stop, R):
        position = s + tl.arange(0, R)
        valid = position < stop
        token = frame * S + position
        plain = _keys(source, frame, position, valid, channel, row, T, S, C, D, KEY_SCALE, CARRY, STORED)
        key = rotate_pairs(plain, rotary_tile(cos, token, valid, P, D), rotary_tile(sin, token, valid, P, D), R, P)
        weighted = operand(key * _strength(logits, valid), PRECISION)
        logits = _logits(beta, frame, position + R, stop, beta_row, S)
        if GRAM:
            outer = product(tl.trans(operand(key, PRECISION)), weighted, outer, PRECISION)
        if UPDATE:
            value = operand(_head_tile(v, token, valid, channel, row, D), PRECISION)
            written = product(tl.trans(value), weighted, written, PRECISION)
    if GRAM:
        _store_square(gram, slot, outer, D, P)
    if UPDATE:
        _store_square(update, slot, written, D, P)


@triton.jit
def _normaliser_job(
    source, beta, beta_row, row, frame, start, stop, gram, column, gram_slot, slot,
    T: tl.constexpr, S: tl.constexpr, C: tl.constexpr, D: tl.constexpr, P: tl.constexpr, R: tl.constexpr, KEY_SCALE: tl.constexpr,
    PRECISION: tl.constexpr, CARRY: tl.constexpr, STORED: tl.constexpr,
):  # fmt: skip
    # These keys have only been normalised: before they are scaled they fit half precision, which is more exact than bfloat16.
    HALF: tl.constexpr = "fp16" if PRECISION == "bf16" else PRECISION
    channel = tl.arange(0, P)
    outer = tl.zeros((P, P), tl.float32)
    total = tl.zeros((R, P), tl.float32)
    logits = _logits(beta, frame, start + tl.arange(0, R), stop, beta_row, S)
    for s in range(start, stop, R):
        position = s + tl.arange(0, R)
        valid = position < stop
        plain = _keys(source, frame, position, valid, channel, row, T, S, C, D, 1.0, CARRY, STORED)
        weighted = plain * _strength(logits, valid)
        logits = _logits(beta, frame, position + R, stop, beta_row, S)
        outer = product(tl.trans(operand(plain, HALF)), operand(weighted, HALF), outer, HALF)
        total += weighted
    _store_square(gram, gram_slot, outer * (KEY_SCALE * KEY_SCALE), D, P)
    tl.store(column + slot * D + channel, tl.sum(total, 0) * KEY_SCALE, mask=channel < D)


@triton.jit
def summarize(
    main_k, main_v, main_k_norm, main_conv, main_tail, main_row, main_batch, cos, sin,
    camera_k, camera_v, camera_k_norm, camera_conv, camera_tail, camera_row, camera_batch, rays_inverse, rays_batch, camera_cos, camera_sin,
    beta, beta_row, beta_batch, keys, k_scale, gram, update, column, inflation,
    B: tl.constexpr, H: tl.constexpr, T: tl.constexpr, S: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
    R: tl.constexpr, SPLITS: tl.constexpr, KEY_SCALE: tl.constexpr, PRECISION: tl.constexpr,
    MAIN: tl.constexpr, CAMERA: tl.constexpr, CLAMP: tl.constexpr,
    MAIN_CARRY: tl.constexpr, CAMERA_CARRY: tl.constexpr, STORE_KEYS: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    """Grid (B*H, T*SPLITS, jobs), R tokens a step.

    Writes float32 gram (3, B*H, T, SPLITS, D, D), update (2, B*H, T, SPLITS, D, D) value x key, column (B*H, T, SPLITS, D) and
    inflation (B*H, T, SPLITS), the sum over tokens; first index: camera, main, normaliser.
    """
    C: tl.constexpr = H * D
    # Whole steps go to each split.
    SHARE: tl.constexpr = (S + R * SPLITS - 1) // (R * SPLITS) * R
    PARTS: tl.constexpr = 1 if FUSED else 2
    batch, head = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    frame, split = tl.program_id(1) // SPLITS, tl.program_id(1) % SPLITS
    job = tl.program_id(2)
    start = split * SHARE
    stop = tl.minimum(start + SHARE, S)
    slot = (tl.program_id(0) * T + frame) * SPLITS + split
    slots: tl.constexpr = B * H * T * SPLITS
    first = head * D
    tokens = batch * (T * S)
    tail = batch * (3 * S * C) + first
    beta += batch * beta_batch + head

    if CAMERA:  # noqa: SIM102  (decided when compiling, the next when running)
        if job < PARTS:
            row = camera_row.to(tl.int64)
            offset = batch * camera_batch + first
            source = (camera_k, offset, keys, k_scale, tokens, camera_tail, tail, camera_conv, camera_k_norm, first)
            v = camera_v + offset
            inverse = rays_inverse + batch * rays_batch
            if job == 0:
                _camera_job(
                    source, v, beta, beta_row, inverse, camera_cos, camera_sin, row, frame, start, stop, gram, update, inflation, slot,
                    T, S, C, D, P, R, KEY_SCALE, PRECISION, CLAMP, CAMERA_CARRY, STORE_KEYS, FUSED, True,
                )  # fmt: skip
            elif not FUSED:
                _camera_job(
                    source, v, beta, beta_row, inverse, camera_cos, camera_sin, row, frame, start, stop, gram, update, inflation, slot,
                    T, S, C, D, P, R, KEY_SCALE, PRECISION, CLAMP, CAMERA_CARRY, STORE_KEYS, True, False,
                )  # fmt: skip
    if MAIN:  # noqa: SIM102
        if job >= CAMERA * PARTS:
            row = main_row.to(tl.int64)
            offset = batch * main_batch + first
            source = (main_k, offset, keys, k_scale, tokens + B * T * S, main_tail, tail, main_conv, main_k_norm, first)
            v = main_v + offset
            if job == CAMERA * PARTS:
                _main_job(
                    source, v, beta, beta_row, cos, sin, row, frame, start, stop, gram, update, slots + slot,
                    T, S, C, D, P, R, KEY_SCALE, PRECISION, MAIN_CARRY, STORE_KEYS, FUSED, True,
                )  # fmt: skip
            elif job == (CAMERA + 1) * PARTS:
                _normaliser_job(
                    source, beta, beta_row, row, frame, start, stop, gram, column, 2 * slots + slot, slot,
                    T, S, C, D, P, R, KEY_SCALE, PRECISION, MAIN_CARRY, STORE_KEYS,
                )  # fmt: skip
            elif not FUSED:
                _main_job(
                    source, v, beta, beta_row, cos, sin, row, frame, start, stop, gram, update, slots + slot,
                    T, S, C, D, P, R, KEY_SCALE, PRECISION, MAIN_CARRY, STORE_KEYS, True, False,
                )  # fmt: skip
