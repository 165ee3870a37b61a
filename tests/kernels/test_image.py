"""The image encoder's kernels against their plain definitions in float64, in Triton's interpreter (float32)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sanawm.model.vae.blocks import patchify, space_to_depth
from sanawm_kernels.image import naive, plans
from sanawm_kernels.tokenwise.launch import launch


def random(*shape: int, seed: int = 0) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    x.view(-1)[:: max(1, x.numel() // 7)] *= 20  # outliers
    return x


def empty(*shape: int) -> Tensor:
    return torch.full(shape, torch.nan)


def close(got: Tensor, want: Tensor) -> None:
    # Sums of at most 9 * 40 products of size one in float32.
    torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-5 * float(want.abs().max()))


@pytest.mark.parametrize("patch", [2, 4])
def test_patches(patch: int) -> None:
    H, W = 5, 7
    image = random(3, patch * H, patch * W)
    out = empty(H * W, 3 * patch**2)
    launch(plans.patches("fp32", H, W, patch), {"image": image, "out": out})
    want = naive.patches(image, patch, torch.float32)
    torch.testing.assert_close(out.reshape(want.shape), want, rtol=0, atol=0)
    model = patchify(image[None, :, None], patch)[0, :, 0].permute(1, 2, 0)
    torch.testing.assert_close(want, model, rtol=0, atol=0)


# Frames of less and more than one tile of 32 pixels, one as narrow as the kernel; channels under, at and over the tile's depth.
@pytest.mark.parametrize(("H", "W", "C", "N"), [(5, 9, 40, 33), (1, 3, 8, 5), (4, 8, 16, 32)])
def test_convolution(H: int, W: int, C: int, N: int) -> None:
    x, residual = random(H, W, C), random(H, W, N, seed=1)
    weight, bias, mean = random(N, 9 * C, seed=2) / C**0.5, random(N, seed=3), random(N, seed=4)
    std = 0.5 + torch.rand(N, generator=torch.Generator().manual_seed(5))
    want = naive.frame_conv(x.double(), weight.double(), bias.double())
    given: dict[str, Any] = {"x": x, "weight": weight, "bias": bias}

    def run(mode: Any, out: Tensor, **more: Tensor) -> Tensor:
        launch(plans.frame_conv("fp32", 0, H, W, C, N, mode), {**given, **more, "out": out})
        return out

    close(run("plain", empty(H, W, N)), want)
    close(run("residual", empty(H, W, N), residual=residual), want + residual)
    latent = naive.normalised_latent(want, mean.double(), std.double(), torch.float64)
    close(run("latent", empty(N, H, W), mean=mean, std=std), latent)


# The strides of the encoder's stages; a mean over 1, less than, as many as and more channels than a block has.
@pytest.mark.parametrize(
    ("stride", "C", "made"), [((1, 2, 2), 6, 3), ((2, 1, 1), 5, 5), ((2, 2, 2), 12, 2), ((2, 2, 2), 16, 2), ((2, 2, 2), 24, 2)]
)
def test_downsampling(stride: tuple[int, int, int], C: int, made: int) -> None:
    H, W = 4, 6
    x, y = random(H, W, C), random(H, W, made, seed=1)
    want = naive.downsampled(y.double(), x.double(), stride)
    out = empty(*want.shape)
    launch(plans.downsample("fp32", H, W, C, made, stride), {"y": y, "x": x, "out": out, "SIZE": out.numel()})
    close(out, want)
    # The model sees the frame twice where time is halved.
    video = [t.double().permute(2, 0, 1)[None, :, None].expand(-1, -1, stride[0], -1, -1) for t in (y, x)]
    main, skip = (space_to_depth(v, stride)[0, :, 0] for v in video)
    model = main + skip.unflatten(0, (len(main), -1)).mean(1)
    torch.testing.assert_close(want, model.permute(1, 2, 0), rtol=1e-12, atol=1e-12)


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="does not divide 5x6 pixels"):
        plans.downsample("fp32", 5, 6, 8, 2, (2, 2, 2))
