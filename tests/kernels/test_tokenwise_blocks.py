"""The kernels around attention and FFN against their plain definitions, in the interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from sanawm_kernels.quant.formats import Fp8Tensor, Nvfp4Tensor, quantize_fp8, unpack_e2m1
from sanawm_kernels.quant.interpreter import exact, poisoned
from sanawm_kernels.quant.request import Quantize
from sanawm_kernels.tokenwise import naive
from sanawm_kernels.tokenwise import triton as fused

# Argument lists are built as lists here, which a checker cannot match with parameters.
plain: Any = naive
EPS32 = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    with poisoned():
        yield


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) + seed)).to(dtype)


def merged(parts: int, B: int, N: int, C: int, **kwargs: object) -> tuple[torch.Tensor, ...]:
    """Column blocks of one wide projection, with outlier channels."""
    x = rand(B, N, parts * C + 32, **kwargs)  # type: ignore[arg-type]
    x[..., ::29] *= 50
    return tuple(x[..., i * C : (i + 1) * C] for i in range(parts))


def close(actual: torch.Tensor, wanted: torch.Tensor, roundings: float) -> None:
    """Within a number of float32 roundings of the largest element."""
    assert actual.shape == wanted.shape
    assert float((actual.double() - wanted).abs().max()) <= roundings * EPS32 * float(wanted.abs().max())


# The latent height is odd, the width no multiple of the tile, and the channels overhang their block.
@pytest.mark.parametrize(("grid", "G"), [((5, 11), 48), ((1, 3), 80), ((6, 8), 16)])
def test_depthwise_glu(grid: tuple[int, int], G: int) -> None:
    B, T = 1, 2
    N = T * grid[0] * grid[1]
    (x,) = merged(1, B, N, 2 * G)
    taps, bias = rand(9, 2 * G), rand(2 * G)
    wanted = naive.depthwise_glu(x.double(), taps.double(), bias.double(), grid).plain
    out = fused.depthwise_glu(x, taps, bias, grid).plain
    assert out is not None and wanted is not None
    # Ten terms a half; the product of the halves is relative to each half's own largest term.
    close(out, wanted, 30)


@pytest.mark.parametrize("layout", ["rows", "swizzled"])
def test_depthwise_glu_to_nvfp4(layout: str) -> None:
    x, taps, bias = (rand(*shape, dtype=torch.bfloat16) for shape in ((1, 2 * 15, 96), (9, 96), (96,)))
    request = Quantize("nvfp4", torch.tensor(0.01), layout=layout, keep=True)  # type: ignore[arg-type]
    with exact():
        out = fused.depthwise_glu(x, taps, bias, (3, 5), quantize=request)
    assert out.plain is not None and isinstance(out.quantized, Nvfp4Tensor)
    wanted = naive.quantize_activations(out.plain, request).quantized
    assert isinstance(wanted, Nvfp4Tensor)
    assert torch.equal(out.quantized.scales.view(torch.uint8), wanted.scales.view(torch.uint8))
    # Codes may differ where the reciprocal product meets a tie.
    assert int((unpack_e2m1(out.quantized.packed) != unpack_e2m1(wanted.packed)).sum()) <= 2


def test_depthwise_glu_to_fp8() -> None:
    x, taps, bias = (rand(*shape, dtype=torch.bfloat16) for shape in ((1, 15, 64), (9, 64), (64,)))
    request = Quantize("fp8", torch.tensor(0.05))
    with exact():
        out = fused.depthwise_glu(x, taps, bias, (3, 5), quantize=request)
        plain = fused.depthwise_glu(x, taps, bias, (3, 5)).plain
    assert out.plain is None and isinstance(out.quantized, Fp8Tensor) and plain is not None
    wanted = quantize_fp8(plain, request.scale).values.view(torch.uint8).int()
    assert int((out.quantized.values.view(torch.uint8).int() - wanted).abs().max()) <= 1


def double(*tensors: torch.Tensor) -> list[Any]:
    return [x.double() for x in tensors]


def tables(N: int, pairs: int) -> tuple[torch.Tensor, torch.Tensor]:
    angle = rand(N, pairs) * 3
    return angle.cos(), angle.sin()


# The official head width 112 = 128 - 16, and a power of two.
@pytest.mark.parametrize(("H", "D"), [(2, 112), (3, 32)])
def test_rope_heads(H: int, D: int) -> None:
    B, N = 2, 11
    q, k = merged(2, B, N, H * D)
    q_norm, k_norm = rand(H * D), rand(H * D, seed=1)
    cos, sin = tables(N, D // 2)
    actual = fused.rope_heads(q, k, q_norm, k_norm, cos, sin, H, 1e-5)
    wanted = plain.rope_heads(*double(q, k, q_norm, k_norm, cos, sin), H, 1e-5)
    for a, b in zip(actual, wanted):
        close(a, b, 10)


def matrices(batch: int, N: int) -> torch.Tensor:
    """Ray-like matrices with translations of several units."""
    rotation = torch.linalg.qr(rand(batch, N, 3, 3))[0]
    matrix = torch.zeros(batch, N, 4, 4)
    matrix[..., :3, :3], matrix[..., :3, 3], matrix[..., 3, 3] = rotation, 5 * rand(batch, N, 3), 1
    return matrix


@pytest.mark.parametrize(("H", "D"), [(2, 112), (3, 32)])
@pytest.mark.parametrize("clamp", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_ucpe_heads(H: int, D: int, clamp: bool, shared: bool) -> None:
    B, N = 2, 9
    q, k, v = merged(3, B, N, H * D)
    q_norm, k_norm = rand(H * D), rand(H * D, seed=1)
    rays = matrices(1 if shared else B, N)
    inverse = torch.linalg.inv(rays).contiguous()
    cos, sin = tables(N, D // 4)
    args = (q, k, v, q_norm, k_norm, rays, inverse, cos, sin)
    actual = fused.ucpe_heads(*args, H, 1e-5, clamp=clamp)
    wanted = plain.ucpe_heads(*double(*args), H, 1e-5, clamp=clamp)
    for a, b in zip(actual, wanted):
        close(a, b, 12)
    back = fused.inverse_ucpe(actual[2], rays, cos, sin)
    close(back, naive.inverse_ucpe(actual[2].double(), rays.double(), cos.double(), sin.double()), 8)
    if not clamp:
        # Values turned into ray space and back are themselves; matrices of norm 6 amplify the rounding twice.
        close(back, v.double(), 400)


def test_fp8_heads_round_the_plain_heads() -> None:
    B, N, H, D = 1, 5, 2, 48
    q, k, v = (x.to(torch.bfloat16) for x in merged(3, B, N, H * D))
    norm = rand(H * D).to(torch.bfloat16)
    scale = torch.tensor(0.05)
    cos, sin = tables(N, D // 2)
    with exact():
        codes = fused.rope_heads_fp8(q, k, norm, norm, cos, sin, H, 1e-5, scale, scale)
        transposed = fused.fp8_values_transposed(v.unflatten(-1, (H, D)), scale)
    wanted = naive.rope_heads(q.float(), k.float(), norm.float(), norm.float(), cos, sin, H, 1e-5)
    for a, b in zip(codes, wanted):
        # One step at a tie of the reciprocal product.
        assert int((a.view(torch.uint8).int() - quantize_fp8(b, scale).values.view(torch.uint8).int()).abs().max()) <= 1
    expected = naive.fp8_values_transposed(v.unflatten(-1, (H, D)), scale)
    assert transposed.stride(-2) % 16 == 0 and transposed.stride(-1) == 1
    assert int((transposed.view(torch.uint8).int() - expected.view(torch.uint8).int()).abs().max()) <= 1
    padding = transposed.as_strided((B, H, D, 16), transposed.stride())[..., N:]
    assert bool((padding.view(torch.uint8) == 0).all())


def test_wrong_inputs_are_refused() -> None:
    x = rand(1, 15, 64)
    with pytest.raises(ValueError, match="whole frames"):
        fused.depthwise_glu(x, rand(9, 64), rand(64), (4, 5))
    with pytest.raises(ValueError, match="taps"):
        fused.depthwise_glu(x, rand(64, 9).t(), rand(64), (3, 5))
    with pytest.raises(ValueError, match="fp8_rows"):
        fused.depthwise_glu(x, rand(9, 64), rand(64), (3, 5), quantize=Quantize("fp8_rows"))
    cos, sin = tables(15, 16)
    with pytest.raises(ValueError, match="float32 cos table"):
        fused.rope_heads(x, x, rand(64), rand(64), cos.double(), sin, 2, 1e-5)
    with pytest.raises(ValueError, match="multiple of 8"):
        fused.rope_heads(x, x, rand(64), rand(64), cos, sin, 16, 1e-5)
    with pytest.raises(ValueError, match="ray matrices"):
        fused.inverse_ucpe(x.unflatten(-1, (2, 32)), matrices(1, 14), *tables(15, 8))
