"""Gluon kernel of the cross-attention over text on Hopper, one batch, bfloat16: what `cross.cross_attention` computes of rows with known squares.

A program serves one head, whose keys and values stay in its shared memory, and every program of a head about as many tiles of 64 queries. Its warps
have roles:

    two consumers, four warps each  alternate tiles: norm of the queries, all logits of the tile, probabilities, and their products with the values
    the loader, one warp            keys, values, and each consumer's queries one tile ahead

A consumer holds all logits of its tile in registers before it needs its accumulator: probabilities are relative to the row's largest logit, and
nothing is scaled again. While one block's probabilities are made, the products of the block before run, or those of the other consumer.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait

from sanawm_kernels import roles
from sanawm_kernels.attention.kernels import LOG2_E

# Queries of a tile, which are the rows of one instruction, and channels of a block, of which those from a head's width on are zeros.
ROWS = gl.constexpr(64)
P = gl.constexpr(128)
# Layout of the queries in registers, as the left operand of products.
OPERAND = gl.constexpr(gl.DotOperandLayout(0, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]), 2))


@gluon.jit
def cross_attention(
    q, k, v, mask, q_norm, squares, out, N, softmax_scale,
    HEADS: gl.constexpr, KEYS: gl.constexpr, PARTS: gl.constexpr, BP: gl.constexpr, D: gl.constexpr, BN: gl.constexpr, TAIL: gl.constexpr,
    EPS: gl.constexpr,
):  # fmt: skip
    """Grid (HEADS * programs of a head,), heads one after the other; best as many as there are multiprocessors, rounded down to whole heads.

    Descriptors: q (N, HEADS, D) with blocks (64, 1, 128), k and v (KEYS, HEADS, D) with blocks (BN, 1, 128).
    mask (KEYS,) bytes, 0 for padding; q_norm (HEADS * D,); squares (N, PARTS) float32, partial sums of the rows' squares, BP its power of two, at
    least 8. out (N, HEADS * D). TAIL: power of two, at least 16, for the keys of the last block that are multiplied. Consumers issue the products
    for their logits in turns.
    """
    BLOCKS: gl.constexpr = (KEYS + BN - 1) // BN
    gl.static_assert(D % 16 == 0 and D <= P, "instructions multiply 16 channels at once")
    gl.static_assert((BLOCKS - 1) * BN + TAIL >= KEYS and TAIL <= BN, "the last block is too short")
    queries = gl.allocate_shared_memory(gl.bfloat16, [2, ROWS, 1, P], q.layout)
    keys = gl.allocate_shared_memory(gl.bfloat16, [BLOCKS, BN, 1, P], k.layout)
    values = gl.allocate_shared_memory(gl.bfloat16, [BLOCKS, BN, 1, P], v.layout)
    # What is added to logits: 0, or -inf where there is no key.
    bias = gl.allocate_shared_memory(gl.float32, [BLOCKS, BN], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    held = (queries, keys, values, bias)
    arrived = (roles.barriers(2, 1), roles.barriers(2, 1), roles.barriers(BLOCKS, 1), roles.barriers(BLOCKS, 1))
    turns = roles.barriers(2, 1)
    fence_async_shared()
    programs = gl.num_programs(0) // HEADS
    head, program = gl.program_id(0) // programs, gl.program_id(0) % programs
    tiles = gl.cdiv(N, ROWS)
    first, last = program * tiles // programs, (program + 1) * tiles // programs
    inputs = (mask, q_norm, squares)
    scale = softmax_scale * LOG2_E
    gl.warp_specialize(
        [
            (_consume, (0, held, arrived, turns, inputs, out, head, first, last, N, scale, HEADS, KEYS, PARTS, BP, D, TAIL, EPS)),
            (_consume, (1, held, arrived, turns, inputs, out, head, first, last, N, scale, HEADS, KEYS, PARTS, BP, D, TAIL, EPS)),
            (_load, (q, k, v, held, arrived, head, first, last)),
        ],
        [4, 1],
        [240, 24],
    )


@gluon.jit
def _load(q, k, v, held, arrived, head, first, last):
    """The loader."""
    queries, keys, values, _ = held
    q_full, q_empty, k_full, v_full = arrived
    BLOCKS: gl.constexpr = keys.shape[0]
    BN: gl.constexpr = keys.shape[1]
    _fetch(k, 0, head, keys.index(0), k_full.index(0))
    for tile in range(first, min(first + 2, last)):
        _fetch(q, tile * queries.shape[1], head, queries.index(tile - first), q_full.index(tile - first))
    for block in gl.static_range(1, BLOCKS):
        _fetch(k, block * BN, head, keys.index(block), k_full.index(block))
    for block in gl.static_range(BLOCKS):
        _fetch(v, block * BN, head, values.index(block), v_full.index(block))
    for tile in range(first + 2, last):
        consumer, phase = (tile - first) % 2, (tile - first) // 2 & 1
        mbarrier.wait(q_empty.index(consumer), phase ^ 1)
        _fetch(q, tile * queries.shape[1], head, queries.index(consumer), q_full.index(consumer))


@gluon.jit
def _fetch(source, row, head, to, full):
    mbarrier.expect(full, source.block_type.nbytes)
    roles.load(source, [row, head, 0], full, to)


@gluon.jit
def _consume(
    SELF: gl.constexpr, held, arrived, turns, inputs, out, head, first, last, N, scale,
    HEADS: gl.constexpr, KEYS: gl.constexpr, PARTS: gl.constexpr, BP: gl.constexpr, D: gl.constexpr, TAIL: gl.constexpr, EPS: gl.constexpr,
):  # fmt: skip
    """Consumer SELF, 0 or 1."""
    queries, keys, values, bias = held
    q_full, q_empty, k_full, v_full = arrived
    mask, q_norm, squares = inputs
    BLOCKS: gl.constexpr = keys.shape[0]
    BN: gl.constexpr = keys.shape[1]
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, P, 16])
    # Products of one block of keys, one for each part of the queries.
    PRODUCTS: gl.constexpr = D // 64 + D % 64 // 32 + D % 32 // 16
    ahead = _squares(squares, (first + SELF) * ROWS, N, PARTS, BP)
    # Both consumers write all of it, the same numbers, and wait for their own alone.
    _write_bias(mask, bias, KEYS)
    roles.barrier()
    inverse = _inverse(ahead, HEADS * D, EPS)
    raw = queries.index(SELF).reshape([ROWS, P])
    for tile in range(first + SELF, last, 2):
        phase = (tile - first) // 2 & 1
        weight = _weights(q_norm + head * D, 0, D)
        mbarrier.wait(q_full.index(SELF), phase)
        normal = _normalised(raw, inverse, weight, 0, D)
        # All warps have read.
        roles.barrier()
        mbarrier.arrive(q_empty.index(SELF), count=1)
        # A wait for a parity tells a phase from the one before it only; the other consumer's next arrival comes after this one's.
        mbarrier.wait(turns.index(SELF), phase ^ (1 - SELF))
        logits = ()
        for block in gl.static_range(BLOCKS):
            mbarrier.wait(k_full.index(block), 0)
            logits += (_logits(normal, _block(keys, block, TAIL if block == BLOCKS - 1 else BN), None, 0, D),)  # type: ignore[assignment]
        mbarrier.arrive(turns.index(1 - SELF), count=1)
        biased = ()
        for block in gl.static_range(BLOCKS):
            made = warpgroup_mma_wait((BLOCKS - 1 - block) * PRODUCTS, deps=[logits[block]])
            made = made * scale + _bias(bias, block, made)
            biased += (made,)  # type: ignore[assignment]
            if block == 0:
                most = _largest(made)
            else:
                most = gl.maximum(most, gl.convert_layout(_largest(made), most.type.layout, assert_trivial=True))
        # 0 in place of -inf, in rows without any key, avoids -inf - -inf.
        largest = gl.max(most, 1)
        largest = gl.where(largest == float("-inf"), 0.0, largest)
        acc = gl.zeros([ROWS, P], gl.float32, OUT)
        for block in gl.static_range(BLOCKS):
            logit = biased[block]  # type: ignore[var-annotated]
            p = gl.exp2(logit - gl.convert_layout(largest, gl.SliceLayout(1, logit.type.layout), assert_trivial=True)[:, None])
            if block == 0:
                total = roles.thread_sums(p)
            else:
                total += gl.convert_layout(roles.thread_sums(p), total.type.layout, assert_trivial=True)
            p = gl.convert_layout(p.to(gl.bfloat16), gl.DotOperandLayout(0, OUT, 2), assert_trivial=True)
            mbarrier.wait(v_full.index(block), 0)
            acc = warpgroup_mma(p, _block(values, block, p.shape[1]), acc, use_acc=block > 0, is_async=True)
            if block == max(BLOCKS - 2, 0):
                ahead = _squares(squares, (tile + 2) * ROWS, N, PARTS, BP)
        inverse = _inverse(ahead, HEADS * D, EPS)
        total = gl.convert_layout(gl.sum(total, 1), gl.SliceLayout(1, OUT), assert_trivial=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        _store(acc * (1.0 / gl.where(total == 0.0, 1.0, total))[:, None], out, tile * ROWS, head, N, HEADS, D)


@gluon.jit
def _write_bias(mask, bias, KEYS: gl.constexpr):
    BLOCKS: gl.constexpr = bias.shape[0]
    BN: gl.constexpr = bias.shape[1]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    present = ()
    for block in gl.static_range(BLOCKS):
        key = block * BN + gl.arange(0, BN, LAYOUT)
        present += (gl.load(mask + key, mask=key < KEYS, other=0) != 0,)  # type: ignore[assignment]
    for block in gl.static_range(BLOCKS):
        bias.index(block).store(gl.where(present[block], 0.0, float("-inf")))


@gluon.jit
def _bias(bias, block: gl.constexpr, like):
    """The part of the bias for the columns of a block's logits, (1, columns)."""
    WIDTH: gl.constexpr = like.shape[1]
    part = bias.index(block)
    part = part if part.shape[0] == WIDTH else part.slice(0, WIDTH)
    return part.load(gl.SliceLayout(0, like.type.layout))[None, :]


@gluon.jit
def _block(blocks, block: gl.constexpr, WIDTH: gl.constexpr):
    """WIDTH keys or values of a block, (WIDTH, 128)."""
    whole = blocks.index(block).reshape([blocks.shape[1], P])
    return whole if whole.shape[0] == WIDTH else whole.slice(0, WIDTH)


@gluon.jit
def _squares(squares, start, N, PARTS: gl.constexpr, BP: gl.constexpr):
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BP, 16])
    row = start + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    part = gl.arange(0, BP, gl.SliceLayout(0, LAYOUT))
    return gl.load(squares + row[:, None] * PARTS + part[None, :], mask=(row < N)[:, None] & (part < PARTS)[None, :], other=0.0)


@gluon.jit
def _inverse(squares, CHANNELS: gl.constexpr, EPS: gl.constexpr):
    """Inverses of the rows' roots of mean squares."""
    return gl.rsqrt(gl.sum(squares, 1) / CHANNELS + EPS)


@gluon.constexpr_function
def _width(left):
    """Channels of the next part of the queries, of `left` ones: instructions multiply 16 at once, and slices have powers of two."""
    return 64 if left >= 64 else 32 if left >= 32 else 16


@gluon.jit
def _weights(q_norm, FIRST: gl.constexpr, D: gl.constexpr):
    """Weights of a head's channels from FIRST on, a tuple of parts."""
    WIDTH: gl.constexpr = _width(D - FIRST)
    channel = gl.arange(0, WIDTH, gl.SliceLayout(0, OPERAND))
    parts = (gl.load(q_norm + FIRST + channel),)
    if FIRST + WIDTH < D:
        parts += _weights(q_norm, FIRST + WIDTH, D)
    return parts


@gluon.jit
def _normalised(raw, inverse, weight, FIRST: gl.constexpr, D: gl.constexpr):
    """Queries to multiply, a tuple of parts."""
    WIDTH: gl.constexpr = _width(D - FIRST)
    LAYOUT: gl.constexpr = OPERAND
    value = raw.slice(FIRST, WIDTH, dim=1).load(LAYOUT).to(gl.float32)
    value *= gl.convert_layout(inverse, gl.SliceLayout(1, LAYOUT), assert_trivial=True)[:, None]
    parts = ((value * weight[0].to(gl.float32)[None, :]).to(gl.bfloat16),)
    if FIRST + WIDTH < D:
        parts += _normalised(raw, inverse, weight[1:], FIRST + WIDTH, D)
    return parts


@gluon.jit
def _logits(normal, keys, acc, FIRST: gl.constexpr, D: gl.constexpr):
    """Issue the products of the queries and a block of keys, those of the channels from FIRST on, which are added to acc."""
    KEYS: gl.constexpr = keys.shape[0]
    WIDTH: gl.constexpr = normal[0].shape[1]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    if FIRST == 0:
        acc = gl.zeros([ROWS, KEYS], gl.float32, LAYOUT)
    left = gl.convert_layout(normal[0], gl.DotOperandLayout(0, LAYOUT, 2), assert_trivial=True)
    acc = warpgroup_mma(left, keys.slice(FIRST, WIDTH, dim=1).permute([1, 0]), acc, use_acc=FIRST > 0, is_async=True)
    if FIRST + WIDTH < D:
        acc = _logits(normal[1:], keys, acc, FIRST + WIDTH, D)
    return acc


@gluon.jit
def _largest(x):
    """What a thread has of each row's maximum, (64, 4)."""
    return gl.max(gl.max(x.reshape([x.shape[0], x.shape[1] // 8, 4, 2]), 3), 1)


@gluon.jit
def _store(x, out, start, head, N, HEADS: gl.constexpr, D: gl.constexpr):
    """Store a head's output rows."""
    # A thread has 4 adjacent channels, half of them from a neighbour; the four threads of a row write 32 bytes at once.
    LAYOUT: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [8, 0], [0, 16], [0, 32], [0, 64]], [[0, 8], [0, 4], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 128]
    )
    rounded = gl.convert_layout(x.to(gl.bfloat16), LAYOUT)
    row = start + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    channel = gl.arange(0, P, gl.SliceLayout(0, LAYOUT))
    at = row.to(gl.int64)[:, None] * (HEADS * D) + head * D + channel[None, :]
    gl.store(out + at, rounded, mask=(row < N)[:, None] & (channel < D)[None, :])
