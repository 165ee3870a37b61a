"""One entry to the products, whichever backend serves them."""

from __future__ import annotations

import torch
from torch import Tensor

from sanawm_kernels.gemm import cublaslt, table
from sanawm_kernels.gemm import triton as fused
from sanawm_kernels.gemm.naive import Epilogue, Operand, Product
from sanawm_kernels.tokenwise.launch import target


def choice(x: Operand, weight: Operand, epilogue: Epilogue | None = None) -> table.Choice:
    """The table's choice for this product on the device it is on."""
    epilogue = epilogue or Epilogue()
    (a, values), (_, weights) = fused.describe(x, "linear x"), fused.describe(weight, "linear weight")
    depth = values.shape[-1] * (2 if a.kind == "nvfp4" else 1)
    rows = values.numel() // values.shape[-1]
    plain = not cublaslt.has_more(epilogue)
    return table.choose(target(values.device), a.kind, rows, weights.shape[0], depth, plain=plain, glu=epilogue.glu)


def linear(x: Operand, weight: Operand, epilogue: Epilogue | None = None, *, backend: table.Backend | None = None) -> Product:
    """See `naive.linear`. `backend` overrides the table; a backend that cannot serve the product raises ValueError, none is substituted."""
    if backend not in (None, "triton", "cublaslt"):
        raise ValueError(f"linear: expected a backend of triton or cublaslt, found {backend!r}")
    chosen = choice(x, weight, epilogue)
    if (backend or chosen.backend) == "cublaslt":
        return cublaslt.linear(x, weight, epilogue)
    return fused.linear(x, weight, epilogue)


def temporal_conv(s: Operand, weight: Operand, frames: int, carried: Tensor | None = None, epilogue: Epilogue | None = None) -> Product:
    """See `naive.temporal_conv`. Always Triton: cuBLASLt cannot read three shifted views as one operand."""
    return fused.temporal_conv(s, weight, frames, carried, epilogue)


def carried_products(s: Operand, weight: Operand, dtype: torch.dtype) -> Tensor:
    """See `naive.carried_products`. Always Triton: it reads a third of the weight where it lies."""
    return fused.carried_products(s, weight, dtype)
