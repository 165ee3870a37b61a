"""LTX-2 video VAE between RGB video and normalised latents.

Letters: B batch, C latent channels, T, h and w latent frames, rows and columns, F, H and W pixel frames, rows and columns.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sanawm.config import VAEConfig
from sanawm.errors import InputError
from sanawm.model.vae.decoder import Decoder
from sanawm.model.vae.encoder import Encoder
from sanawm.model.vae.temporal import Causal, Centred
from sanawm.vae_state import MIN_LATENT_SIDE


class VideoVAE(nn.Module):
    """Encoder, decoder and latent statistics under the parameter names of the official checkpoints.

    `latents_mean` and `latents_std` (C,) come from the checkpoint; `scaling_factor` is 1 in every released one.
    """

    latents_mean: Tensor
    latents_std: Tensor

    def __init__(self, config: VAEConfig, scaling_factor: float = 1.0) -> None:
        super().__init__()
        self.config = config
        self.scaling_factor = scaling_factor
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.register_buffer("latents_mean", torch.zeros(config.latent_channels))
        self.register_buffer("latents_std", torch.ones(config.latent_channels))

    def encode_mode(self, video_B3FHW: Tensor) -> Tensor:
        """Normalised mode of the latent: (B,3,F,H,W) in [-1, 1], F = 8k+1 -> (B,C,k+1,H/32,W/32) in the dtype of the weights.

        Raises InputError for another shape. Source: SANA-WM paper arXiv 2605.15178 and the LTX-2 video VAE.
        """
        check_video(self.config, video_B3FHW)
        mean = self.encoder(video_B3FHW)[:, : self.config.latent_channels]
        return (mean - per_channel(self.latents_mean)) * self.scaling_factor / per_channel(self.latents_std)

    def decode(self, z_BCThw: Tensor, causal: bool | None = None) -> Tensor:
        """Video of a normalised latent: (B,C,T,h,w) -> (B,3,8T-7,32h,32w) near [-1, 1], unclamped.

        `causal` is the configuration's `decoder_causal` if None; it must fit the weights. The whole clip is held in memory: use
        `StreamingDecoder` or `tiled_segments` for a long one. Raises InputError for a latent of another shape.
        """
        check_latent(self.config, z_BCThw)
        causal = self.config.decoder_causal if causal is None else causal
        z_BCThw = denormalise(z_BCThw, self.latents_mean, self.latents_std, self.scaling_factor)
        return self.decoder(z_BCThw, Causal() if causal else Centred())


def denormalise(z_BCThw: Tensor, mean_C: Tensor, std_C: Tensor, scaling_factor: float) -> Tensor:
    """The decoder's input from a normalised latent."""
    return z_BCThw * per_channel(std_C / scaling_factor) + per_channel(mean_C)


def per_channel(values_C: Tensor) -> Tensor:
    """(C,) as (C,1,1,1), which broadcasts over (B,C,T,h,w)."""
    return values_C.reshape(-1, 1, 1, 1)


def check_video(config: VAEConfig, video: Tensor) -> None:
    """Raise InputError unless `video` is (B,3,8k+1,32h,32w)."""
    stride, frames = config.spatial_stride, config.temporal_stride
    shape = tuple(video.shape)
    if len(shape) != 5 or shape[1] != 3 or min(shape) < 1 or shape[2] % frames != 1 or shape[3] % stride or shape[4] % stride:
        raise InputError(
            f"the VAE encodes video of shape (batch, 3, frames, height, width) with {frames}k+1 frames and sides that are multiples of "
            f"{stride}, found {shape}; resize, crop or trim the video"
        )


def check_latent(config: VAEConfig, z: Tensor) -> None:
    """Raise InputError unless `z` is (B,C,T,h,w) with the configuration's channels and sides of at least 2."""
    shape = tuple(z.shape)
    if len(shape) != 5 or shape[1] != config.latent_channels or min(shape) < 1 or min(shape[3:]) < MIN_LATENT_SIDE:
        raise InputError(
            f"the VAE decodes latents of shape (batch, {config.latent_channels}, frames, rows, columns) with at least {MIN_LATENT_SIDE} "
            f"rows and columns, found {shape}; pass the latent that this VAE's encoder or the DiT made"
        )
