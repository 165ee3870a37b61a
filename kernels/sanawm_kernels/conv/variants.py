"""Kernels that the video decoder launches."""

from __future__ import annotations

from collections.abc import Iterator

from sanawm_kernels.aot.spec import KernelVariant, ModelSizes
from sanawm_kernels.conv import plans
from sanawm_kernels.tokenwise.variants import KIND


def variants(sizes: ModelSizes, target: int) -> list[KernelVariant]:
    """Decoding of one latent frame, at the start of a clip and later, where each stage after the first has twice the frames before it."""
    widths = (sizes.latent_channels, *sizes.decoder_widths, sizes.decoder_widths[0] // 2)
    decode = _decode_described if plans.described(KIND, target, widths) else _decode
    found = [plans.latent_rows(KIND), *(v for first in (True, False) for v in decode(sizes, target, first))]
    return list({variant.name: variant for variant in found}.values())


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


def _decode_described(sizes: ModelSizes, target: int, first: bool) -> Iterator[KernelVariant]:
    widths = sizes.decoder_widths[::-1]

    def conv(stage: int, channels: int, out: int, mode: plans.Mode, norm: bool = True) -> Iterator[KernelVariant]:
        frames, height, width = 1 if first else 2**stage, sizes.height * 2**stage, sizes.width * 2**stage
        if mode == "plain" and not norm:
            yield plans.padded_latent(KIND, height, width, channels, first)
        else:
            yield plans.padded(KIND, frames, height, width, channels, first, norm)
        tile = plans.config(KIND, target, channels, out, mode)
        yield plans.described_conv(KIND, frames, height, width, channels, out, mode, first, tile, sizes.patch)
        if tile.splits > 1:
            yield plans.summed(KIND, frames * plans.frame_stride(height, width), out, tile.splits, mode == "residual")
        elif mode in ("residual", "upsample"):
            yield plans.selection(KIND, channels, out, mode)

    yield from conv(0, sizes.latent_channels, widths[0], "plain", norm=False)
    for stage, width in enumerate((*widths, widths[-1] // 2)):
        yield from conv(stage, width, width, "plain")
        yield from conv(stage, width, width, "residual")
        if stage < len(widths):
            yield from conv(stage, width, 4 * width, "upsample", norm=False)
    yield from conv(len(widths), widths[-1] // 2, 3 * sizes.patch**2, "pixels")
