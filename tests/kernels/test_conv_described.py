"""The decoder's convolutions with descriptors and what stands around them against their plain definitions, in Triton's interpreter (float32)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from sanawm_kernels.conv import naive, plans
from sanawm_kernels.conv.plans import Config, Mode
from sanawm_kernels.tokenwise.launch import launch

H, W = 3, 10
# A stride that is a multiple of 256 pixels: one tile of 32 pixels and more a frame, the last one overhanging.
STRIDE = plans.frame_stride(H, W)
TILE = Config(32, 32, 16, slices=2, group=2)


def random(*shape: int, seed: int = 0) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    x.view(-1)[:: max(1, x.numel() // 7)] *= 20  # outliers
    return x


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, 255 if dtype == torch.uint8 else torch.nan, dtype=dtype)


def between_rows(x: Tensor) -> Tensor:
    """Frames as results lie in memory, with garbage between the rows."""
    out = random(x.shape[0], STRIDE, x.shape[3], seed=9)
    naive.frames(out, *x.shape[:3], W + 2).copy_(x)
    return out


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, mode: Mode, skip: Tensor | None = None, **choices: Any) -> None:
    """Convolution of padded frames."""
    frames, C, N = x.shape[0] - 2, x.shape[3], weight.shape[0]
    tile = choices.pop("tile", TILE)
    arguments: dict[str, Any] = {"x": x, "weight": weight, "out": out} | ({} if bias is None else {"bias": bias})
    if skip is not None:
        select = empty(N, C)
        launch(plans.selection("fp32", C, N, mode), {"out": select})
        assert torch.equal(select, naive.selection(N, C, mode == "upsample"))
        arguments |= {"skip": between_rows(skip), "select": select}
    launch(plans.described_conv("fp32", frames, H, W, C, N, mode, choices.pop("first", False), tile, **choices), arguments, SMS=3)


def close(found: Tensor, wanted: Tensor) -> None:
    """Sums of at most 27 * 40 products of size one in float32, against float64."""
    torch.testing.assert_close(found.double(), wanted, rtol=2e-5, atol=2e-5 * float(wanted.abs().max()))


def cases() -> Iterator[tuple[int, int, Config]]:
    """Frames, channels, tile: depths that a block does not divide, tiles wider than the result, more tiles than programs."""
    yield 1, 8, TILE
    yield 3, 24, TILE
    yield 2, 40, Config(16, 16, 32)
    yield 2, 16, Config(64, 64, 16, slices=4, persistent=2)


@pytest.mark.parametrize(("frames", "channels", "tile"), list(cases()))
def test_convolution(frames: int, channels: int, tile: Config) -> None:
    x = naive.padded(random(frames, H, W, channels), random(2, H, W, channels, seed=1))
    weight, bias, residual = random(channels, 27 * channels, seed=2) / channels**0.5, random(channels, seed=3), random(frames, H, W, channels, seed=4)
    want = naive.padded_conv(x.double(), weight.double(), bias.double())
    out = empty(frames, STRIDE, channels)
    convolve(x, weight, bias, out, "plain", tile=tile)
    close(naive.frames(out, frames, H, W, W + 2), want)
    out = empty(frames, STRIDE, channels)
    convolve(x, weight, bias, out, "residual", residual, tile=tile)
    close(naive.frames(out, frames, H, W, W + 2), want + residual)


@pytest.mark.parametrize(("splits", "residual"), [(3, True), (9, False)])
def test_parts_of_the_depth(splits: int, residual: bool) -> None:
    x, weight, bias = random(4, H + 2, W + 2, 24), random(40, 27 * 24, seed=2) / 5, random(40, seed=3)
    added = random(2, H, W, 40, seed=4)
    parts, out = empty(splits, 2, STRIDE, 40), empty(2, STRIDE, 40)
    convolve(x, weight, None, parts, "residual" if residual else "plain", tile=Config(32, 32, 16, splits=splits))
    arguments = {"parts": parts, "bias": bias, "out": out} | ({"residual": between_rows(added)} if residual else {})
    launch(plans.summed("fp32", 2 * STRIDE, 40, splits, residual), arguments)
    want = naive.padded_conv(x.double(), weight.double(), bias.double())
    close(naive.frames(out, 2, H, W, W + 2), want + added if residual else want)


def test_parts_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="expected parts of 54 steps"):
        plans.described_conv("fp32", 1, H, W, 24, 40, "plain", False, Config(32, 32, 16, splits=4))
    with pytest.raises(ValueError, match="found 2 and upsample"):
        plans.described_conv("fp32", 1, H, W, 24, 96, "upsample", False, Config(32, 32, 16, splits=2))


@pytest.mark.parametrize(("first", "channels"), [(False, 16), (True, 8), (False, 24)])
def test_upsampling(first: bool, channels: int) -> None:
    x, past = random(2, H, W, channels), random(2, H, W, channels, seed=1)
    weight, bias = random(4 * channels, 27 * channels, seed=2) / channels**0.5, random(4 * channels, seed=3)
    seen = naive.padded(x, past)
    want = naive.upsampled(naive.padded_conv(seen.double(), weight.double(), bias.double()), x.double(), first)
    out = empty(4 - first, plans.frame_stride(2 * H, 2 * W), channels // 2)
    convolve(seen, weight, bias, out, "upsample", x, first=first)
    close(naive.frames(out, 4 - first, 2 * H, 2 * W, 2 * W + 2), want)


def test_pixels() -> None:
    C, patch = 8, 4
    x = random(4, H + 2, W + 2, C)
    weight, bias = random(3 * patch**2, 27 * C, seed=2) / (20 * C**0.5), random(3 * patch**2, seed=3) / 10
    want = naive.pixels(naive.padded_conv(x, weight, bias), patch)
    assert len(want.unique()) > 100  # neither all dark nor all bright
    out = empty(2, H * patch, W * patch, 3, dtype=torch.uint8)
    convolve(x, weight, bias, out, "pixels", patch=patch, tile=Config(32, 64, 16))
    # A value within rounding of the middle between two levels may go to the other one.
    assert (out.int() - want.int()).abs().max() <= 1
    assert (out != want).float().mean() < 1e-2


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize(("frames", "norm"), [(1, True), (3, True), (2, False)])
def test_padded_frames_and_state(frames: int, norm: bool, first: bool) -> None:
    C = 24
    x, past = random(frames, H, W, C), None if first else random(2, H, W, C, seed=1)
    out, state = empty(frames + 2, H + 2, W + 2, C), empty(2, H, W, C)
    arguments = {"x": between_rows(x), "out": out, "state": state} | ({} if past is None else {"past": past})
    launch(plans.padded("fp32", frames, H, W, C, first, norm), arguments)
    want = naive.padded(naive.norm_silu(x) if norm else x, past)
    torch.testing.assert_close(out, want, rtol=2e-5, atol=2e-5)
    assert torch.equal(state, out[-2:, 1:-1, 1:-1])


def test_padded_latent() -> None:
    x, out, state = random(1, H, W, 24), empty(3, H + 2, W + 2, 24), empty(2, H, W, 24)
    launch(plans.padded_latent("fp32", H, W, 24, True), {"x": x, "out": out, "state": state})
    assert torch.equal(out, naive.padded(x, None)) and torch.equal(state, torch.cat((x, x)))
