"""The order in which a kernel's programs visit the tiles of its result."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def grouped_tile(tile, M, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Tile row and column of the tile-th tile of an (M, N) result, GROUP tile rows at a time."""
    rows, columns = tl.cdiv(M, BM), tl.cdiv(N, BN)
    group = tile // (GROUP * columns)
    first = group * GROUP
    height = min(rows - first, GROUP)
    within = tile % (GROUP * columns)
    return first + within % height, within // height
