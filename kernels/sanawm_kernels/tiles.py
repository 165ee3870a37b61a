"""Which tiles of its result a kernel's programs visit, and what they need of three taps along time."""

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


@triton.jit
def frame_taps(first, end, frame: tl.constexpr, batch: tl.constexpr):
    """First tap, and the one after the last, of a temporal convolution's tile of rows [first, end); `frame` rows a frame, `batch` rows a batch.

    Taps 0, 1 and 2 are the frames before, of and after a row. Nothing but zeros comes before a batch's first frame and after its last one.
    """
    place, two = first % batch, (end - 1) // batch > first // batch
    return tl.where((place + end - first > frame) | two, 0, 1), tl.where((place < batch - frame) | two, 3, 2)
