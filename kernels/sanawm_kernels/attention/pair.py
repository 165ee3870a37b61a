"""Gluon kernel of window attention of a softmax block's two branches in one launch, on Hopper; `finish_pair` completes what it leaves.

Programs serve one branch each, even ones the main branch and odd ones the camera's, and take every `programs`-th tile of it: 64 queries of a head for
each consumer. The warps of a program have roles:

    two or three consumers, four warps each  attention of 64 queries: logits become probabilities while the values of the block before are multiplied
    the loader, one warp                     queries, and blocks of BN keys and values, up to STAGES ahead

Probabilities are relative to the largest logit of a row's first block of keys, not of all keys so far: nothing is scaled again from block to block.
They are 2**HEADROOM times smaller, so that sums neither vanish, as the first block holds 2**-HEADROOM, nor leave float32 before another block's
logit is HEADROOM + 96 larger. Tiles whose sums do are left to `finish_pair`; camera logits get there when a path leads some hundred units away.

The last tiles of a branch, which do not fill a round of its programs, are each divided by keys into PARTS, so that more programs share them. Every
part begins with the first block, which gives all of them the same maxima; their sums are `finish_pair`'s to add, in an order that is always the same.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait

from sanawm_kernels import roles
from sanawm_kernels.attention.finish import undivided
from sanawm_kernels.attention.kernels import LOG2_E

# Queries of a consumer, which are the rows of one instruction, and channels of a block, of which those from a head's width on are zeros.
ROWS = gl.constexpr(64)
P = gl.constexpr(128)
# Binary orders of magnitude below one: 30 above the smallest normal number, more than bfloat16 probabilities resolve.
HEADROOM = gl.constexpr(96.0)


@gluon.jit
def window_pair(
    main_q, camera_q,
    main_k0, main_v0, camera_k0, camera_v0, n0, main_k1, main_v1, camera_k1, camera_v1, n1, main_k2, main_v2, camera_k2, camera_v2, n2,
    main_out, seen, sums, parts, part_sums, N, programs, main_scale, camera_scale,
    HEADS: gl.constexpr, D: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr,
    TURNS: gl.constexpr, TIE: gl.constexpr,
):  # fmt: skip
    """Grid (2 * programs,). One batch; segments 1 and 2 may be None.

    Descriptors: q (N, HEADS, D) with blocks (64, 1, 128), k and v of a segment (n, HEADS, D) with blocks (BN, 1, 128). BM: queries of a tile.
    main_out, and seen for the camera branch: (N, HEADS * D), and sums (2, HEADS, N) float32, each row's sum of probabilities; all of them are
    written in whole tiles alone. parts (2, divided, PARTS, BM, D) and part_sums (2, divided, PARTS, BM) float32: the other tiles' sums of values
    and of probabilities.
    TURNS: consumers issue their products one after the other. TIE: see `_step`.
    """
    CONSUMERS: gl.constexpr = BM // ROWS
    camera = gl.program_id(0) % 2
    tiles, whole = undivided(N, programs, HEADS, BM)
    out, scale = main_out, main_scale
    if camera == 1:
        out, scale = seen, camera_scale
        main_q, main_k0, main_v0 = camera_q, camera_k0, camera_v0
        if main_k1 is not None:
            main_k1, main_v1 = camera_k1, camera_v1
        if main_k2 is not None:
            main_k2, main_v2 = camera_k2, camera_v2
    before = camera * (tiles - whole)
    results = (out, sums + camera * HEADS * N, parts + before * (PARTS * BM * D), part_sums + before * (PARTS * BM))
    queries = gl.allocate_shared_memory(gl.bfloat16, [CONSUMERS, ROWS, 1, P], main_q.layout)
    keys = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BN, 1, P], main_k0.layout)
    values = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BN, 1, P], main_v0.layout)
    blocks = (queries, keys, values)
    bars = (
        roles.barriers(CONSUMERS, 1), roles.barriers(CONSUMERS, 1),
        roles.barriers(STAGES, 1), roles.barriers(STAGES, CONSUMERS), roles.barriers(STAGES, 1), roles.barriers(STAGES, CONSUMERS),
    )  # fmt: skip
    turns = roles.barriers(CONSUMERS, 1)
    fence_async_shared()
    sizes = (n0, n1, n2, N, programs)
    scale *= LOG2_E
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (0, blocks, bars, turns, results, sizes, scale, HEADS, D, BM, PARTS, TURNS, TIE)),
                (_consume, (1, blocks, bars, turns, results, sizes, scale, HEADS, D, BM, PARTS, TURNS, TIE)),
                (_load, (main_q, main_k0, main_v0, main_k1, main_v1, main_k2, main_v2, blocks, bars, sizes, HEADS, BM, PARTS)),
            ],
            [4, 1],
            [240, 24],
        )
    else:
        gl.static_assert(CONSUMERS == 3)
        gl.warp_specialize(
            [
                (_consume, (0, blocks, bars, turns, results, sizes, scale, HEADS, D, BM, PARTS, TURNS, TIE)),
                (_consume, (1, blocks, bars, turns, results, sizes, scale, HEADS, D, BM, PARTS, TURNS, TIE)),
                (_consume, (2, blocks, bars, turns, results, sizes, scale, HEADS, D, BM, PARTS, TURNS, TIE)),
                (_load, (main_q, main_k0, main_v0, main_k1, main_v1, main_k2, main_v2, blocks, bars, sizes, HEADS, BM, PARTS)),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )


@gluon.jit
def _item(item, whole, PARTS: gl.constexpr):
    """Tile of an item, and its part of the tile's keys; -1 is all of them."""
    rest = item - whole
    return gl.where(rest < 0, item, whole + rest // PARTS), gl.where(rest < 0, -1, rest % PARTS)


@gluon.jit
def _span(segment, part, sizes, BN: gl.constexpr, PARTS: gl.constexpr):
    """Keys of a segment, the first block that a part has of it, and the one after the last; without the very first, with which all begin."""
    n0, n1, n2, _, _ = sizes
    if n1 is None:
        n1 = 0
    if n2 is None:
        n2 = 0
    n = gl.where(segment == 0, n0, gl.where(segment == 1, n1, n2))
    blocks0, blocks1, blocks = gl.cdiv(n0, BN), gl.cdiv(n1, BN), gl.cdiv(n, BN)
    before = gl.where(segment == 0, 0, gl.where(segment == 1, blocks0, blocks0 + blocks1))
    total = blocks0 + blocks1 + gl.cdiv(n2, BN)
    first = gl.where(part < 0, 1, gl.maximum(1, part * total // PARTS)) - before
    end = gl.where(part < 0, total, (part + 1) * total // PARTS) - before
    return n, gl.minimum(gl.maximum(first, 0), blocks), gl.minimum(gl.maximum(end, 0), blocks)


@gluon.jit
def _place(count, STAGES: gl.constexpr):
    """Stage of the count-th block that a program works on, and the phase of its barriers."""
    count = count.to(gl.uint32)
    return (count % STAGES).to(gl.int32), (count // STAGES & 1).to(gl.int32)


@gluon.jit
def _fetch(desc, start, head, to, full, empty, stage, phase):
    mbarrier.wait(empty.index(stage), phase ^ 1)
    arrived = full.index(stage)
    mbarrier.expect(arrived, desc.block_type.nbytes)
    roles.load(desc, [start, head, 0], arrived, to.index(stage))


@gluon.jit
def _load_segment(k, v, segment, part, head, blocks, bars, sizes, count, PARTS: gl.constexpr):
    _, keys, values = blocks
    _, _, keys_full, keys_empty, values_full, values_empty = bars
    BN: gl.constexpr = keys.shape[1]
    _, first, end = _span(segment, part, sizes, BN, PARTS)
    for block in range(first, end):
        stage, phase = _place(count, keys.shape[0])
        _fetch(k, block * BN, head, keys, keys_full, keys_empty, stage, phase)
        _fetch(v, block * BN, head, values, values_full, values_empty, stage, phase)
        count += 1
    return count


@gluon.jit
def _load(
    q, k0, v0, k1, v1, k2, v2, blocks, bars, sizes, HEADS: gl.constexpr, BM: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """The loader."""
    queries, keys, values = blocks
    queries_full, queries_empty, keys_full, keys_empty, values_full, values_empty = bars
    _, _, _, N, programs = sizes
    CONSUMERS: gl.constexpr = BM // ROWS
    STAGES: gl.constexpr = keys.shape[0]
    tiles, whole = undivided(N, programs, HEADS, BM)
    rows = gl.cdiv(N, BM)
    count, query_phase = gl.to_tensor(0), gl.to_tensor(0)
    for item in range(gl.program_id(0) // 2, whole + (tiles - whole) * PARTS, programs):
        tile, part = _item(item, whole, PARTS)
        head = tile // rows
        stage, phase = _place(count, STAGES)
        _fetch(k0, 0, head, keys, keys_full, keys_empty, stage, phase)
        for c in gl.static_range(CONSUMERS):
            _fetch(q, tile % rows * BM + c * ROWS, head, queries, queries_full, queries_empty, c, query_phase)
        _fetch(v0, 0, head, values, values_full, values_empty, stage, phase)
        count += 1
        query_phase ^= 1
        count = _load_segment(k0, v0, 0, part, head, blocks, bars, sizes, count, PARTS)
        if k1 is not None:
            count = _load_segment(k1, v1, 1, part, head, blocks, bars, sizes, count, PARTS)
        if k2 is not None:
            count = _load_segment(k2, v2, 2, part, head, blocks, bars, sizes, count, PARTS)


@gluon.jit
def _logits(q, k, D: gl.constexpr, LAYOUT: gl.constexpr):
    """Issues the products of q (64, 128) with keys (BN, 128): of the first D channels, rounded up to the 16 of an instruction."""
    BN: gl.constexpr = k.shape[0]
    s = gl.zeros([ROWS, BN], gl.float32, LAYOUT)
    USED: gl.constexpr = (D + 15) // 16 * 16
    if USED == P:
        s = warpgroup_mma(q, k.permute([1, 0]), s, use_acc=False, is_async=True)
    else:
        # Slices are as wide as a power of two.
        if USED & 64:
            s = warpgroup_mma(q.slice(0, 64, 1), k.slice(0, 64, 1).permute([1, 0]), s, use_acc=False, is_async=True)
        if USED & 32:
            at: gl.constexpr = USED & 64
            s = warpgroup_mma(q.slice(at, 32, 1), k.slice(at, 32, 1).permute([1, 0]), s, use_acc=at > 0, is_async=True)
        if USED & 16:
            end: gl.constexpr = USED & 96
            s = warpgroup_mma(q.slice(end, 16, 1), k.slice(end, 16, 1).permute([1, 0]), s, use_acc=end > 0, is_async=True)
    return s


@gluon.jit
def _within(s, start, n, LAYOUT: gl.constexpr):
    """Logits of a block of keys from `start` on, -inf past the segment's n keys."""
    BN: gl.constexpr = s.shape[1]
    column = start + gl.arange(0, BN, gl.SliceLayout(0, LAYOUT))
    return gl.where((column < n)[None, :], s, float("-inf"))


@gluon.jit
def _step(
    SELF: gl.constexpr, start, n, q, m, total, acc, p, turn, scale, blocks, bars, turns, count,
    D: gl.constexpr, TURNS: gl.constexpr, TIE: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """The count-th block: its logits are made together with the product of the block before, whose probabilities are p, and become the next p."""
    queries, keys, values = blocks
    _, _, keys_full, keys_empty, values_full, values_empty = bars
    BN: gl.constexpr = keys.shape[1]
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    stage, phase = _place(count, keys.shape[0])
    before, before_phase = _place(count - 1, keys.shape[0])
    mbarrier.wait(keys_full.index(stage), phase)
    if TURNS:
        mbarrier.wait(turns.index(SELF), turn ^ (1 if SELF == 0 else 0))
    s = _logits(q, keys.index(stage).reshape([BN, P]), D, LOGITS)
    mbarrier.wait(values_full.index(before), before_phase)
    acc = warpgroup_mma(p, values.index(before).reshape([BN, P]), acc, is_async=True)
    if TURNS:
        mbarrier.arrive(turns.index((SELF + 1) % queries.shape[0]), count=1)
    s = warpgroup_mma_wait(1, deps=(s,))
    mbarrier.arrive(keys_empty.index(stage), count=1)
    if MASKED:
        s = _within(s, start, n, LOGITS)
    made = gl.exp2(s * scale - m[:, None])
    total += roles.thread_sums(made)
    p = gl.convert_layout(made.to(gl.bfloat16), p.type.layout)
    if TIE:
        # Returns at once. Its branch keeps the compiler from moving the exponentials behind the wait for the product.
        mbarrier.wait(values_full.index(before), before_phase)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(values_empty.index(before), count=1)
    return total, acc, p, turn ^ 1


@gluon.jit
def _consume(
    SELF: gl.constexpr, blocks, bars, turns, results, sizes, scale,
    HEADS: gl.constexpr, D: gl.constexpr, BM: gl.constexpr, PARTS: gl.constexpr, TURNS: gl.constexpr, TIE: gl.constexpr,
):  # fmt: skip
    """Consumer SELF; scale includes log2(e)."""
    queries, keys, values = blocks
    queries_full, queries_empty, keys_full, keys_empty, values_full, values_empty = bars
    n0, n1, n2, N, programs = sizes
    BN: gl.constexpr = keys.shape[1]
    STAGES: gl.constexpr = keys.shape[0]
    SEGMENTS: gl.constexpr = 1 + (0 if n1 is None else 1) + (0 if n2 is None else 1)
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, P, 16])
    tiles, whole = undivided(N, programs, HEADS, BM)
    rows = gl.cdiv(N, BM)
    count, query_phase, turn = gl.to_tensor(0), gl.to_tensor(0), gl.to_tensor(0)
    q = queries.index(SELF).reshape([ROWS, P])
    for item in range(gl.program_id(0) // 2, whole + (tiles - whole) * PARTS, programs):
        tile, part = _item(item, whole, PARTS)
        stage, phase = _place(count, STAGES)
        mbarrier.wait(queries_full.index(SELF), query_phase)
        mbarrier.wait(keys_full.index(stage), phase)
        s = _logits(q, keys.index(stage).reshape([BN, P]), D, LOGITS)
        s = warpgroup_mma_wait(0, deps=(s,))
        mbarrier.arrive(keys_empty.index(stage), count=1)
        s = _within(s, 0, n0, LOGITS)
        m = gl.max(s, 1) * scale + HEADROOM
        # Only the first part counts the block that all parts need for the maximum.
        made = gl.where(part > 0, 0.0, gl.exp2(s * scale - m[:, None]))
        total = roles.thread_sums(made)
        p = gl.convert_layout(made.to(gl.bfloat16), gl.DotOperandLayout(0, OUT, 2))
        acc = gl.zeros([ROWS, P], gl.float32, OUT)
        count += 1
        for segment in range(SEGMENTS):
            n, first, end = _span(segment, part, sizes, BN, PARTS)
            for block in range(first, end - 1):
                total, acc, p, turn = _step(SELF, block * BN, n, q, m, total, acc, p, turn, scale, blocks, bars, turns, count, D, TURNS, TIE, False)
                count += 1
            # The last block of a segment alone pays for masked logits.
            for block in range(gl.maximum(first, end - 1), end):
                total, acc, p, turn = _step(SELF, block * BN, n, q, m, total, acc, p, turn, scale, blocks, bars, turns, count, D, TURNS, TIE, True)
                count += 1
        mbarrier.arrive(queries_empty.index(SELF), count=1)
        query_phase ^= 1
        stage, phase = _place(count - 1, STAGES)
        mbarrier.wait(values_full.index(stage), phase)
        acc = warpgroup_mma(p, values.index(stage).reshape([BN, P]), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(values_empty.index(stage), count=1)
        total = gl.convert_layout(gl.sum(total, 1), gl.SliceLayout(1, OUT))
        _store(acc, total, results, tile // rows, tile % rows * BM, (tile - whole) * PARTS + part, part, N, SELF, HEADS, D, BM, OUT)


@gluon.jit
def _store(
    acc, total, results, head, start, slot, part, N, SELF: gl.constexpr,
    HEADS: gl.constexpr, D: gl.constexpr, BM: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Means of a whole tile and its rows' sums, or as the slot-th part of a divided one plain sums; `start` is the tile's first query."""
    out, sums, parts, part_sums = results
    row = SELF * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    channel = gl.arange(0, P, gl.SliceLayout(0, LAYOUT))
    valid = start + row < N
    mask = valid[:, None] & (channel < D)[None, :]
    if part < 0:
        at = (start + row).to(gl.int64)[:, None] * (HEADS * D) + head * D + channel[None, :]
        gl.store(out + at, (acc * (1.0 / total)[:, None]).to(gl.bfloat16), mask=mask)
        gl.store(sums + head * N + start + row, total, mask=valid)
    else:
        gl.store(parts + (slot * BM + row)[:, None] * D + channel[None, :], acc, mask=mask)
        gl.store(part_sums + slot * BM + row, total, mask=valid)
