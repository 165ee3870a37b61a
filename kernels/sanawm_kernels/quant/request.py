"""What a fused operation writes beside, or instead of, its plain output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sanawm_kernels.quant.formats import BLOCK, Fp8Tensor, Layout, Nvfp4Tensor, quantize_fp8, quantize_nvfp4

Kind = Literal["fp8", "fp8_rows", "nvfp4"]


@dataclass(frozen=True)
class Quantize:
    """A request for quantized rows, the operand of the next product.

    `scale` (): the calibrated float32 scale of "fp8", or global scale of "nvfp4"; None for "fp8_rows", which measures each row. `layout` of NVFP4
    block scales; `keep` asks for the plain output as well. What is quantized is the plain output, after its rounding to the output dtype.
    """

    kind: Kind
    scale: Tensor | None = None
    layout: Layout = "rows"
    keep: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("fp8", "fp8_rows", "nvfp4"):
            raise ValueError(f"expected a quantization kind of fp8, fp8_rows or nvfp4, found {self.kind!r}")
        if (self.kind == "fp8_rows") != (self.scale is None):
            raise ValueError(f"{self.kind} takes {'no scale' if self.kind == 'fp8_rows' else 'a calibrated scale'}, found {self.scale}")
        if self.scale is not None and (self.scale.dim() or self.scale.dtype != torch.float32):
            raise ValueError(f"expected a float32 scale of shape (), found {tuple(self.scale.shape)} {self.scale.dtype}")


class Output(NamedTuple):
    """Plain rows, quantized rows, or both; what was not asked for is None."""

    plain: Tensor | None
    quantized: Fp8Tensor | Nvfp4Tensor | None


def quantize_rows(x: Tensor, request: Quantize | None) -> Output:
    """The plain definition: x as it is, its quantized form, or both."""
    if request is None:
        return Output(x, None)
    quantized: Fp8Tensor | Nvfp4Tensor
    if request.kind == "nvfp4":
        quantized = quantize_nvfp4(x, request.scale, layout=request.layout)
    else:
        quantized = quantize_fp8(x, request.scale, per_row=request.kind == "fp8_rows")
    return Output(x if request.keep else None, quantized)


def empty_quantized(shape: tuple[int, ...], request: Quantize | None, device: torch.device) -> Fp8Tensor | Nvfp4Tensor | None:
    """Uninitialised tensors for quantized rows of `shape` (..., K); raises ValueError where K does not fit the format.

    Swizzled scales start as zeros when the rows do not fill the last 128-row tile, since kernels write real rows only.
    """
    if request is None:
        return None
    rows, width = shape[:-1], shape[-1]
    if request.kind != "nvfp4":
        scale = torch.empty(rows, dtype=torch.float32, device=device) if request.scale is None else request.scale
        return Fp8Tensor(torch.empty(shape, dtype=torch.float8_e4m3fn, device=device), scale)
    if width % BLOCK:
        raise ValueError(f"expected rows of a multiple of {BLOCK} elements for NVFP4, found {width}")
    assert request.scale is not None
    count, blocks = torch.Size(rows).numel(), width // BLOCK
    packed = torch.empty(*rows, width // 2, dtype=torch.uint8, device=device)
    if request.layout == "rows":
        scales = torch.empty(*rows, blocks, dtype=torch.float8_e4m3fn, device=device)
    else:
        whole = count % 128 == 0 and blocks % 4 == 0
        make = torch.empty if whole else torch.zeros
        scales = make(-(-count // 128), -(-blocks // 4), 32, 4, 4, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
    return Nvfp4Tensor(packed, scales, request.scale, request.layout)
