"""Products of one block against cuBLASLt, in every format."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from kernel_timing import Case, main

from sanawm_kernels.gemm import cublaslt, interface, naive
from sanawm_kernels.gemm import triton as fused
from sanawm_kernels.gemm.naive import Epilogue, Operand
from sanawm_kernels.quant.formats import quantize_fp8, quantize_nvfp4

T, S, C, G = 3, 880, 2240, 6720
M = T * S
# Name: columns, depth, and whether the epilogue is the block's own (else none).
SHAPES = {
    "merged": (15744, C), "qkv": (3 * C, C), "square": (C, C), "ffn_in": (2 * G, C), "ffn_out": (C, G), "text_kv": (2 * C, C),
}  # fmt: skip
ROWS = {"text_kv": 300}
BYTES = {"bf16": 2.0, "fp8": 1.0, "fp8_rows": 1.0, "nvfp4": 0.5625}
NEEDS = {"bf16": 80, "fp8": 89, "fp8_rows": 89, "nvfp4": 100}


INCLUDES = (
    "product with its epilogue by the table's choice; cuBLASLt's epilogue is a second launch",
    "product with its epilogue; the floor is that of traffic alone",
)


def arithmetic(kind: str, flops: int) -> int:
    """Work that the floor counts: torch has no NVFP4 product whose peak could be measured."""
    return 0 if kind == "nvfp4" else flops


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").bfloat16()


def operand(x: torch.Tensor, kind: str) -> Operand:
    if kind == "bf16":
        return x
    if kind == "nvfp4":
        return quantize_nvfp4(x, layout="swizzled" if torch.cuda.get_device_capability()[0] == 10 else "rows")
    return quantize_fp8(x, per_row=kind == "fp8_rows")


def residual(columns: int) -> Epilogue:
    stream = rand(1, M, columns)
    return Epilogue(bias=rand(columns), frame_gate=rand(1, T, columns), residual=stream, extra=rand(1, M, columns), dtype=torch.bfloat16)


def gated(columns: int) -> Epilogue:
    return Epilogue(bias=rand(columns), add=rand(1, M, columns), gate=rand(1, M, columns), dtype=torch.bfloat16)


EPILOGUES: dict[str, tuple[Callable[[int], Epilogue], int]] = {
    "plain": (lambda columns: Epilogue(dtype=torch.bfloat16), 0),
    "residual": (residual, 2),
    "gated": (gated, 2),
    "silu": (lambda columns: Epilogue(bias=rand(columns), silu=True, dtype=torch.bfloat16), 0),
}


def _product(name: str, kind: str, finish: str) -> Case:
    columns, depth = SHAPES[name]
    rows = ROWS.get(name, M)
    make, reads = EPILOGUES[finish]

    def prepare() -> tuple[Callable[[], Any], dict[str, Callable[[], Any]]]:
        x, weight, epilogue = operand(rand(1, rows, depth), kind), operand(rand(columns, depth), kind), make(columns)
        if kind == "nvfp4":
            return lambda: fused.linear(x, weight, epilogue), {}
        peers = {"cublaslt": lambda: cublaslt.linear(x, weight, epilogue), "triton": lambda: fused.linear(x, weight, epilogue)}
        return lambda: interface.linear(x, weight, epilogue), peers

    traffic = BYTES[kind] * (rows * depth + columns * depth) + 2 * rows * columns * (1 + reads)
    return Case(
        f"gemm.{name}.{finish}.{kind}", prepare, int(traffic), arithmetic(kind, 2 * rows * columns * depth), "bf16" if kind == "bf16" else "fp8",
        INCLUDES[kind == "nvfp4"], NEEDS[kind],
    )  # fmt: skip


def _temporal(kind: str) -> Case:
    def prepare() -> tuple[Callable[[], Any], dict[str, Callable[[], Any]]]:
        scale = torch.tensor(0.02, device="cuda")

        def coded(x: torch.Tensor) -> Operand:
            return x if kind == "bf16" else quantize_fp8(x, scale) if kind == "fp8" else quantize_nvfp4(x, scale)

        s, before = rand(1, M, C), rand(1, S, C)
        weight, codes = operand(rand(C, 3 * C), kind), coded(s)
        if kind == "nvfp4":
            weight = quantize_nvfp4(rand(C, 3 * C))
        carried = fused.carried_products(coded(before), weight, torch.bfloat16)
        epilogue = Epilogue(add=s, residual=rand(1, M, C), frame_gate=rand(1, T, C), dtype=torch.bfloat16)
        peers: dict[str, Callable[[], Any]] = {}
        if kind == "bf16":
            shifted = torch.cat((torch.cat((before, s[:, :-S]), 1), s, torch.cat((s[:, S:], torch.zeros_like(before)), 1)), -1)
            peers = {
                "cublaslt, views built": lambda: cublaslt.linear(shifted, weight, epilogue),
                "torch": lambda: naive.temporal_conv(s, weight, T, carried, epilogue),
            }
        return lambda: fused.temporal_conv(codes, weight, T, carried, epilogue), peers

    traffic = BYTES[kind] * (M * C + 3 * C * C) + 2 * (M * C * 3 + S * C)
    return Case(
        f"gemm.temporal.{kind}",
        prepare,
        int(traffic),
        arithmetic(kind, (6 * M - 4 * S) * C * C),
        "bf16" if kind == "bf16" else "fp8",
        "convolution, residuals, gate",
        NEEDS[kind],
    )


def cases() -> Sequence[Case]:
    """Every shape bare, the block's epilogues on the square shape and the FFN's input, and the temporal convolution."""
    found = [_product(name, kind, "plain") for name, kind in product(SHAPES, BYTES)]
    found += [_product("square", kind, finish) for finish, kind in product(("residual", "gated"), BYTES)]
    found += [_product("ffn_in", kind, "silu") for kind in BYTES]
    return found + [_temporal(kind) for kind in ("bf16", "fp8", "nvfp4")]


if __name__ == "__main__":
    main("kernels-gemm", cases, "products of one block, 3 frames at 704x1280, random inputs")
