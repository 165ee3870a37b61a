"""Encoder of the LTX-2 video VAE.

Letters: B batch, C latent channels, F pixel frames, H and W pixel rows and columns, T, h and w latent frames, rows and columns.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from sanawm.config import VAEConfig
from sanawm.model.vae.blocks import Downsampler, ResNetBlock, VideoConv, channel_rms_norm, patchify
from sanawm.model.vae.temporal import Causal, TemporalContext
from sanawm.vae_state import DOWN_STRIDES, check_vae


class DownBlock(nn.Module):
    """ResNet blocks, then an optional downsampler."""

    def __init__(self, layers: int, in_channels: int, out_channels: int, stride: tuple[int, int, int] | None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResNetBlock(in_channels, "zeros") for _ in range(layers))
        self.downsamplers = nn.ModuleList([] if stride is None else [Downsampler(in_channels, out_channels, stride, "zeros")])

    def forward(self, x_BCTHW: Tensor, context: TemporalContext) -> Tensor:
        for layer in (*self.resnets, *self.downsamplers):
            x_BCTHW = layer(x_BCTHW, context)
        return x_BCTHW


class Encoder(nn.Module):
    """Causal encoder with strides (8, 32, 32) and zero spatial padding."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        check_vae(config)
        self.patch = config.patch
        width = config.latent_channels
        self.conv_in = VideoConv(3 * config.patch**2, width, "zeros")
        self.down_blocks = nn.ModuleList()
        for layers, out, stride in zip(config.encoder_layers[:-1], config.encoder_widths, DOWN_STRIDES, strict=True):
            self.down_blocks.append(DownBlock(layers, width, out, stride))
            width = out
        self.mid_block = DownBlock(config.encoder_layers[-1], width, width, None)
        self.conv_out = VideoConv(width, config.latent_channels + 1, "zeros")

    def forward(self, video_B3FHW: Tensor) -> Tensor:
        """Mean and shared log-variance of the latent: (B,3,F,H,W) in [-1, 1] -> (B,C+1,T,h,w), the last channel the log-variance."""
        context = Causal()
        x = self.conv_in(patchify(video_B3FHW, self.patch), context)
        for block in (*self.down_blocks, self.mid_block):
            x = block(x, context)
        return self.conv_out(F.silu(channel_rms_norm(x)), context)
