"""Row kernels against their plain definitions, in the interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from sanawm_kernels.quant.formats import E2M1_MIDPOINTS, Fp8Tensor, Nvfp4Tensor, unpack_e2m1
from sanawm_kernels.quant.interpreter import exact, poisoned
from sanawm_kernels.quant.request import Output, Quantize
from sanawm_kernels.tokenwise import naive
from sanawm_kernels.tokenwise import triton as fused

B, T, S = 2, 2, 3
N = T * S
# One tile, two tiles, and the shape of 2240 in small: a power of two plus a rest that its tile does not fill.
WIDTHS = [64, 80, 144]
EPS32 = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    with poisoned():
        yield


def rand(*shape: int, outliers: bool = True, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))
    if outliers:
        x[..., ::17] *= 100
    return x.to(dtype)


def strided(*shape: int) -> torch.Tensor:
    """A slice of a wider tensor, like a projection inside the merged product."""
    return rand(*shape[:-1], 3 * shape[-1])[..., shape[-1] : 2 * shape[-1]]


def close(actual: torch.Tensor, wanted: torch.Tensor, terms: int) -> None:
    """Within the rounding of a float32 sum over `terms` elements, relative to the largest element of the row."""
    error = (actual.double() - wanted).abs().amax(-1)
    assert bool((error <= EPS32 * (8 + terms**0.5) * wanted.abs().amax(-1).clamp_min(1e-3)).all()), float(error.max())


@pytest.mark.parametrize("C", WIDTHS)
def test_modulate(C: int) -> None:
    x, shift, scale = strided(B, N, C) + 50, strided(B, T, C), strided(B, T, C)
    wanted = naive.modulate(x.double(), shift.double(), scale.double()).plain
    out = fused.modulate(x, shift, scale).plain
    assert out is not None and wanted is not None
    # x has a common offset of 50 standard deviations: the mean's rounding, 50 eps, is what LayerNorm's input loses.
    assert bool(((out.double() - wanted).abs() <= 60 * EPS32 * (1 + wanted.abs().amax(-1, keepdim=True))).all())


@pytest.mark.parametrize("C", [80])
@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("extra", [True, False])
def test_residual_modulate(C: int, gate: bool, extra: bool) -> None:
    x, branch = rand(B, N, C), strided(B, N, C)
    g = strided(B, T, C) if gate else None
    e = strided(B, N, C) if extra else None
    shift, scale = rand(B, T, C), rand(B, T, C)
    wide = [None if t is None else t.double() for t in (x, branch, g, e, shift, scale)]
    wanted_stream, wanted = naive.residual_modulate(*wide)  # type: ignore[arg-type]
    stream, out = fused.residual_modulate(x, branch, g, e, shift, scale)
    assert out.plain is not None and wanted.plain is not None
    close(stream, wanted_stream, 3)
    close(out.plain, wanted.plain, C)
    alone = fused.residual(x, branch, g, e).plain
    assert alone is not None and torch.equal(alone, stream)


def test_plucker_residual_without_branch() -> None:
    x, extra = rand(B, N, 80), strided(B, N, 80)
    out = fused.residual(x, extra_BNC=extra).plain
    assert out is not None and torch.equal(out, x + extra)


@pytest.mark.parametrize("C", WIDTHS)
@pytest.mark.parametrize("camera", [True, False])
def test_output_gate(C: int, camera: bool) -> None:
    main, gate = strided(B, N, C), strided(B, N, C) / 10
    cam = rand(B, N, C) if camera else None
    wanted = naive.output_gate(main.double(), gate.double(), None if cam is None else cam.double()).plain
    out = fused.output_gate(main, gate, cam).plain
    assert out is not None and wanted is not None
    close(out, wanted, 4)


@pytest.mark.parametrize("C", WIDTHS)
def test_rms_norm(C: int) -> None:
    x, weight = strided(B, N, C), rand(C)
    close(fused.rms_norm(x, weight, 1e-6), naive.rms_norm(x.double(), weight.double(), 1e-6), C)


def compare_codes(actual: Output, plain: torch.Tensor, request: Quantize) -> None:
    """Quantized rows against the exact format of the same plain rows; an element may differ only next to a tie."""
    wanted, got = naive.quantize_activations(plain, request).quantized, actual.quantized
    if isinstance(wanted, Nvfp4Tensor):
        assert isinstance(got, Nvfp4Tensor)
        assert torch.equal(got.scales.view(torch.uint8), wanted.scales.view(torch.uint8))
        steps = wanted.block_scales().float().repeat_interleave(16, -1) if wanted.layout == "rows" else None
        different = unpack_e2m1(got.packed) != unpack_e2m1(wanted.packed)
        if steps is None:
            assert int(different.sum()) <= 2
        else:
            ratio = (plain.float() / (steps * wanted.global_scale)).abs()[different]
            # The kernels multiply by a reciprocal: 2 units in the last place.
            assert bool(((ratio.unsqueeze(-1) - torch.tensor(E2M1_MIDPOINTS)).abs().amin(-1) <= 2 * EPS32 * ratio).all())
        return
    assert isinstance(got, Fp8Tensor) and isinstance(wanted, Fp8Tensor)
    assert torch.equal(got.scale, wanted.scale)
    different = got.values.view(torch.uint8) != wanted.values.view(torch.uint8)
    scale = wanted.scale.unsqueeze(-1) if wanted.scale.dim() else wanted.scale
    ratio = (plain.float() / scale)[different]
    # As above: the quotient must lie within 2 units in the last place of the middle of the two codes.
    middle = (got.values.float()[different] + wanted.values.float()[different]) / 2
    assert bool(((ratio - middle).abs() <= 2 * EPS32 * ratio.abs()).all())


REQUESTS = [
    Quantize("fp8", torch.tensor(0.02), keep=True),
    Quantize("fp8_rows", keep=True),
    Quantize("nvfp4", torch.tensor(0.004), keep=True),
    Quantize("nvfp4", torch.tensor(0.004), layout="swizzled", keep=True),
]


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda q: q.kind + q.layout)
@pytest.mark.parametrize("C", [64, 80, 192])
def test_quantized_rows_are_those_of_the_plain_output(request_: Quantize, C: int) -> None:
    """bfloat16 end to end with exact casts: the quantized rows must be the format applied to the plain rows."""
    x, shift, scale = rand(B, N, C, dtype=torch.bfloat16), rand(B, T, C, dtype=torch.bfloat16), rand(B, T, C, dtype=torch.bfloat16)
    with exact():
        out = fused.modulate(x, shift, scale, quantize=request_)
        gated = fused.output_gate(x, x, x, quantize=request_)
        stream, after = fused.residual_modulate(x, x, shift, None, shift, scale, quantize=request_)
        raw = fused.residual(x, x, shift, quantize=request_)
    for result in (out, gated, after, raw):
        assert result.plain is not None
        compare_codes(result, result.plain, request_)
    assert raw.plain is not None and torch.equal(stream, raw.plain)


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda q: q.kind + q.layout)
def test_quantize_alone(request_: Quantize) -> None:
    x = rand(7, 48)
    x[3] = 0
    with exact():
        compare_codes(fused.quantize_activations(x, request_), x, request_)


def test_without_keep_there_is_no_plain_output() -> None:
    x, shift = rand(B, N, 64), rand(B, T, 64)
    with exact():
        assert fused.modulate(x, shift, shift, quantize=Quantize("fp8_rows")).plain is None


def test_wrong_inputs_are_refused() -> None:
    x, shift = rand(B, N, 64), rand(B, T, 64)
    with pytest.raises(ValueError, match="whole frames"):
        fused.modulate(x, rand(B, 4, 64), shift)
    with pytest.raises(ValueError, match="one a frame"):
        fused.modulate(x, shift, rand(B, T, 32))
    with pytest.raises(ValueError, match="one dtype"):
        fused.residual(x, x.bfloat16())
    with pytest.raises(ValueError, match="adjacent elements"):
        fused.rms_norm(x.transpose(1, 2), rand(N), 1e-6)
    with pytest.raises(ValueError, match="evenly spaced"):
        fused.rms_norm(rand(4, 2 * N, 64)[:, :N], rand(64), 1e-6)
    with pytest.raises(ValueError, match="expected shape"):
        fused.output_gate(x, x[:, :3])
    with pytest.raises(ValueError, match="branch or an extra"):
        fused.residual(x)
    with pytest.raises(ValueError, match="multiple of 16"):
        fused.modulate(rand(B, N, 72), rand(B, T, 72), rand(B, T, 72), quantize=Quantize("nvfp4", torch.tensor(1.0)))
    with pytest.raises(ValueError, match="takes a calibrated scale"):
        Quantize("nvfp4")
