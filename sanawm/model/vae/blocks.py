"""Building blocks of the LTX-2 video VAE.

Letters: B batch, C channels, T frames, H and W rows and columns, p patch side.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sanawm.model.vae.temporal import TemporalContext

SpatialPadding = Literal["zeros", "reflect"]


class VideoConv(nn.Module):
    """3x3x3 convolution; frames beyond the ends come from a `TemporalContext`, rows and columns from zero or reflect padding."""

    def __init__(self, in_channels: int, out_channels: int, padding: SpatialPadding) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, kernel_size=3, padding=(0, 1, 1), padding_mode=padding)

    def forward(self, x_BCTHW: Tensor, context: TemporalContext) -> Tensor:
        return self.conv(context.extend(x_BCTHW))


def channel_rms_norm(x_BCTHW: Tensor, eps: float = 1e-8) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the channels of each pixel; the mean is taken in fp32 (fp64 for fp64)."""
    channels = x_BCTHW.shape[1]
    wide = x_BCTHW.to(torch.promote_types(x_BCTHW.dtype, torch.float32))
    # A sum with `channels * eps`, not a mean with `eps`: torch's ONNX exporter drops the addition of a constant up to 1e-8 as a zero.
    total = (wide * wide).sum(dim=1, keepdim=True) + channels * eps
    return x_BCTHW * torch.sqrt(channels / total).to(x_BCTHW.dtype)


class ResNetBlock(nn.Module):
    """Two normalised convolutions around a skip; width and size stay."""

    def __init__(self, width: int, padding: SpatialPadding) -> None:
        super().__init__()
        self.conv1 = VideoConv(width, width, padding)
        self.conv2 = VideoConv(width, width, padding)

    def forward(self, x_BCTHW: Tensor, context: TemporalContext) -> Tensor:
        y = self.conv1(F.silu(channel_rms_norm(x_BCTHW)), context)
        return x_BCTHW + self.conv2(F.silu(channel_rms_norm(y)), context)


class Downsampler(nn.Module):
    """Convolution and space-to-depth by `stride` (frames, rows, columns), beside a skip of averaged channel groups.

    A temporal stride of 2 sees the first frame twice, so 2k+1 frames become k+1.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: tuple[int, int, int], padding: SpatialPadding) -> None:
        super().__init__()
        self.stride = stride
        self.out_channels = out_channels
        self.conv = VideoConv(in_channels, out_channels // math.prod(stride), padding)

    def forward(self, x_BCTHW: Tensor, context: TemporalContext) -> Tensor:
        if self.stride[0] == 2:
            x_BCTHW = torch.cat([x_BCTHW[:, :, :1], x_BCTHW], dim=2)
        skip = space_to_depth(x_BCTHW, self.stride)
        batch, channels, frames, rows, columns = skip.shape
        if channels != self.out_channels:
            skip = skip.reshape(batch, self.out_channels, channels // self.out_channels, frames, rows, columns).mean(dim=2)
        return space_to_depth(self.conv(x_BCTHW, context), self.stride) + skip


class Upsampler(nn.Module):
    """Convolution to four times the channels and depth-to-space by (2, 2, 2): half the channels come out.

    The skip is the input's own depth-to-space, its channels repeated four times. Both branches are rearranged alike, so they are summed
    before one rearrangement. At the start of a clip the first of the new frames is dropped: T frames become 2T-1, later parts 2T.
    """

    def __init__(self, width: int, padding: SpatialPadding) -> None:
        super().__init__()
        self.conv = VideoConv(width, 4 * width, padding)

    def forward(self, x_BCTHW: Tensor, context: TemporalContext) -> Tensor:
        y = self.conv(x_BCTHW, context)
        summed = y.unflatten(1, (4, x_BCTHW.shape[1])) + x_BCTHW.unsqueeze(1)
        up = depth_to_space(summed.flatten(1, 2), (2, 2, 2))
        return up[:, :, 1:] if context.starts_clip else up


def space_to_depth(x_BCTHW: Tensor, stride: tuple[int, int, int]) -> Tensor:
    """Move blocks of `stride` (frames, rows, columns) pixels to channels, in the order channel, frame, row, column."""
    batch, channels, frames, rows, columns = x_BCTHW.shape
    t, y, x = stride
    # Batch and channel stay neighbours, so they share one axis and the transpose has seven.
    blocks = x_BCTHW.reshape(batch * channels, frames // t, t, rows // y, y, columns // x, x).permute(0, 2, 4, 6, 1, 3, 5)
    return blocks.reshape(batch, channels * t * y * x, frames // t, rows // y, columns // x)


def depth_to_space(x_BCTHW: Tensor, stride: tuple[int, int, int]) -> Tensor:
    """Inverse of `space_to_depth`."""
    batch, channels, frames, rows, columns = x_BCTHW.shape
    t, y, x = stride
    width = channels // (t * y * x)
    blocks = x_BCTHW.reshape(batch * width, t, y, x, frames, rows, columns).permute(0, 4, 1, 5, 2, 6, 3)
    return blocks.reshape(batch, width, frames * t, rows * y, columns * x)


def patchify(x_BCTHW: Tensor, patch: int) -> Tensor:
    """Move pxp patches to channels, (B,C,T,H,W) -> (B,C*p*p,T,H/p,W/p); channel, column in the patch, row in the patch."""
    batch, channels, frames, rows, columns = x_BCTHW.shape
    patches = x_BCTHW.reshape(batch * channels, frames, rows // patch, patch, columns // patch, patch).permute(0, 5, 3, 1, 2, 4)
    return patches.reshape(batch, channels * patch**2, frames, rows // patch, columns // patch)


def unpatchify(x_BCTHW: Tensor, patch: int) -> Tensor:
    """Inverse of `patchify`."""
    batch, channels, frames, rows, columns = x_BCTHW.shape
    width = channels // patch**2
    patches = x_BCTHW.reshape(batch * width, patch, patch, frames, rows, columns).permute(0, 3, 4, 2, 5, 1)
    return patches.reshape(batch, width, frames, rows * patch, columns * patch)
