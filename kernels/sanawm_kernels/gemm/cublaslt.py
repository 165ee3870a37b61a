"""Products through cuBLASLt, by way of torch; what its epilogues lack follows as one Triton pass.

The product is rounded to the output dtype before that pass, once more than in the fused kernels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sanawm_kernels.gemm import triton as fused
from sanawm_kernels.gemm.naive import Epilogue, Operand, Product, output_dtype
from sanawm_kernels.quant.formats import Fp8Tensor


def has_more(epilogue: Epilogue) -> bool:
    """Whether the epilogue asks for more than a bias."""
    operands = (epilogue.add, epilogue.gate, epilogue.frame_gate, epilogue.residual, epilogue.extra, epilogue.quantize)
    return epilogue.silu or epilogue.glu or epilogue.squares or any(x is not None for x in operands)


def linear(x: Operand, weight: Operand, epilogue: Epilogue | None = None) -> Product:
    """See `naive.linear`. Raises ValueError for NVFP4, for which torch has no stable cuBLASLt entry."""
    epilogue = epilogue or Epilogue()
    dtype = output_dtype(x, epilogue)
    if isinstance(x, Tensor) and isinstance(weight, Tensor):
        product = F.linear(x, weight, epilogue.bias)
    elif isinstance(x, Fp8Tensor) and isinstance(weight, Fp8Tensor):
        product = _fp8(x, weight, epilogue.bias, dtype)
    else:
        raise ValueError(
            f"cublaslt: expected two plain or two FP8 operands, found {type(x).__name__} and {type(weight).__name__}; use the triton backend"
        )
    if not has_more(epilogue):
        return Product(product, None, None)
    fields = {name: getattr(epilogue, name) for name in epilogue.__dataclass_fields__} | {"bias": None}
    return fused.apply(product, Epilogue(**fields), dtype)


def _fp8(x: Fp8Tensor, weight: Fp8Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    rows = x.values.flatten(0, -2)
    a_scale, b_scale = x.scale, weight.scale
    if a_scale.dim() or b_scale.dim():
        # cuBLASLt takes one scale each or one a row each.
        a_scale = a_scale.reshape(-1, 1).expand(rows.shape[0], 1).contiguous()
        b_scale = b_scale.reshape(1, -1).expand(1, weight.values.shape[0]).contiguous()
    out = torch._scaled_mm(rows, weight.values.t(), scale_a=a_scale, scale_b=b_scale, bias=bias, out_dtype=dtype)
    return out.view(*x.values.shape[:-1], -1)
