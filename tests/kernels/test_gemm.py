"""Products in float32 against their plain definitions in float64, in the interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from sanawm_kernels.gemm import interface, naive
from sanawm_kernels.gemm import triton as fused
from sanawm_kernels.gemm.naive import Epilogue, Product
from sanawm_kernels.gemm.plans import Config
from sanawm_kernels.quant.interpreter import poisoned

EPS32 = torch.finfo(torch.float32).eps
B, T, S = 2, 3, 13
TOKENS = T * S


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    with poisoned():
        yield


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) + seed))
    if len(shape) > 2:
        x[..., ::23] *= 30
    return x


def strided(*shape: int, seed: int = 0) -> torch.Tensor:
    return rand(*shape[:-1], 2 * shape[-1] + 16, seed=seed)[..., shape[-1] : 2 * shape[-1]]


def wide(epilogue: Epilogue) -> Epilogue:
    values: dict[str, Any] = {f.name: getattr(epilogue, f.name) for f in fields(epilogue)}
    doubled: dict[str, Any] = {name: v.double() if isinstance(v, torch.Tensor) else v for name, v in values.items()}
    return Epilogue(**doubled)


def close(actual: Product, wanted: Product, roundings: float) -> None:
    """Within a number of float32 roundings of the largest element of a row."""
    assert actual.plain is not None and wanted.plain is not None
    assert actual.plain.shape == wanted.plain.shape
    error = (actual.plain.double() - wanted.plain).abs().amax(-1)
    assert bool((error <= roundings * EPS32 * wanted.plain.abs().amax(-1)).all()), (
        float((error / wanted.plain.abs().amax(-1)).max()) / EPS32
    )
    if wanted.squares is not None:
        assert actual.squares is not None
        torch.testing.assert_close(actual.squares.sum(-1, keepdim=True).double(), wanted.squares, rtol=1e-4, atol=0)


# Depths that the tile divides and does not, one under a tile, and the remainder of 2240 modulo 128; widths with an overhanging tile.
@pytest.mark.parametrize(("K", "N"), [(64, 64), (80, 48), (24, 16), (192, 65)])
def test_linear(K: int, N: int) -> None:
    x, weight = strided(B, TOKENS, K), rand(N, K)
    epilogue = Epilogue(bias=rand(N), squares=True)
    # A sum of K terms, none cancelling more than the outlier columns' spread.
    close(fused.linear(x, weight, epilogue), naive.linear(x.double(), weight.double(), wide(epilogue)), 16 + K**0.5 * 8)


def summand(seed: int) -> torch.Tensor:
    return strided(B, TOKENS, 48, seed=seed)


EPILOGUES = {
    "silu": Epilogue(bias=rand(48), silu=True),
    "glu": Epilogue(bias=rand(96), glu=True),
    "merge": Epilogue(bias=rand(48), add=summand(1), gate=summand(2)),
    "residual": Epilogue(bias=rand(48), frame_gate=strided(B, T, 48), residual=summand(3), extra=summand(4)),
    "all": Epilogue(
        bias=rand(48),
        silu=True,
        add=summand(1),
        gate=summand(2),
        frame_gate=rand(B, T, 48),
        residual=summand(3),
        extra=summand(4),
        squares=True,
    ),
}


@pytest.mark.parametrize("name", EPILOGUES)
@pytest.mark.parametrize("backend", ["triton", "cublaslt"])
def test_epilogues(name: str, backend: str) -> None:
    """cuBLASLt's path is torch's own product here; its epilogue kernel is the one under test."""
    epilogue = EPILOGUES[name]
    x, weight = rand(B, TOKENS, 40), rand(96 if epilogue.glu else 48, 40)
    wanted = naive.linear(x.double(), weight.double(), wide(epilogue))
    close(interface.linear(x, weight, epilogue, backend=backend), wanted, 200)  # type: ignore[arg-type]


@pytest.mark.parametrize("slices", [1, 2, 4])
@pytest.mark.parametrize("persistent", [0, 1, 2])
def test_tilings_agree(slices: int, persistent: int) -> None:
    """Every order of tiles and slices gives the same numbers bit by bit: a sum never depends on it."""
    x, weight, epilogue = rand(1, 70, 40), rand(200, 40), replace(EPILOGUES["silu"], bias=rand(200), squares=True)
    reference = fused.linear(x, weight, epilogue, config=Config(32, 64, 16, group=1, warps=4, stages=1))
    tiled = fused.linear(x, weight, epilogue, config=Config(32, 64, 16, group=2, warps=4, stages=1, slices=slices, persistent=persistent))
    assert reference.plain is not None and tiled.plain is not None and torch.equal(reference.plain, tiled.plain)
    assert tiled.squares is not None and tiled.squares.shape == (1, 70, -(-200 * slices // 64))
    close(tiled, naive.linear(x.double(), weight.double(), wide(epilogue)), 200)
    described = fused.linear(x, weight, epilogue, config=Config(32, 64, 16, group=2, warps=4, stages=1, slices=slices, persistent=1, form="descriptors"))
    assert described.plain is not None and torch.equal(reference.plain, described.plain)
    assert described.squares is not None and torch.equal(tiled.squares, described.squares)


@pytest.mark.parametrize("name", [name for name in EPILOGUES if not EPILOGUES[name].glu])
def test_descriptors(name: str) -> None:
    """Operands by descriptor: depth and columns that no block divides, rows of a wider tensor."""
    epilogue = EPILOGUES[name]
    x, weight = rand(B, TOKENS, 40), rand(48, 40)
    config = Config(32, 32, 16, group=2, warps=4, stages=1, slices=2, persistent=1, form="descriptors")
    close(fused.linear(x, weight, epilogue, config=config), naive.linear(x.double(), weight.double(), wide(epilogue)), 200)


@pytest.mark.parametrize("C", [32, 48, 16])
@pytest.mark.parametrize("later", [True, False])
@pytest.mark.parametrize("frames", [3, 1])
def test_temporal_conv_with_descriptors(C: int, later: bool, frames: int) -> None:
    """Tiles that begin in the first frame, whose first tap is left out, span frames, and end in the last one, whose last tap is left out."""
    N = 40
    s, weight = strided(1, frames * S, C), rand(N, 3 * C)
    before = strided(1, S, N, seed=7) if later else None
    epilogue = Epilogue(add=rand(1, frames * S, N), frame_gate=rand(1, frames, N), residual=strided(1, frames * S, N))
    config = Config(16, 32, 32, group=2, warps=4, stages=1, slices=2, persistent=2, form="descriptors")
    actual = fused.temporal_conv(s, weight, frames, before, epilogue, config=config)
    wanted = naive.temporal_conv(s.double(), weight.double(), frames, None if before is None else before.double(), wide(epilogue))
    close(actual, wanted, 200)


# A tile holds rows of several frames and batches; channels under, at and over the tile's depth.
@pytest.mark.parametrize("C", [32, 48, 16])
@pytest.mark.parametrize("later", [True, False])
@pytest.mark.parametrize("frames", [3, 1])
def test_temporal_conv(C: int, later: bool, frames: int) -> None:
    N = 40
    s, weight = strided(B, frames * S, C), rand(N, 3 * C)
    before = strided(B, S, N, seed=7) if later else None
    epilogue = Epilogue(add=rand(B, frames * S, N), frame_gate=rand(B, frames, N), residual=strided(B, frames * S, N))
    actual = fused.temporal_conv(s, weight, frames, before, epilogue)
    wanted = naive.temporal_conv(s.double(), weight.double(), frames, None if before is None else before.double(), wide(epilogue))
    close(actual, wanted, 200)


def test_carried_products() -> None:
    """They are what a chunk's first frame gets from the frame before it: two chunks give what one does."""
    C, N = 32, 40
    s, weight = rand(B, TOKENS, C), rand(N, 3 * C)
    carried = fused.carried_products(s[:, S : 2 * S].contiguous(), weight, torch.float32)
    rest = fused.temporal_conv(s[:, 2 * S :].contiguous(), weight, T - 2, carried).plain
    whole = naive.temporal_conv(s.double(), weight.double(), T).plain
    assert rest is not None and whole is not None and T > 2
    close(Product(rest, None, None), Product(whole[:, 2 * S :], None, None), 200)


def test_temporal_conv_is_a_convolution() -> None:
    """The definition itself against torch's convolution over (frames, tokens)."""
    C, N = 8, 6
    s, kernel = rand(1, TOKENS, C).double(), rand(N, C, 3, 1).double()
    weight = kernel.squeeze(-1).transpose(1, 2).flatten(1)
    image = s.reshape(1, T, S, C).permute(0, 3, 1, 2)
    wanted = torch.nn.functional.conv2d(image, kernel, padding=(1, 0)).permute(0, 2, 3, 1).reshape(1, TOKENS, N)
    out = naive.temporal_conv(s, weight, T).plain
    assert out is not None
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)


def test_wrong_inputs_are_refused() -> None:
    x, weight = rand(1, 8, 32), rand(16, 32)
    with pytest.raises(ValueError, match="stored shapes"):
        fused.linear(x, rand(16, 48))
    with pytest.raises(ValueError, match="one kind"):
        fused.linear(x, weight.half())
    with pytest.raises(ValueError, match="contiguous vector of 16"):
        fused.linear(x, weight, Epilogue(bias=rand(32)))
    with pytest.raises(ValueError, match="output's dtype"):
        fused.linear(x, weight, Epilogue(residual=rand(1, 8, 16).half()))
    with pytest.raises(ValueError, match="whole frames"):
        fused.linear(x, weight, Epilogue(frame_gate=rand(1, 3, 16)))
    with pytest.raises(ValueError, match="found both"):
        Epilogue(silu=True, glu=True)
    with pytest.raises(ValueError, match="three taps"):
        fused.temporal_conv(x, weight, 2)
    with pytest.raises(ValueError, match="add, frame_gate, residual"):
        fused.temporal_conv(x, rand(16, 96), 2, None, Epilogue(bias=rand(16)))
    with pytest.raises(ValueError, match="three taps|3K"):
        fused.carried_products(x, weight, torch.float32)
    with pytest.raises(ValueError, match="carried: expected shape"):
        fused.temporal_conv(x, rand(16, 96), 2, rand(1, 4, 32))
    with pytest.raises(ValueError, match="carried: expected the output's dtype"):
        fused.temporal_conv(x, rand(16, 96), 2, rand(1, 4, 16).half())
    with pytest.raises(ValueError, match="multiples of 16 bytes"):
        fused.temporal_conv(rand(1, 8, 33)[..., 1:], rand(16, 96), 2)
    with pytest.raises(ValueError, match="backend"):
        interface.linear(x, weight, backend="cutlass")  # type: ignore[arg-type]
