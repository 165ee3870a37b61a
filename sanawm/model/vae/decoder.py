"""Decoder of the LTX-2 video VAE.

Letters: B batch, C latent channels, T, h and w latent frames, rows and columns, F, H and W pixel frames, rows and columns.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from sanawm.config import VAEConfig
from sanawm.model.vae.blocks import ResNetBlock, Upsampler, VideoConv, channel_rms_norm, unpatchify
from sanawm.model.vae.temporal import TemporalContext
from sanawm.vae_state import check_vae


class UpBlock(nn.Module):
    """An optional upsampler, then ResNet blocks."""

    def __init__(self, layers: int, in_channels: int, upsample: bool) -> None:
        super().__init__()
        self.upsamplers = nn.ModuleList([Upsampler(in_channels, "reflect")] if upsample else [])
        width = in_channels // 2 if upsample else in_channels
        self.resnets = nn.ModuleList(ResNetBlock(width, "reflect") for _ in range(layers))

    def forward(self, x_BCTHW: Tensor, context: TemporalContext) -> Tensor:
        for layer in (*self.upsamplers, *self.resnets):
            x_BCTHW = layer(x_BCTHW, context)
        return x_BCTHW


class Decoder(nn.Module):
    """Decoder with strides (8, 32, 32) and reflect spatial padding; the temporal context decides whether it is causal."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        check_vae(config)
        self.patch = config.patch
        widths, layers = config.decoder_widths[::-1], config.decoder_layers[::-1]
        self.conv_in = VideoConv(config.latent_channels, widths[0], "reflect")
        self.mid_block = UpBlock(layers[0], widths[0], upsample=False)
        self.up_blocks = nn.ModuleList(UpBlock(count, width, upsample=True) for count, width in zip(layers[1:], widths, strict=True))
        self.conv_out = VideoConv(widths[-1] // 2, 3 * config.patch**2, "reflect")

    def forward(self, z_BCThw: Tensor, context: TemporalContext) -> Tensor:
        """Pixels of a de-normalised latent: (B,C,T,h,w) -> (B,3,F,H,W) near [-1, 1]; F = 8T-7 at the start of a clip, else 8T."""
        x = self.conv_in(z_BCThw, context)
        for block in (self.mid_block, *self.up_blocks):
            x = block(x, context)
        return unpatchify(self.conv_out(F.silu(channel_rms_norm(x)), context), self.patch)
