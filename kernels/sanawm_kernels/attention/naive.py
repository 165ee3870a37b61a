"""Plain torch definitions of the attentions.

Shapes: B batch, N query tokens, n keys of a segment, L caption tokens, H heads, D head width, C = H*D.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sanawm_kernels import rotary
from sanawm_kernels.numerics import rms_norm, wide
from sanawm_kernels.quant.request import Output, Quantize, quantize_rows


@dataclass(frozen=True)
class Segment:
    """Keys and values of a run of tokens, (B, n, H, D) each. For FP8 the values are transposed, (B, H, D, n): see `fp8_values_transposed`."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class Fp8Scales:
    """float32 scales () of e4m3 queries, keys and values; all segments share them."""

    query: Tensor
    key: Tensor
    value: Tensor


@dataclass(frozen=True)
class InverseUCPE:
    """Transform of the camera attention's output: rays (B or 1, N, 4, 4), cos, sin (N, D/4), not negated."""

    rays: Tensor
    cos: Tensor
    sin: Tensor


def softmax_attention(q_BNHD: Tensor, k_BMHD: Tensor, v_BMHD: Tensor, scale: float, mask_BM: Tensor | None = None) -> Tensor:
    """softmax(q k^T * scale) v per head in `wide` precision, (B, N, H, D). A query without any unmasked key gives zeros."""
    q, k, v = (wide(x).transpose(1, 2) for x in (q_BNHD, k_BMHD, v_BMHD))
    logits = q @ k.transpose(-1, -2) * scale
    if mask_BM is not None:
        logits = logits.masked_fill(~mask_BM[:, None, None, :], -torch.inf)
    return (torch.softmax(logits, -1).nan_to_num(0.0) @ v).transpose(1, 2)


def window_attention(
    q_BNHD: Tensor,
    segments: Sequence[Segment],
    scale: float,
    *,
    fp8: Fp8Scales | None = None,
    ucpe: InverseUCPE | None = None,
    dtype: torch.dtype | None = None,
    quantize: Quantize | None = None,
) -> Output:
    """Attention of the current tokens to one to three segments, (B, N, C) in `dtype` (q's by default; needed for FP8).

    `scale` multiplies the logits; `ucpe` turns the output of the camera branch back from ray space (SANA-WM paper, arXiv 2605.15178).
    """
    dtype = dtype or q_BNHD.dtype
    keys, values = [s.keys for s in segments], [s.values for s in segments]
    q = q_BNHD
    if fp8 is not None:
        q = q.double() * fp8.query.double()
        keys = [k.double() * fp8.key.double() for k in keys]
        values = [v.permute(0, 3, 1, 2).double() * fp8.value.double() for v in values]
    out = softmax_attention(q, torch.cat(keys, 1), torch.cat(values, 1), scale)
    if ucpe is not None:
        out = rotary.ucpe(out, ucpe.rays, ucpe.cos, -ucpe.sin)
    return quantize_rows(out.to(dtype).flatten(2), quantize)


def cross_attention(
    q_BNC: Tensor,
    k_BLHD: Tensor,
    v_BLHD: Tensor,
    mask_BL: Tensor,
    q_norm_C: Tensor,
    eps: float,
    *,
    squares: Tensor | None = None,
    quantize: Quantize | None = None,
) -> Output:
    """Attention of raw query projections to the caption: RMS over all channels and weight on q, then softmax with 1/sqrt(D), (B, N, C).

    k is already normalised; mask is true on real tokens. `squares` (B, N, parts): partial sums of q's squares if the product that made q
    measured them; the definition does not read it.
    """
    H, D = k_BLHD.shape[2:]
    q = rms_norm(q_BNC, q_norm_C, eps).to(q_BNC.dtype).unflatten(-1, (H, D))
    out = softmax_attention(q, k_BLHD, v_BLHD, D**-0.5, mask_BL)
    return quantize_rows(out.to(q_BNC.dtype).flatten(2), quantize)
