"""Plain torch definitions of the video encoder's operations on a single frame.

A causal convolution sees a clip's first frame three times, so on that frame alone its three time taps act as their sum: a 3x3 convolution.

Shapes: H rows, W columns, M = H*W pixels, C input channels, N output channels, p patch side; frames are channels-last, (H, W, C).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sanawm_kernels.numerics import wide


def patches(image_3HW: Tensor, patch: int, dtype: torch.dtype) -> Tensor:
    """Patches as pixels, (3, p*H, p*W) -> (H, W, 3 p^2) in `dtype`; channel (colour * p + column in the patch) * p + row in the patch."""
    x = image_3HW.to(dtype).unflatten(2, (-1, patch)).unflatten(1, (-1, patch))  # colour, H, row, W, column
    return x.permute(1, 3, 0, 4, 2).flatten(2)


def frame_conv(x_HWC: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """3x3 convolution between zeros, (H, W, C) to (H, W, N) in `wide` precision; weight (N, 9 C), input index (dy*3 + dx)*C + channel."""
    x = wide(x_HWC)
    kernel = wide(weight).unflatten(1, (3, 3, x.shape[-1])).permute(0, 3, 1, 2)
    return F.conv2d(x.permute(2, 0, 1)[None], kernel, wide(bias), padding=1)[0].permute(1, 2, 0)


def downsampled(y_HWN: Tensor, x_HWC: Tensor, stride: tuple[int, int, int]) -> Tensor:
    """Space to depth of y plus space to depth of x averaged over groups of channels, in x's dtype: (H/sy, W/sx, N*st*sy*sx).

    Channels are ordered channel, frame, row, column of the block; the frames are copies. Source: LTX-2 video VAE.
    """
    volume = math.prod(stride)
    main, skip = (_space_to_depth(wide(t), stride) for t in (y_HWN, x_HWC))
    group = skip.shape[-1] // (y_HWN.shape[-1] * volume)
    return (main + skip.unflatten(-1, (-1, group)).mean(-1)).to(x_HWC.dtype)


def _space_to_depth(x_HWC: Tensor, stride: tuple[int, int, int]) -> Tensor:
    t, y, x = stride
    blocks = x_HWC.unflatten(1, (-1, x)).unflatten(0, (-1, y))  # H/y, y, W/x, x, C
    return blocks.permute(0, 2, 4, 1, 3)[:, :, :, None].expand(-1, -1, -1, t, -1, -1).flatten(2)


def normalised_latent(y_HWC: Tensor, mean_C: Tensor, std_C: Tensor, dtype: torch.dtype) -> Tensor:
    """(y - mean) / std of the channel, channel-major: (H, W, C) -> (C, H, W) in `dtype`."""
    return ((wide(y_HWC) - wide(mean_C)) / wide(std_C)).permute(2, 0, 1).to(dtype)
