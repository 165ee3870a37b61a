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
def _mean(sums, S: tl.constexpr, SPLITS: tl.constexpr):
    """Mean over a frame's S tokens of the splits' sums."""
    total = tl.load(sums)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(sums + split)
    return total / S


@triton.jit
def _decays(decay_sums, A_log, dt_bias, T: tl.constexpr, S: tl.constexpr, SPLITS: tl.constexpr):
    """The frames' decay factors, as a tuple."""
    rate, bias = tl.load(A_log).to(tl.float32), tl.load(dt_bias).to(tl.float32)
    found = ()
    for t in tl.static_range(T):
        found = found + (decay_factor(_mean(decay_sums + t * SPLITS, S, SPLITS), rate, bias),)  # type: ignore[assignment] # noqa: RUF005
    return found


@triton.jit
def _corrections(inflation, T: tl.constexpr, S: tl.constexpr, SPLITS: tl.constexpr, CAMERA: tl.constexpr):
    """1 / max(1, mean inflation) of each frame in the camera branch, 1 in the main branch, as a tuple."""
    found = ()
    for t in tl.static_range(T):
        if CAMERA:
            found = found + (1.0 / tl.maximum(_mean(inflation + t * SPLITS, S, SPLITS), 1.0),)  # type: ignore[assignment] # noqa: RUF005
        else:
            found = found + (1.0,)  # type: ignore[assignment] # noqa: RUF005
    return found


@triton.jit
def _effect(
    gram, square, in_square, update, rows, in_rows, STEP: tl.constexpr, T: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr, HEIGHT: tl.constexpr
):  # fmt: skip
    """What a step's frame does to the state: A, and its rows of U, which has HEIGHT."""
    t: tl.constexpr = T - 1 - STEP if STEP < T - 1 else STEP - T + 1
    a = _sum_splits(gram + t * (SPLITS * D * D) + square, in_square, D * D, SPLITS)
    return a, _sum_splits(update + t * (SPLITS * HEIGHT * D) + rows, in_rows, HEIGHT * D, SPLITS)


@triton.jit
def _scan_rows(
    gram, update, inflation, state_in, state_out, carried, applied, applied_scale, frames, decay_sums, A_log, dt_bias, block,
    T: tl.constexpr, S: tl.constexpr, D: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr,
    PRECISION: tl.constexpr, SCALED: tl.constexpr, CAMERA: tl.constexpr, HAS_STATE: tl.constexpr, COMMIT: tl.constexpr,
):  # fmt: skip
    i, column = tl.arange(0, P)[:, None], tl.arange(0, P)[None, :]
    row = block * ROWS + tl.arange(0, ROWS)[:, None]
    square = i * D + column
    in_square = (i < D) & (column < D)
    rows = row * D + column
    in_rows = (row < D) & (column < D)
    value = block * ROWS + tl.arange(0, ROWS)

    zero = tl.zeros((ROWS, P), tl.float32)
    a, u = _effect(gram, square, in_square, update, rows, in_rows, 0, T, D, SPLITS, D)
    seed = zero
    if HAS_STATE:
        seed = tl.load(state_in + carried + rows, mask=in_rows, other=0.0)
    decays = _decays(decay_sums, A_log, dt_bias, T, S, SPLITS)
    corrections = _corrections(inflation, T, S, SPLITS, CAMERA)
    state = zero
    # What later frames leave for a frame's queries, from the last but one to the first.
    later = ()
    # Backward through frames T - 1 to 1, then forward through 0 to T - 1.
    for step in tl.static_range(2 * T - 1):
        if step == T - 1:
            state = seed
        factor = corrections[T - 1 - step if step < T - 1 else step - T + 1]
        state *= decays[T - 1 - step if step < T - 1 else step - T + 1]
        operand_a, target = operand(a, PRECISION), u
        # A frame's effect is asked for a step ahead: nothing in it waits for the scan.
        if step + 1 < 2 * T - 1:
            a, u = _effect(gram, square, in_square, update, rows, in_rows, step + 1, T, D, SPLITS, D)
        state += factor * (target - product(operand(state, PRECISION), operand_a, zero, PRECISION))
        if step < T - 1:
            later = later + (state,)  # type: ignore[assignment] # noqa: RUF005
        else:
            t = step - (T - 1)
            seen = state
            if step < 2 * T - 2:
                seen += later[2 * T - 3 - step]
            if SCALED:
                scale = tl.maximum(tl.max(tl.abs(seen), 1), 1e-30) / 1024
                tl.store(applied_scale + (frames + t) * D + value, scale, mask=value < D)
                seen = seen / scale[:, None]
            tl.store(applied + (frames + t) * (D * D) + rows, seen.to(applied.dtype.element_ty), mask=in_rows)
    if COMMIT:
        # The state may be updated in place: no thread may still be reading it.
        tl.debug_barrier()
        tl.store(state_out + carried + rows, state, mask=in_rows)


@triton.jit
def _scan_normaliser(
    gram, column, z_in, z_out, carried, applied, decay_sums, A_log, dt_bias,
    T: tl.constexpr, S: tl.constexpr, D: tl.constexpr, P: tl.constexpr, SPLITS: tl.constexpr, HAS_STATE: tl.constexpr, COMMIT: tl.constexpr,
):  # fmt: skip
    channel = tl.arange(0, P)
    inside = channel < D
    square = channel[:, None] * D + channel[None, :]
    in_square = inside[:, None] & inside[None, :]
    zero = tl.zeros((P,), tl.float32)
    a, b = _effect(gram, square, in_square, column, channel, inside, 0, T, D, SPLITS, 1)
    seed = zero
    if HAS_STATE:
        seed = tl.load(z_in + carried + channel, mask=inside, other=0.0)
    decays = _decays(decay_sums, A_log, dt_bias, T, S, SPLITS)
    z = zero
    later = ()
    for step in tl.static_range(2 * T - 1):
        if step == T - 1:
            z = seed
        z *= decays[T - 1 - step if step < T - 1 else step - T + 1]
        matrix, target = a, b
        if step + 1 < 2 * T - 1:
            a, b = _effect(gram, square, in_square, column, channel, inside, step + 1, T, D, SPLITS, 1)
        z += target - tl.sum(matrix * z[None, :], 1)
        if step < T - 1:
            later = later + (z,)  # type: ignore[assignment] # noqa: RUF005
        else:
            seen = z
            if step < 2 * T - 2:
                seen += later[2 * T - 3 - step]
            tl.store(applied + (step - (T - 1)) * D + channel, seen, mask=inside)
    if COMMIT:
        # The state may be updated in place: no thread may still be reading it.
        tl.debug_barrier()
        tl.store(z_out + carried + channel, z, mask=inside)


@triton.jit
def combine(
    gram, update, column, inflation, applied, applied_scale, applied_z,
    main_state_in, main_state_out, z_in, z_out, camera_state_in, camera_state_out, decay_sums, A_log, dt_bias,
    B: tl.constexpr, H: tl.constexpr, T: tl.constexpr, S: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
    ROWS: tl.constexpr, BLOCKS: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr, SCALED: tl.constexpr,
    MAIN: tl.constexpr, CAMERA: tl.constexpr, HAS_STATE: tl.constexpr, COMMIT: tl.constexpr,
):  # fmt: skip
    """Grid (BLOCKS * branches + MAIN, B*H): row blocks of the camera branch, of the main branch, and the normaliser.

    Reads what `summarize` wrote. Writes the states queries see: applied (2, B*H, T, D, D) value x key, float32, or with SCALED half precision
    relative to applied_scale (2, B*H, T, D), a factor a value channel; applied_z (B*H, T, D) float32; and with COMMIT the states carried on, which
    may be the ones read.
    """
    job, head = tl.program_id(0), tl.program_id(1)
    slot = head * T * SPLITS
    heads: tl.constexpr = B * H
    decay_sums += slot
    A_log += head % H
    dt_bias += head % H
    frames = (head * T).to(tl.int64)
    splits = slot.to(tl.int64) * (D * D)
    carried = head.to(tl.int64) * (D * D)
    if CAMERA:  # noqa: SIM102  (decided when compiling, the next when running)
        if job < BLOCKS:
            _scan_rows(
                gram + splits, update + splits, inflation + slot, camera_state_in, camera_state_out, carried,
                applied, applied_scale, frames, decay_sums, A_log, dt_bias, job,
                T, S, D, P, ROWS, SPLITS, PRECISION, SCALED, True, HAS_STATE, COMMIT,
            )  # fmt: skip
    if MAIN:
        main_splits = splits + tl.cast(heads * T * SPLITS, tl.int64) * (D * D)
        if (job >= CAMERA * BLOCKS) & (job < (CAMERA + 1) * BLOCKS):
            _scan_rows(
                gram + main_splits, update + main_splits, None, main_state_in, main_state_out, carried,
                applied, applied_scale, heads * T + frames, decay_sums, A_log, dt_bias, job - CAMERA * BLOCKS,
                T, S, D, P, ROWS, SPLITS, PRECISION, SCALED, False, HAS_STATE, COMMIT,
            )  # fmt: skip
        if job == (CAMERA + 1) * BLOCKS:
            _scan_normaliser(
                gram + main_splits + tl.cast(heads * T * SPLITS, tl.int64) * (D * D), column + slot * D, z_in, z_out, head * D,
                applied_z + head * T * D, decay_sums, A_log, dt_bias,
                T, S, D, P, SPLITS, HAS_STATE, COMMIT,
            )  # fmt: skip
