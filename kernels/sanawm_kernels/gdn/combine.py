"""Triton phase B of the gated delta network: frames' effects combined into the state each frame's queries see.

Forward inclusive, S_t = g_t S_{t-1} (I - A_t) + U_t, seeded by the carried state, plus backward exclusive, R_{t-1} = g_t R_t (I - A_t) + U_t with
R_{T-1} = 0. Rows of the state do not mix, so blocks of rows are independent programs; the decayed state itself stays float32 and only the
correction M A goes through the tensor cores. The camera branch divides A and U by its keys' mean inflation: the corrected write strength is
beta / max(1, inflation) with one inflation a frame and head. One more program a head carries the normaliser, the same scan on a single row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sanawm_kernels.gdn.transforms import decay_factor, operand, product


@triton.jit
def _sum_splits(x, inside, STRIDE: tl.constexpr, SPLITS: tl.constexpr):
    """Sum of SPLITS tiles of pointers STRIDE apart."""
    total = tl.load(x, mask=inside, other=0.0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(x + split * STRIDE, mask=inside, other=0.0)
    return total


@triton.jit
def _decay(decay_logits, A_log, dt_bias, t, H: tl.constexpr):
    logits = tl.load(decay_logits + t * H).to(tl.float32)
    return decay_factor(logits, tl.load(A_log).to(tl.float32), tl.load(dt_bias).to(tl.float32))


@triton.jit
def _correction(inflation, slot, S: tl.constexpr, SPLITS: tl.constexpr, CAMERA: tl.constexpr):
    """1 / max(1, mean inflation) in the camera branch, 1 in the main branch."""
    if CAMERA:
        total = tl.load(inflation + slot)
        for split in tl.static_range(1, SPLITS):
            total += tl.load(inflation + slot + split)
        return 1.0 / tl.maximum(total / S, 1.0)
    else:
        return 1.0


@triton.jit
def _scan_rows(
    gram, update, inflation, slot, state_in, state_out, carried, later, applied, applied_scale, frames, decay_logits, A_log, dt_bias, block,
    H: tl.constexpr, T: tl.constexpr, S: tl.constexpr, D: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr,
    PRECISION: tl.constexpr, SCALED: tl.constexpr, CAMERA: tl.constexpr, HAS_STATE: tl.constexpr, COMMIT: tl.constexpr,
):  # fmt: skip
    i, column = tl.arange(0, P)[:, None], tl.arange(0, P)[None, :]
    row = block * ROWS + tl.arange(0, ROWS)[:, None]
    square = i * D + column
    in_square = (i < D) & (column < D)
    rows = row * D + column
    in_rows = (row < D) & (column < D)
    value = block * ROWS + tl.arange(0, ROWS)[None, :]
    across = i * D + value
    in_across = (i < D) & (value < D)

    state = tl.zeros((ROWS, P), tl.float32)
    for back in range(T - 1):
        t = T - 1 - back
        state *= _decay(decay_logits, A_log, dt_bias, t, H)
        factor = _correction(inflation, slot + t * SPLITS, S, SPLITS, CAMERA)
        a = _sum_splits(gram + t * (SPLITS * D * D) + square, in_square, D * D, SPLITS)
        u = _sum_splits(update + t * (SPLITS * D * D) + rows, in_rows, D * D, SPLITS)
        state += factor * (u - product(operand(state, PRECISION), operand(a, PRECISION), tl.zeros((ROWS, P), tl.float32), PRECISION))
        tl.store(later + (frames + t - 1) * (D * D) + rows, state, mask=in_rows)
    # The forward scan adds the rows stored above, which other threads of this program may have written.
    tl.debug_barrier()

    if HAS_STATE:
        state = tl.load(state_in + carried + rows, mask=in_rows, other=0.0)
    else:
        state = tl.zeros((ROWS, P), tl.float32)
    for t in range(T):
        state *= _decay(decay_logits, A_log, dt_bias, t, H)
        factor = _correction(inflation, slot + t * SPLITS, S, SPLITS, CAMERA)
        a = _sum_splits(gram + t * (SPLITS * D * D) + square, in_square, D * D, SPLITS)
        u = _sum_splits(update + t * (SPLITS * D * D) + rows, in_rows, D * D, SPLITS)
        state += factor * (u - product(operand(state, PRECISION), operand(a, PRECISION), tl.zeros((ROWS, P), tl.float32), PRECISION))
        seen = state + tl.load(later + (frames + t) * (D * D) + rows, mask=in_rows & (t < T - 1), other=0.0)
        if SCALED:
            scale = tl.maximum(tl.max(tl.abs(seen), 1), 1e-30) / 1024
            tl.store(applied_scale + (frames + t) * D + block * ROWS + tl.arange(0, ROWS), scale, mask=block * ROWS + tl.arange(0, ROWS) < D)
            seen = seen / scale[:, None]
        # Stored key x value, as `apply` multiplies it.
        tl.store(applied + (frames + t) * (D * D) + across, tl.trans(seen).to(applied.dtype.element_ty), mask=in_across)
    if COMMIT:
        # The state may be updated in place: no thread may still be reading it.
        tl.debug_barrier()
        tl.store(state_out + carried + rows, state, mask=in_rows)


@triton.jit
def _scan_normaliser(
    gram, column, z_in, z_out, carried, later, applied, decay_logits, A_log, dt_bias,
    H: tl.constexpr, T: tl.constexpr, D: tl.constexpr, P: tl.constexpr, SPLITS: tl.constexpr, HAS_STATE: tl.constexpr, COMMIT: tl.constexpr,
):  # fmt: skip
    channel = tl.arange(0, P)
    inside = channel < D
    square = channel[:, None] * D + channel[None, :]
    in_square = inside[:, None] & inside[None, :]
    z = tl.zeros((P,), tl.float32)
    for back in range(T - 1):
        t = T - 1 - back
        z *= _decay(decay_logits, A_log, dt_bias, t, H)
        a = _sum_splits(gram + t * (SPLITS * D * D) + square, in_square, D * D, SPLITS)
        b = _sum_splits(column + t * (SPLITS * D) + channel, inside, D, SPLITS)
        z += b - tl.sum(a * z[None, :], 1)
        tl.store(later + (t - 1) * D + channel, z, mask=inside)
    tl.debug_barrier()

    if HAS_STATE:
        z = tl.load(z_in + carried + channel, mask=inside, other=0.0)
    else:
        z = tl.zeros((P,), tl.float32)
    for t in range(T):
        z *= _decay(decay_logits, A_log, dt_bias, t, H)
        a = _sum_splits(gram + t * (SPLITS * D * D) + square, in_square, D * D, SPLITS)
        b = _sum_splits(column + t * (SPLITS * D) + channel, inside, D, SPLITS)
        z += b - tl.sum(a * z[None, :], 1)
        tl.store(applied + t * D + channel, z + tl.load(later + t * D + channel, mask=inside & (t < T - 1), other=0.0), mask=inside)
    if COMMIT:
        # The state may be updated in place: no thread may still be reading it.
        tl.debug_barrier()
        tl.store(z_out + carried + channel, z, mask=inside)


@triton.jit
def combine(
    gram, update, column, inflation, later, later_z, applied, applied_scale, applied_z,
    main_state_in, main_state_out, z_in, z_out, camera_state_in, camera_state_out, decay_logits, A_log, dt_bias,
    B: tl.constexpr, H: tl.constexpr, T: tl.constexpr, S: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
    ROWS: tl.constexpr, BLOCKS: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr, SCALED: tl.constexpr,
    MAIN: tl.constexpr, CAMERA: tl.constexpr, HAS_STATE: tl.constexpr, COMMIT: tl.constexpr,
):  # fmt: skip
    """Grid (BLOCKS * branches + MAIN, B*H): row blocks of the camera branch, of the main branch, and the normaliser.

    Reads what `summarize` wrote. Scratch: later (2, B*H, T, D, D), later_z (B*H, T, D) float32. Writes the states queries see: applied
    (2, B*H, T, D, D) key x value, float32, or with SCALED half precision relative to applied_scale (2, B*H, T, D), a factor a value channel;
    applied_z (B*H, T, D) float32; and with COMMIT the states carried on, which may be the ones read.
    """
    job, head = tl.program_id(0), tl.program_id(1)
    slot = head * T * SPLITS
    heads: tl.constexpr = B * H
    decay_logits += (head // H) * (T * H) + head % H
    A_log += head % H
    dt_bias += head % H
    frames = (head * T).to(tl.int64)
    splits = slot.to(tl.int64) * (D * D)
    carried = head.to(tl.int64) * (D * D)
    if CAMERA:  # noqa: SIM102  (decided when compiling, the next when running)
        if job < BLOCKS:
            _scan_rows(
                gram + splits, update + splits, inflation, slot, camera_state_in, camera_state_out, carried,
                later, applied, applied_scale, frames, decay_logits, A_log, dt_bias, job,
                H, T, S, D, P, ROWS, SPLITS, PRECISION, SCALED, True, HAS_STATE, COMMIT,
            )  # fmt: skip
    if MAIN:
        main_splits = splits + tl.cast(heads * T * SPLITS, tl.int64) * (D * D)
        if (job >= CAMERA * BLOCKS) & (job < (CAMERA + 1) * BLOCKS):
            _scan_rows(
                gram + main_splits, update + main_splits, inflation, slot, main_state_in, main_state_out, carried,
                later, applied, applied_scale, heads * T + frames, decay_logits, A_log, dt_bias, job - CAMERA * BLOCKS,
                H, T, S, D, P, ROWS, SPLITS, PRECISION, SCALED, False, HAS_STATE, COMMIT,
            )  # fmt: skip
        if job == (CAMERA + 1) * BLOCKS:
            _scan_normaliser(
                gram + main_splits + tl.cast(heads * T * SPLITS, tl.int64) * (D * D), column + slot * D, z_in, z_out, head * D,
                later_z + head * T * D, applied_z + head * T * D, decay_logits, A_log, dt_bias,
                H, T, D, P, SPLITS, HAS_STATE, COMMIT,
            )  # fmt: skip
