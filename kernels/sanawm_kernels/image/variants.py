"""Kernels that the image encoder launches."""

from __future__ import annotations

import math
from collections.abc import Iterator

from sanawm_kernels.aot.spec import KernelVariant, ModelSizes
from sanawm_kernels.conv import plans as conv
from sanawm_kernels.image import plans
from sanawm_kernels.tokenwise.variants import KIND


def variants(sizes: ModelSizes, target: int) -> list[KernelVariant]:
    """The encoder's stages on one frame, from patches to the latent."""
    # The frame in patches, which the stages bring down to the latent's grid.
    height, width = (n * math.prod(s[axis] for s in plans.STRIDES) for n, axis in ((sizes.height, 1), (sizes.width, 2)))
    channels = sizes.latent_channels
    found = [plans.patches(KIND, height, width, sizes.patch)]
    found.append(plans.frame_conv(KIND, target, height, width, 3 * sizes.patch**2, channels, "plain"))
    for out, stride in zip(sizes.encoder_widths, plans.STRIDES):
        made = out // math.prod(stride)
        found += _blocks(target, height, width, channels)
        found.append(plans.frame_conv(KIND, target, height, width, channels, made, "plain"))
        found.append(plans.downsample(KIND, height, width, channels, made, stride))
        height, width, channels = height // stride[1], width // stride[2], out
    found += _blocks(target, height, width, channels)
    found.append(plans.frame_conv(KIND, target, height, width, channels, sizes.latent_channels, "latent"))
    return list({variant.name: variant for variant in found}.values())


def _blocks(target: int, height: int, width: int, channels: int) -> Iterator[KernelVariant]:
    yield conv.norm_silu(KIND, channels, False)
    modes: tuple[plans.Mode, ...] = ("plain", "residual")
    for mode in modes:
        yield plans.frame_conv(KIND, target, height, width, channels, channels, mode)
