"""Attention kernels against their plain definitions, in the interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from sanawm_kernels.attention import naive
from sanawm_kernels.attention import triton as fused
from sanawm_kernels.attention.naive import Fp8Scales, InverseUCPE, Segment
from sanawm_kernels.quant.formats import Fp8Tensor, Nvfp4Tensor, quantize_fp8
from sanawm_kernels.quant.interpreter import exact, poisoned
from sanawm_kernels.quant.request import Quantize
from sanawm_kernels.tokenwise import naive as tokenwise

EPS32 = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    with poisoned():
        yield


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) + seed))


def projection(B: int, n: int, H: int, D: int, seed: int) -> torch.Tensor:
    """(B, n, H, D) inside a wider projection, as the current chunk's values are."""
    return rand(B, n, 2 * H * D + 16, seed=seed)[..., H * D : 2 * H * D].unflatten(-1, (H, D))


def close(actual: torch.Tensor, wanted: torch.Tensor, roundings: float) -> None:
    assert actual.shape == wanted.shape
    assert float((actual.double() - wanted).abs().max()) <= roundings * EPS32 * float(wanted.abs().max())


def window(B: int, lengths: tuple[int, ...], H: int, D: int) -> list[Segment]:
    """Contiguous caches first, the current chunk (strided values) last."""
    caches = [Segment(rand(B, n, H, D, seed=2 * i), rand(B, n, H, D, seed=2 * i + 1)) for i, n in enumerate(lengths[:-1])]
    return [*caches, Segment(rand(B, lengths[-1], H, D, seed=90), projection(B, lengths[-1], H, D, 91))]


# One to three segments; lengths under, at and over the tile of 32 keys; the official head width and a power of two.
@pytest.mark.parametrize(("lengths", "D"), [((37,), 112), ((64, 33), 32), ((40, 31, 34), 112), ((1, 32, 7), 16)])
def test_window_attention(lengths: tuple[int, ...], D: int) -> None:
    B, H = 2, 2
    N = lengths[-1]
    q, segments = 3 * rand(B, N, H, D, seed=5), window(B, lengths, H, D)
    segments[0].keys[:, 0] *= 10  # one dominant key
    wide = [Segment(s.keys.double(), s.values.double()) for s in segments]
    wanted = naive.window_attention(q.double(), wide, D**-0.5).plain
    out = fused.window_attention(q, segments, D**-0.5).plain
    assert out is not None and wanted is not None
    # Logits up to about 100 carry 100 roundings into the exponent; probabilities inherit them.
    close(out, wanted, 300)


@pytest.mark.parametrize("shared", [True, False])
def test_window_attention_leaves_ray_space(shared: bool) -> None:
    B, N, H, D = 2, 35, 2, 112
    q, segments = rand(B, N, H, D), window(B, (N,), H, D)
    rays, angle = rand(1 if shared else B, N, 4, 4), rand(N, D // 4)
    ucpe = InverseUCPE(rays, angle.cos(), angle.sin())
    out = fused.window_attention(q, segments, 0.1, ucpe=ucpe).plain
    wide = InverseUCPE(rays.double(), angle.cos().double(), angle.sin().double())
    wanted = naive.window_attention(q.double(), [Segment(s.keys.double(), s.values.double()) for s in segments], 0.1, ucpe=wide).plain
    assert out is not None and wanted is not None
    close(out, wanted, 60)


def test_extreme_logits_do_not_overflow() -> None:
    q, keys = torch.full((1, 3, 1, 16), 1e4), torch.full((1, 5, 1, 16), 1e4)
    keys[:, 3] *= -1
    values = rand(1, 5, 1, 16)
    out = fused.window_attention(q, [Segment(keys, values)], 1.0).plain
    assert out is not None
    torch.testing.assert_close(out[0, 0].double(), values[0, [0, 1, 2, 4], 0].double().mean(0), rtol=1e-5, atol=1e-6)


def test_window_attention_fp8() -> None:
    """e4m3 operands against exact arithmetic on the same e4m3 values."""
    B, N, H, D = 1, 40, 2, 48
    lengths = (48, N)
    scale = torch.tensor(0.02)
    q8 = quantize_fp8(rand(B, N, H, D), scale).values
    segments = [
        Segment(quantize_fp8(s.keys, scale).values, tokenwise.fp8_values_transposed(s.values, scale)) for s in window(B, lengths, H, D)
    ]
    padded = [Segment(s.keys, pad_rows(s.values)) for s in segments]
    scales = Fp8Scales(scale, scale, scale)
    with exact():
        out = fused.window_attention(q8, padded, D**-0.5, fp8=scales, dtype=torch.bfloat16).plain
    wanted = naive.window_attention(q8, segments, D**-0.5, fp8=scales, dtype=torch.float64).plain
    assert out is not None and wanted is not None
    error = (out.double() - wanted).norm() / wanted.norm()
    # Probabilities are rounded to three mantissa bits (relative error uniform in +-2^-4, rms 2^-4/sqrt(3) = 3.6 %) and averaged over about
    # 88 keys of comparable weight with random signs, in numerator alone: the relative error of the sum keeps that size at most.
    assert 1e-3 < float(error) < 0.036


def pad_rows(v_BHDn: torch.Tensor) -> torch.Tensor:
    """The same values in rows a multiple of 16 apart."""
    B, H, D, n = v_BHDn.shape
    storage = torch.zeros(B, H, D, -(-n // 16) * 16, dtype=torch.uint8).view(torch.float8_e4m3fn)
    storage.view(torch.uint8)[..., :n] = v_BHDn.view(torch.uint8)
    return storage[..., :n]


@pytest.mark.parametrize("squares", [True, False])
@pytest.mark.parametrize(("H", "D", "L"), [(2, 112, 45), (6, 32, 32)])
def test_cross_attention(squares: bool, H: int, D: int, L: int) -> None:
    B, N = 2, 37
    q = rand(B, N, 3 * H * D)[..., H * D : 2 * H * D]
    q[..., ::31] *= 50
    kv = rand(B, L, 2 * H * D)
    k, v = kv[..., : H * D].unflatten(-1, (H, D)), kv[..., H * D :].unflatten(-1, (H, D))
    mask = rand(B, L, seed=3) > 0
    mask[0, :33] = False  # a whole tile without a real token
    weight = rand(H * D)
    parts = q.reshape(B, N, 4, -1).square().sum(-1) if squares else None
    out = fused.cross_attention(q, k, v, mask, weight, 1e-6, squares=parts).plain
    wanted = naive.cross_attention(q.double(), k.double(), v.double(), mask, weight.double(), 1e-6).plain
    assert out is not None and wanted is not None
    # Normalised queries with outliers reach logits of a few tens.
    close(out, wanted, 300)


def test_fully_masked_caption_gives_zeros() -> None:
    q, kv = rand(1, 3, 32), rand(1, 9, 2, 16)
    out = fused.cross_attention(q, kv, kv, torch.zeros(1, 9, dtype=torch.bool), rand(32), 1e-6).plain
    assert out is not None and torch.equal(out, torch.zeros_like(out))


@pytest.mark.parametrize(
    "request_", [Quantize("fp8", torch.tensor(0.01), keep=True), Quantize("nvfp4", torch.tensor(0.001), layout="swizzled", keep=True)]
)
def test_quantized_outputs_are_those_of_the_plain_output(request_: Quantize) -> None:
    B, N, H, D = 1, 19, 2, 48
    q, segments = rand(B, N, H, D).bfloat16(), [Segment(rand(B, 21, H, D).bfloat16(), rand(B, 21, H, D, seed=1).bfloat16())]
    with exact():
        first = fused.window_attention(q, segments, 0.2, quantize=request_)
        second = fused.cross_attention(
            q.flatten(2),
            segments[0].keys,
            segments[0].values,
            torch.ones(B, 21, dtype=torch.bool),
            rand(H * D).bfloat16(),
            1e-6,
            quantize=request_,
        )
    for out in (first, second):
        assert out.plain is not None
        wanted = tokenwise.quantize_activations(out.plain, request_).quantized
        got = out.quantized
        if isinstance(wanted, Nvfp4Tensor):
            assert isinstance(got, Nvfp4Tensor)
            assert torch.equal(got.scales.view(torch.uint8), wanted.scales.view(torch.uint8))
            # A reciprocal product may meet a tie.
            assert int((got.packed != wanted.packed).sum()) <= 2
        else:
            assert isinstance(got, Fp8Tensor) and isinstance(wanted, Fp8Tensor)
            assert int((got.values.view(torch.uint8).int() - wanted.values.view(torch.uint8).int()).abs().max()) <= 1


def test_wrong_inputs_are_refused() -> None:
    q, kv = rand(1, 4, 2, 32), rand(1, 6, 2, 32)
    with pytest.raises(ValueError, match="one to three segments"):
        fused.window_attention(q, [], 1.0)
    with pytest.raises(ValueError, match="expected shape"):
        fused.window_attention(q, [Segment(kv, kv[:, :5])], 1.0)
    with pytest.raises(ValueError, match="adjacent heads"):
        fused.window_attention(q, [Segment(rand(1, 2, 6, 32).transpose(1, 2), kv)], 1.0)
    with pytest.raises(ValueError, match="q's dtype"):
        fused.window_attention(q, [Segment(kv.half(), kv.half())], 1.0)
    with pytest.raises(ValueError, match="up to 128"):
        fused.window_attention(rand(1, 4, 1, 136), [Segment(rand(1, 4, 1, 136), rand(1, 4, 1, 136))], 1.0)
    with pytest.raises(ValueError, match="bool mask"):
        fused.cross_attention(q.flatten(2), kv, kv, torch.ones(1, 6), rand(64), 1e-6)
    with pytest.raises(ValueError, match="nvfp4 with heads"):
        fused.window_attention(
            rand(1, 4, 2, 24), [Segment(rand(1, 4, 2, 24), rand(1, 4, 2, 24))], 1.0, quantize=Quantize("nvfp4", torch.tensor(1.0))
        )
