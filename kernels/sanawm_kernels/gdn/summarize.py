"""Triton phase A of the gated delta network: each frame's effect on the state.

The delta update of a frame is affine, S -> S g (I - A) + U with A = sum_s beta k k^T and U = sum_s beta v k^T (k, v: the token's transformed
key and value), and z -> g (I - A') z + b with the unrotated keys. This phase sums A, U, A' and b over a frame's tokens; frames, heads, splits
of the tokens and jobs are independent. `prepare` has multiplied keys and the camera's values by sqrt(beta): A and U are products of tiles as they
lie in memory, and only the main branch's values pass through registers.

Jobs: U and A of the camera and of the main branch, then the normaliser (A', b). FUSED jobs sum A and U of a branch together, which reads each key
once and needs twice the registers.

D = 112 is covered by 128-wide tiles whose last 16 columns are masked: masked lanes load nothing, so the padding costs no memory traffic, only
idle tensor-core columns; the alternative, 64 + 32 + 16, needs nine small products for one large one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sanawm_kernels.gdn.transforms import SHRINK, operand, product, root_strength, round_tf32


@triton.jit
def _head_tile(x, token, valid, channel, row, D: tl.constexpr):
    """(R, P) of a head's channels at rows `token`, as they are stored."""
    return tl.load(x + token[:, None] * row + channel[None, :], mask=valid[:, None] & (channel < D)[None, :], other=0.0)


@triton.jit
def _strengths(beta, token, valid, beta_row):
    """Logits of the tokens' write strengths."""
    return tl.load(beta + token * beta_row, mask=valid, other=0.0)


@triton.jit
def _roots(logits, valid):
    """Roots of the tokens' write strengths, 0 beyond the last."""
    return tl.where(valid, root_strength(logits), 0.0)[:, None]


@triton.jit
def _token_sum(x, frame, start, stop, ROW, S: tl.constexpr, SPAN: tl.constexpr):
    """Sum over a split's tokens of what lies ROW apart; all are asked for at once. SPAN: power of two, at least the split's length."""
    position = start + tl.arange(0, SPAN)
    return tl.sum(tl.load(x + (frame * S + position) * ROW, mask=position < stop, other=0.0).to(tl.float32), 0)


@triton.jit
def _store_square(to, slot, x, D: tl.constexpr, P: tl.constexpr):
    i, j = tl.arange(0, P)[:, None], tl.arange(0, P)[None, :]
    tl.store(to + slot.to(tl.int64) * (D * D) + i * D + j, x, mask=(i < D) & (j < D))


@triton.jit
def _branch_job(
    keys, values, value_row, beta, beta_row, growth, frame, start, stop, gram, update, inflation, slot, branch_slot,
    S: tl.constexpr, H: tl.constexpr, D: tl.constexpr, P: tl.constexpr, R: tl.constexpr, SPAN: tl.constexpr, KEY_SCALE: tl.constexpr,
    PRECISION: tl.constexpr, GRAM: tl.constexpr, UPDATE: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """A with GRAM and U with UPDATE of one branch. With `growth`, the camera's, values are stored as keys are; else they are the raw ones."""
    KIND: tl.constexpr = "fp16" if PRECISION == "bf16" else PRECISION
    KEY: tl.constexpr = KEY_SCALE / SHRINK
    channel = tl.arange(0, P)
    outer = tl.zeros((P, P), tl.float32)
    written = tl.zeros((P, P), tl.float32)
    if GRAM and growth is not None:
        tl.store(inflation + slot, _token_sum(growth, frame, start, stop, H, S, SPAN))
    # A step's write strengths are asked for a step ahead.
    lane = tl.arange(0, R)
    if UPDATE and growth is None:
        ahead = _strengths(beta, frame * S + start + lane, start + lane < stop, beta_row)
    for s in range(start, stop, R):
        position = s + lane
        valid = position < stop
        token = frame * S + position
        key = operand(_head_tile(keys, token, valid, channel, H * D, D), KIND)
        if UPDATE:
            value = _head_tile(values, token, valid, channel, value_row, D)
            if growth is None:
                logits = ahead
                ahead = _strengths(beta, token + R, position + R < stop, beta_row)
                value = value.to(tl.float32) * (_roots(logits, valid) * SHRINK)
            written = product(tl.trans(operand(value, KIND)), key, written, KIND)
        if GRAM:
            outer = product(tl.trans(key), key, outer, KIND)
    if GRAM:
        outer *= KEY * KEY
        # What `combine` multiplies by.
        _store_square(gram, branch_slot, round_tf32(outer) if ROUND else outer, D, P)
    if UPDATE:
        _store_square(update, branch_slot, written * (KEY / SHRINK), D, P)


@triton.jit
def _normaliser_job(
    keys, beta, beta_row, frame, start, stop, gram, column, gram_slot, slot,
    S: tl.constexpr, H: tl.constexpr, D: tl.constexpr, P: tl.constexpr, R: tl.constexpr, KEY_SCALE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A' and b."""
    KIND: tl.constexpr = "fp16" if PRECISION == "bf16" else PRECISION
    KEY: tl.constexpr = KEY_SCALE / SHRINK
    channel = tl.arange(0, P)
    outer = tl.zeros((P, P), tl.float32)
    total = tl.zeros((R, P), tl.float32)
    lane = tl.arange(0, R)
    ahead = _strengths(beta, frame * S + start + lane, start + lane < stop, beta_row)
    for s in range(start, stop, R):
        position = s + lane
        valid = position < stop
        token = frame * S + position
        logits = ahead
        ahead = _strengths(beta, token + R, position + R < stop, beta_row)
        plain = _head_tile(keys, token, valid, channel, H * D, D)
        key = operand(plain, KIND)
        outer = product(tl.trans(key), key, outer, KIND)
        total += plain.to(tl.float32) * _roots(logits, valid)
    _store_square(gram, gram_slot, outer * (KEY * KEY), D, P)
    tl.store(column + slot * D + channel, tl.sum(total, 0) * KEY, mask=channel < D)


@triton.jit
def summarize(
    main_v, main_row, main_batch, beta, beta_row, beta_batch, decay, decay_row, decay_batch, main_keys, plain_keys, camera_keys, camera_values,
    growth, gram, update, column, inflation, decay_sums,
    B: tl.constexpr, H: tl.constexpr, T: tl.constexpr, S: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
    R: tl.constexpr, SPLITS: tl.constexpr, KEY_SCALE: tl.constexpr, PRECISION: tl.constexpr,
    MAIN: tl.constexpr, CAMERA: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    """Grid (B*H, T*SPLITS, jobs), R tokens a step.

    Writes float32 gram (3, B*H, T, SPLITS, D, D), update (2, B*H, T, SPLITS, D, D) value x key, column (B*H, T, SPLITS, D), and
    inflation and decay_sums (B*H, T, SPLITS), the sums over tokens; first index: camera, main, normaliser. In half precision a single split's A
    of the first two is rounded to tf32.
    """
    # Whole steps go to each split.
    SHARE: tl.constexpr = (S + R * SPLITS - 1) // (R * SPLITS) * R
    # Sums of one split are complete: `combine` need not round them again.
    ROUND: tl.constexpr = SPLITS == 1 and PRECISION == "bf16"
    SPAN: tl.constexpr = triton.next_power_of_2(SHARE)
    PARTS: tl.constexpr = 1 if FUSED else 2
    batch, head = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    frame, split = tl.program_id(1) // SPLITS, tl.program_id(1) % SPLITS
    job = tl.program_id(2)
    start = split * SHARE
    stop = tl.minimum(start + SHARE, S)
    slot = (tl.program_id(0) * T + frame) * SPLITS + split
    slots: tl.constexpr = B * H * T * SPLITS
    first = batch * (T * S) * (H * D) + head * D
    beta += batch * beta_batch + head
    # The job that has least to do sums the decays.
    if job == ((CAMERA + 1) * PARTS if MAIN else PARTS - 1):
        tl.store(decay_sums + slot, _token_sum(decay + batch * decay_batch + head, frame, start, stop, decay_row, S, SPAN))

    if CAMERA:  # noqa: SIM102  (decided when compiling, the next when running)
        if job < PARTS:
            keys, values, ratios = camera_keys + first, camera_values + first, growth + batch * (T * S * H) + head
            if job == 0:
                _branch_job(
                    keys, values, H * D, beta, beta_row, ratios, frame, start, stop, gram, update, inflation, slot, slot,
                    S, H, D, P, R, SPAN, KEY_SCALE, PRECISION, FUSED, True, ROUND,
                )  # fmt: skip
            elif not FUSED:
                _branch_job(
                    keys, values, H * D, beta, beta_row, ratios, frame, start, stop, gram, update, inflation, slot, slot,
                    S, H, D, P, R, SPAN, KEY_SCALE, PRECISION, True, False, ROUND,
                )  # fmt: skip
    if MAIN:  # noqa: SIM102
        if job >= CAMERA * PARTS:
            values, row = main_v + batch * main_batch + head * D, main_row.to(tl.int64)
            if job == CAMERA * PARTS:
                _branch_job(
                    main_keys + first, values, row, beta, beta_row, None, frame, start, stop, gram, update, None, slot, slots + slot,
                    S, H, D, P, R, SPAN, KEY_SCALE, PRECISION, FUSED, True, ROUND,
                )  # fmt: skip
            elif job == (CAMERA + 1) * PARTS:
                _normaliser_job(
                    plain_keys + first, beta, beta_row, frame, start, stop, gram, column, 2 * slots + slot, slot,
                    S, H, D, P, R, KEY_SCALE, PRECISION,
                )  # fmt: skip
            elif not FUSED:
                _branch_job(
                    main_keys + first, values, row, beta, beta_row, None, frame, start, stop, gram, update, None, slot, slots + slot,
                    S, H, D, P, R, SPAN, KEY_SCALE, PRECISION, True, False, ROUND,
                )  # fmt: skip
