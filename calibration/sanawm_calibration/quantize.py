"""Quantization of one linear layer with NVIDIA's model optimizer, and the packed result that is judged and exported.

Shapes: N output features, K input features, M rows of activations, R rank of a correction.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sanawm.model.checkpoint.lazy import require
from sanawm_calibration import modelopt_cpu
from sanawm_calibration.errors import CalibrationError
from sanawm_calibration.recipe import LayerFormat
from sanawm_calibration.scales import fp8_scale, limit, nvfp4_scale
from sanawm_kernels.quant.formats import BLOCK, Fp8Tensor, Nvfp4Tensor, quantize_fp8, to_e4m3

_NVFP4: dict[str, Any] = {"num_bits": (2, 1), "block_sizes": {-1: BLOCK, "type": "dynamic", "scale_bits": (4, 3)}}
_STATIC = {-1: BLOCK, "type": "static", "scale_bits": (4, 3)}
# modelopt's weight quantizer and algorithm of each way to choose block scales.
_WEIGHTS: dict[str, tuple[dict[str, Any], Any]] = {
    "rtn": (_NVFP4, "max"),
    "mse": (_NVFP4 | {"block_sizes": _STATIC}, {"method": "mse", "fp8_scale_sweep": True}),
    "four-over-six": (
        _NVFP4 | {"block_sizes": _STATIC | {"four_over_six": 1}},
        {"method": "mse", "fp8_scale_sweep": False, "start_multiplier": 1.0, "stop_multiplier": 1.5, "step_size": 0.5},
    ),
}


@dataclass(frozen=True)
class PackedLinear:
    """A quantized layer as it is stored: y = dequantize(weight) quantize(x * pre_scale) + up down (x * pre_scale) + bias.

    weight (N, K); input_scale: the static scale of activations, a power of two; pre_scale (K,) and the factors down (R, K) and up (N, R) of the
    correction are None where the recipe has none, and in the model's dtype.
    """

    name: str
    layer_format: LayerFormat
    weight: Nvfp4Tensor | Fp8Tensor
    input_scale: float
    bias: Tensor | None = None
    pre_scale: Tensor | None = None
    down: Tensor | None = None
    up: Tensor | None = None

    @property
    def input_limit(self) -> float:
        """Largest magnitude of x * pre_scale that is not clipped."""
        return limit(self.input_scale, self.layer_format.format == "nvfp4")

    @property
    def nbytes(self) -> int:
        """Bytes as stored, with scales, correction and bias."""
        if isinstance(self.weight, Nvfp4Tensor):
            tensors = [self.weight.packed, self.weight.scales, self.weight.global_scale]
        else:
            tensors = [self.weight.values, self.weight.scale]
        rest = [t for t in (self.bias, self.pre_scale, self.down, self.up) if t is not None]
        return sum(t.numel() * t.element_size() for t in tensors + rest)


def quantize_linear(
    name: str, linear: nn.Linear, layer_format: LayerFormat, channel_amax_K: Tensor, rows_MK: Tensor | None = None
) -> PackedLinear:
    """Quantize a layer; `linear` is left as it is.

    `channel_amax_K` holds the largest magnitude of each calibrated input channel, `rows_MK` a sample of inputs, which AWQ searches with.
    Raises CalibrationError naming the layer for weights or statistics that are not finite, a layer whose input was always zero, and AWQ
    without rows.
    """
    amax = float(channel_amax_K.amax())
    weight = linear.weight.detach()
    if not bool(torch.isfinite(weight).all()):
        raise CalibrationError(f"{name}: the weights have an infinity or NaN; check the checkpoint")
    bias = None if linear.bias is None else linear.bias.detach()
    if layer_format.format == "fp8":
        scale = fp8_scale(float(weight.abs().amax()), f"{name}, weight", headroom=1)
        packed = quantize_fp8(weight, torch.tensor(scale, device=weight.device))
        return PackedLinear(name, layer_format, packed, fp8_scale(amax, f"{name}, input"), bias)
    if layer_format.format != "nvfp4":
        raise ValueError(f"{name}: {layer_format.format} is no quantized format")
    pre_scale = down = up = None
    if layer_format.awq:
        if rows_MK is None or not rows_MK.numel():
            raise CalibrationError(f"{name}: AWQ needs sampled inputs and the calibration has none; calibrate again with --rows above 0")
        pre_scale, weight = _smooth(linear, rows_MK)
        amax = float((channel_amax_K.to(pre_scale) * pre_scale).amax())
    if layer_format.lowrank:
        down, up = low_rank(weight, layer_format.lowrank)
        weight = weight - up @ down
    packed_weight = _pack(weight, layer_format)
    return PackedLinear(name, layer_format, packed_weight, nvfp4_scale(amax, f"{name}, input"), bias, pre_scale, down, up)


def _quantized(weight: Tensor, quantizer: dict[str, Any], algorithm: Any, forward: Any = None) -> nn.Module:
    """modelopt's quantized linear layer of a weight (which it may overwrite)."""
    mtq = modelopt_cpu.load()
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    holder = nn.ModuleDict({"layer": linear})
    rules = [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "layer.weight_quantizer", "cfg": quantizer, "enable": True},
        {"quantizer_name": "layer.input_quantizer", "cfg": _NVFP4, "enable": forward is not None},
    ]
    with _silence():
        mtq.quantize(holder, {"quant_cfg": rules, "algorithm": algorithm}, forward)
    return holder["layer"]


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    # It prints a line and draws a bar for every layer.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _pack(weight: Tensor, layer_format: LayerFormat) -> Nvfp4Tensor:
    """NVFP4 weight with the scales that modelopt's calibration chose."""
    layer: Any = _quantized(weight, *_WEIGHTS[layer_format.scales])
    tensors = require("modelopt.torch.quantization.qtensor").NVFP4QTensor
    scales, global_scale = tensors.get_weights_scaling_factor_from_quantizer(layer.weight_quantizer, weight)
    values, scales, global_scale = tensors.quantize(weight, BLOCK, scales, global_scale)
    return Nvfp4Tensor(values._quantized_data, scales, global_scale.reshape(()).float())


def _smooth(linear: nn.Linear, rows_MK: Tensor) -> tuple[Tensor, Tensor]:
    """AWQ: input scales (K,) and the weight (N, K) that goes with them."""
    weight = linear.weight.detach()
    rows = rows_MK.to(weight)
    layer: Any = _quantized(weight.clone(), _NVFP4, "awq_lite", lambda holder: holder["layer"](rows))
    return layer.input_quantizer.pre_quant_scale.detach().reshape(-1).to(weight.dtype), layer.weight.detach()


def low_rank(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors down (R, K) and up (N, R), in weight's dtype, of its best approximation of that rank."""
    modelopt_cpu.load()
    svd = require("modelopt.torch.quantization.model_calib").svd
    up, down = svd(weight, rank)
    return down, up


def _input_quantizer(packed: PackedLinear, device: torch.device) -> nn.Module:
    """Rounds activations as modelopt does: NVFP4 by its own quantizer, FP8 without it, so that such a recipe is judged where it is not installed."""
    if packed.layer_format.format == "fp8":
        return _Fp8Rounding(packed.input_scale)
    modelopt_cpu.load()
    quantization = require("modelopt.torch.quantization")
    quantizer: Any = quantization.nn.TensorQuantizer(quantization.config.QuantizerAttributeConfig(**_NVFP4))
    quantizer.amax = torch.tensor(packed.input_limit)
    return quantizer.to(device)


class _Fp8Rounding(nn.Module):
    """x rounded to e4m3 under a static scale, a power of two, in x's dtype; what exceeds its range saturates."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return to_e4m3(x / self.scale).to(x.dtype) * self.scale


class FakeQuantLinear(nn.Module):
    """A packed layer computed in the model's dtype: dequantized weight, activations rounded as modelopt rounds them."""

    def __init__(self, packed: PackedLinear, dtype: torch.dtype) -> None:
        super().__init__()
        self.packed = packed
        self.weight = nn.Parameter(packed.weight.dequantize(torch.float32).to(dtype), requires_grad=False)
        self.input_quantizer = _input_quantizer(packed, self.weight.device)
        self._peak: Tensor | None = None

    @property
    def peak(self) -> float:
        """Largest magnitude that the quantizer was given so far."""
        return 0.0 if self._peak is None else float(self._peak)

    def forward(self, x: Tensor) -> Tensor:
        packed = self.packed
        if packed.pre_scale is not None:
            x = x * packed.pre_scale
        largest = x.detach().abs().amax()
        self._peak = largest if self._peak is None else torch.maximum(self._peak, largest)
        y = F.linear(self.input_quantizer(x), self.weight, packed.bias)
        if packed.down is not None and packed.up is not None:
            y = y + F.linear(F.linear(x, packed.down), packed.up)
        return y
