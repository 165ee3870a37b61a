"""Packed weights of the image encoder: the VAE encoder's convolutions as they act on a single frame."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import cached_property

from sanawm.config import VAEConfig
from sanawm.vae_state import DOWN_STRIDES, check_vae
from sanawm_runtime.engines._cuda_pack import Packed, Source

Stride = tuple[int, int, int]


class ImageWeights:
    """Packed tensors by name, 3x3 convolutions with the sum of the time taps; `dtype` is the activations'."""

    def __init__(self, config: VAEConfig, dtype: str) -> None:
        check_vae(config)
        self.config = config
        self.dtype = dtype

    @cached_property
    def stages(self) -> tuple[tuple[str, int, int, int, Stride | None], ...]:
        """(path, residual blocks, input channels, channels that its downsampler's convolution makes, stride) of every stage."""
        c, width = self.config, self.config.latent_channels
        found: list[tuple[str, int, int, int, Stride | None]] = []
        for i, (layers, out, stride) in enumerate(zip(c.encoder_layers, c.encoder_widths, DOWN_STRIDES)):
            found.append((f"down_blocks.{i}", layers, width, out // math.prod(stride), stride))
            width = out
        return (*found, ("mid_block", c.encoder_layers[-1], width, 0, None))

    @cached_property
    def tensors(self) -> Mapping[str, Packed]:
        return {packed.name: packed for packed in self._all()}

    def _conv(self, name: str, channels: int, made: int, kept: int | None = None) -> Iterator[Packed]:
        weight, bias = (f"encoder.{name}.conv.{part}" for part in ("weight", "bias"))
        kept = made if kept is None else kept
        sources = (Source(weight, (made, channels, 3, 3, 3)),)
        yield Packed(f"{name}.weight", self.dtype, (kept, 9 * channels), "frame_conv", sources, rounding=self.dtype)
        yield Packed(f"{name}.bias", self.dtype, (kept,), "frame_conv", (Source(bias, (made,)),), rounding=self.dtype)

    def _all(self) -> Iterator[Packed]:
        c = self.config
        width = (c.latent_channels,)
        for name in ("latents_mean", "latents_std"):
            yield Packed(name, "float32", width, "rows", (Source(name, width),), rounding=self.dtype)
        yield from self._conv("conv_in", 3 * c.patch**2, c.latent_channels)
        for name, layers, channels, made, stride in self.stages:
            for layer in range(layers):
                for n in (1, 2):
                    yield from self._conv(f"{name}.resnets.{layer}.conv{n}", channels, channels)
            if stride is not None:
                yield from self._conv(f"{name}.downsamplers.0.conv", channels, made)
        # The last output is the latent's log-variance, which the mode does not need.
        yield from self._conv("conv_out", c.encoder_widths[-1], c.latent_channels + 1, c.latent_channels)
