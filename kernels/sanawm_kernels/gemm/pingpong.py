"""Gluon kernel of the matrix products on Hopper whose consumers take turns: bf16 or FP8 operands, bf16 results.

It computes what `tma.gemm` and `tma.temporal_conv` do. Each program takes every num_programs-th tile, and its warps have roles:

    two consumers, four warps each  take alternate tiles; while one of them finishes its tile, the products of the other one run
    the loader of a and b           one warp, up to STAGES steps ahead of the consumers
    the loader of the operands      one warp, up to RING chunks of CW columns of the epilogue's summands and gates ahead

All tiles come and leave through tensor descriptors, which are arguments of the launch. What they read outside of a matrix is zero.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from sanawm_kernels import roles
from sanawm_kernels.gemm.pingpong_epilogue import finish
from sanawm_kernels.tiles import frame_taps, grouped_tile


@gluon.jit
def gemm(
    a, a_scale, b, b_scale, bias, add, carried, carried_row, gate, frame_gate, frame_gate_row, residual, extra, out, squares, M,
    N: gl.constexpr, K: gl.constexpr, TAPS: gl.constexpr, TOKENS: gl.constexpr, BATCH: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, CW: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, RING: gl.constexpr,
    SLICE: gl.constexpr, A_ROWS: gl.constexpr, B_ROWS: gl.constexpr, SILU: gl.constexpr,
):  # fmt: skip
    """One-dimensional grid. What is absent is None; TOKENS rows share a frame gate, squares is (M, cdiv(N, BN)).

    Descriptors: a (M, K) with blocks (BM, BK), b (N, TAPS * K) with blocks (BN, BK); add, gate, residual, extra and out (M, N), blocks (BM, CW).
    With 3 TAPS output rows of frame f add the products of frames f - 1, f and f + 1, TOKENS rows each, with a third of b, and those of the first
    frame `carried` (TOKENS, N), the products of the frame before. There BATCH is M.
    RING counts the chunks of operands in flight, or without operands each consumer's buffers of finished chunks; SLICE columns of a chunk are
    finished at once.
    """
    gl.static_assert(TAPS == 1 or not A_ROWS, "row-wise scales of the activations cannot be factored out of a sum over three rows")
    ADD: gl.constexpr = 0 if add is None else 1
    GATE: gl.constexpr = 0 if gate is None else 1
    RESIDUAL: gl.constexpr = 0 if residual is None else 1
    EXTRA: gl.constexpr = 0 if extra is None else 1
    OPERANDS: gl.constexpr = ADD + GATE + RESIDUAL + EXTRA
    a_steps = gl.allocate_shared_memory(a.dtype, [STAGES, BM, BK], a.layout)
    b_steps = gl.allocate_shared_memory(b.dtype, [STAGES, BN, BK], b.layout)
    chunks = gl.allocate_shared_memory(out.dtype, [RING * (OPERANDS if OPERANDS > 0 else 2), BM, CW], out.layout)
    steps = (a_steps, b_steps, roles.barriers(STAGES, 1), roles.barriers(STAGES, 1))
    ring = (chunks, roles.barriers(RING, 1), roles.barriers(RING, 1))
    # Whose turn it is, of the consumers 0 and 1: with the products, and with the operands.
    turns = (roles.barriers(2, 1), roles.barriers(2, 1))
    values = (a_scale, b_scale, bias, carried, carried_row, frame_gate, frame_gate_row, squares)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    0, steps, ring, turns, values, out, M,
                    N, K, TAPS, TOKENS, BATCH, BN, GROUP, SLICE, A_ROWS, B_ROWS, SILU, ADD, GATE, RESIDUAL, EXTRA,
                ),
            ),
            (
                _consume,
                (
                    1, steps, ring, turns, values, out, M,
                    N, K, TAPS, TOKENS, BATCH, BN, GROUP, SLICE, A_ROWS, B_ROWS, SILU, ADD, GATE, RESIDUAL, EXTRA,
                ),
            ),
            (_load_steps, (a, b, steps, M, N, K, TAPS, TOKENS, BATCH, GROUP)),
            (_load_operands, (add, gate, residual, extra, ring, M, N, BN, TAPS, TOKENS, GROUP, ADD, GATE, RESIDUAL, EXTRA)),
        ],
        [4, 1, 1],
        [240, 24, 24],
    )  # fmt: skip


@gluon.jit
def _place(round, TAPS: gl.constexpr):
    """This program's place in the round-th round. With three taps every second round has the programs in reverse."""
    program, programs = gl.program_id(0), gl.num_programs(0)
    return gl.where(round % 2 == 1, programs - 1 - program, program) if TAPS == 3 else program


@gluon.jit
def _rounds(M, N: gl.constexpr, TAPS: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr):
    """Tiles of this program."""
    tiles = gl.cdiv(M, BM) * gl.cdiv(N, BN)
    whole = tiles // gl.num_programs(0)
    return whole + (_place(whole, TAPS) < tiles % gl.num_programs(0)).to(gl.int32)


@gluon.jit
def _tile(round, M, N: gl.constexpr, TAPS: gl.constexpr, TOKENS: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, GROUP: gl.constexpr):
    """Tile row and column of this program's tile in the round-th round.

    With three taps the rows that need all of them come first: with every second round in reverse, no program gets two of their tiles and two others.
    """
    tile = round * gl.num_programs(0) + _place(round, TAPS)
    if TAPS == 3:
        return (TOKENS // BM + tile // gl.cdiv(N, BN)) % gl.cdiv(M, BM), tile % gl.cdiv(N, BN)
    else:
        return grouped_tile(tile, M, N, BM, BN, GROUP)


@gluon.jit
def _taps(tile_m, M, TAPS: gl.constexpr, TOKENS: gl.constexpr, BATCH: gl.constexpr, BM: gl.constexpr):
    """First tap of a tile, and the one after the last."""
    if TAPS == 3:
        return frame_taps(tile_m * BM, min(tile_m * BM + BM, M), TOKENS, BATCH)
    else:
        return gl.to_tensor(0), gl.to_tensor(1)


@gluon.jit
def _tap_count(
    round, M,
    N: gl.constexpr, TAPS: gl.constexpr, TOKENS: gl.constexpr, BATCH: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Taps of this program's tile in the round-th round."""
    tile_m, tile_n = _tile(round, M, N, TAPS, TOKENS, BM, BN, GROUP)
    first, last = _taps(tile_m, M, TAPS, TOKENS, BATCH, BM)
    return last - first


@gluon.jit
def _load_steps(
    a, b, steps, M,
    N: gl.constexpr, K: gl.constexpr, TAPS: gl.constexpr, TOKENS: gl.constexpr, BATCH: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """The loader of a and b."""
    a_steps, b_steps, full, empty = steps
    STAGES: gl.constexpr = a_steps.shape[0]
    BM: gl.constexpr = a_steps.shape[1]
    BN: gl.constexpr = b_steps.shape[1]
    BK: gl.constexpr = a_steps.shape[2]
    BYTES: gl.constexpr = (BM + BN) * BK * (a_steps.dtype.primitive_bitwidth // 8)
    count = 0
    for round in range(_rounds(M, N, TAPS, BM, BN)):
        tile_m, tile_n = _tile(round, M, N, TAPS, TOKENS, BM, BN, GROUP)
        first, last = _taps(tile_m, M, TAPS, TOKENS, BATCH, BM)
        for tap in range(first, last):
            for part in range((K + BK - 1) // BK):
                slot = count % STAGES
                arrived = full.index(slot)
                mbarrier.wait(empty.index(slot), (count // STAGES & 1) ^ 1)
                mbarrier.expect(arrived, BYTES)
                roles.load(a, [tile_m * BM + (tap - TAPS // 2) * TOKENS, part * BK], arrived, a_steps.index(slot))
                # A tap's last block reads on into the next tap, against the zeros that a has there.
                roles.load(b, [tile_n * BN, tap * K + part * BK], arrived, b_steps.index(slot))
                count += 1


@gluon.jit
def _load_operands(
    add, gate, residual, extra, ring, M,
    N: gl.constexpr, BN: gl.constexpr, TAPS: gl.constexpr, TOKENS: gl.constexpr, GROUP: gl.constexpr,
    ADD: gl.constexpr, GATE: gl.constexpr, RESIDUAL: gl.constexpr, EXTRA: gl.constexpr,
):  # fmt: skip
    """The loader of the epilogue's operands, which lie one after the other in a slot of the ring."""
    chunks, full, empty = ring
    OPERANDS: gl.constexpr = ADD + GATE + RESIDUAL + EXTRA
    RING: gl.constexpr = full.shape[0]
    BM: gl.constexpr = chunks.shape[1]
    CW: gl.constexpr = chunks.shape[2]
    if OPERANDS > 0:
        count = 0
        for round in range(_rounds(M, N, TAPS, BM, BN)):
            tile_m, tile_n = _tile(round, M, N, TAPS, TOKENS, BM, BN, GROUP)
            for chunk in range(BN // CW):
                slot = count % RING
                arrived, first = full.index(slot), slot * OPERANDS
                at = [tile_m * BM, tile_n * BN + chunk * CW]
                mbarrier.wait(empty.index(slot), (count // RING & 1) ^ 1)
                mbarrier.expect(arrived, OPERANDS * BM * CW * 2)
                if ADD:
                    roles.load(add, at, arrived, chunks.index(first))
                if GATE:
                    roles.load(gate, at, arrived, chunks.index(first + ADD))
                if RESIDUAL:
                    roles.load(residual, at, arrived, chunks.index(first + ADD + GATE))
                if EXTRA:
                    roles.load(extra, at, arrived, chunks.index(first + ADD + GATE + RESIDUAL))
                count += 1


@gluon.jit
def _consume(
    SELF: gl.constexpr, steps, ring, turns, values, out, M,
    N: gl.constexpr, K: gl.constexpr, TAPS: gl.constexpr, TOKENS: gl.constexpr, BATCH: gl.constexpr, BN: gl.constexpr, GROUP: gl.constexpr,
    SLICE: gl.constexpr, A_ROWS: gl.constexpr, B_ROWS: gl.constexpr, SILU: gl.constexpr,
    ADD: gl.constexpr, GATE: gl.constexpr, RESIDUAL: gl.constexpr, EXTRA: gl.constexpr,
):  # fmt: skip
    """Consumer SELF, 0 or 1."""
    a_steps, b_steps, full, empty = steps
    chunks, chunks_full, chunks_empty = ring
    product_turn, operand_turn = turns
    STAGES: gl.constexpr = a_steps.shape[0]
    BM: gl.constexpr = a_steps.shape[1]
    BK: gl.constexpr = a_steps.shape[2]
    STEPS: gl.constexpr = (K + BK - 1) // BK
    CHUNKS: gl.constexpr = BN // chunks.shape[2]
    OPERANDS: gl.constexpr = ADD + GATE + RESIDUAL + EXTRA
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 256 // a_steps.dtype.primitive_bitwidth])
    # Steps of the loader that came before this tile, and tiles that this consumer has finished.
    count = gl.program_id(0) * 0
    if SELF == 1:
        count += _tap_count(0, M, N, TAPS, TOKENS, BATCH, BM, BN, GROUP) * STEPS
    done = gl.program_id(0) * 0
    for round in range(SELF, _rounds(M, N, TAPS, BM, BN), 2):
        tile_m, tile_n = _tile(round, M, N, TAPS, TOKENS, BM, BN, GROUP)
        here = _tap_count(round, M, N, TAPS, TOKENS, BATCH, BM, BN, GROUP) * STEPS
        acc = gl.zeros((BM, BN), gl.float32, LAYOUT)
        # A wait for a parity tells a phase from the one before it only, so that a consumer may not wait for a slot's next phase before this one
        # has passed: the other one is with its products until then.
        mbarrier.wait(product_turn.index(SELF), (done & 1) ^ (1 - SELF))
        for step in range(here):
            at = count + step
            slot = at % STAGES
            mbarrier.wait(full.index(slot), at // STAGES & 1)
            acc = warpgroup_mma(a_steps.index(slot), b_steps.index(slot).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=[acc])
            # The step before this one is done with its slot.
            mbarrier.arrive(empty.index((at + STAGES - 1) % STAGES), count=1, pred=step > 0)
        mbarrier.arrive(product_turn.index(1 - SELF), count=1)
        count += here
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index((count + STAGES - 1) % STAGES), count=1)
        chunk = done * CHUNKS
        if OPERANDS > 0:
            chunk = (2 * done + SELF) * CHUNKS
            mbarrier.wait(operand_turn.index(SELF), (done & 1) ^ (1 - SELF))
        sums = finish(
            acc, out, chunks, chunks_full, chunks_empty, values, chunk, tile_m, tile_n, M,
            N, BN, SLICE, BN, 0, SELF, TOKENS, A_ROWS, B_ROWS, SILU, ADD, GATE, RESIDUAL, EXTRA,
        )  # fmt: skip
        if OPERANDS > 0:
            mbarrier.arrive(operand_turn.index(1 - SELF), count=1)
        squares = values[7]
        if squares is not None:
            row = tile_m * BM + gl.arange(0, BM, sums.type.layout)
            gl.store(squares + row.to(gl.int64) * gl.cdiv(N, BN) + tile_n, sums, mask=row < M)
        count += _tap_count(round + 1, M, N, TAPS, TOKENS, BATCH, BM, BN, GROUP) * STEPS
        done += 1
    tma.store_wait(0)
