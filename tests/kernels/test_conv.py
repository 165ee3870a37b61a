"""The decoder's kernels against their plain definitions, in Triton's interpreter (float32) or on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sanawm_kernels.conv import naive, plans
from sanawm_kernels.tokenwise.launch import launch

# Sums of at most 27 * 24 products of size one in float32.
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}
H, W = 3, 4


def random(*shape: int, seed: int = 0) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    x.view(-1)[:: max(1, x.numel() // 7)] *= 20  # outliers
    return x


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, 255 if dtype == torch.uint8 else torch.nan, dtype=dtype)


def convolve(
    x: Tensor, past: Tensor | None, weight: Tensor, bias: Tensor, out: Tensor, mode: Any, patch: int = 1, residual: Tensor | None = None
) -> None:
    T, C, N = x.shape[0], x.shape[3], weight.shape[0]
    variant = plans.causal_conv("fp32", 0, T, H, W, C, N, mode, past is None, patch)
    arguments: dict[str, Any] = {"x": x, "weight": weight, "bias": bias, "out": out, "M": T * H * W}
    arguments |= {} if past is None else {"past": past}
    launch(variant, arguments | ({} if residual is None else {"residual": residual}))


@pytest.mark.parametrize(("frames", "first", "channels"), [(1, True, 8), (1, False, 24), (3, True, 24), (2, False, 8)])
def test_convolution(frames: int, first: bool, channels: int) -> None:
    x, past = random(frames, H, W, channels), None if first else random(2, H, W, channels, seed=1)
    weight, bias, residual = random(40, 27 * channels, seed=2) / channels**0.5, random(40, seed=3), random(frames, H, W, 40, seed=4)
    want = naive.causal_conv(x, past, weight, bias)
    out = empty(frames, H, W, 40)
    convolve(x, past, weight, bias, out, "plain")
    torch.testing.assert_close(out, want, rtol=2e-5, atol=2e-5 * float(want.abs().max()))
    convolve(x, past, weight, bias, out, "residual", residual=residual)
    torch.testing.assert_close(out, want + residual, rtol=2e-5, atol=2e-5 * float(want.abs().max()))


@pytest.mark.parametrize("first", [False, True])
def test_upsampling(first: bool) -> None:
    C, T = 8, 2
    x, past = random(T, H, W, C), None if first else random(2, H, W, C, seed=1)
    weight, bias = random(4 * C, 27 * C, seed=2) / C**0.5, random(4 * C, seed=3)
    want = naive.upsampled(naive.causal_conv(x, past, weight, bias), x, first)
    out = empty(2 * T - first, 2 * H, 2 * W, C // 2)
    convolve(x, past, weight, bias, out, "upsample")
    torch.testing.assert_close(out, want, rtol=2e-5, atol=2e-5 * float(want.abs().max()))


def test_pixels() -> None:
    C, T, patch = 8, 2, 4
    x, past = random(T, H, W, C), random(2, H, W, C, seed=1)
    weight, bias = random(3 * patch**2, 27 * C, seed=2) / (20 * C**0.5), random(3 * patch**2, seed=3) / 10
    want = naive.pixels(naive.causal_conv(x, past, weight, bias), patch)
    assert len(want.unique()) > 100  # neither all dark nor all bright
    out = empty(T, H * patch, W * patch, 3, dtype=torch.uint8)
    convolve(x, past, weight, bias, out, "pixels", patch)
    # A value within rounding of the middle between two levels may go to the other one.
    assert (out.int() - want.int()).abs().max() <= 1
    assert (out != want).float().mean() < 1e-2


@pytest.mark.parametrize(("channels", "kept"), [(24, True), (32, False), (12, True)])
def test_norm_silu(channels: int, kept: bool) -> None:
    x = random(37, channels)
    x[5] = 0
    out, state = empty(37, channels), empty(11, channels)
    arguments: dict[str, Any] = {"x": x, "out": out, "M": 37, "KEPT": 26} | ({"state": state} if kept else {})
    launch(plans.norm_silu("fp32", channels, kept), arguments)
    want = naive.norm_silu(x)
    torch.testing.assert_close(out, want, **TOLERANCE)
    if kept:
        torch.testing.assert_close(state, want[26:], **TOLERANCE)


def test_latent_rows() -> None:
    z, mean, std = random(24, 35), random(24, seed=1), random(24, seed=2)
    out = empty(35, 24)
    launch(plans.latent_rows("fp32"), {"z": z, "mean": mean, "std": std, "out": out, "S": 35, "C": 24})
    torch.testing.assert_close(out, naive.latent_rows(z, mean, std), **TOLERANCE)
