"""Quantized layers that trace to the nodes which TensorRT compiles to FP4 and FP8 matrix products.

NVFP4 (what nvidia-modelopt's own exporter writes, and TensorRT documents): the weight is FLOAT4E2M1 with an e4m3 scale for every 16 elements
and a float32 scalar, dequantized by two DequantizeLinear nodes; the activation goes through TRT_FP4DynamicQuantize, whose scalar must be a
constant, and the same two nodes. FP8: QuantizeLinear and DequantizeLinear with a scale of the graph's dtype. Buffers carry the names of
modelopt's checkpoints.

Shapes: M rows, N output features, K input features, R rank of a correction.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sanawm_calibration.quantize import PackedLinear
from sanawm_kernels.quant.formats import BLOCK, Fp8Tensor, Nvfp4Tensor

# Domain in which TensorRT's parser and modelopt know the operator, and FLOAT8E4M3FN in ONNX's enumeration.
TRT_DOMAIN = "trt"
DYNAMIC_QUANTIZE = "TRT_FP4DynamicQuantize"
_E4M3 = 17
_OPSET = 23


def _dequantize(x: Tensor, scale: Tensor, shape: tuple[int, ...], block: bool = False) -> Tensor:
    """DequantizeLinear; the result has the scale's dtype."""
    attributes: dict[str, Any] = {"axis": -1, "block_size": BLOCK} if block else {}
    return torch.onnx.ops.symbolic("DequantizeLinear", (x, scale), attrs=attributes, dtype=scale.dtype, shape=shape, version=_OPSET)


class _QuantizedLinear(nn.Module):
    """What both formats share: input scaling, low-rank correction, bias."""

    bias: Tensor | None
    pre_quant_scale: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None

    def __init__(self, packed: PackedLinear, dtype: torch.dtype) -> None:
        super().__init__()
        rest = {"bias": packed.bias, "pre_quant_scale": packed.pre_scale, "lora_a": packed.down, "lora_b": packed.up}
        for name, tensor in rest.items():
            self.register_buffer(name, None if tensor is None else tensor.detach().cpu().to(dtype))

    def product(self, x: Tensor) -> Tensor:
        """The quantized product without bias."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if self.pre_quant_scale is not None:
            x = x * self.pre_quant_scale
        y = self.product(x)
        if self.bias is not None:
            y = y + self.bias
        if self.lora_a is not None and self.lora_b is not None:
            y = y + F.linear(F.linear(x, self.lora_a), self.lora_b)
        return y


class Nvfp4Linear(_QuantizedLinear):
    """W4A4. weight (N, K) e2m1, weight_scale (N, K/16) e4m3, weight_scale_2 and input_scale () float32."""

    weight: Tensor
    weight_scale: Tensor
    weight_scale_2: Tensor
    input_scale: Tensor

    def __init__(self, packed: PackedLinear, dtype: torch.dtype) -> None:
        super().__init__(packed, dtype)
        weight = packed.weight
        assert isinstance(weight, Nvfp4Tensor)
        self.shape = (weight.packed.shape[0], weight.packed.shape[1] * 2)
        self.register_buffer("weight", weight.packed.cpu().contiguous().view(torch.float4_e2m1fn_x2))
        self.register_buffer("weight_scale", weight.block_scales().cpu().contiguous())
        self.register_buffer("weight_scale_2", weight.global_scale.detach().cpu().float().clone())
        self.register_buffer("input_scale", torch.tensor(packed.input_scale, dtype=torch.float32))

    def product(self, x: Tensor) -> Tensor:
        N, K = self.shape
        steps = _dequantize(self.weight_scale, self.weight_scale_2, (N, K // BLOCK))
        weight = _dequantize(self.weight, steps, (N, K), block=True).transpose(0, 1).to(x.dtype)
        lead = tuple(x.shape[:-1])
        codes, scales = torch.onnx.ops.symbolic_multi_out(
            f"{TRT_DOMAIN}::{DYNAMIC_QUANTIZE}",
            (x, self.input_scale),
            attrs={"axis": -1, "block_size": BLOCK, "scale_type": _E4M3},
            # torch counts pairs of elements, the exporter writes the number of elements.
            dtypes=(torch.float4_e2m1fn_x2, torch.float8_e4m3fn),
            shapes=((*lead, K // 2), (*lead, K // BLOCK)),
            version=1,
        )
        steps = _dequantize(scales, self.input_scale, (*lead, K // BLOCK))
        return torch.matmul(_dequantize(codes, steps, (*lead, K), block=True).to(x.dtype), weight)


class Fp8Linear(_QuantizedLinear):
    """W8A8 per tensor. weight (N, K) e4m3, weight_scale and input_scale () in the graph's dtype: powers of two, so exact in any."""

    weight: Tensor
    weight_scale: Tensor
    input_scale: Tensor
    zero_point: Tensor

    def __init__(self, packed: PackedLinear, dtype: torch.dtype) -> None:
        super().__init__(packed, dtype)
        weight = packed.weight
        assert isinstance(weight, Fp8Tensor)
        self.register_buffer("weight", weight.values.cpu().contiguous())
        self.register_buffer("weight_scale", weight.scale.detach().cpu().to(dtype).reshape(()))
        self.register_buffer("input_scale", torch.tensor(packed.input_scale, dtype=dtype))
        # Only its type matters: it makes QuantizeLinear write e4m3.
        self.register_buffer("zero_point", torch.zeros((), dtype=torch.float8_e4m3fn))

    def product(self, x: Tensor) -> Tensor:
        shape = tuple(x.shape)
        inputs = (x, self.input_scale, self.zero_point)
        codes = torch.onnx.ops.symbolic("QuantizeLinear", inputs, dtype=torch.float8_e4m3fn, shape=shape, version=_OPSET)
        weight = _dequantize(self.weight, self.weight_scale, tuple(self.weight.shape))
        return torch.matmul(_dequantize(codes, self.input_scale, shape), weight.transpose(0, 1))


def export_module(packed: PackedLinear, dtype: torch.dtype) -> nn.Module:
    """The layer as it is traced; `dtype` is the graph's."""
    return Nvfp4Linear(packed, dtype) if packed.layer_format.format == "nvfp4" else Fp8Linear(packed, dtype)
