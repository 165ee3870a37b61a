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
from sanawm_kernels.gemm.roles_epilogue import finish
from sanawm_kernels.gemm.roles_loaders import load_operands, load_steps
from sanawm_kernels.gemm.roles_schedule import rounds, tap_count, tile_at


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
            (load_steps, (a, b, (a_steps,), b_steps, steps[2], steps[3], M, N, K, TAPS, TOKENS, BATCH, GROUP)),
            (load_operands, (add, gate, residual, extra, (ring,), M, N, BN, TAPS, TOKENS, GROUP, ADD, GATE, RESIDUAL, EXTRA)),
        ],
        [4, 1, 1],
        [240, 24, 24],
    )  # fmt: skip


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
        count += tap_count(0, M, N, TAPS, TOKENS, BATCH, BM, BN, GROUP) * STEPS
    done = gl.program_id(0) * 0
    for round in range(SELF, rounds(M, N, TAPS, BM, BN), 2):
        tile_m, tile_n = tile_at(round, M, N, TAPS, TOKENS, BM, BN, GROUP)
        here = tap_count(round, M, N, TAPS, TOKENS, BATCH, BM, BN, GROUP) * STEPS
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
        count += tap_count(round + 1, M, N, TAPS, TOKENS, BATCH, BM, BN, GROUP) * STEPS
        done += 1
    tma.store_wait(0)
