"""Plain torch definitions of the products.

Shapes: B batch, T frames, S tokens a frame, M = B*T*S rows, K input and N output channels. Rows are (B, T*S, K) tensors, frame-major.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sanawm_kernels.numerics import wide
from sanawm_kernels.quant.formats import Fp8Tensor, Nvfp4Tensor
from sanawm_kernels.quant.request import Quantize, quantize_rows

Operand = Tensor | Fp8Tensor | Nvfp4Tensor


@dataclass(frozen=True)
class Epilogue:
    """What happens to a product before it is stored, in this order.

    bias (N,), or (2N,) with `glu`; `silu` of the result, or `glu`: value * SiLU(gate) of a product twice as wide, values first; `add` (B, T*S, N)
    is added; SiLU(`gate`) (B, T*S, N) multiplies; `frame_gate` (B, T, N) multiplies; `residual` and `extra` (B, T*S, N) are added. Everything in
    at least float32, rounded once to `dtype` (the operands' own where they are not quantized). `squares` asks for the rows' sums of squares and
    `quantize` for quantized rows; both are of the rounded result.
    """

    bias: Tensor | None = None
    silu: bool = False
    glu: bool = False
    add: Tensor | None = None
    gate: Tensor | None = None
    frame_gate: Tensor | None = None
    residual: Tensor | None = None
    extra: Tensor | None = None
    squares: bool = False
    quantize: Quantize | None = None
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.silu and self.glu:
            raise ValueError("epilogue: expected silu or glu, found both; glu applies its own")


class Product(NamedTuple):
    """Plain rows (B, T*S, N), quantized rows, and partial sums of squares (B, T*S, parts), None where not asked for."""

    plain: Tensor | None
    quantized: Fp8Tensor | Nvfp4Tensor | None
    squares: Tensor | None


def numbers(x: Operand, dtype: torch.dtype | None = None) -> Tensor:
    """The numbers an operand stands for, in `dtype` or at least float32."""
    if isinstance(x, Tensor):
        return wide(x) if dtype is None else x.to(dtype)
    return x.dequantize(dtype or torch.float32)


def output_dtype(x: Operand, epilogue: Epilogue) -> torch.dtype:
    """Raises ValueError where the operand is quantized and the epilogue does not say."""
    if epilogue.dtype is not None:
        return epilogue.dtype
    if not isinstance(x, Tensor):
        raise ValueError("product: expected Epilogue.dtype, the output's, with quantized operands")
    return x.dtype


def apply(product: Tensor, epilogue: Epilogue, dtype: torch.dtype) -> Product:
    """The epilogue on a product in float32 or float64, (B, T*S, N) or, with `glu`, (B, T*S, 2N)."""
    y = product if epilogue.bias is None else product + epilogue.bias.to(product.dtype)
    if epilogue.glu:
        value, gate = y.chunk(2, -1)
        y = value * F.silu(gate)
    elif epilogue.silu:
        y = F.silu(y)
    if epilogue.add is not None:
        y = y + epilogue.add.to(y.dtype)
    if epilogue.gate is not None:
        y = y * F.silu(epilogue.gate.to(y.dtype))
    if epilogue.frame_gate is not None:
        y = (y.unflatten(1, (epilogue.frame_gate.shape[1], -1)) * epilogue.frame_gate.to(y.dtype).unsqueeze(2)).flatten(1, 2)
    if epilogue.residual is not None:
        y = y + epilogue.residual.to(y.dtype)
    if epilogue.extra is not None:
        y = y + epilogue.extra.to(y.dtype)
    plain = y.to(dtype)
    squares = wide(plain).square().sum(-1, keepdim=True) if epilogue.squares else None
    return Product(*quantize_rows(plain, epilogue.quantize), squares)


def linear(x: Operand, weight: Operand, epilogue: Epilogue | None = None) -> Product:
    """x (B, T*S, K) @ weight (N, K)^T with an epilogue."""
    epilogue = epilogue or Epilogue()
    dtype = output_dtype(x, epilogue)
    exact = torch.float64 if dtype == torch.float64 else None
    return apply(F.linear(numbers(x, exact), numbers(weight, exact)), epilogue, dtype)


def carried_products(s: Operand, weight: Operand, dtype: torch.dtype | None = None) -> Tensor:
    """What the frame after s (B, S, C) adds for it: s @ the first third of weight (N, 3C), (B, S, N) in `dtype` or at least float32."""
    x = numbers(s, torch.float64 if dtype == torch.float64 else None)
    product = F.linear(x, numbers(weight, x.dtype)[:, : x.shape[-1]])
    return product if dtype is None else product.to(dtype)


def temporal_conv(s: Operand, weight: Operand, frames: int, carried: Tensor | None = None, epilogue: Epilogue | None = None) -> Product:
    """Dense three-tap convolution along time as a product with [frame before | frame | frame after] (SANA-WM paper, arXiv 2605.15178).

    s (B, T*S, C); weight (N, 3C), input index tap * C + channel. Before the first and after the last frame come zeros; `carried` (B, S, N), the
    `carried_products` of the frame before the first, is added to the first frame. The residual of the FFN is `epilogue.add` = s.
    """
    epilogue = epilogue or Epilogue()
    dtype = output_dtype(s, epilogue)
    exact = torch.float64 if dtype == torch.float64 else None
    x = numbers(s, exact).unflatten(1, (frames, -1))
    zero = torch.zeros_like(x[:, :1])
    shifted = torch.cat((torch.cat((zero, x[:, :-1]), 1), x, torch.cat((x[:, 1:], zero), 1)), -1)
    product = F.linear(shifted.flatten(1, 2), numbers(weight, exact).to(x.dtype))
    if carried is not None:
        product[:, : carried.shape[1]] += carried.to(product.dtype)
    return apply(product, epilogue, dtype)
