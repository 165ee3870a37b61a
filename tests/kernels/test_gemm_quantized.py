"""FP8 and NVFP4 products and quantizing epilogues, in the interpreter with exact low-precision arithmetic.

The products of decoded operands are exact in float32 (e4m3 has 4 significant bits, e2m1 with its scale 6), so a kernel differs from the plain
definition by the rounding of its sums alone, whatever the operands' own error.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from sanawm_kernels.gemm import interface, naive, table
from sanawm_kernels.gemm import triton as fused
from sanawm_kernels.gemm.naive import Epilogue, Operand
from sanawm_kernels.gemm.plans import Config
from sanawm_kernels.quant.formats import Fp8Tensor, Nvfp4Tensor, nvfp4_global_scale, quantize_fp8, quantize_nvfp4, unpack_e2m1
from sanawm_kernels.quant.interpreter import exact, poisoned
from sanawm_kernels.quant.request import Quantize
from sanawm_kernels.tokenwise import naive as tokenwise

EPS32 = torch.finfo(torch.float32).eps
EPS16 = torch.finfo(torch.bfloat16).eps


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    with poisoned(), exact():
        yield


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) + seed))
    x[..., ::19] *= 20
    return x


def operands(kind: str, M: int, N: int, K: int) -> tuple[Operand, Operand]:
    x, weight = rand(1, M, K), rand(N, K)
    if kind == "fp8":
        return quantize_fp8(x), quantize_fp8(weight)
    if kind == "fp8_rows":
        return quantize_fp8(x, per_row=True), quantize_fp8(weight, per_row=True)
    if kind == "fp8_mixed":
        return quantize_fp8(x), quantize_fp8(weight, per_row=True)
    if kind == "bf16":
        return x.bfloat16(), weight.bfloat16()
    layouts = {"nvfp4": ("rows", "rows"), "nvfp4_swizzled": ("swizzled", "swizzled"), "nvfp4_mixed": ("rows", "swizzled")}[kind]
    return quantize_nvfp4(x, layout=layouts[0]), quantize_nvfp4(weight, layout=layouts[1])  # type: ignore[arg-type]


KINDS = ["bf16", "fp8", "fp8_rows", "fp8_mixed", "nvfp4", "nvfp4_swizzled", "nvfp4_mixed"]


# 64 divides the first depth; the second leaves a remainder of 16, the least NVFP4 allows. 150 rows and columns overhang 128-row scale tiles.
@pytest.mark.parametrize("K", [128, 80])
@pytest.mark.parametrize("kind", KINDS)
def test_linear(kind: str, K: int) -> None:
    x, weight = operands(kind, 150, 144, K)
    bias = rand(144)
    out = fused.linear(x, weight, Epilogue(bias=bias, dtype=torch.float32)).plain
    wanted = naive.linear(x, weight, Epilogue(bias=bias, dtype=torch.float64)).plain
    assert out is not None and wanted is not None
    # The interpreter's sums are float64 rounded once a step; the scales and the bias add three roundings.
    error = (out.double() - wanted).abs().amax(-1)
    assert bool((error <= 8 * EPS32 * wanted.abs().amax(-1)).all())


@pytest.mark.parametrize("kind", ["fp8", "nvfp4"])
def test_linear_rounds_once_to_bfloat16(kind: str) -> None:
    x, weight = operands(kind, 40, 48, 64)
    residual = rand(1, 40, 48).bfloat16()
    out = fused.linear(x, weight, Epilogue(residual=residual, dtype=torch.bfloat16)).plain
    wanted = naive.linear(x, weight, Epilogue(residual=residual.double(), dtype=torch.float64)).plain
    assert out is not None and wanted is not None
    # Half a unit in the last place (eps / 2 relative), and float32 sums that may tip a tie.
    assert bool(((out.double() - wanted).abs() <= (EPS16 / 2 + 4 * EPS32) * wanted.abs() + 16 * EPS32 * wanted.abs().amax()).all())


@pytest.mark.parametrize("kind", ["fp8", "nvfp4"])
def test_glu(kind: str) -> None:
    x, weight = operands(kind, 40, 96, 80)
    out = fused.linear(x, weight, Epilogue(glu=True, dtype=torch.float32)).plain
    wanted = naive.linear(x, weight, Epilogue(glu=True, dtype=torch.float64)).plain
    assert out is not None and wanted is not None
    assert float((out.double() - wanted).abs().max()) <= 32 * EPS32 * float(wanted.abs().max())


REQUESTS = [
    Quantize("fp8", torch.tensor(0.5), keep=True),
    Quantize("nvfp4", torch.tensor(0.05), keep=True),
    Quantize("nvfp4", torch.tensor(0.05), layout="swizzled"),
]


@pytest.mark.parametrize("request_", REQUESTS, ids=["fp8", "nvfp4", "nvfp4_swizzled"])
@pytest.mark.parametrize("backend", ["triton", "cublaslt"])
def test_quantizing_epilogue_is_the_format_of_the_plain_result(request_: Quantize, backend: str) -> None:
    x, weight = operands("bf16", 37, 80, 48)
    if backend == "cublaslt":
        x, weight = numbers(x), numbers(weight)
        plain = interface.linear(x, weight, Epilogue(silu=True), backend="cublaslt").plain
        out = interface.linear(x, weight, Epilogue(silu=True, quantize=request_), backend="cublaslt")
    else:
        plain = fused.linear(x, weight, Epilogue(silu=True)).plain
        out = fused.linear(x, weight, Epilogue(silu=True, quantize=request_))
    assert plain is not None and (out.plain is not None) == request_.keep
    if out.plain is not None:
        assert torch.equal(out.plain, plain)
    wanted = tokenwise.quantize_activations(plain, request_).quantized
    if isinstance(wanted, Nvfp4Tensor):
        assert isinstance(out.quantized, Nvfp4Tensor)
        assert torch.equal(out.quantized.scales.view(torch.uint8), wanted.scales.view(torch.uint8))
        # A reciprocal product may meet a tie.
        assert int((unpack_e2m1(out.quantized.packed) != unpack_e2m1(wanted.packed)).sum()) <= 2
    else:
        assert isinstance(out.quantized, Fp8Tensor) and isinstance(wanted, Fp8Tensor)
        assert int((out.quantized.values.view(torch.uint8).int() - wanted.values.view(torch.uint8).int()).abs().max()) <= 1


def numbers(x: Operand) -> torch.Tensor:
    return naive.numbers(x)


def test_chain_of_quantized_products() -> None:
    """A product's NVFP4 output is the next product's operand, as in the FFN."""
    x, first = operands("nvfp4", 40, 64, 64)
    second = quantize_nvfp4(rand(48, 64, seed=3))
    plain = naive.linear(x, first, Epilogue(silu=True, dtype=torch.float32)).plain
    assert plain is not None
    request = Quantize("nvfp4", nvfp4_global_scale(plain), layout="rows")
    hidden = fused.linear(x, first, Epilogue(silu=True, quantize=request, dtype=torch.float32)).quantized
    assert hidden is not None
    out = fused.linear(hidden, second, Epilogue(dtype=torch.float32)).plain
    wanted = naive.linear(hidden, second, Epilogue(dtype=torch.float64)).plain
    assert out is not None and wanted is not None
    assert float((out.double() - wanted).abs().max()) <= 8 * EPS32 * float(wanted.abs().max())


@pytest.mark.parametrize("kind", ["bf16", "fp8", "nvfp4"])
@pytest.mark.parametrize("first", [True, False])
def test_temporal_conv(kind: str, first: bool) -> None:
    T, S, C, N = 3, 11, 96, 96
    scale = torch.tensor(0.25)

    def operand(x: torch.Tensor) -> Operand:
        if kind == "bf16":
            return x.bfloat16()
        return quantize_fp8(x, scale) if kind == "fp8" else quantize_nvfp4(x, scale * 0.1)

    s, weight = rand(1, T * S, C), operand(rand(N, 3 * C))
    codes = operand(s)
    carried = None
    if not first:
        before = operand(rand(1, S, C, seed=9))
        carried = fused.carried_products(before, weight, torch.float32)
        exact = naive.carried_products(before, weight, torch.float64)
        assert bool(((carried.double() - exact).abs().amax(-1) <= 8 * EPS32 * exact.abs().amax(-1)).all())
    epilogue = Epilogue(add=s, dtype=torch.float32)
    out = fused.temporal_conv(codes, weight, T, carried, epilogue).plain
    wanted = naive.temporal_conv(codes, weight, T, carried, Epilogue(add=s.double(), dtype=torch.float64)).plain
    assert out is not None and wanted is not None
    error = (out.double() - wanted).abs().amax(-1)
    assert bool((error <= 8 * EPS32 * wanted.abs().amax(-1)).all())


def test_wrong_operands_are_refused() -> None:
    x, weight = operands("nvfp4", 8, 64, 64)
    with pytest.raises(ValueError, match=r"Epilogue\.dtype"):
        fused.linear(x, weight)
    rows = Fp8Tensor(rand(1, 22, 64).to(torch.float8_e4m3fn), torch.ones(1, 22))
    with pytest.raises(ValueError, match="one activation scale"):
        fused.temporal_conv(rows, quantize_fp8(rand(16, 192)), 2, None, Epilogue(dtype=torch.float32))
    with pytest.raises(ValueError, match="multiple of 64 for NVFP4"):
        fused.linear(x, weight, Epilogue(dtype=torch.float32), config=Config(32, 32, 32))
    with pytest.raises(ValueError, match="multiple of 128 for swizzled"):
        fused.linear(*operands("nvfp4_swizzled", 8, 64, 64), Epilogue(dtype=torch.float32), config=Config(32, 32, 64))
    with pytest.raises(ValueError, match="use the triton backend"):
        interface.linear(x, weight, Epilogue(dtype=torch.bfloat16), backend="cublaslt")
    with pytest.raises(ValueError, match="fp8_rows"):
        fused.linear(rand(1, 8, 64), rand(16, 64), Epilogue(quantize=Quantize("fp8_rows")))


def test_table_chooses_only_what_it_can_explain() -> None:
    for target in (89, 90, 100, 120):
        for kind in ("bf16", "fp8", "nvfp4"):
            # So many columns were measured nowhere.
            fused_choice = table.choose(target, kind, 2640, 2048, 2240, plain=False)
            assert fused_choice.backend == "triton"
            plain = table.choose(target, kind, 2640, 2048, 2240, plain=True)
            assert plain.backend == ("triton" if kind == "nvfp4" else "cublaslt")
            for choice in (fused_choice, plain):
                assert choice.measured or choice.reason.startswith(table.UNMEASURED)
    with pytest.raises(ValueError, match=r"compute capability 7\.5"):
        table.choose(75, "bf16", 1, 64, 64, plain=False)


def test_measured_rows_win_over_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    def row(rows: int, backend: table.Backend) -> table.Measured:
        return table.Measured(90, "bf16", 2240, 2240, rows, False, backend, "2026-12-01", f"measured at {rows} rows")

    monkeypatch.setattr(table, "MEASURED", (row(3520, "triton"), row(2640, "cublaslt")))
    assert table.choose(90, "bf16", 2640, 2240, 2240, plain=False).reason == "2026-12-01: measured at 2640 rows"
    assert table.choose(90, "bf16", 2641, 2240, 2240, plain=False).backend == "triton"
    assert not table.choose(90, "bf16", 9999, 2240, 2240, plain=False).measured
    assert not table.choose(120, "bf16", 2640, 2240, 2240, plain=False).measured


def test_rows_carry_a_date_and_a_reason() -> None:
    import datetime

    keys = [(r.target, r.kind, r.columns, r.depth, r.rows, r.plain) for r in table.MEASURED]
    assert len(keys) == len(set(keys))
    for row in table.MEASURED:
        assert datetime.date.fromisoformat(row.date) and len(row.reason) > 10
