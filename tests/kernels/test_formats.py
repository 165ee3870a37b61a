"""Number formats against brute force over every code."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sanawm_kernels.quant import formats
from sanawm_kernels.quant.formats import quantize_fp8, quantize_nvfp4

E2M1 = torch.tensor(formats.E2M1_MAGNITUDES, dtype=torch.float64)
E4M3 = torch.arange(0, 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).double()  # every finite magnitude, by code

finite = st.one_of(st.floats(width=32, allow_nan=False, allow_infinity=False), st.floats(-8, 8, width=32), st.floats(-512, 512, width=32))
blocks = st.lists(st.lists(finite, min_size=16, max_size=16), min_size=1, max_size=6)


def nearest_even(x: torch.Tensor, magnitudes: torch.Tensor) -> torch.Tensor:
    """Index of the nearest magnitude, ties to the even index, by exhaustive search in float64."""
    # Beyond twice the largest magnitude float64 cannot tell the distances apart.
    distance = (x.double().abs().clamp_max(2 * float(magnitudes[-1])).unsqueeze(-1) - magnitudes).abs()
    best = distance.min(-1, keepdim=True).values
    tied = distance == best
    index = torch.arange(len(magnitudes)).expand(tied.shape)
    even = (tied & (index % 2 == 0)).any(-1)
    first = tied.int().argmax(-1)
    return torch.where(even, (tied & (index % 2 == 0)).int().argmax(-1), first)


@given(st.lists(st.one_of(finite, st.sampled_from(formats.E2M1_MIDPOINTS)), min_size=1, max_size=64))
def test_e2m1_rounds_to_nearest_even(values: list[float]) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    codes = formats.round_e2m1(x)
    assert torch.equal(codes & 7, nearest_even(x, E2M1).to(torch.uint8))
    assert torch.equal(codes >= 8, x < 0)
    assert torch.equal(formats.round_e2m1(formats.decode_e2m1(codes).abs()), codes & 7)


@given(st.lists(finite, min_size=1, max_size=64))
def test_e4m3_rounds_to_nearest_even_and_saturates(values: list[float]) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    assert torch.equal(formats.to_e4m3(x).view(torch.uint8) & 0x7F, nearest_even(x, E4M3).to(torch.uint8))


@given(st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_packing_is_reversible_and_low_nibble_first(pairs: int, seed: int) -> None:
    codes = torch.randint(0, 16, (3, 2 * pairs), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = formats.pack_e2m1(codes)
    assert torch.equal(formats.unpack_e2m1(packed), codes)
    assert torch.equal(packed % 16, codes[:, ::2])


@settings(max_examples=100)
@given(blocks)
def test_nvfp4_error_bound(rows: list[list[float]]) -> None:
    x = torch.tensor(rows, dtype=torch.float32)
    q = quantize_nvfp4(x)
    step = q.block_scales().double() * q.global_scale.double()
    error = (q.dequantize(torch.float64) - x.double()).abs()
    # Half a spacing of e2m1 in units of the block's step: a quarter up to 2, at most a quarter of the value above. The e4m3 rounding of a normal
    # block scale is at most 2^-4 too small, so the largest element can saturate by less than the spacing's half (6.4 -> 6). Subnormal block scales,
    # far under the tensor's largest block, are off by at most half of 2^-9: a value is then at most 1.5 times the largest code (9 -> 6).
    bound = torch.maximum(step.expand_as(x) * 0.25, x.double().abs() / 4)
    saturated = x.double().abs() - 6 * step
    assert bool((error <= torch.maximum(bound, saturated) * (1 + 1e-6)).all())
    subnormal = q.block_scales().double() < 2.0**-6
    limit = torch.where(subnormal, 9.0, 6.4) * step
    # tiny: global scales are clamped to normal float32 numbers, under which block maxima are lost altogether.
    if float(x.abs().amax()) > 1e-30:
        assert bool((x.double().abs() <= limit * (1 + 1e-6)).all())


@given(blocks)
def test_nvfp4_requantising_is_idempotent(rows: list[list[float]]) -> None:
    q = quantize_nvfp4(torch.tensor(rows, dtype=torch.float32) * 1e-6)
    again = quantize_nvfp4(q.dequantize(torch.float64), q.global_scale, q.scales)
    assert torch.equal(decoded(again), decoded(q))


def decoded(q: formats.Nvfp4Tensor) -> torch.Tensor:
    return formats.decode_e2m1(formats.unpack_e2m1(q.packed))


def test_nvfp4_known_block() -> None:
    """Worked by hand: amax 12 gives global 12/2688, block scale e4m3(2 / global) = 448, so steps of 2."""
    x = torch.tensor([[12, -12, 8, 6, 4, 3, 2, 1, 0.5, 0.49, -0.51, 0, 5, 7, 10, -3]], dtype=torch.float32)
    q = quantize_nvfp4(x)
    assert q.global_scale.item() == torch.tensor(12 / 2688, dtype=torch.float32).item()
    assert q.scales.float().tolist() == [[448.0]]
    expected = [6, -6, 4, 3, 2, 1.5, 1, 0.5, 0.0, 0.0, -0.5, 0.0, 2.0, 4.0, 4.0, -1.5]
    assert decoded(q).tolist() == [expected]


@given(st.integers(1, 300), st.integers(1, 13), st.integers(0, 2**32 - 1))
@settings(max_examples=40)
def test_scale_swizzle_is_reversible(rows: int, blocks_: int, seed: int) -> None:
    scales = torch.randint(0, 0x7F, (rows, blocks_), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8).view(
        torch.float8_e4m3fn
    )
    swizzled = formats.swizzle_scales(scales)
    assert torch.equal(formats.unswizzle_scales(swizzled, rows, blocks_).view(torch.uint8), scales.view(torch.uint8))
    row, block = rows - 1, blocks_ - 1
    flat = swizzled.view(torch.uint8).flatten()
    tile = (row // 128 * swizzled.shape[1] + block // 4) * 512
    assert flat[tile + row % 32 * 16 + row % 128 // 32 * 4 + block % 4] == scales.view(torch.uint8)[row, block]
    assert int((flat != 0).sum()) == int((scales.view(torch.uint8) != 0).sum())


@given(blocks, st.booleans())
def test_fp8_error_bound(rows: list[list[float]], per_row: bool) -> None:
    x = torch.tensor(rows, dtype=torch.float32)
    q = quantize_fp8(x, per_row=per_row)
    scale = q.scale.double().unsqueeze(-1) if per_row else q.scale.double()
    error = (q.dequantize(torch.float64) - x.double()).abs()
    # Half a unit in the last of three mantissa bits, or half the subnormal spacing; the division's own rounding adds 2^-23.
    assert bool((error <= torch.maximum(x.double().abs() * 2.0**-4, scale * 2.0**-10) * (1 + 1e-6)).all())


def test_static_scales_saturate() -> None:
    x = torch.tensor([[1000.0, -1000.0, 1.0] + [0.0] * 13])
    fp8 = quantize_fp8(x, torch.tensor(1.0))
    assert fp8.dequantize()[0, :3].tolist() == [448.0, -448.0, 1.0]
    fp4 = quantize_nvfp4(x, torch.tensor(0.01))
    # Block scale saturates at 448, a step of 4.48.
    assert fp4.dequantize()[0, :2].tolist() == pytest.approx([26.88, -26.88])


@pytest.mark.parametrize("bad", [float("inf"), float("nan"), -float("inf")])
def test_non_finite_is_refused(bad: float) -> None:
    x = torch.ones(2, 16)
    x[1, 3] = bad
    for quantize in (quantize_fp8, quantize_nvfp4):
        with pytest.raises(ValueError, match="infinity or NaN"):
            quantize(x)


def test_bad_shapes_and_scales_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 16"):
        quantize_nvfp4(torch.ones(2, 24))
    with pytest.raises(ValueError, match="positive finite scales"):
        quantize_nvfp4(torch.ones(2, 16), torch.tensor(0.0))
    with pytest.raises(ValueError, match="positive finite scales"):
        quantize_fp8(torch.ones(2, 16), torch.tensor([1.0, float("nan")]))
    with pytest.raises(ValueError, match="scale of shape"):
        quantize_fp8(torch.ones(2, 16), torch.ones(3))
    with pytest.raises(ValueError, match="two-dimensional"):
        formats.swizzle_scales(torch.ones(2, 2, 2))
    with pytest.raises(ValueError, match="elements to quantize"):
        quantize_fp8(torch.ones(0, 16))
