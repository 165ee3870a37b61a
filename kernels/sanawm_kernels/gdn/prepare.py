"""Triton pre-pass of the gated delta network: what needs all channels of a token, and what turns a token's heads.

One program handles one spatial position with all frames of the chunk: the short convolution reads every raw key once. It writes the
reciprocal RMS of each query, and the keys as `summarize` multiplies them: convolved, normalised, rectified, rotated (main branch: also unrotated, for
the normaliser), times the root of the token's write strength, which makes every sum over tokens a plain product of two such tiles. Programs of
their own transform the camera's values.

Half precision holds them eight times more exactly than bfloat16 in the same memory. Normalised keys are at most sqrt(C) times a weight; what ray
matrices make of them and of values has no such bound, but is stored SHRINK times smaller and saturates. Exact modes store float32.

A tile holds heads in rows: one of H0 heads (the largest power of two within them) and one of H1, 20 = 16 + 4. A head of 112 channels has 128 lanes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sanawm_kernels.gdn.transforms import SHRINK, camera_rotary_row, relu, rms_clamp, root_strength, rotary_row, rotate_pairs, saturate, ucpe


@triton.jit
def _places(FIRST: tl.constexpr, R: tl.constexpr, H: tl.constexpr, D: tl.constexpr, P: tl.constexpr):
    """Of R heads from FIRST on: the heads (R, 1), their channels (R, P), and which of them exist."""
    head, channel = FIRST + tl.arange(0, R)[:, None], tl.arange(0, P)[None, :]
    return head, head * D + channel, (head < H) & (channel < D)


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
def _taps(conv, place, inside):
    """The four taps of each channel, w0 to w3, from (C, 4). Those of bfloat16 are read as one integer, for they keep the tile's layout."""
    if conv.dtype.element_ty == tl.bfloat16:
        four = tl.load(conv.to(tl.pointer_type(tl.int64), bitcast=True) + place, mask=inside, other=0)
        low, high = four.to(tl.int32), (four >> 32).to(tl.int32)
        w0, w1 = (low << 16).to(tl.float32, bitcast=True), (low & -65536).to(tl.float32, bitcast=True)
        w2, w3 = (high << 16).to(tl.float32, bitcast=True), (high & -65536).to(tl.float32, bitcast=True)
        return w0, w1, w2, w3
    else:
        w = ()
        for tap in tl.static_range(4):
            w = w + (tl.load(conv + place * 4 + tap, mask=inside, other=0.0).to(tl.float32),)  # type: ignore[assignment] # noqa: RUF005
        return w


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
def _thread_sums(x, COUNT: tl.constexpr, LANES: tl.constexpr):
    """Sums of squares of COUNT tiles over the elements of each of LANES threads, as a tuple."""
    parts = ()
    for i in tl.static_range(COUNT):
        y = x[i].to(tl.float32)
        mine = tl.reshape(y * y, (LANES, y.shape[0] * y.shape[1] // LANES), can_reorder=True)
        parts = parts + (tl.sum(mine, 1),)  # type: ignore[assignment] # noqa: RUF005
    return parts


@triton.jit
def _totals(parts, COUNT: tl.constexpr, LANES: tl.constexpr):
    """Sums of COUNT <= 16 vectors (LANES,), as a tuple: one reduction over the program for all of them."""
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
def _store(to, place, x, inside):
    if to.dtype.element_ty == tl.float16:
        x = saturate(x)
    tl.store(to + place, x.to(to.dtype.element_ty), mask=inside)


@triton.jit
def _store_keys(
    key, places, beta, matrix, cos, sin, turned_keys, plain_keys, growth, H: tl.constexpr, D: tl.constexpr, P: tl.constexpr, KEY_SCALE: tl.constexpr,
    CLAMP: tl.constexpr,
):  # fmt: skip
    """Rotate and store a tile of finished keys of one token; matrix: its ray matrix, None in the main branch."""
    R: tl.constexpr = key.shape[0]
    head, place, inside = places
    root = root_strength(tl.load(beta + head, mask=head < H, other=0.0)) * SHRINK
    if matrix is None:
        key *= root
        _store(plain_keys, place, key, inside)
        _store(turned_keys, place, rotate_pairs(key, cos, sin, R, P), inside)
    else:
        # Epsilons count at the size that keys have in the definition.
        SIZE: tl.constexpr = KEY_SCALE if CLAMP else 1.0
        SQUARE: tl.constexpr = (KEY_SCALE / SIZE) * (KEY_SCALE / SIZE)
        key *= SIZE
        turned = ucpe(key, matrix, None, cos, sin, R, P, D, False)
        if CLAMP:
            turned = rms_clamp(turned, key, D)
        after, before = tl.sum(turned * turned, 1) * SQUARE, tl.sum(key * key, 1) * SQUARE
        ratio = tl.maximum(after, 1e-12) / tl.maximum(before, 1e-12)
        tl.store(growth + head, ratio[:, None], mask=head < H)
        _store(turned_keys, place, turned * (root / SIZE), inside)


@triton.jit
def _prepare_keys(
    q, k, k_norm, conv, tail_in, tail_out, matrices, cos, sin, beta, beta_row, turned_keys, plain_keys, growth, q_scale, position, batch, row,
    T: tl.constexpr, S: tl.constexpr, H: tl.constexpr, H0: tl.constexpr, H1: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
    THREADS: tl.constexpr, EPS: tl.constexpr, KEY_SCALE: tl.constexpr, HAS_STATE: tl.constexpr, CARRY: tl.constexpr, COMMIT: tl.constexpr,
    CLAMP: tl.constexpr,
):  # fmt: skip
    """A branch's queries and keys at one position; q and k, beta and scratch start at the batch's first token."""
    C: tl.constexpr = H * D
    LANES: tl.constexpr = min(THREADS, H0 * P)
    MERGED: tl.constexpr = H1 * P >= LANES
    row = row.to(tl.int64)
    tail = (batch * 3 * S + position) * C
    places0, places1 = _places(0, H0, H, D, P), _places(H0, H1 if H1 > 0 else 1, H, D, P)
    _, place0, inside0 = places0
    _, place1, inside1 = places1
    first = position * row
    # Every row is asked for before the first sum waits for one.
    q0 = _frames(q + first + place0, inside0, T, S * row)
    rows0 = _raw_keys(k + first + place0, tail_in, tail + place0, inside0, T, S * row, S * C, HAS_STATE)
    q1, rows1 = q0, rows0
    if H1 > 0:
        q1 = _frames(q + first + place1, inside1, T, S * row)
        rows1 = _raw_keys(k + first + place1, tail_in, tail + place1, inside1, T, S * row, S * C, HAS_STATE)
        w1 = _taps(conv, place1, inside1)
        norm1 = tl.load(k_norm + place1, mask=inside1, other=0.0).to(tl.float32)
    w0 = _taps(conv, place0, inside0)
    norm0 = tl.load(k_norm + place0, mask=inside0, other=0.0).to(tl.float32)

    filtered0, filtered1 = (), ()
    for t in tl.static_range(T):
        filtered0 = filtered0 + (_filtered(rows0, w0, t, T, CARRY and HAS_STATE),)  # type: ignore[assignment] # noqa: RUF005
        if H1 > 0:
            filtered1 = filtered1 + (_filtered(rows1, w1, t, T, CARRY and HAS_STATE),)  # type: ignore[assignment] # noqa: RUF005
    parts = _thread_sums(q0 + filtered0, 2 * T, LANES)
    if H1 > 0 and MERGED:
        rest = _thread_sums(q1 + filtered1, 2 * T, LANES)
        both = ()
        for i in tl.static_range(2 * T):
            both = both + (parts[i] + rest[i],)  # type: ignore[assignment] # noqa: RUF005
        parts = both
    totals = _totals(parts, 2 * T, LANES)
    if H1 > 0 and not MERGED:
        rest = _totals(_thread_sums(q1 + filtered1, 2 * T, H1 * P), 2 * T, H1 * P)

    for t in tl.static_range(T):
        token = t * S + position
        query_total, key_total = totals[t], totals[T + t]
        if H1 > 0 and not MERGED:
            query_total += rest[t]
            key_total += rest[T + t]
        tl.store(q_scale + token, tl.rsqrt(query_total / C + EPS))
        inverse = tl.rsqrt(key_total / C + EPS)
        logits = beta + token.to(tl.int64) * beta_row
        to = turned_keys + token * C
        if matrices is None:
            c, s, matrix, plain_to, growth_to = rotary_row(cos, token, P, D), rotary_row(sin, token, P, D), None, plain_keys + token * C, None
        else:
            c, s, matrix = camera_rotary_row(cos, token, P, D), camera_rotary_row(sin, token, P, D), matrices + token * 16
            plain_to, growth_to = None, growth + token * H
        key = relu(filtered0[t] * inverse * norm0)
        _store_keys(key, places0, logits, matrix, c, s, to, plain_to, growth_to, H, D, P, KEY_SCALE, CLAMP)
        if H1 > 0:
            key = relu(filtered1[t] * inverse * norm1)
            _store_keys(key, places1, logits, matrix, c, s, to, plain_to, growth_to, H, D, P, KEY_SCALE, CLAMP)
    if COMMIT:
        # The tail may be updated in place: every row of it has been read above, by all threads after this barrier.
        tl.debug_barrier()
        for i in tl.static_range(3):
            tl.store(tail_out + tail + i * S * C + place0, rows0[T + i], mask=inside0)
            if H1 > 0:
                tl.store(tail_out + tail + i * S * C + place1, rows1[T + i], mask=inside1)


@triton.jit
def _value_tile(v, places, matrix, cos, sin, beta, to, H: tl.constexpr, D: tl.constexpr, P: tl.constexpr, CLAMP: tl.constexpr):
    head, place, inside = places
    raw = tl.load(v + place, mask=inside, other=0.0).to(tl.float32)
    value = ucpe(raw, matrix, None, cos, sin, raw.shape[0], P, D, False)
    if CLAMP:
        value = rms_clamp(value, raw, D)
    _store(to, place, value * (root_strength(tl.load(beta + head, mask=head < H, other=0.0)) * SHRINK), inside)


@triton.jit
def _prepare_values(
    v, matrices, cos, sin, beta, beta_row, values, position, row,
    T: tl.constexpr, S: tl.constexpr, H: tl.constexpr, H0: tl.constexpr, H1: tl.constexpr, D: tl.constexpr, P: tl.constexpr, CLAMP: tl.constexpr,
):  # fmt: skip
    """The camera's values at one position."""
    places0, places1 = _places(0, H0, H, D, P), _places(H0, H1 if H1 > 0 else 1, H, D, P)
    for t in range(T):
        token = t * S + position
        c, s, matrix = camera_rotary_row(cos, token, P, D), camera_rotary_row(sin, token, P, D), matrices + token * 16
        at, logits, to = v + token * row.to(tl.int64), beta + token.to(tl.int64) * beta_row, values + token * (H * D)
        _value_tile(at, places0, matrix, c, s, logits, to, H, D, P, CLAMP)
        if H1 > 0:
            _value_tile(at, places1, matrix, c, s, logits, to, H, D, P, CLAMP)


@triton.jit
def prepare(
    main_q, main_k, main_k_norm, main_conv, main_tail_in, main_tail_out, main_row, main_batch, cos, sin,
    camera_q, camera_k, camera_v, camera_k_norm, camera_conv, camera_tail_in, camera_tail_out, camera_row, camera_batch,
    rays_inverse, rays_batch, camera_cos, camera_sin, beta, beta_row, beta_batch,
    main_keys, plain_keys, camera_keys, camera_values, growth, q_scale,
    B: tl.constexpr, T: tl.constexpr, S: tl.constexpr, H: tl.constexpr, H0: tl.constexpr, H1: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
    THREADS: tl.constexpr, EPS: tl.constexpr, KEY_SCALE: tl.constexpr, MAIN: tl.constexpr, CAMERA: tl.constexpr, CAMERA_CARRY: tl.constexpr,
    HAS_STATE: tl.constexpr, COMMIT: tl.constexpr, CLAMP: tl.constexpr,
):  # fmt: skip
    """Grid (S, B, MAIN + 2 * CAMERA): the camera's keys and queries, the main branch's, the camera's values.

    Scratch: main_keys, plain_keys, camera_keys, camera_values (B, N, C); growth (B, N, H), how UCPE changes the camera keys' squares; q_scale
    (2, B, N) float32, the camera branch first.
    """
    position, batch, job = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    tokens = batch * (T * S)
    beta += batch * beta_batch
    if CAMERA:
        matrices = rays_inverse + batch * rays_batch
        if job == 0:
            _prepare_keys(
                camera_q + batch * camera_batch, camera_k + batch * camera_batch, camera_k_norm, camera_conv, camera_tail_in, camera_tail_out,
                matrices, camera_cos, camera_sin, beta, beta_row, camera_keys + tokens * (H * D), None, growth + tokens * H, q_scale + tokens,
                position, batch, camera_row, T, S, H, H0, H1, D, P, THREADS, EPS, KEY_SCALE, HAS_STATE, CAMERA_CARRY, COMMIT, CLAMP,
            )  # fmt: skip
        elif job == MAIN + 1:
            _prepare_values(
                camera_v + batch * camera_batch, matrices, camera_cos, camera_sin, beta, beta_row, camera_values + tokens * (H * D),
                position, camera_row, T, S, H, H0, H1, D, P, CLAMP,
            )  # fmt: skip
    if MAIN:  # noqa: SIM102  (decided when compiling, the next when running)
        if job == CAMERA:
            _prepare_keys(
                main_q + batch * main_batch, main_k + batch * main_batch, main_k_norm, main_conv, main_tail_in, main_tail_out,
                None, cos, sin, beta, beta_row, main_keys + tokens * (H * D), plain_keys + tokens * (H * D), None, q_scale + B * T * S + tokens,
                position, batch, main_row, T, S, H, H0, H1, D, P, THREADS, EPS, KEY_SCALE, HAS_STATE, True, COMMIT, CLAMP,
            )  # fmt: skip
