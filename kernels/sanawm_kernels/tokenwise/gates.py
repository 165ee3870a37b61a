"""Triton kernels of the gate logits of a GDN block.

The decay logit of a frame is a product with the mean of its tokens, so the mean of the tokens' products: a tile of tokens is multiplied once by
the weights of all heads, its sum is the tile's share of the frame's logit, and the same pass gives the tokens' write-strength logits. Without those
the channels are split among programs, too.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gate_tiles(
    u, u_row, decay_weight, beta_weight, beta_bias, beta, partial,
    TOKENS: tl.constexpr, C: tl.constexpr, HEADS: tl.constexpr, BH: tl.constexpr, BS: tl.constexpr, BK: tl.constexpr, SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(TOKENS, BS), frames, SPLITS). beta (rows, HEADS) or None, without splits; partial (frames, tiles, SPLITS, BH) float32: each tile's
    sum of decay products over a split's channels."""
    tl.static_assert(SPLITS == 1 or beta is None, "a write strength needs all channels")
    tile, frame, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    SHARE: tl.constexpr = (C + BK * SPLITS - 1) // (BK * SPLITS) * BK
    token = tile * BS + tl.arange(0, BS)
    present = token < TOKENS
    row = (frame * TOKENS + token).to(tl.int64)
    head = tl.arange(0, BH)
    decay = tl.zeros((BS, BH), tl.float32)
    strength = tl.zeros((BS, BH), tl.float32)
    for start in range(0, SHARE, BK):
        channel = split * SHARE + start + tl.arange(0, BK)
        inside = channel < C
        a = tl.load(u + row[:, None] * u_row + channel[None, :], mask=present[:, None] & inside[None, :], other=0.0)
        weights = (head[None, :] < HEADS) & inside[:, None]
        w = tl.load(decay_weight + head[None, :] * C + channel[:, None], mask=weights, other=0.0).to(a.dtype)
        decay = tl.dot(a, w, decay, input_precision=PRECISION)
        if beta is not None:
            w = tl.load(beta_weight + head[None, :] * C + channel[:, None], mask=weights, other=0.0).to(a.dtype)
            strength = tl.dot(a, w, strength, input_precision=PRECISION)
    tl.store(partial + ((frame * tl.num_programs(0) + tile) * SPLITS + split) * BH + head, tl.sum(decay, 0))
    if beta is not None:
        strength += tl.load(beta_bias + head, mask=head < HEADS, other=0.0).to(tl.float32)[None, :]
        mask = present[:, None] & (head[None, :] < HEADS)
        tl.store(beta + row[:, None] * HEADS + head[None, :], strength.to(beta.dtype.element_ty), mask=mask)


@triton.jit
def gate_means(
    partial, decay_bias, out, SHARES: tl.constexpr, BT: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, BH: tl.constexpr
):
    """Grid (frames). out (frames, HEADS) float32: sum of a frame's shares over TOKENS, plus bias; always added in the same order."""
    frame = tl.program_id(0)
    place, head = tl.arange(0, BT), tl.arange(0, BH)
    share = tl.load(partial + (frame * SHARES + place[:, None]) * BH + head[None, :], mask=place[:, None] < SHARES, other=0.0)
    bias = tl.load(decay_bias + head, mask=head < HEADS, other=0.0).to(tl.float32)
    tl.store(out + frame * HEADS + head, tl.sum(share, 0) / TOKENS + bias, mask=head < HEADS)
