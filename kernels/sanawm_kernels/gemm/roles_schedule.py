"""Which tiles of a product a Gluon kernel's program takes, and which taps of a temporal convolution each needs."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from sanawm_kernels.tiles import frame_taps, grouped_tile


@gluon.jit
def _place(round, TAPS: gl.constexpr):
    """This program's place in the round-th round. With three taps every second round has the programs in reverse."""
    program, programs = gl.program_id(0), gl.num_programs(0)
    return gl.where(round % 2 == 1, programs - 1 - program, program) if TAPS == 3 else program


@gluon.jit
def rounds(M, N: gl.constexpr, TAPS: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr):
    """Tiles of this program."""
    tiles = gl.cdiv(M, BM) * gl.cdiv(N, BN)
    whole = tiles // gl.num_programs(0)
    return whole + (_place(whole, TAPS) < tiles % gl.num_programs(0)).to(gl.int32)


@gluon.jit
def tile_at(round, M, N: gl.constexpr, TAPS: gl.constexpr, TOKENS: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, GROUP: gl.constexpr):
    """Tile row and column of this program's tile in the round-th round.

    With three taps the rows that need all of them come first: with every second round in reverse, no program gets two of their tiles and two others.
    """
    tile = round * gl.num_programs(0) + _place(round, TAPS)
    if TAPS == 3:
        return (TOKENS // BM + tile // gl.cdiv(N, BN)) % gl.cdiv(M, BM), tile % gl.cdiv(N, BN)
    else:
        return grouped_tile(tile, M, N, BM, BN, GROUP)


@gluon.jit
def taps_of(tile_m, M, TAPS: gl.constexpr, TOKENS: gl.constexpr, BATCH: gl.constexpr, BM: gl.constexpr):
    """First tap of a tile, and the one after the last."""
    if TAPS == 3:
        return frame_taps(tile_m * BM, min(tile_m * BM + BM, M), TOKENS, BATCH)
    else:
        return gl.to_tensor(0), gl.to_tensor(1)


@gluon.jit
def tap_count(
    round, M,
    N: gl.constexpr, TAPS: gl.constexpr, TOKENS: gl.constexpr, BATCH: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Taps of this program's tile in the round-th round."""
    tile_m, tile_n = tile_at(round, M, N, TAPS, TOKENS, BM, BN, GROUP)
    first, last = taps_of(tile_m, M, TAPS, TOKENS, BATCH, BM)
    return last - first
