"""Plain torch definitions of the Gemma-2 text encoder's operations between its products.

Shapes: L tokens, K tokens that the transformer sees, V vocabulary, C hidden width, H query heads, J key and value heads, D head width,
G feed-forward width. Norm gains are given whole, 1 + the stored weight. Source: Gemma 2, arXiv 2408.00118, as transformers computes it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sanawm_kernels.numerics import rms_norm, wide


def embed(ids_L: Tensor, table_VC: Tensor, scale: float, gain_C: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Residual stream (L, C), the tokens' rows times `scale` (the root of the width), and its RMS norm, in the table's dtype."""
    stream = (wide(table_VC[ids_L]) * scale).to(table_VC.dtype)
    return stream, rms_norm(stream, gain_C, eps).to(stream.dtype)


def add_normed(x_LC: Tensor, branch_LC: Tensor, post_C: Tensor, pre_C: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """A sub-block's end and the next one's start: x + norm(branch), and the norm of that as it is stored; both (L, C) in x's dtype."""
    stream = (wide(x_LC) + rms_norm(branch_LC, post_C, eps)).to(x_LC.dtype)
    return stream, rms_norm(stream, pre_C, eps).to(x_LC.dtype)


def rotate_halves(x_LHD: Tensor, frequencies: Tensor) -> Tensor:
    """Rotary embedding of positions 0 to L - 1: channel i turns with channel i + D/2 by position * frequencies[i]; in x's dtype."""
    x = wide(x_LHD)
    angle = torch.arange(len(x), device=x.device).to(frequencies.dtype)[:, None] * frequencies
    cos, sin = (table.to(x.dtype)[:, None] for table in (angle.cos(), angle.sin()))
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x_LHD.dtype)


def causal_attention(q_LHD: Tensor, k_LJD: Tensor, v_LJD: Tensor, mask_L: Tensor, scale: float, cap: float) -> Tensor:
    """Attention of each token to the real ones up to itself, (L, H, D) in q's dtype.

    H/J query heads share a key head. Logits are cap * tanh(scale * q k^T / cap). mask is nonzero on real tokens; a token that sees none gives
    zeros.
    """
    q, k, v = (wide(x).transpose(0, 1) for x in (q_LHD, k_LJD, v_LJD))
    k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
    logits = cap * torch.tanh(q @ k.transpose(-1, -2) * scale / cap)
    L = q.shape[1]
    visible = torch.ones(L, L, dtype=torch.bool, device=q.device).tril() & (mask_L != 0)
    weights = torch.softmax(logits.masked_fill(~visible, -torch.inf), -1).nan_to_num(0.0)
    return (weights @ v).transpose(0, 1).to(q_LHD.dtype)


def gelu_gated(x_LG: Tensor) -> Tensor:
    """tanh GELU of the left half of the columns times the right half, (L, 2G) -> (L, G), in x's dtype."""
    gate, up = wide(x_LG).chunk(2, -1)
    return (F.gelu(gate, approximate="tanh") * up).to(x_LG.dtype)


def token_mask(mask_L: Tensor, tokens: int) -> Tensor:
    """Whether the first and the last tokens - 1 positions hold real tokens, (tokens,) bool."""
    return torch.cat((mask_L[:1], mask_L[len(mask_L) - tokens + 1 :])) != 0
