"""Convolutions of the video VAE's decoder and the state they carry, without torch.

Letters: B batch, C channels, h and w latent rows and columns.
"""

from __future__ import annotations

from typing import NamedTuple

from sanawm.config import VAEConfig
from sanawm.errors import InputError, UserError

# Frames of left context that a convolution with a temporal kernel of 3 keeps.
CONTEXT_FRAMES = 2
# (frames, rows, columns) by which each stage of the encoder shrinks the video; the decoder's stages undo (2, 2, 2) each.
DOWN_STRIDES = ((1, 2, 2), (2, 1, 1), (2, 2, 2), (2, 2, 2))
UP_STAGES = 3
# Reflect padding by one needs a second row and column.
MIN_LATENT_SIDE = 2


class DecoderConv(NamedTuple):
    """One decoder convolution: its path in the decoder, its channels, and the size of its frames in multiples of the latent's."""

    name: str
    in_channels: int
    out_channels: int
    scale: int


def check_vae(config: VAEConfig) -> None:
    """Raise UserError unless widths, layers and strides make an LTX-2 video VAE."""
    if len(config.encoder_widths) != len(DOWN_STRIDES) or len(config.encoder_layers) != len(DOWN_STRIDES) + 1:
        raise UserError(
            f"the VAE encoder needs {len(DOWN_STRIDES)} widths and {len(DOWN_STRIDES) + 1} layer counts, found "
            f"{len(config.encoder_widths)} and {len(config.encoder_layers)}; correct the VAE configuration"
        )
    width = config.latent_channels
    for out, (frames, rows, columns) in zip(config.encoder_widths, DOWN_STRIDES, strict=True):
        volume = frames * rows * columns
        if out % volume or width * volume % out:
            raise UserError(
                f"a VAE encoder stage with strides {(frames, rows, columns)} cannot go from {width} to {out} channels: {out} must be a "
                f"multiple of {volume} and divide {width * volume}; correct the VAE configuration"
            )
        width = out
    if len(config.decoder_widths) != UP_STAGES or len(config.decoder_layers) != UP_STAGES + 1:
        raise UserError(
            f"the VAE decoder needs {UP_STAGES} widths and {UP_STAGES + 1} layer counts, found {len(config.decoder_widths)} and "
            f"{len(config.decoder_layers)}; correct the VAE configuration"
        )
    first, doubled = config.decoder_widths[0], [2 * width for width in config.decoder_widths[:-1]]
    if first % 8 or list(config.decoder_widths[1:]) != doubled:
        raise UserError(
            f"VAE decoder widths must start at a multiple of 8 and double from one to the next, found {config.decoder_widths}; "
            "correct the VAE configuration"
        )
    if config.temporal_stride != 8:
        raise UserError(f"the VAE's temporal stride is 8, found {config.temporal_stride}; correct the VAE configuration")


def decoder_convs(config: VAEConfig) -> list[DecoderConv]:
    """Every decoder convolution in the order in which a forward pass runs them (45 at the official size)."""
    check_vae(config)
    widths, layers = config.decoder_widths[::-1], config.decoder_layers[::-1]
    convs = [DecoderConv("conv_in", config.latent_channels, widths[0], 1), *_residual_convs("mid_block", layers[0], widths[0], 1)]
    for stage, (width, count) in enumerate(zip(widths, layers[1:], strict=True)):
        scale = 2**stage
        convs.append(DecoderConv(f"up_blocks.{stage}.upsamplers.0.conv", width, 4 * width, scale))
        convs += _residual_convs(f"up_blocks.{stage}", count, width // 2, 2 * scale)
    convs.append(DecoderConv("conv_out", widths[-1] // 2, 3 * config.patch**2, 2**UP_STAGES))
    return convs


def state_shapes(config: VAEConfig, h: int, w: int, batch: int = 1) -> list[tuple[str, tuple[int, int, int, int, int]]]:
    """Name and shape (B, C, 2, rows, columns) of each tensor of the streaming decoder's state, in order.

    Each is the last two frames that the convolution of that name read. `h` and `w` are the latent's rows and columns. Raises InputError
    if they are smaller than 2, which reflect padding cannot extend.
    """
    if min(h, w) < MIN_LATENT_SIDE or batch < 1:
        raise InputError(
            f"the VAE decodes batches of at least 1 latent of at least {MIN_LATENT_SIDE}x{MIN_LATENT_SIDE}, found a batch of {batch} of "
            f"{h}x{w}; use a larger image"
        )
    return [(conv.name, (batch, conv.in_channels, CONTEXT_FRAMES, h * conv.scale, w * conv.scale)) for conv in decoder_convs(config)]


def _residual_convs(block: str, layers: int, width: int, scale: int) -> list[DecoderConv]:
    return [DecoderConv(f"{block}.resnets.{layer}.conv{n}", width, width, scale) for layer in range(layers) for n in (1, 2)]
