"""Streaming causal decoder with explicit state.

Letters: B batch, C latent channels, T, h and w latent frames, rows and columns, F, H and W pixel frames, rows and columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from sanawm.config import VAEConfig
from sanawm.errors import InputError
from sanawm.model.vae.temporal import Carried
from sanawm.model.vae.vae import VideoVAE, check_latent, denormalise
from sanawm.vae_state import state_shapes

State = tuple[Tensor, ...]


class StreamingDecoder(nn.Module):
    """Causal decoder that takes a clip part by part and gives what decoding it at once gives.

    The state is one tensor a convolution, named and shaped by `sanawm.vae_state.state_shapes`. It goes in and comes out; nothing is kept
    in the module, so it can be exported and compiled. Weights are shared with `vae`, its encoder is left out; wrap the VAE after moving it
    to its device and dtype. Source: SANA-WM paper arXiv 2605.15178, causal LTX-2 decoder.
    """

    latents_mean: Tensor
    latents_std: Tensor

    def __init__(self, vae: VideoVAE) -> None:
        super().__init__()
        self.config = vae.config
        self.scaling_factor = vae.scaling_factor
        self.decoder = vae.decoder
        self.register_buffer("latents_mean", vae.latents_mean)
        self.register_buffer("latents_std", vae.latents_std)

    def decode_first(self, z_BCThw: Tensor) -> tuple[Tensor, State]:
        """Pixels (B,3,8T-7,32h,32w) of a clip's first latent frames, usually one, and the state after them.

        Raises InputError for a latent of another shape.
        """
        check_latent(self.config, z_BCThw)
        return self._decode(z_BCThw, None)

    def decode_next(self, z_BCThw: Tensor, state: Sequence[Tensor]) -> tuple[Tensor, State]:
        """Pixels (B,3,8T,32h,32w) of the latent frames that follow, usually one, and the state after them.

        Raises InputError for a latent of another shape or a state that does not belong to it.
        """
        check_latent(self.config, z_BCThw)
        check_state(self.config, z_BCThw, state)
        return self._decode(z_BCThw, state)

    def segments(self, z_BCThw: Tensor) -> Iterator[Tensor]:
        """Pixels of each latent frame in turn: (B,3,1,H,W), then (B,3,8,H,W) each, in constant memory."""
        pixels, state = self.decode_first(z_BCThw[:, :, :1])
        yield pixels
        for frame in range(1, z_BCThw.shape[2]):
            pixels, state = self.decode_next(z_BCThw[:, :, frame : frame + 1], state)
            yield pixels

    def _decode(self, z_BCThw: Tensor, state: Sequence[Tensor] | None) -> tuple[Tensor, State]:
        context = Carried(state)
        pixels = self.decoder(denormalise(z_BCThw, self.latents_mean, self.latents_std, self.scaling_factor), context)
        return pixels, context.state


class FirstFrameDecoder(StreamingDecoder):
    """`decode_first` as a module with flat outputs, for export."""

    def forward(self, z_BCThw: Tensor) -> tuple[Tensor, ...]:
        """(pixels, *state)."""
        pixels, state = self.decode_first(z_BCThw)
        return pixels, *state


class NextFrameDecoder(StreamingDecoder):
    """`decode_next` as a module with flat inputs and outputs, for export."""

    def forward(self, z_BCThw: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """(pixels, *new_state)."""
        pixels, new_state = self.decode_next(z_BCThw, state)
        return pixels, *new_state


def check_state(config: VAEConfig, z_BCThw: Tensor, state: Sequence[Tensor]) -> None:
    """Raise InputError unless `state` has the number and shapes of tensors that continue latents shaped like `z`."""
    batch, _, _, rows, columns = z_BCThw.shape
    expected = state_shapes(config, rows, columns, batch)
    if len(state) != len(expected):
        raise InputError(
            f"the VAE decoder's state has {len(expected)} tensors, found {len(state)}; pass the state that the call before returned"
        )
    for (name, shape), tensor in zip(expected, state, strict=True):
        if tuple(tensor.shape) != shape:
            raise InputError(
                f"the VAE decoder's state for {name} has shape {shape} at this latent size, found {tuple(tensor.shape)}; "
                "pass the state that the call before returned"
            )
