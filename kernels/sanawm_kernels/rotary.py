"""Rotary and projective (UCPE) position transforms of attention heads.

Shapes: B batch, N tokens of a chunk (frame-major), H heads, D head width.
"""

from __future__ import annotations

import torch

from sanawm_kernels.numerics import wide


def rotate_pairs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Multiply adjacent channel pairs (2m, 2m+1) by exp(i * angle).

    x (..., N, H, 2P); cos, sin (N, P). Result in `wide` precision, same shape.
    """
    x = wide(x)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos.to(x.dtype).unsqueeze(-2), sin.to(x.dtype).unsqueeze(-2)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


def ucpe(x_BNHD: torch.Tensor, matrix_BN44: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Unified camera positional encoding of head vectors (SANA-WM paper, arXiv 2605.15178).

    The first half of each head, in groups of four channels, is multiplied by the token's 4x4 matrix; the second half is rotated in pairs.

    x (B, N, H, D); matrix (B or 1, N, 4, 4); cos, sin (N, D/4). Queries use the transpose of the ray matrix, keys and values its inverse,
    outputs the matrix itself with negated sin. Result in `wide` precision.
    """
    x = wide(x_BNHD)
    half = x.shape[-1] // 2
    B, N, H, _ = x.shape
    groups = x[..., :half].reshape(B, N, H * (half // 4), 4)
    projected = (groups @ matrix_BN44.to(x.dtype).transpose(-1, -2)).reshape(B, N, H, half)
    return torch.cat((projected, rotate_pairs(x[..., half:], cos, sin)), -1)


def rms_clamp(after: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """Scale each head vector of `after` down to the RMS of `before` where it is larger (a variant of diffusers and sglang)."""
    rms_before = (before.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    rms_after = (after.square().mean(-1, keepdim=True) + 1e-6).sqrt().clamp_min(1e-6)
    return after * (rms_before / rms_after).clamp_max(1.0)
