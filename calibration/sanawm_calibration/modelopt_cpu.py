"""NVIDIA's model optimizer on machines without a GPU.

modelopt 0.47 calibrates and evaluates NVFP4 with Triton kernels alone. `install` registers plain torch versions of them for tensors on the
CPU; what lies on a GPU still goes to the kernels. Both give the same bits: the tests run modelopt's own kernels in Triton's interpreter
beside these.

Shapes: J blocks of 16 elements, flattened.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sanawm.model.checkpoint.lazy import require
from sanawm_calibration.block_search import best_block_amax, round_magnitude
from sanawm_kernels.quant.formats import BLOCK, E2M1_MAX, E4M3_MAX

# Under this block scale (as a plain number) modelopt's dynamic quantizer divides by one instead, which makes the block zero.
_SMALLEST_SCALE = 1e-5

_LIBRARY: list[torch.library.Library] = []


@functools.cache
def load() -> Any:
    """`modelopt.torch.quantization`, able to quantize on the CPU. Raises UserError where modelopt is not installed."""
    with warnings.catch_warnings():
        # It reports untested versions of libraries that are not used here.
        warnings.simplefilter("ignore")
        mtq = require("modelopt.torch.quantization")
    install()
    return mtq


def install() -> None:
    """Give modelopt its CPU operations; a second call changes nothing."""
    if _LIBRARY:
        return
    kernels = require("modelopt.torch.kernels.quantization.gemm")
    calibrators = require("modelopt.torch.quantization.calib.mse")
    library = torch.library.Library("tensorrt", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library.impl("dynamic_block_quantize_op", _dynamic_block_quantize, "CPU", allow_override=True)
    _LIBRARY.append(library)
    kernels.static_blockwise_fp4_fake_quant = _by_device(static_fake_quant, getattr(kernels, "static_blockwise_fp4_fake_quant", None))
    # What this flag guards are the two operations above and a search that falls back by itself.
    kernels.IS_AVAILABLE = True
    reference = calibrators.NVFP4MSECalibrator._run_reference_collect
    calibrators.NVFP4MSECalibrator._run_reference_collect = functools.partialmethod(_collect, reference)


def _by_device(plain: Callable[..., Tensor], kernel: Callable[..., Tensor] | None) -> Callable[..., Tensor]:
    def dispatch(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not x.is_cuda:
            return plain(x, *args, **kwargs)
        if kernel is None:
            raise RuntimeError("modelopt found no CUDA device when it was imported; move the model to the CPU or restart")
        return kernel(x, *args, **kwargs)

    return dispatch


def _fake_quant(x_J16: Tensor, scale_J1: Tensor) -> Tensor:
    """Round blocks to e2m1 under their float32 scales; float32, no negative zeros."""
    rounded = round_magnitude(x_J16.abs() / scale_J1) * scale_J1
    return torch.where(x_J16 >= 0, rounded, 0 - rounded)


def dynamic_fake_quant(x: Tensor, amax: Tensor) -> Tensor:
    """x (..., K) rounded to NVFP4 under the global scale amax / 2688, same shape and dtype: modelopt's `fp4_fake_quant_block`."""
    global_scale = amax.float() / (E2M1_MAX * E4M3_MAX)
    global_scale = torch.where(global_scale > 0, global_scale, torch.full_like(global_scale, 1e-12))
    blocks = x.float().reshape(-1, BLOCK)
    wanted = blocks.abs().amax(1, keepdim=True) / (E2M1_MAX * global_scale)
    scale = wanted.clamp_max(E4M3_MAX).to(torch.float8_e4m3fn).float() * global_scale
    scale = torch.where(scale >= _SMALLEST_SCALE, scale, torch.ones_like(scale))
    return _fake_quant(blocks, scale).reshape(x.shape).to(x.dtype)


def _dynamic_block_quantize(
    x: Tensor, block_size: int, amax: Tensor, num_bits: int, exponent_bits: int, scale_num_bits: int, scale_exponent_bits: int
) -> Tensor:
    if (block_size, num_bits, exponent_bits, scale_num_bits, scale_exponent_bits) != (BLOCK, 4, 2, 8, 4):
        raise NotImplementedError(f"on the CPU only NVFP4 in blocks of {BLOCK} is known, found {num_bits} bits in blocks of {block_size}")
    if x.shape[-1] % BLOCK:
        raise ValueError(f"expected a last axis that is a multiple of {BLOCK}, found shape {tuple(x.shape)}")
    return dynamic_fake_quant(x, amax.amax())


def static_fake_quant(
    x: Tensor,
    amax: Tensor,
    global_amax: Tensor | None = None,
    quantize_block_scales: bool = True,
    fp8_max_for_normalization: float = E4M3_MAX,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """x rounded to NVFP4 under given block maxima (J,), same shape: modelopt's `static_blockwise_fp4_fake_quant`."""
    tensor_quant = require("modelopt.torch.quantization.tensor_quant")
    scale = amax.float() / E2M1_MAX
    if quantize_block_scales:
        top = (amax.amax() if global_amax is None else global_amax).float()
        scale = tensor_quant.scaled_e4m3_impl(scale, top * (E4M3_MAX / fp8_max_for_normalization) / E2M1_MAX)
    scale = scale.reshape(-1, 1)
    usable = torch.where(scale.isfinite() & (scale != 0), scale, torch.ones_like(scale))
    blocks = _fake_quant(x.float().reshape(scale.shape[0], -1), usable)
    blocks = torch.where(scale == 0, torch.zeros_like(blocks), blocks)
    return blocks.reshape(x.shape).to(out_dtype or x.dtype)


def _collect(calibrator: Any, reference: Callable[..., None], x_J16: Tensor) -> None:
    """The sweep of `NVFP4MSECalibrator` on the CPU: the same choice from fewer candidates, where its metric is the plain squared error."""
    if x_J16.is_cuda or calibrator._error_func is not None or x_J16.dim() != 2 or x_J16.shape[1] != BLOCK:
        reference(calibrator, x_J16)
        return
    best = best_block_amax(x_J16.detach().float(), calibrator._global_amax)
    calibrator._best_amax = best.reshape(calibrator._initial_amax.shape)
