"""Loaders of the Gluon kernels of the products: a warp for the operands of the products, and one for those of the epilogue."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from sanawm_kernels import roles
from sanawm_kernels.gemm.roles_schedule import rounds, taps_of, tile_at


@gluon.jit
def load_steps(
    a, b, a_steps, b_steps, full, empty, M,
    N: gl.constexpr, K: gl.constexpr, TAPS: gl.constexpr, TOKENS: gl.constexpr, BATCH: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Loads a tile's steps of a and b; `a_steps` are the buffers of the row blocks that make up a tile, one after the other."""
    PARTS: gl.constexpr = len(a_steps)
    ROWS: gl.constexpr = a_steps[0].shape[1]
    BM: gl.constexpr = PARTS * ROWS
    STAGES: gl.constexpr = b_steps.shape[0]
    BN: gl.constexpr = b_steps.shape[1]
    BK: gl.constexpr = b_steps.shape[2]
    BYTES: gl.constexpr = (BM + BN) * BK * (b_steps.dtype.primitive_bitwidth // 8)
    count = 0
    for round in range(rounds(M, N, TAPS, BM, BN)):
        tile_m, tile_n = tile_at(round, M, N, TAPS, TOKENS, BM, BN, GROUP)
        first, last = taps_of(tile_m, M, TAPS, TOKENS, BATCH, BM)
        for tap in range(first, last):
            for part in range((K + BK - 1) // BK):
                slot = count % STAGES
                arrived = full.index(slot)
                mbarrier.wait(empty.index(slot), (count // STAGES & 1) ^ 1)
                mbarrier.expect(arrived, BYTES)
                for i in gl.static_range(PARTS):
                    row = tile_m * BM + i * ROWS + (tap - TAPS // 2) * TOKENS
                    roles.load(a, [row, part * BK], arrived, a_steps[i].index(slot))
                # A tap's last block reads on into the next tap, against the zeros that a has there.
                roles.load(b, [tile_n * BN, tap * K + part * BK], arrived, b_steps.index(slot))
                count += 1


@gluon.jit
def load_operands(
    add, gate, residual, extra, rings, M,
    N: gl.constexpr, BN: gl.constexpr, TAPS: gl.constexpr, TOKENS: gl.constexpr, GROUP: gl.constexpr,
    ADD: gl.constexpr, GATE: gl.constexpr, RESIDUAL: gl.constexpr, EXTRA: gl.constexpr,
):  # fmt: skip
    """Loads chunks of the epilogue's operands, which lie one after the other in a slot; `rings`: buffers and barriers of each row block of a tile."""
    OPERANDS: gl.constexpr = ADD + GATE + RESIDUAL + EXTRA
    PARTS: gl.constexpr = len(rings)
    RING: gl.constexpr = rings[0][1].shape[0]
    ROWS: gl.constexpr = rings[0][0].shape[1]
    CW: gl.constexpr = rings[0][0].shape[2]
    BM: gl.constexpr = PARTS * ROWS
    if OPERANDS > 0:
        count = 0
        for round in range(rounds(M, N, TAPS, BM, BN)):
            tile_m, tile_n = tile_at(round, M, N, TAPS, TOKENS, BM, BN, GROUP)
            for chunk in range(BN // CW):
                slot = count % RING
                first = slot * OPERANDS
                for i in gl.static_range(PARTS):
                    chunks, full, empty = rings[i]
                    arrived = full.index(slot)
                    at = [tile_m * BM + i * ROWS, tile_n * BN + chunk * CW]
                    mbarrier.wait(empty.index(slot), (count // RING & 1) ^ 1)
                    mbarrier.expect(arrived, OPERANDS * ROWS * CW * 2)
                    if ADD:
                        roles.load(add, at, arrived, chunks.index(first))
                    if GATE:
                        roles.load(gate, at, arrived, chunks.index(first + ADD))
                    if RESIDUAL:
                        roles.load(residual, at, arrived, chunks.index(first + ADD + GATE))
                    if EXTRA:
                        roles.load(extra, at, arrived, chunks.index(first + ADD + GATE + RESIDUAL))
                count += 1
