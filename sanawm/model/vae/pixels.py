"""Conversion of decoded video to 8-bit pixels."""

from __future__ import annotations

import torch
from torch import Tensor


def to_uint8(video: Tensor) -> Tensor:
    """Video in [-1, 1], any shape and float dtype, as uint8 of the same shape; values outside are clamped.

    Rounds to the nearest level in fp32, as diffusers' VideoProcessor does, and not down, as the official streaming script does: truncation
    darkens every pixel by half a level on average.
    """
    return ((video.float() * 0.5 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
