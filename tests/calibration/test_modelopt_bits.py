"""NVFP4 here against modelopt: its Triton kernels in the interpreter, its reference sweep, and its packed tensors, bit for bit."""

from __future__ import annotations

import importlib
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sanawm_calibration import modelopt_cpu
from sanawm_calibration.quantize import _WEIGHTS, FakeQuantLinear, PackedLinear, _quantized, quantize_linear
from sanawm_calibration.recipe import LayerFormat
from sanawm_kernels.quant.formats import E2M1_MIDPOINTS, Nvfp4Tensor, quantize_nvfp4
from sanawm_kernels.quant.interpreter import exact

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def samples(dtype: torch.dtype, seed: int, rows: int = 48, columns: int = 128) -> Tensor:
    """Normal rows with outliers, zero blocks, whole zero rows, tiny and denormal numbers, and values on e2m1's ties."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    x[0, :3] = torch.tensor([3e3, -2e3, 0.0])
    x[1] = 0
    x[2, 16:32] = 0
    x[3] *= 1e-6
    x[4] *= torch.exp2(torch.randint(-16, 4, (columns,), generator=generator).float())
    x[5] = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, -0.25, -0.75, -1.25, -5.0, -6.0, -0.0, 0.0, 1.0]).repeat(columns // 16)
    x = x.to(dtype)
    x[6, :16] = torch.finfo(dtype).smallest_normal / 4
    return x


@pytest.fixture(scope="module")
def kernels() -> Any:
    """modelopt's kernel modules as they run on a GPU, interpreted; `libdevice` functions are not part of the interpreter."""
    modelopt_cpu.load()
    base = "modelopt.torch.kernels.quantization"
    common = importlib.import_module(f"{base}.common.nvfp4_quant")
    common.libdevice = types.SimpleNamespace(isnan=lambda x: x != x)
    return types.SimpleNamespace(
        dynamic=importlib.import_module(f"{base}.gemm.fp4_kernel_hopper"), static=importlib.import_module(f"{base}.gemm.fp4_kernel")
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("headroom", [0.5, 1.0, 8.0])
def test_dynamic_fake_quantization_equals_the_triton_kernel(kernels: Any, dtype: torch.dtype, headroom: float) -> None:
    x = samples(dtype, 1)
    amax = x.abs().amax().float() * headroom
    M, N = x.shape
    expected = torch.full_like(x, float("nan"))
    with exact():
        kernels.dynamic.fp4_fake_quant_kernel[(-(-M // 16), -(-N // 64))](
            x, expected, M, N, amax / 2688, *x.stride(), *x.stride(),
            BLOCK_SIZE=16, TILE_M=16, TILE_N=64, NUM_FP4_BLOCKS=4, OUT_DTYPE=kernels.static._torch_dtype_to_tl(dtype),
        )  # fmt: skip
    found = torch.ops.tensorrt.dynamic_block_quantize_op(x, 16, amax, 4, 2, 8, 4)
    assert found.dtype == dtype
    assert torch.equal(found, expected) and torch.equal(found.signbit(), expected.signbit())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("top", [448.0, 256.0])
def test_static_fake_quantization_equals_the_triton_kernel(kernels: Any, dtype: torch.dtype, top: float) -> None:
    x = samples(dtype, 2).reshape(-1, 16)
    amax = x.float().abs().amax(1) * (0.5 + torch.rand(len(x), generator=torch.Generator().manual_seed(3)))
    scale = kernels.static.compute_fp4_scales(amax, amax.max(), True, top)
    expected = torch.full_like(x, float("nan"))
    with exact():
        kernels.static.static_blockwise_fp4_fake_quant_kernel[(len(x),)](
            x, expected, scale, len(x), 16, OUT_DTYPE=kernels.static._torch_dtype_to_tl(dtype)
        )
    found = modelopt_cpu.static_fake_quant(x, amax, amax.max(), True, top)
    assert torch.equal(found, expected) and torch.equal(found.signbit(), expected.signbit())


@pytest.mark.parametrize("kind", ["normal", "wide", "cubed", "sparse", "grid", "tiny"])
def test_block_search_equals_modelopts_sweep(kind: str) -> None:
    from modelopt.torch.quantization.calib.mse import NVFP4MSECalibrator

    generator = torch.Generator().manual_seed(7)
    x = torch.randn(400, 16, generator=generator)
    if kind in ("wide", "tiny"):
        low, high = (-14, 6) if kind == "wide" else (-40, 0)
        x *= torch.exp2(torch.randint(low, high, (400, 1), generator=generator).float())
    elif kind == "cubed":
        x = x**3
    elif kind == "sparse":
        x *= torch.rand(400, 16, generator=generator) < 0.1
    elif kind == "grid":
        x = x.sign() * torch.randint(0, 7, (400, 16), generator=generator)
    top, amax = x.abs().max(), x.abs().amax(1)

    def fake(values: Tensor, block_amax: Tensor) -> Tensor:
        return modelopt_cpu.static_fake_quant(values, block_amax, top)

    def squared(a: Tensor, b: Tensor) -> Tensor:
        return F.mse_loss(a, b, reduction="none")

    # With an error function the calibrator takes its own 126-candidate loop.
    reference = NVFP4MSECalibrator(amax, top, axis=0, quant_func=fake, error_func=squared)
    fast = NVFP4MSECalibrator(amax, top, axis=0, quant_func=fake)
    reference.collect(x)
    fast.collect(x)
    assert torch.equal(fast.compute_amax(), reference.compute_amax())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scales", ["rtn", "mse", "four-over-six"])
def test_packed_weights_are_modelopts(dtype: torch.dtype, scales: str) -> None:
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    weight = samples(dtype, 4)
    layer: Any = _quantized(weight.clone(), *_WEIGHTS[scales])
    block, top = NVFP4QTensor.get_weights_scaling_factor_from_quantizer(layer.weight_quantizer, weight)
    theirs, _, _ = NVFP4QTensor.quantize(weight, 16, block, top)
    ours = quantize_nvfp4(weight, top.reshape(()), block)
    assert torch.equal(ours.packed & 0x77, theirs._quantized_data & 0x77)
    expected = theirs.dequantize(torch.float32, scale=block, double_scale=top, block_sizes={-1: 16})
    assert torch.equal(ours.dequantize(), expected)
    # The fake-quantized weight rounds its scales once more than the packed one, so a number at a tie of e2m1 may go to the other side. It drops
    # blocks whose scale is under e4m3's smallest number, 2^-9 of the global scale; the packed one keeps them at that number.
    fake = layer.weight_quantizer(weight).float()
    other = ((fake - expected).abs() > 4 * torch.finfo(dtype).eps * expected.abs()) & (fake != 0)
    step = (block.float() * top).repeat_interleave(16, -1)
    ties = torch.tensor(E2M1_MIDPOINTS)
    assert bool((((weight.float() / step).abs()[other].unsqueeze(-1) - ties).abs().amin(-1) < 1e-5).all())
    assert bool((expected.abs()[fake == 0] <= 2**-9 * 6 * top).all())
    if scales == "rtn":
        own = quantize_nvfp4(weight)
        used = weight.float().reshape(len(weight), -1, 16).abs().amax(-1) > 0
        assert torch.equal(own.global_scale, top.reshape(()))
        # A block of zeros has no scale of its own: modelopt writes the largest, the format here the smallest.
        assert torch.equal(own.scales.float()[used], block.float()[used])


def fp8_quantizer(packed: PackedLinear) -> Any:
    """modelopt's quantizer with a layer's static scale."""
    modelopt_cpu.load()
    quantization = importlib.import_module("modelopt.torch.quantization")
    quantizer = quantization.nn.TensorQuantizer(quantization.config.QuantizerAttributeConfig(num_bits=(4, 3), axis=None))
    quantizer.amax = torch.tensor(packed.input_limit)
    return quantizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("headroom", [1.0, 8.0])
def test_fp8_activations_equal_modelopts(dtype: torch.dtype, headroom: float) -> None:
    """FP8 activations are rounded without modelopt, to its very bits."""
    x = samples(dtype, 6)
    packed = quantize_linear("layer", nn.Linear(128, 48, bias=False), LayerFormat("fp8"), x.abs().amax(0) * headroom)
    found = FakeQuantLinear(packed, dtype).input_quantizer(x)
    assert found.dtype == dtype and torch.equal(found, fp8_quantizer(packed)(x))


@pytest.mark.parametrize("layer_format", [LayerFormat("nvfp4", s) for s in ("rtn", "mse", "four-over-six")] + [LayerFormat("fp8")])
def test_layer_forward_equals_modelopts(layer_format: LayerFormat) -> None:
    generator = torch.Generator().manual_seed(5)
    linear = nn.Linear(128, 48, bias=False)
    linear.weight = nn.Parameter(torch.randn(48, 128, generator=generator), requires_grad=False)
    x = torch.randn(64, 128, generator=generator)
    packed = quantize_linear("layer", linear, layer_format, x.abs().amax(0))
    if layer_format.format == "fp8":
        theirs: Any = _quantized(linear.weight.clone(), {"num_bits": (4, 3), "axis": None}, "max")
        theirs.weight_quantizer.amax = packed.weight.scale * 448  # type: ignore[union-attr]
    else:
        theirs = _quantized(linear.weight.clone(), *_WEIGHTS[layer_format.scales])
    quantized = FakeQuantLinear(packed, torch.float32)
    theirs.input_quantizer = fp8_quantizer(packed) if layer_format.format == "fp8" else quantized.input_quantizer
    # Their weight's scales carry one more float32 rounding, 2^-23 each, over 128 products.
    assert torch.allclose(quantized(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_scales_reach_the_packed_layer_unchanged() -> None:
    linear = nn.Linear(64, 32, bias=False)
    amax = torch.full((64,), 3.7)
    packed = quantize_linear("layer", linear, LayerFormat("nvfp4", "mse"), amax)
    quantized = FakeQuantLinear(packed, torch.float32)
    assert isinstance(packed.weight, Nvfp4Tensor)
    # modelopt derives its global scale from the quantizer's amax; it must be the exported one, exactly.
    assert float(quantized.input_quantizer.amax.float()) / (6 * 448) == packed.input_scale
    assert torch.equal(quantized.weight, packed.weight.dequantize())


def test_infinities_are_refused() -> None:
    linear = nn.Linear(32, 16, bias=False)
    weight = linear.weight.detach().clone()
    weight[3, 4] = float("inf")
    with pytest.raises(ValueError, match="infinity or NaN"):
        quantize_nvfp4(weight)
    linear.weight = nn.Parameter(weight)
    for name in ("nvfp4", "fp8"):
        with pytest.raises(Exception, match="blocks.0.layer: the weights have an infinity or NaN"):
            quantize_linear("blocks.0.layer", linear, LayerFormat(name), torch.ones(32))  # type: ignore[arg-type]


def test_other_block_formats_are_refused_on_the_cpu() -> None:
    modelopt_cpu.load()
    with pytest.raises(NotImplementedError, match="only NVFP4"):
        torch.ops.tensorrt.dynamic_block_quantize_op(torch.ones(2, 32), 32, torch.tensor(1.0), 4, 2, 8, 4)
