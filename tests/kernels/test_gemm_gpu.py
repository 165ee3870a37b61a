"""Compiled kernels of the products, the token-wise operations and the attentions on a GPU, in bf16 at the model's sizes (`-m gpu`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from sanawm_kernels.attention import naive as attention_naive
from sanawm_kernels.attention import triton as attention
from sanawm_kernels.attention.naive import Fp8Scales, InverseUCPE, Segment
from sanawm_kernels.gemm import interface, naive
from sanawm_kernels.gemm import triton as fused
from sanawm_kernels.gemm.naive import Epilogue, Operand
from sanawm_kernels.gemm.plans import Config
from sanawm_kernels.quant.formats import Fp8Tensor, quantize_fp8, quantize_nvfp4
from sanawm_kernels.quant.interpreter import poisoned
from sanawm_kernels.quant.request import Quantize
from sanawm_kernels.tokenwise import naive as tokenwise_naive
from sanawm_kernels.tokenwise import triton as tokenwise

# Argument lists are built as lists here, which a checker cannot match with parameters.
plain: Any = tokenwise_naive
kernel: Any = tokenwise
pytestmark = pytest.mark.gpu

CAPABILITY = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
KINDS = ["bf16"] + ["fp8", "fp8_rows"] * (CAPABILITY >= (8, 9)) + ["nvfp4", "nvfp4_swizzled"] * (CAPABILITY >= (10, 0))
T, S, C, H, D = 3, 880, 2240, 20, 112
N = T * S
HALF_ULP = 2.0**-8


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    with poisoned():
        yield


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal numbers with outlier channels, bfloat16."""
    x = torch.randn(*shape, device="cuda", generator=torch.Generator("cuda").manual_seed(sum(shape) + seed))
    if x.dim() > 1:
        x[..., ::97] *= 30
    return x.bfloat16()


def close(actual: torch.Tensor | None, wanted: torch.Tensor | None, sums: float, size: torch.Tensor | None = None) -> None:
    """One rounding to bfloat16, and `sums` relative to `size` (by default the row's largest element) for what is lost before it."""
    assert actual is not None and wanted is not None and actual.shape == wanted.shape
    error = (actual.double() - wanted).abs()
    bound = HALF_ULP * wanted.abs() + sums * (wanted.abs().amax(-1, keepdim=True) if size is None else size)
    assert bool((error <= bound).all()), float((error / bound).max())


def operands(kind: str, rows: int, columns: int, depth: int) -> tuple[Operand, Operand]:
    x, weight = rand(1, rows, depth).float(), rand(columns, depth).float()
    if kind == "bf16":
        return x.bfloat16(), weight.bfloat16()
    if kind.startswith("fp8"):
        return quantize_fp8(x, per_row=kind == "fp8_rows"), quantize_fp8(weight, per_row=kind == "fp8_rows")
    layout = "swizzled" if kind == "nvfp4_swizzled" else "rows"
    return quantize_nvfp4(x, layout=layout), quantize_nvfp4(weight, layout=layout)  # type: ignore[arg-type]


# Float32 sums of 2240 terms lose about sqrt(2240) * 2^-24 of their size. Hopper's tensor cores cut the sum so far, and the 32 e4m3 products that they
# add to it, to 13 fraction bits below the largest of them, all towards zero: at most 2^-13 of the magnitudes in each of depth / 32 steps.
SUMS = {"bf16": 2e-5, "fp8": 2**-13, "fp8_rows": 2**-13, "nvfp4": 2e-5, "nvfp4_swizzled": 2e-5}
CUT_DEPTH = 32


def magnitudes(product: Callable[..., naive.Product], x: Operand, weight: Operand, *more: Any, gate: torch.Tensor) -> torch.Tensor | None:
    """What the sums of e4m3 products are measured against: products of magnitudes, times the gate, in each step. Sums of floats need none."""
    if not isinstance(weight, Fp8Tensor):
        return None
    steps = weight.values.shape[-1] / CUT_DEPTH
    x, weight, *more = (abs(naive.numbers(v, torch.float64)) if isinstance(v, Fp8Tensor) else v for v in (x, weight, *more))  # type: ignore[assignment]
    return product(x, weight, *more, Epilogue(frame_gate=gate.double().abs(), dtype=torch.float64)).plain * steps  # type: ignore[operator]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("columns", "depth"), [(2240, 2240), (6720, 2240), (2240, 6720), (128, 2240)])
def test_linear(kind: str, columns: int, depth: int) -> None:
    x, weight = operands(kind, N, columns, depth)
    bias, residual, gate = rand(columns), rand(1, N, columns), rand(1, T, columns)
    out = interface.linear(x, weight, Epilogue(bias=bias, residual=residual, frame_gate=gate, dtype=torch.bfloat16), backend="triton").plain
    wide = Epilogue(bias=bias.double(), residual=residual.double(), frame_gate=gate.double(), dtype=torch.float64)
    close(out, naive.linear(x, weight, wide).plain, SUMS[kind], magnitudes(naive.linear, x, weight, gate=gate))


@pytest.mark.parametrize("kind", [k for k in KINDS if k in ("bf16", "fp8", "fp8_rows")])
def test_backends_agree(kind: str) -> None:
    x, weight = operands(kind, N, 2240, 2240)
    bias = rand(2240)
    wanted = naive.linear(x, weight, Epilogue(bias=bias.double(), dtype=torch.float64)).plain
    size = magnitudes(naive.linear, x, weight, gate=torch.ones(1, 1, 2240, device="cuda"))
    for backend in ("triton", "cublaslt"):
        close(interface.linear(x, weight, Epilogue(bias=bias, dtype=torch.bfloat16), backend=backend).plain, wanted, SUMS[kind], size)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [k for k in KINDS if k in ("bf16", "fp8", "nvfp4")])
@pytest.mark.parametrize("first", [True, False])
def test_temporal_conv(kind: str, first: bool) -> None:
    scale = torch.tensor(0.3, device="cuda")

    def operand(x: torch.Tensor) -> Operand:
        return x if kind == "bf16" else quantize_fp8(x, scale) if kind == "fp8" else quantize_nvfp4(x, scale)

    s, weight = rand(1, N, C), operand(rand(C, 3 * C))
    codes, carried = operand(s), None
    if not first:
        before = operand(rand(1, S, C, seed=1))
        carried = interface.carried_products(before, weight, torch.bfloat16)
        exact = naive.carried_products(before, weight, torch.float64)
        first = Fp8Tensor(weight.values[:, :C], weight.scale) if isinstance(weight, Fp8Tensor) else weight
        close(carried, exact, SUMS[kind], magnitudes(naive.linear, before, first, gate=torch.ones(1, 1, C, device="cuda")))
    residual, gate = rand(1, N, C), rand(1, T, C)
    out = interface.temporal_conv(codes, weight, T, carried, Epilogue(add=s, residual=residual, frame_gate=gate, dtype=torch.bfloat16)).plain
    wide = Epilogue(add=s.double(), residual=residual.double(), frame_gate=gate.double(), dtype=torch.float64)
    size = magnitudes(naive.temporal_conv, codes, weight, T, None if carried is None else carried.abs(), gate=gate)
    close(out, naive.temporal_conv(codes, weight, T, carried, wide).plain, SUMS[kind], size)


# The forms whose warps have roles, with tiles and rings of the table's rows.
ROLES = {
    "pingpong": Config(128, 128, 64, 8, 4, 4, 2, persistent=1, form="pingpong", chunk=64, ring=1),
    "wide": Config(192, 256, 64, 14, 4, 3, 8, persistent=1, form="wide", chunk=64, ring=1),
}
hopper = pytest.mark.skipif(CAPABILITY != (9, 0), reason="warp group products are instructions of Hopper")


@hopper
@pytest.mark.parametrize("form", ROLES)
@pytest.mark.parametrize("kind", ["bf16", "fp8_rows"])
@pytest.mark.parametrize("finish", ["bias", "silu", "squares", "gated", "residual"])
def test_roles(form: str, kind: str, finish: str) -> None:
    """Rows and columns that no tile divides, more and fewer tiles than programs, and each epilogue of a block."""
    config = replace(ROLES[form], depth=64 if kind == "bf16" else 128, stages=ROLES[form].stages if kind == "bf16" else 3)
    for rows, columns in ((N, C), (S, 2 * C)):
        x, weight = operands(kind, rows, columns, C)
        tensors = {"bias": rand(columns)}
        if finish == "gated":
            tensors |= {"add": rand(1, rows, columns, seed=1), "gate": rand(1, rows, columns, seed=2)}
        if finish == "residual":
            tensors |= {"residual": rand(1, rows, columns, seed=1), "extra": rand(1, rows, columns, seed=2), "frame_gate": rand(1, rows // S, columns)}
        facts: dict[str, Any] = {"silu": finish == "silu", "squares": finish == "squares"}
        found = fused.linear(x, weight, Epilogue(**tensors, **facts, dtype=torch.bfloat16), config=config)
        wanted = naive.linear(x, weight, Epilogue(**{n: t.double() for n, t in tensors.items()}, **facts, dtype=torch.float64))
        # SiLU has a slope of at most 1.1, and a gate's SiLU multiplies the sum's error by no more than its own size.
        gate = torch.nn.functional.silu(tensors["gate"].double()).abs().amax() if finish == "gated" else torch.tensor(1.1)
        size = magnitudes(naive.linear, x, weight, gate=tensors.get("frame_gate", gate.to("cuda").expand(1, 1, columns)))
        close(found.plain, wanted.plain, SUMS[kind] * (float(gate) if kind == "bf16" else 1), size)
        if finish == "squares":
            assert found.plain is not None and found.squares is not None
            exact = found.plain.double().square()
            parts = found.squares.shape[-1]
            exact = torch.nn.functional.pad(exact, (0, parts * config.squares_width - columns)).unflatten(-1, (parts, -1)).sum(-1)
            assert bool(((found.squares.double() - exact).abs() <= 1e-5 * exact.amax()).all())


@hopper
@pytest.mark.parametrize("form", ROLES)
@pytest.mark.parametrize("frames", [1, 2, 3, 4])
def test_temporal_roles(form: str, frames: int) -> None:
    s, weight, carried = rand(1, frames * S, C), rand(C, 3 * C), rand(1, S, C, seed=3)
    residual, gate = rand(1, frames * S, C, seed=1), rand(1, frames, C)
    for before in (None, carried):
        given = Epilogue(add=s, residual=residual, frame_gate=gate, dtype=torch.bfloat16)
        out = fused.temporal_conv(s, weight, frames, before, given, config=ROLES[form]).plain
        wide = Epilogue(add=s.double(), residual=residual.double(), frame_gate=gate.double(), dtype=torch.float64)
        close(out, naive.temporal_conv(s, weight, frames, before, wide).plain, SUMS["bf16"])


def test_rows() -> None:
    x, branch, extra = rand(1, N, C), rand(1, N, C, seed=1), rand(1, N, C, seed=2)
    gate, shift, scale = rand(1, T, C), rand(1, T, C, seed=1), rand(1, T, C, seed=2)
    stream, out = tokenwise.residual_modulate(x, branch, gate, extra, shift, scale)
    close(stream, tokenwise_naive.residual(x.double(), branch.double(), gate.double(), extra.double()).plain, 1e-6)
    # The modulation reads the rounded stream.
    close(out.plain, tokenwise_naive.modulate(stream.double(), shift.double(), scale.double()).plain, 1e-5)
    close(
        tokenwise.output_gate(x, branch, extra).plain, tokenwise_naive.output_gate(x.double(), branch.double(), extra.double()).plain, 1e-6
    )
    close(tokenwise.rms_norm(x, shift[0, 0], 1e-6), tokenwise_naive.rms_norm(x.double(), shift[0, 0].double(), 1e-6), 1e-6)


REQUESTS = [("fp8", "rows"), ("fp8_rows", "rows"), ("nvfp4", "rows"), ("nvfp4", "swizzled")] if CAPABILITY >= (8, 9) else []


@pytest.mark.parametrize(("kind", "layout"), REQUESTS)
def test_quantized_rows(kind: str, layout: str) -> None:
    """Rounding instructions against the exact formats: a code may differ by one step where a reciprocal meets a tie, which is
    rare unless the scale is a short decimal fraction of the data's grid."""
    scale = None if kind == "fp8_rows" else torch.tensor(0.0173, device="cuda")
    request = Quantize(kind, scale, layout=layout, keep=True)  # type: ignore[arg-type]
    out = tokenwise.modulate(rand(1, N, C), rand(1, T, C), rand(1, T, C, seed=1), quantize=request)
    assert out.plain is not None and out.quantized is not None
    wanted = tokenwise_naive.quantize_activations(out.plain, request).quantized
    assert wanted is not None
    different = out.quantized.dequantize(torch.float64) != wanted.dequantize(torch.float64)
    # A row's own scale is such a fraction: the data are bfloat16, and so is the row's largest.
    assert float(different.double().mean()) < (2e-3 if kind == "fp8_rows" else 1e-4)


def test_depthwise_glu() -> None:
    x, taps, bias = rand(1, N, 6 * C), rand(9, 6 * C), rand(6 * C)
    close(
        tokenwise.depthwise_glu(x, taps, bias, (22, 40)).plain,
        tokenwise_naive.depthwise_glu(x.double(), taps.double(), bias.double(), (22, 40)).plain,
        1e-5,
    )


# On Hopper one strip of columns or several, one block of channels or several, fewer rows than are copied ahead; and what the kernel for all GPUs takes.
@pytest.mark.parametrize(("frames", "grid", "G"), [(1, (1, 8), 64), (2, (3, 16), 192), (3, (7, 24), 128), (4, (22, 40), 3 * C), (2, (5, 11), 64), (1, (4, 8), 48)])
@pytest.mark.parametrize("form", ["plain", "strided", "fp8", "fp8_keep"] if CAPABILITY >= (8, 9) else ["plain", "strided"])
def test_depthwise_glu_forms(frames: int, grid: tuple[int, int], G: int, form: str) -> None:
    rows = frames * grid[0] * grid[1]
    x, taps, bias = rand(1, rows, 2 * G), rand(9, 2 * G), rand(2 * G)
    if form == "strided":
        x = torch.cat([x, rand(1, rows, 64)], -1)[..., : 2 * G]
    exact = tokenwise_naive.depthwise_glu(x.double(), taps.double(), bias.double(), grid).plain
    assert exact is not None
    request = Quantize("fp8", (exact.abs().amax() / 400).float(), keep=form == "fp8_keep") if "fp8" in form else None
    out = tokenwise.depthwise_glu(x, taps, bias, grid, quantize=request)
    if request is None or request.keep:
        close(out.plain, exact, 1e-5)
    if request is not None:
        plain = out.plain if request.keep else tokenwise.depthwise_glu(x, taps, bias, grid).plain
        assert plain is not None and isinstance(out.quantized, Fp8Tensor)
        # Codes in the order of their numbers, both zeros 0.
        found, wanted = (c.view(torch.uint8).int() for c in (out.quantized.values, quantize_fp8(plain, request.scale).values))
        found, wanted = (torch.where(c >= 128, 128 - c, c) for c in (found, wanted))
        difference = (found - wanted).abs()
        # A reciprocal may meet a tie.
        assert int(difference.max()) <= 1 and float((difference > 0).double().mean()) < 1e-3


def heads_inputs() -> dict[str, torch.Tensor]:
    merged = rand(1, N, 3 * C)
    angle = torch.randn(N, D // 2, device="cuda") * 5
    rays = torch.randn(1, N, 4, 4, device="cuda")
    return {
        "q": merged[..., :C], "k": merged[..., C : 2 * C], "v": merged[..., 2 * C :], "q_norm": rand(C), "k_norm": rand(C, seed=1),
        "cos": angle.cos(), "sin": angle.sin(), "rays": rays, "inverse": torch.linalg.inv(rays.double()).float().contiguous(),
    }  # fmt: skip


def test_heads() -> None:
    x = heads_inputs()
    main: list[Any] = [x[n] for n in ("q", "k", "q_norm", "k_norm", "cos", "sin")]
    wanted = plain.rope_heads(*double(main), H, 1e-5)
    for a, b in zip(kernel.rope_heads(*main, H, 1e-5), wanted):
        close(a, b, 1e-5)
    camera: list[Any] = [x[n] for n in ("q", "k", "v", "q_norm", "k_norm", "rays", "inverse")]
    camera += [x[n][:, : D // 4].contiguous() for n in ("cos", "sin")]
    turned = plain.ucpe_heads(*double(camera), H, 1e-5)
    for a, b in zip(kernel.ucpe_heads(*camera, H, 1e-5), turned):
        close(a, b, 1e-5)


def double(tensors: list[Any]) -> list[Any]:
    return [x.double() for x in tensors]


def error(actual: torch.Tensor | None, wanted: torch.Tensor | None) -> float:
    assert actual is not None and wanted is not None and bool(torch.isfinite(actual).all())
    return float((actual.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("cached", [(), (3520,), (3520, 2640)])
@pytest.mark.parametrize("camera", [True, False])
def test_window_attention(cached: tuple[int, ...], camera: bool) -> None:
    q = rand(1, N, H, D)
    caches = [Segment(rand(1, n, H, D, seed=i), rand(1, n, H, D, seed=i + 9)) for i, n in enumerate(cached)]
    segments = [*caches, Segment(rand(1, N, H, D, seed=20), rand(1, N, 3 * C)[..., C : 2 * C].unflatten(-1, (H, D)))]
    x = heads_inputs()
    ucpe = InverseUCPE(x["rays"], x["cos"][:, : D // 4].contiguous(), x["sin"][:, : D // 4].contiguous()) if camera else None
    wide_ucpe = InverseUCPE(ucpe.rays.double(), ucpe.cos.double(), ucpe.sin.double()) if ucpe else None
    wide = [Segment(s.keys.double(), s.values.double()) for s in segments]
    out = attention.window_attention(q / 8, segments, D**-0.5, ucpe=ucpe).plain
    # Probabilities and the output are rounded to bfloat16, 2^-8 relative each at most, averaged over keys.
    assert error(out, attention_naive.window_attention((q / 8).double(), wide, D**-0.5, ucpe=wide_ucpe).plain) < 4e-3


@pytest.mark.parametrize("value", [0.02] if CAPABILITY >= (8, 9) else [])
def test_window_attention_fp8(value: float) -> None:
    scale = torch.tensor(value, device="cuda")
    q = quantize_fp8(rand(1, N, H, D) / 8, scale).values
    segments = []
    for i, n in enumerate((3520, 2640, N)):
        keys = quantize_fp8(rand(1, n, H, D, seed=i), scale).values
        segments.append(Segment(keys, tokenwise.fp8_values_transposed(rand(1, n, H, D, seed=i + 9), scale)))
    scales = Fp8Scales(scale, scale, scale)
    out = attention.window_attention(q, segments, D**-0.5, fp8=scales, dtype=torch.bfloat16).plain
    wanted = attention_naive.window_attention(q, segments, D**-0.5, fp8=scales, dtype=torch.float64).plain
    # Probabilities are rounded to three mantissa bits, 3.6 % rms of each term.
    assert error(out, wanted) < 0.036


def test_cross_attention() -> None:
    q, kv, weight = rand(1, N, C), rand(1, 300, 2 * C), rand(C)
    k, v = kv[..., :C].unflatten(-1, (H, D)) / 8, kv[..., C:].unflatten(-1, (H, D))
    k = k.contiguous()
    mask = torch.arange(300, device="cuda")[None] < 77
    out = attention.cross_attention(q, k, v, mask, weight, 1e-6).plain
    wanted = attention_naive.cross_attention(q.double(), k.double(), v.double(), mask, weight.double(), 1e-6).plain
    # The normalised queries, the probabilities and the output are rounded to bfloat16; logits of tens amplify the first.
    assert error(out, wanted) < 2e-2
