"""Kernels that the video decoder launches."""

from __future__ import annotations

from collections.abc import Iterator

from sanawm_kernels.aot.spec import KernelVariant, ModelSizes
from sanawm_kernels.conv import plans
from sanawm_kernels.tokenwise.variants import KIND


def variants(sizes: ModelSizes, target: int) -> list[KernelVariant]:
    """Decoding of one latent frame, at the start of a clip and later, where each stage after the first has twice the frames before it."""
    return [plans.latent_rows(KIND), *(v for first in (True, False) for v in _decode(sizes, target, first))]


def _decode(sizes: ModelSizes, target: int, first: bool) -> Iterator[KernelVariant]:
    widths = sizes.decoder_widths[::-1]

    def conv(stage: int, channels: int, out: int, mode: plans.Mode) -> KernelVariant:
        frames, scale = 1 if first else 2**stage, 2**stage
        return plans.causal_conv(KIND, target, frames, sizes.height * scale, sizes.width * scale, channels, out, mode, first, sizes.patch)

    yield conv(0, sizes.latent_channels, widths[0], "plain")
    # A stage's upsampling halves the channels.
    for stage, width in enumerate((*widths, widths[-1] // 2)):
        yield plans.norm_silu(KIND, width, not first and stage > 0)
        yield conv(stage, width, width, "plain")
        yield conv(stage, width, width, "residual")
        if stage < len(widths):
            yield conv(stage, width, 4 * width, "upsample")
    yield conv(len(widths), widths[-1] // 2, 3 * sizes.patch**2, "pixels")
