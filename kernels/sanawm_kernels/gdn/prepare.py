"""Triton pre-pass of the gated delta network: what needs all channels of a token.

One program handles one spatial position with all frames of the chunk: the short convolution reads every raw key once. It writes the
reciprocal RMS of each query, and either the finished keys (convolved, normalised, rectified) or only their
reciprocal RMS, for kernels that convolve again and round nothing on the way. Keys after a norm are
at most sqrt(C) times a weight, so half precision holds them eight times more exactly than bfloat16 in the same memory.

The C channels are covered by a tile of C0 (the largest power of two within C) and one of C1: 2240 = 2048 + 192, of which 3 % is masked.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sanawm_kernels.gdn.transforms import relu, saturate


@triton.jit
def _frames(x, inside, T: tl.constexpr, STEP):
    """T rows of pointers STEP apart, as a tuple."""
    rows = ()
    for t in tl.static_range(T):
        rows = rows + (tl.load(x + t * STEP, mask=inside, other=0.0),)  # type: ignore[assignment] # noqa: RUF005
    return rows


@triton.jit
def _raw_keys(k, tail, offset, inside, T: tl.constexpr, STEP, TAIL_STEP: tl.constexpr, HAS_TAIL: tl.constexpr):
    """Raw keys at one position as a tuple of T + 3 rows: the three frames before the chunk, then the chunk."""
    if HAS_TAIL:
        return _frames(tail + offset, inside, 3, TAIL_STEP) + _frames(k, inside, T, STEP)
    else:
        zero = tl.zeros(inside.shape, k.dtype.element_ty)
        return (zero, zero, zero) + _frames(k, inside, T, STEP)  # noqa: RUF005


@triton.jit
def _taps(conv, channel, inside, WIDTH: tl.constexpr):
    """The four taps of each channel, w0 to w3, from (C, 4)."""
    tap = tl.arange(0, 4)[None, :]
    w = tl.load(conv + channel[:, None] * 4 + tap, mask=inside[:, None], other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(w, (WIDTH, 2, 2)))
    w0, w2 = tl.split(even)
    w1, w3 = tl.split(odd)
    return w0, w1, w2, w3


@triton.jit
def _filtered(rows, w, t: tl.constexpr, T: tl.constexpr, CARRY: tl.constexpr):
    """Symmetric 7-tap filter of frame t; the left half reaches before the chunk only with CARRY."""
    y = w[3] * rows[t + 3].to(tl.float32)
    for j in tl.static_range(1, 4):
        if CARRY or t - j >= 0:
            y += w[3 - j] * rows[t + 3 - j].to(tl.float32)
        if t + j < T:
            y += w[3 - j] * rows[t + 3 + j].to(tl.float32)
    return y


@triton.jit
def _totals(rows, COUNT: tl.constexpr, LANES: tl.constexpr, EACH: tl.constexpr):
    """Sums of squares of COUNT <= 16 vectors (LANES * EACH,), as a tuple: one reduction over the program for all of them."""
    parts = ()
    for i in tl.static_range(COUNT):
        x = rows[i].to(tl.float32)
        parts = parts + (tl.sum(tl.reshape(x * x, (LANES, EACH)), 1),)  # type: ignore[assignment] # noqa: RUF005
    LEVELS: tl.constexpr = (COUNT > 1) + (COUNT > 2) + (COUNT > 4) + (COUNT > 8)
    for _ in tl.static_range(2**LEVELS - COUNT):
        parts = parts + (tl.zeros((LANES,), tl.float32),)  # type: ignore[assignment] # noqa: RUF005
    for level in tl.static_range(LEVELS):
        pairs = ()
        for i in tl.static_range(2 ** (LEVELS - 1 - level)):
            pairs = pairs + (tl.join(parts[2 * i], parts[2 * i + 1]),)  # type: ignore[assignment] # noqa: RUF005
        parts = pairs
    totals = (tl.sum(parts[0], 0),)  # type: ignore[misc]
    for level in tl.static_range(LEVELS):
        halves = ()
        for i in tl.static_range(2**level):
            halves = halves + tl.split(totals[i])  # type: ignore[assignment,misc]
        totals = halves  # type: ignore[assignment]
    return totals


@triton.jit
def _prepare_branch(
    q, k, k_norm, conv, tail_in, tail_out, keys, q_scale, k_scale, position, batch, slot, row, batch_stride,
    T: tl.constexpr, S: tl.constexpr, C: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, EPS: tl.constexpr,
    HAS_STATE: tl.constexpr, CARRY: tl.constexpr, COMMIT: tl.constexpr, STORE_KEYS: tl.constexpr,
):  # fmt: skip
    # Vectors of eight elements a thread are summed in the thread first.
    LANES: tl.constexpr = C0 if C0 < 16 else C0 // 8
    LANES1: tl.constexpr = C1 if C1 < 16 else C1 // 8
    channel0 = tl.arange(0, C0)
    channel1 = C0 + tl.arange(0, C1 if C1 > 0 else 16)
    inside0, inside1 = channel0 < C, channel1 < C
    row = row.to(tl.int64)
    first = batch * batch_stride + position * row
    tail = (batch * 3 * S + position) * C
    # Every row is asked for before the first sum waits for one.
    q0 = _frames(q + first + channel0, inside0, T, S * row)
    rows0 = _raw_keys(k + first + channel0, tail_in, tail + channel0, inside0, T, S * row, S * C, HAS_STATE)
    if C1 > 0:
        q1 = _frames(q + first + channel1, inside1, T, S * row)
        rows1 = _raw_keys(k + first + channel1, tail_in, tail + channel1, inside1, T, S * row, S * C, HAS_STATE)
        w1 = _taps(conv, channel1, inside1, C1)
        norm1 = tl.load(k_norm + channel1, mask=inside1, other=0.0).to(tl.float32)
    w0 = _taps(conv, channel0, inside0, C0)
    norm0 = tl.load(k_norm + channel0, mask=inside0, other=0.0).to(tl.float32)

    filtered0, filtered1 = (), ()
    for t in tl.static_range(T):
        filtered0 = filtered0 + (_filtered(rows0, w0, t, T, CARRY and HAS_STATE),)  # type: ignore[assignment] # noqa: RUF005
        if C1 > 0:
            filtered1 = filtered1 + (_filtered(rows1, w1, t, T, CARRY and HAS_STATE),)  # type: ignore[assignment] # noqa: RUF005
    totals = _totals(q0 + filtered0, 2 * T, LANES, C0 // LANES)
    rest = totals
    if C1 > 0:
        # A tile this narrow lies in every warp: its sums need no other.
        rest = _totals(q1 + filtered1, 2 * T, LANES1, C1 // LANES1)

    scale = slot * (T * S) + position
    key = scale * C
    for t in tl.static_range(T):
        query_total, key_total = totals[t], totals[T + t]
        if C1 > 0:
            query_total += rest[t]
            key_total += rest[T + t]
        tl.store(q_scale + scale + t * S, tl.rsqrt(query_total / C + EPS))
        inverse = tl.rsqrt(key_total / C + EPS)
        if STORE_KEYS:
            to = keys + key + t * S * C
            tl.store(to + channel0, saturate(relu(filtered0[t] * inverse * norm0)).to(keys.dtype.element_ty), mask=inside0)
            if C1 > 0:
                tl.store(to + channel1, saturate(relu(filtered1[t] * inverse * norm1)).to(keys.dtype.element_ty), mask=inside1)
        else:
            tl.store(k_scale + scale + t * S, inverse)
    if COMMIT:
        # The tail may be updated in place: every row of it has been read above, by all threads after this barrier.
        tl.debug_barrier()
        for i in tl.static_range(3):
            tl.store(tail_out + tail + i * S * C + channel0, rows0[T + i], mask=inside0)
            if C1 > 0:
                tl.store(tail_out + tail + i * S * C + channel1, rows1[T + i], mask=inside1)


@triton.jit
def prepare(
    main_q, main_k, main_k_norm, main_conv, main_tail_in, main_tail_out, main_row, main_batch,
    camera_q, camera_k, camera_k_norm, camera_conv, camera_tail_in, camera_tail_out, camera_row, camera_batch,
    keys, q_scale, k_scale,
    B: tl.constexpr, T: tl.constexpr, S: tl.constexpr, C: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, EPS: tl.constexpr,
    MAIN: tl.constexpr, CAMERA: tl.constexpr, CAMERA_CARRY: tl.constexpr,
    HAS_STATE: tl.constexpr, COMMIT: tl.constexpr, STORE_KEYS: tl.constexpr,
):  # fmt: skip
    """Grid (S, B, branches). Scratch: keys (2, B, N, C), q_scale and k_scale (2, B, N) float32; index 0 is the camera branch, 1 the main."""
    position, batch, branch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    if CAMERA:  # noqa: SIM102  (decided when compiling, the next when running)
        if branch == 0:
            _prepare_branch(
                camera_q, camera_k, camera_k_norm, camera_conv, camera_tail_in, camera_tail_out, keys, q_scale, k_scale,
                position, batch, batch, camera_row, camera_batch,
                T, S, C, C0, C1, EPS, HAS_STATE, CAMERA_CARRY, COMMIT, STORE_KEYS,
            )  # fmt: skip
    if MAIN:  # noqa: SIM102
        if branch == CAMERA:
            _prepare_branch(
                main_q, main_k, main_k_norm, main_conv, main_tail_in, main_tail_out, keys, q_scale, k_scale,
                position, batch, B + batch, main_row, main_batch,
                T, S, C, C0, C1, EPS, HAS_STATE, True, COMMIT, STORE_KEYS,
            )  # fmt: skip
