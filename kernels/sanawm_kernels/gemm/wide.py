"""Gluon kernel of the matrix products on Hopper with tiles of 192 x 256: bf16 or FP8 operands, bf16 results.

It computes what `pingpong.gemm` does, with other roles: three consumers of four warps share a tile, 64 rows each, and finish it together. An
instruction of 64 x 128 reads 96 bytes of shared memory a cycle, and copies into it write 37 a cycle for such a tile where they write 64 for one of
128 x 128; together 133 and 160, of the 128 that a multiprocessor has. A tile also takes a quarter less from the second-level cache for each product,
which is what counts where the power of the card sets its clock. In exchange an epilogue has no other tile's products beside it.
(ptxas refuses instructions of 64 x 256 in programs of 512 threads.)
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from sanawm_kernels import roles
from sanawm_kernels.gemm.roles_epilogue import finish
from sanawm_kernels.gemm.roles_loaders import load_operands, load_steps
from sanawm_kernels.gemm.roles_schedule import rounds, tap_count, tile_at

ROWS = gl.constexpr(64)


@gluon.jit
def gemm(
    a, a_scale, b, b_scale, bias, add, carried, carried_row, gate, frame_gate, frame_gate_row, residual, extra, out, squares, M,
    N: gl.constexpr, K: gl.constexpr, TAPS: gl.constexpr, TOKENS: gl.constexpr, BATCH: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, CW: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, RING: gl.constexpr,
    SLICE: gl.constexpr, A_ROWS: gl.constexpr, B_ROWS: gl.constexpr, SILU: gl.constexpr,
):  # fmt: skip
    """As `pingpong.gemm`, but blocks of a and of the epilogue's operands have 64 rows, RING counts a consumer's chunks with and without operands, and
    squares is (M, cdiv(N, BN / 2))."""
    gl.static_assert(BM == 3 * ROWS, "three consumers have 64 rows each")
    gl.static_assert(TAPS == 1 or not A_ROWS, "row-wise scales of the activations cannot be factored out of a sum over three rows")
    ADD: gl.constexpr = 0 if add is None else 1
    GATE: gl.constexpr = 0 if gate is None else 1
    RESIDUAL: gl.constexpr = 0 if residual is None else 1
    EXTRA: gl.constexpr = 0 if extra is None else 1
    OPERANDS: gl.constexpr = ADD + GATE + RESIDUAL + EXTRA
    BUFFERS: gl.constexpr = RING * (OPERANDS if OPERANDS > 0 else 1)
    a0 = gl.allocate_shared_memory(a.dtype, [STAGES, ROWS, BK], a.layout)
    a1 = gl.allocate_shared_memory(a.dtype, [STAGES, ROWS, BK], a.layout)
    a2 = gl.allocate_shared_memory(a.dtype, [STAGES, ROWS, BK], a.layout)
    b_steps = gl.allocate_shared_memory(b.dtype, [STAGES, BN, BK], b.layout)
    full, empty = roles.barriers(STAGES, 1), roles.barriers(STAGES, 3)
    ring0 = (gl.allocate_shared_memory(out.dtype, [BUFFERS, ROWS, CW], out.layout), roles.barriers(RING, 1), roles.barriers(RING, 1))
    ring1 = (gl.allocate_shared_memory(out.dtype, [BUFFERS, ROWS, CW], out.layout), roles.barriers(RING, 1), roles.barriers(RING, 1))
    ring2 = (gl.allocate_shared_memory(out.dtype, [BUFFERS, ROWS, CW], out.layout), roles.barriers(RING, 1), roles.barriers(RING, 1))
    values = (a_scale, b_scale, bias, carried, carried_row, frame_gate, frame_gate_row, squares)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    0, a0, b_steps, full, empty, ring0, values, out, M,
                    N, K, TAPS, TOKENS, BATCH, BM, BN, GROUP, SLICE, A_ROWS, B_ROWS, SILU, ADD, GATE, RESIDUAL, EXTRA,
                ),
            ),
            (
                _consume,
                (
                    1, a1, b_steps, full, empty, ring1, values, out, M,
                    N, K, TAPS, TOKENS, BATCH, BM, BN, GROUP, SLICE, A_ROWS, B_ROWS, SILU, ADD, GATE, RESIDUAL, EXTRA,
                ),
            ),
            (
                _consume,
                (
                    2, a2, b_steps, full, empty, ring2, values, out, M,
                    N, K, TAPS, TOKENS, BATCH, BM, BN, GROUP, SLICE, A_ROWS, B_ROWS, SILU, ADD, GATE, RESIDUAL, EXTRA,
                ),
            ),
            (load_steps, (a, b, (a0, a1, a2), b_steps, full, empty, M, N, K, TAPS, TOKENS, BATCH, GROUP)),
            (load_operands, (add, gate, residual, extra, (ring0, ring1, ring2), M, N, BN, TAPS, TOKENS, GROUP, ADD, GATE, RESIDUAL, EXTRA)),
        ],
        [4, 4, 1, 1],
        [160, 160, 24, 24],
    )  # fmt: skip


@gluon.jit
def _consume(
    SELF: gl.constexpr, a_steps, b_steps, full, empty, ring, values, out, M,
    N: gl.constexpr, K: gl.constexpr, TAPS: gl.constexpr, TOKENS: gl.constexpr, BATCH: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    GROUP: gl.constexpr, SLICE: gl.constexpr, A_ROWS: gl.constexpr, B_ROWS: gl.constexpr, SILU: gl.constexpr,
    ADD: gl.constexpr, GATE: gl.constexpr, RESIDUAL: gl.constexpr, EXTRA: gl.constexpr,
):  # fmt: skip
    """Consumer SELF, with rows 64 * SELF and on of every tile."""
    chunks, chunks_full, chunks_empty = ring
    STAGES: gl.constexpr = b_steps.shape[0]
    BK: gl.constexpr = b_steps.shape[2]
    STEPS: gl.constexpr = (K + BK - 1) // BK
    HALF: gl.constexpr = BN // 2
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 256 // b_steps.dtype.primitive_bitwidth])
    # Steps and chunks of the tiles before.
    count = gl.program_id(0) * 0
    chunk = gl.program_id(0) * 0
    for round in range(rounds(M, N, TAPS, BM, BN)):
        tile_m, tile_n = tile_at(round, M, N, TAPS, TOKENS, BM, BN, GROUP)
        here = tap_count(round, M, N, TAPS, TOKENS, BATCH, BM, BN, GROUP) * STEPS
        left, right = gl.zeros((ROWS, HALF), gl.float32, LAYOUT), gl.zeros((ROWS, HALF), gl.float32, LAYOUT)
        for step in range(here):
            at = count + step
            slot = at % STAGES
            x, w = a_steps.index(slot), b_steps.index(slot)
            mbarrier.wait(full.index(slot), at // STAGES & 1)
            left = warpgroup_mma(x, w.slice(0, HALF, 0).permute((1, 0)), left, is_async=True)
            right = warpgroup_mma(x, w.slice(HALF, HALF, 0).permute((1, 0)), right, is_async=True)
            left, right = warpgroup_mma_wait(2, deps=[left, right])
            # The step before this one is done with its slot.
            mbarrier.arrive(empty.index((at + STAGES - 1) % STAGES), count=1, pred=step > 0)
        count += here
        left, right = warpgroup_mma_wait(0, deps=[left, right])
        mbarrier.arrive(empty.index((count + STAGES - 1) % STAGES), count=1)
        block = tile_m * 3 + SELF
        left_sums = finish(
            left, out, chunks, chunks_full, chunks_empty, values, chunk, block, tile_n, M,
            N, BN, SLICE, HALF, 0, 0, TOKENS, A_ROWS, B_ROWS, SILU, ADD, GATE, RESIDUAL, EXTRA,
        )  # fmt: skip
        right_sums = finish(
            right, out, chunks, chunks_full, chunks_empty, values, chunk, block, tile_n, M,
            N, BN, SLICE, HALF, HALF, 0, TOKENS, A_ROWS, B_ROWS, SILU, ADD, GATE, RESIDUAL, EXTRA,
        )  # fmt: skip
        squares = values[7]
        if squares is not None:
            row = block * ROWS + gl.arange(0, ROWS, left_sums.type.layout)
            to = squares + row.to(gl.int64) * gl.cdiv(N, HALF) + 2 * tile_n
            gl.store(to, left_sums, mask=row < M)
            gl.store(to + 1, right_sums, mask=(row < M) & (2 * tile_n + 1 < gl.cdiv(N, HALF)))
        chunk += BN // chunks.shape[2]
    tma.store_wait(0)
