"""The rounding blocks of the kernels against the formats' definitions, in the interpreter with exact casts."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from sanawm_kernels.quant import formats
from sanawm_kernels.quant import triton as rounding
from sanawm_kernels.quant.interpreter import exact


@triton.jit
def _codes(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, rounding.e2m1_codes(tl.load(x + i)))


@triton.jit
def _saturate(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, rounding.saturate_e4m3(tl.load(x + i)))


@triton.jit
def _blocks(x, global_scale, packed, scales, M: tl.constexpr, J: tl.constexpr, SWIZZLED: tl.constexpr):
    row, block = tl.arange(0, M)[:, None], tl.arange(0, J)[None, :]
    values = tl.load(x + row * (16 * J) + tl.arange(0, 16 * J)[None, :])
    bytes_, steps = rounding.nvfp4_blocks(values, tl.load(global_scale), M, J, False)
    tl.store(packed + row * (8 * J) + tl.arange(0, 8 * J)[None, :], bytes_)
    tl.store(scales + rounding.scale_offset(row, block, J, SWIZZLED), steps)


def samples(count: int, seed: int) -> torch.Tensor:
    """Numbers over many magnitudes, the ties of e2m1 and e4m3 among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, generator=generator) * torch.exp2(torch.randint(-12, 10, (count,), generator=generator).float())
    ties = torch.tensor(formats.E2M1_MIDPOINTS + formats.E2M1_MAGNITUDES + (0.0, 464.0, 480.0, 2.0**-10, 17.0, 19.0, 1e30))
    x[: len(ties)], x[len(ties) : 2 * len(ties)] = ties, -ties
    return x


def test_e2m1_codes_are_exact() -> None:
    x = samples(2048, 1)
    out = torch.full((2048,), 255, dtype=torch.uint8)
    _codes[(1,)](x, out, N=2048)
    assert torch.equal(out, formats.round_e2m1(x))


def test_e4m3_is_exact_saturates_and_keeps_nan() -> None:
    x = samples(2048, 2)
    x[-3:] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    out = torch.full((2048,), 0xFF, dtype=torch.uint8).view(torch.float8_e4m3fn)
    with exact():
        _saturate[(1,)](x, out, N=2048)
    assert torch.equal(out.view(torch.uint8), formats.to_e4m3(x).view(torch.uint8))


@pytest.mark.parametrize("layout", ["rows", "swizzled"])
def test_nvfp4_blocks(layout: formats.Layout) -> None:
    x = samples(128 * 64, 3).reshape(128, 64)
    scale = formats.nvfp4_global_scale(x)
    expected = formats.quantize_nvfp4(x, scale, layout=layout)
    packed = torch.full((128, 32), 0xFF, dtype=torch.uint8)
    scales = torch.full(expected.scales.shape, 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
    with exact():
        _blocks[(1,)](x, scale, packed, scales, M=128, J=4, SWIZZLED=layout == "swizzled")
    assert torch.equal(scales.view(torch.uint8), expected.scales.view(torch.uint8))
    different = formats.unpack_e2m1(packed) != formats.unpack_e2m1(expected.packed)
    # A reciprocal product is within 2 units in the last place of the quotient: codes may differ at ties only.
    step = expected.block_scales().float().repeat_interleave(16, -1) * scale
    ratio = (x / step).abs()[different]
    ties = torch.tensor(formats.E2M1_MIDPOINTS)
    assert bool(((ratio.unsqueeze(-1) - ties).abs().amin(-1) <= 2 * torch.finfo(torch.float32).eps * ratio).all())
