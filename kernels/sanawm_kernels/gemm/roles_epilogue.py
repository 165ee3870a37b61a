"""Epilogue of the kernels whose warps have roles: what `epilogue._finish` computes, in its order, on tiles of operands in shared memory."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from sanawm_kernels import roles
from sanawm_kernels.quant.triton import rounded


@gluon.jit
def _sigmoid(x):
    """1 / (1 + exp(-x)) with the hardware's reciprocal."""
    power = gl.exp2(x * -1.4426950408889634)
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + power], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def finish(
    acc, out, chunks, full, empty, values, count, tile_m, tile_n, M,
    N: gl.constexpr, BN: gl.constexpr, SLICE: gl.constexpr, WIDTH: gl.constexpr, FIRST: gl.constexpr, SELF: gl.constexpr, TOKENS: gl.constexpr,
    A_ROWS: gl.constexpr, B_ROWS: gl.constexpr, SILU: gl.constexpr,
    ADD: gl.constexpr, GATE: gl.constexpr, RESIDUAL: gl.constexpr, EXTRA: gl.constexpr,
):  # fmt: skip
    """Finish and store WIDTH columns of a tile, from its column FIRST on, one slice after the other; returns the rows' sums of squares.

    `count` is the number of the tile's first chunk in the ring. A finished chunk leaves from where its first operand came.
    """
    if WIDTH > SLICE:
        left, right = gl.split(gl.permute(gl.reshape(acc, (chunks.shape[1], 2, WIDTH // 2)), (0, 2, 1)))
        return finish(
            left, out, chunks, full, empty, values, count, tile_m, tile_n, M,
            N, BN, SLICE, WIDTH // 2, FIRST, SELF, TOKENS, A_ROWS, B_ROWS, SILU, ADD, GATE, RESIDUAL, EXTRA,
        ) + finish(
            right, out, chunks, full, empty, values, count, tile_m, tile_n, M,
            N, BN, SLICE, WIDTH // 2, FIRST + WIDTH // 2, SELF, TOKENS, A_ROWS, B_ROWS, SILU, ADD, GATE, RESIDUAL, EXTRA,
        )  # fmt: skip
    else:
        return _finish_slice(
            acc, out, chunks, full, empty, values, count + FIRST // chunks.shape[2], tile_m, tile_n, M,
            N, BN, SLICE, FIRST, SELF, TOKENS, A_ROWS, B_ROWS, SILU, ADD, GATE, RESIDUAL, EXTRA,
        )  # fmt: skip


@gluon.jit
def _finish_slice(
    acc, out, chunks, full, empty, values, chunk, tile_m, tile_n, M,
    N: gl.constexpr, BN: gl.constexpr, SLICE: gl.constexpr, FIRST: gl.constexpr, SELF: gl.constexpr, TOKENS: gl.constexpr,
    A_ROWS: gl.constexpr, B_ROWS: gl.constexpr, SILU: gl.constexpr,
    ADD: gl.constexpr, GATE: gl.constexpr, RESIDUAL: gl.constexpr, EXTRA: gl.constexpr,
):  # fmt: skip
    a_scale, b_scale, bias, carried, carried_row, frame_gate, frame_gate_row, squares = values
    OPERANDS: gl.constexpr = ADD + GATE + RESIDUAL + EXTRA
    RING: gl.constexpr = full.shape[0]
    BM: gl.constexpr = chunks.shape[1]
    CW: gl.constexpr = chunks.shape[2]
    # The slice's place in its chunk.
    AT: gl.constexpr = FIRST % CW
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SLICE, 16])
    acc = gl.convert_layout(acc, LAYOUT, assert_trivial=True)
    row = tile_m * BM + gl.arange(0, BM, gl.SliceLayout(1, LAYOUT))
    column = tile_n * BN + FIRST + gl.arange(0, SLICE, gl.SliceLayout(0, LAYOUT))
    if frame_gate is not None:
        gl.static_assert(TOKENS >= BM, "a tile's rows belong to two frames at most")
        upper, lower = _frame_gates(frame_gate, frame_gate_row, column, tile_m * BM, M, N, TOKENS)
    if a_scale is not None:
        if A_ROWS:
            acc *= gl.expand_dims(gl.load(a_scale + row, mask=row < M, other=0.0), 1)
        else:
            acc *= gl.load(a_scale)
    if b_scale is not None:
        if B_ROWS:
            acc *= gl.expand_dims(gl.load(b_scale + column, mask=column < N, other=0.0), 0)
        else:
            acc *= gl.load(b_scale)
    if bias is not None:
        acc += gl.expand_dims(gl.load(bias + column, mask=column < N, other=0.0).to(gl.float32), 0)
    if SILU:
        acc = acc * _sigmoid(acc)
    if OPERANDS > 0:
        slot = chunk % RING
        place = slot * OPERANDS
        if AT == 0:
            mbarrier.wait(full.index(slot), chunk // RING & 1)
    else:
        place = SELF * RING + chunk % RING
        if AT == 0:
            # The place's previous chunk has left.
            tma.store_wait(RING - 1)
            roles.barrier()
    if ADD:
        acc += _slice(chunks, place, AT, SLICE).load(LAYOUT).to(gl.float32)
    if carried is not None:  # noqa: SIM102  (decided when compiling, the next when running)
        if tile_m * BM < TOKENS:
            at = carried + gl.expand_dims(row.to(gl.int64) * carried_row, 1) + gl.expand_dims(column, 0)
            here = gl.expand_dims(row < TOKENS, 1) & gl.expand_dims(column < N, 0)
            acc += gl.load(at, mask=here, other=0.0).to(gl.float32)
    if GATE:
        g = _slice(chunks, place + ADD, AT, SLICE).load(LAYOUT).to(gl.float32)
        acc = acc * g * _sigmoid(g)
    if frame_gate is not None:
        above = gl.expand_dims(row < (tile_m * BM // TOKENS + 1) * TOKENS, 1)
        acc *= gl.where(above, upper.to(gl.float32), lower.to(gl.float32))
    if RESIDUAL:
        acc += _slice(chunks, place + ADD + GATE, AT, SLICE).load(LAYOUT).to(gl.float32)
    if EXTRA:
        acc += _slice(chunks, place + ADD + GATE + RESIDUAL, AT, SLICE).load(LAYOUT).to(gl.float32)
    if squares is not None:
        acc = rounded(acc, out.dtype)
    _slice(chunks, place, AT, SLICE).store(acc.to(out.dtype))
    if AT + SLICE == CW:
        fence_async_shared()
        roles.barrier()
        roles.store(out, [tile_m * BM, tile_n * BN + FIRST - AT], chunks.index(place))
        if OPERANDS > 0:
            # Hand back the chunk before this one, and with the tile's last chunk this one.
            if FIRST >= CW and RING > 1:
                tma.store_wait(1)
                mbarrier.arrive(empty.index((chunk - 1) % RING), count=1)
            if FIRST + SLICE == BN or RING == 1:
                tma.store_wait(0)
                mbarrier.arrive(empty.index(slot), count=1)
    if squares is not None:
        # What overhangs N is zero.
        return gl.sum(acc * acc, 1)
    else:
        return 0.0


@gluon.jit
def _slice(chunks, place, FIRST: gl.constexpr, WIDTH: gl.constexpr):
    chunk = chunks.index(place)
    return chunk if chunk.shape[1] == WIDTH else chunk.slice(FIRST, WIDTH, dim=1)


@gluon.jit
def _frame_gates(frame_gate, frame_gate_row, column, first_row, M, N: gl.constexpr, TOKENS: gl.constexpr):
    """Gates of a slice's rows of the tile's first frame, and of those below, which belong to the next one."""
    inside, frame, last = column < N, first_row // TOKENS, gl.cdiv(M, TOKENS) - 1
    upper = gl.load(frame_gate + frame.to(gl.int64) * frame_gate_row + column, mask=inside, other=0.0)
    lower = gl.load(frame_gate + min(frame + 1, last).to(gl.int64) * frame_gate_row + column, mask=inside, other=0.0)
    return gl.expand_dims(upper, 0), gl.expand_dims(lower, 0)
