"""Gluon kernel of what `depthwise.depthwise_glu` computes, in bfloat16, whose rows are copied to shared memory some rows ahead.

A program walks down BX columns of one frame and one block of channels, as there, but what it waits for is a row that was asked for STAGES - 1 rows
before: a row ahead in registers is too little to keep the memory busy. A thread has two adjacent channels of every column. Rows are copied four
columns at once, 16 bytes a thread: boxes of the tensor memory accelerator have a power of two of columns here, and ten are wanted.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from sanawm_kernels import roles
from sanawm_kernels.quant.triton import NO_CODES, rounded
from sanawm_kernels.tokenwise.depthwise import LN_2, LOG2_E, filtered, repeated


@gluon.jit
def _copy_row(rings, slot, at, edge, inside, edge_inside, ROW: gl.constexpr, HALF: gl.constexpr):
    """Start the copy of a row to its slot: values and gates four columns at a time, and the columns beside them."""
    GROUPS: gl.constexpr = len(rings) // 2
    for i in gl.static_range(GROUPS):
        roles.copy(rings[i].index(slot), at + 4 * i * ROW, mask=inside)
        roles.copy(rings[GROUPS + i].index(slot), at + HALF + 4 * i * ROW, mask=inside)
    roles.copy(rings[2 * GROUPS].index(slot), edge, mask=edge_inside)
    async_copy.commit_group()


@gluon.jit
def _numbers(raw):
    """float32 of a column, whose bfloat16 elements come two in an integer."""
    raw = gl.convert_layout(raw, gl.BlockedLayout([1], [32], [1], [0]), assert_trivial=True)
    even, odd = (raw << 16).to(gl.float32, bitcast=True), (raw & -65536).to(gl.float32, bitcast=True)
    return gl.join(even, odd).reshape([2 * raw.shape[0]])


@gluon.jit
def _four(ring, slot):
    """Four columns."""
    raw = ring.index(slot).load(gl.BlockedLayout([1], [32], [1], [0]))
    low, high = gl.split(raw.reshape([2, 2, raw.shape[0] // 4]).permute([1, 2, 0]))
    first, second = gl.split(low.permute([1, 0]))
    third, fourth = gl.split(high.permute([1, 0]))
    return _numbers(first), _numbers(second), _numbers(third), _numbers(fourth)


@gluon.jit
def _row(rings, edges, slot, SELF: gl.constexpr):
    """A row's columns from the one before the first to the one after the last, of values (SELF 0) or gates (1)."""
    GROUPS: gl.constexpr = len(rings) // 2
    columns = (edges[2 * SELF],)
    for i in gl.static_range(GROUPS):
        columns = columns + _four(rings[SELF * GROUPS + i], slot)
    return columns + (edges[2 * SELF + 1],)  # noqa: RUF005


@gluon.jit
def _taps(taps, channel, factor: gl.constexpr, G: gl.constexpr):
    """The nine taps times a factor as float32 vectors."""
    found = ()
    for i in gl.static_range(9):
        found = found + (gl.load(taps + i * 2 * G + channel).to(gl.float32) * factor,)  # type: ignore[assignment] # noqa: RUF005
    return found


@gluon.jit
def depthwise_glu(
    x, taps, bias, out, codes, quant_scale,
    H: gl.constexpr, W: gl.constexpr, G: gl.constexpr, BX: gl.constexpr, BC: gl.constexpr, STAGES: gl.constexpr, QUANT: gl.constexpr,
):  # fmt: skip
    """Grid (G / BC, W / BX, frames). x (frames * H * W, 2G), contiguous; taps (9, 2G), bias (2G,). BX: a multiple of four.

    BC: 64, of one warp. Rows are copied STAGES - 1 rows ahead.
    """
    gl.static_assert(W % BX == 0 and BX % 4 == 0 and G % BC == 0 and BC == 64 and gl.num_warps() == 1, "whole strips of one warp")
    GROUPS: gl.constexpr = BX // 4
    # In words, of two channels each.
    ROW: gl.constexpr = G
    HALF: gl.constexpr = G // 2
    WORDS: gl.constexpr = BC // 2
    COPY: gl.constexpr = gl.BlockedLayout([4], [32], [1], [0])
    PAIRS: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
    # Memories of their own, between whose accesses the compiler sees no need of barriers.
    rings = ()
    for _ in gl.static_range(2 * GROUPS + 1):
        made = gl.allocate_shared_memory(gl.int32, [STAGES, 4 * WORDS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        rings = rings + (made,)  # type: ignore[assignment] # noqa: RUF005
    block = gl.program_id(0)
    x0 = gl.program_id(1) * BX
    # The last frames first: what the product before has written last is still in the second-level cache.
    first_pixel = (gl.num_programs(2) - 1 - gl.program_id(2)) * (H * W) + x0
    word = gl.arange(0, 4 * WORDS, COPY)
    source = x.to(gl.pointer_type(gl.int32), bitcast=True) + first_pixel.to(gl.int64) * ROW + block * WORDS
    at = source + word // WORDS * ROW + word % WORDS
    # The edges: values on the left and on the right, then gates.
    right = word // WORDS % 2
    edge = source + word // (2 * WORDS) * HALF + (right * (BX + 1) - 1) * ROW + word % WORDS
    beside = (right == 0) & (x0 > 0) | (right == 1) & (x0 + BX < W)
    everywhere = word < 4 * WORDS
    for y in gl.static_range(STAGES - 1):
        _copy_row(rings, y, at + y * (W * ROW), edge + y * (W * ROW), everywhere & (y < H), beside & (y < H), ROW, HALF)
    at += (STAGES - 1) * (W * ROW)
    edge += (STAGES - 1) * (W * ROW)

    channel = block * BC + gl.arange(0, BC, PAIRS)
    # Gates are -log2(e) times as large, ready for exp2, and values -log(2) times: their product stays.
    v_taps, g_taps = _taps(taps, channel, -LN_2, G), _taps(taps, channel + G, -LOG2_E, G)
    v_bias = gl.load(bias + channel).to(gl.float32) * -LN_2
    g_bias = gl.load(bias + G + channel).to(gl.float32) * -LOG2_E
    factor = 1.0
    if QUANT != NO_CODES:
        factor = gl.div_rn(1.0, gl.load(quant_scale))

    # `above` waits for output row y - 1, `here` for row y, when input row y arrives; row H is zeros.
    zero = gl.zeros([BC], gl.float32, PAIRS)
    v_above, g_above = repeated(zero, BX), repeated(zero, BX)
    v_here, g_here = repeated(v_bias, BX), repeated(g_bias, BX)
    stored = (first_pixel - W).to(gl.int64) * G + channel
    for y in range(H + 1):
        async_copy.wait_group(STAGES - 2)
        # All threads' copies of this row have arrived, and all have read the row before, whose slot is free.
        roles.barrier()
        inside = y + (STAGES - 1) < H
        _copy_row(rings, (y + STAGES - 1) % STAGES, at, edge, everywhere & inside, beside & inside, ROW, HALF)
        at += W * ROW
        edge += W * ROW
        # In this order fewest sums wait in registers.
        edges = _four(rings[2 * GROUPS], y % STAGES)
        v_row = _row(rings, edges, y % STAGES, 0)
        value = filtered(v_above, v_row, v_taps, 2, BX)
        v_above = filtered(v_here, v_row, v_taps, 1, BX)
        v_here = filtered(repeated(v_bias, BX), v_row, v_taps, 0, BX)
        g_row = _row(rings, edges, y % STAGES, 1)
        gate = filtered(g_above, g_row, g_taps, 2, BX)
        for i in gl.static_range(BX):
            # The square of a reciprocal root costs a third of a division.
            root = gl.rsqrt(1.0 + gl.exp2(gate[i]))
            result = value[i] * gate[i] * (root * root)
            mask = (channel < G) & (y > 0)
            if out is not None:
                gl.store(out + stored + i * G, result.to(gl.bfloat16), mask=mask)
            if QUANT != NO_CODES:
                gl.store(codes + stored + i * G, (rounded(result, gl.bfloat16) * factor).to(gl.float8e4nv), mask=mask)
        g_above = filtered(g_here, g_row, g_taps, 1, BX)
        g_here = filtered(repeated(g_bias, BX), g_row, g_taps, 0, BX)
        stored += W * G
    async_copy.wait_group(0)
