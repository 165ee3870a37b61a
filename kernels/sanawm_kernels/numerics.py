"""Precision helpers shared by the plain definitions."""

from __future__ import annotations

import torch


def wide(x: torch.Tensor) -> torch.Tensor:
    """`x` in at least float32: half types are widened, float64 stays, so that one definition serves deployment and exact tests."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root-mean-square norm over the last axis, in `wide` precision, weight included; the result stays wide."""
    x = wide(x)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.to(x.dtype)
