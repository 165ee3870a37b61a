"""Feed-forward network: gated inverted bottleneck with a spatial depthwise convolution and a dense temporal convolution."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sanawm.config import DiTConfig
from sanawm.model.dit.layers import PointwiseConv


class ConvHolder(nn.Module):
    """Names a convolution the way the checkpoint does (`<name>.conv`)."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class TemporalConv(nn.Module):
    """Dense 3-tap convolution along time as one GEMM over [previous, current, next] frames; weight (C, C, 3, 1)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, channels, 3, 1))

    def gemm_weight(self) -> Tensor:
        """(C, 3C), input index tap * C + channel."""
        return self.weight.squeeze(-1).transpose(1, 2).flatten(1)

    def forward(self, shifted_BN3C: Tensor) -> Tensor:
        return F.linear(shifted_BN3C, self.gemm_weight())


class GLUMBConvTemp(nn.Module):
    """FFN of every block (SANA-WM paper, arXiv 2605.15178)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        C, G = config.hidden, config.glu_width
        self.grid = (config.height, config.width)
        self.inverted_conv = ConvHolder(PointwiseConv(C, 2 * G, 2))
        self.depth_conv = ConvHolder(nn.Conv2d(2 * G, 2 * G, 3, padding=1, groups=2 * G))
        self.point_conv = ConvHolder(PointwiseConv(G, C, 2, bias=False))
        self.t_conv = TemporalConv(C)

    def spatial(self, u_BNC: Tensor, grid: tuple[int, int]) -> Tensor:
        """Per-frame part, (B, N, C) -> (B, N, C)."""
        h, w = grid
        B, N, _ = u_BNC.shape
        a = F.silu(self.inverted_conv(u_BNC))
        images = a.reshape(B * N // (h * w), h, w, -1).permute(0, 3, 1, 2)
        a = self.depth_conv(images).permute(0, 2, 3, 1).reshape(B, N, -1)
        value, gate = a.chunk(2, -1)
        return self.point_conv(value * F.silu(gate))

    def forward(
        self, u_BNC: Tensor, grid: tuple[int, int], chunks: Sequence[int], tail_BSC: Tensor | None, *, tail_only: bool = False
    ) -> tuple[Tensor | None, Tensor]:
        """Returns (out (B, N, C), new tail (B, S, C)); the temporal convolution sees zeros after each chunk's end.

        With `tail_only` the temporal convolution is not computed and the first result is None.
        """
        S = grid[0] * grid[1]
        s = self.spatial(u_BNC, grid)
        B, N, C = s.shape
        frames = s.reshape(B, N // S, S, C)
        new_tail = frames[:, -1]
        if tail_only:
            return None, new_tail
        zero = torch.zeros_like(frames[:, :1])
        before = torch.cat((zero if tail_BSC is None else tail_BSC[:, None].to(s.dtype), frames[:, :-1]), 1)
        after, start = [], 0
        for n in chunks:
            after += [frames[:, start + 1 : start + n], zero]
            start += n
        shifted = torch.cat((before, frames, torch.cat(after, 1)), -1)
        return s + self.t_conv(shifted.reshape(B, N, 3 * C)), new_tail
