"""LTX-2 video VAE: encoder, decoder, streaming and tiled decoding."""

from sanawm.model.vae.pixels import to_uint8
from sanawm.model.vae.streaming import FirstFrameDecoder, NextFrameDecoder, State, StreamingDecoder
from sanawm.model.vae.tiling import Tiling, decode_tiled, tiled_segments
from sanawm.model.vae.vae import VideoVAE

__all__ = [
    "FirstFrameDecoder",
    "NextFrameDecoder",
    "State",
    "StreamingDecoder",
    "Tiling",
    "VideoVAE",
    "decode_tiled",
    "tiled_segments",
    "to_uint8",
]
