"""Packed weights of the VAE decoder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property

from sanawm.config import VAEConfig
from sanawm.vae_state import decoder_convs
from sanawm_runtime.engines._cuda_pack import Op, Packed, Source


class DecoderWeights:
    """Packed tensors by name, as the kernels order them; `dtype` is the activations'."""

    def __init__(self, config: VAEConfig, dtype: str) -> None:
        self.config = config
        self.dtype = dtype

    @cached_property
    def tensors(self) -> Mapping[str, Packed]:
        return {packed.name: packed for packed in self._all()}

    def _all(self) -> Iterator[Packed]:
        width = (self.config.latent_channels,)
        for name in ("latents_mean", "latents_std"):
            yield Packed(name, "float32", width, "rows", (Source(name, width),), rounding=self.dtype)
        for conv in decoder_convs(self.config):
            op: Op = "conv_upsample" if "upsamplers" in conv.name else "conv_pixels" if conv.name == "conv_out" else "conv"
            weight, bias = (f"decoder.{conv.name}.conv.{part}" for part in ("weight", "bias"))
            shape = (conv.out_channels, conv.in_channels, 3, 3, 3)
            packed = (conv.out_channels, 27 * conv.in_channels)
            yield Packed(f"{conv.name}.weight", self.dtype, packed, op, (Source(weight, shape),), rounding=self.dtype)
            yield Packed(f"{conv.name}.bias", self.dtype, packed[:1], op, (Source(bias, packed[:1]),), rounding=self.dtype)
