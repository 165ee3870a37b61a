"""Token-wise kernels of one block against plain torch, eager and compiled, and against a copy of their minimal traffic."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from kernel_timing import Case, main

from sanawm_kernels.quant.request import Quantize
from sanawm_kernels.tokenwise import naive
from sanawm_kernels.tokenwise import triton as fused

T, S, C, G, H, D = 3, 880, 2240, 6720, 20, 112
GRID = (22, 40)
N = T * S
MB = 2 * N * C  # one (N, C) tensor in bf16
# Bytes of the quantized rows, relative to bf16.
WIDTH = {"fp8": 0.5, "fp8_rows": 0.5, "nvfp4": 0.28125}
NEEDS = {"fp8": 89, "fp8_rows": 89, "nvfp4": 89}
Made = tuple[Callable[[], Any], dict[str, Callable[[], Any]]]


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").bfloat16()


def pair(name: str, *args: Any, **kwargs: Any) -> Made:
    """The kernel and the plain definition on the same inputs, the latter eager and compiled."""
    plain = getattr(naive, name)
    compiled = torch.compile(plain, dynamic=False)
    kernel = getattr(fused, name)
    return lambda: kernel(*args, **kwargs), {"torch": lambda: plain(*args, **kwargs), "torch.compile": lambda: compiled(*args, **kwargs)}


def request(kind: str) -> Quantize:
    return Quantize(kind, None if kind == "fp8_rows" else torch.tensor(0.02, device="cuda"))  # type: ignore[arg-type]


def only_kernel(made: Made) -> Made:
    """Without peers: torch has no fused counterpart whose result is comparable."""
    return made[0], {}


def beside_copy(case: Case) -> Case:
    """The case with one more peer: an elementwise kernel that reads and writes as many bytes, half each.

    Launches of some microseconds move less a second than the large copy that floors are computed from; the share of a copy of their own size is the
    share of what the memory gives them.
    """

    def prepare() -> Made:
        call, peers = case.prepare()
        source = rand(case.bytes // 4)
        target = torch.empty_like(source)
        return call, {**peers, "copy of as many bytes": lambda: torch.neg(source, out=target)}

    return replace(case, prepare=prepare)


def tables(pairs: int) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.randn(N, pairs, device="cuda")
    return angle.cos(), angle.sin()


def merged(parts: int) -> list[torch.Tensor]:
    wide = rand(1, N, parts * C + 64)
    return [wide[..., i * C : (i + 1) * C] for i in range(parts)]


def rays() -> tuple[torch.Tensor, torch.Tensor]:
    matrix = torch.randn(1, N, 4, 4, device="cuda")
    return matrix, torch.linalg.inv(matrix).contiguous()


def cases() -> Sequence[Case]:
    """Every token-wise operation of a GDN block and of a softmax block, at 3 frames of 704x1280."""
    row = {"includes": "one launch"}
    found = [
        Case("tokenwise.modulate.bf16", lambda: pair("modulate", rand(1, N, C), rand(1, T, C), rand(1, T, C)), 2 * MB, **row),  # type: ignore[arg-type]
        Case(
            "tokenwise.residual_modulate.bf16",
            lambda: pair("residual_modulate", rand(1, N, C), rand(1, N, C), rand(1, T, C), None, rand(1, T, C), rand(1, T, C)),
            4 * MB,
        ),
        Case("tokenwise.residual.bf16", lambda: pair("residual", rand(1, N, C), rand(1, N, C), rand(1, T, C), rand(1, N, C)), 4 * MB),
        Case("tokenwise.output_gate.bf16", lambda: pair("output_gate", *merged(2), rand(1, N, C)), 4 * MB),
        Case("tokenwise.rms_norm.bf16", lambda: pair("rms_norm", rand(1, N, C), rand(C), 1e-6), 2 * MB),
        Case("tokenwise.depthwise_glu.bf16", lambda: pair("depthwise_glu", rand(1, N, 2 * G), rand(9, 2 * G), rand(2 * G), GRID), 2 * N * 3 * G),
        Case(
            "tokenwise.rope_heads.bf16", lambda: pair("rope_heads", *merged(2), rand(C), rand(C), *tables(D // 2), H, 1e-5),
            4 * MB + 8 * N * D // 2,
        ),
        Case(
            "tokenwise.ucpe_heads.bf16", lambda: pair("ucpe_heads", *merged(3), rand(C), rand(C), *rays(), *tables(D // 4), H, 1e-5),
            6 * MB + 128 * N + 8 * N * D // 4,
        ),
        Case(
            "tokenwise.inverse_ucpe.bf16", lambda: pair("inverse_ucpe", rand(1, N, H, D), rays()[0], *tables(D // 4)),
            2 * MB + 64 * N + 8 * N * D // 4,
        ),
        Case(
            "tokenwise.transpose_values.fp8", lambda: only_kernel(pair("fp8_values_transposed", rand(1, N, H, D), torch.tensor(0.02, device="cuda"))),
            MB + MB // 2, needs=89,
        ),
    ]  # fmt: skip
    for kind, width in WIDTH.items():
        found.append(
            Case(
                f"tokenwise.modulate.{kind}",
                lambda kind=kind: only_kernel(pair("modulate", rand(1, N, C), rand(1, T, C), rand(1, T, C), quantize=request(kind))),  # type: ignore[misc]
                int(MB * (1 + width)), needs=NEEDS[kind],
            )
        )  # fmt: skip
        found.append(
            Case(
                f"tokenwise.output_gate.{kind}",
                lambda kind=kind: only_kernel(pair("output_gate", *merged(2), rand(1, N, C), quantize=request(kind))),  # type: ignore[misc]
                int(MB * (3 + width)), needs=NEEDS[kind],
            )
        )  # fmt: skip
        if kind != "fp8_rows":
            found.append(
                Case(
                    f"tokenwise.depthwise_glu.{kind}",
                    lambda kind=kind: only_kernel(  # type: ignore[misc]
                        pair("depthwise_glu", rand(1, N, 2 * G), rand(9, 2 * G), rand(2 * G), GRID, quantize=request(kind))
                    ),
                    int(2 * N * G * (2 + width)), needs=NEEDS[kind],
                )
            )  # fmt: skip
    return [beside_copy(case) for case in found]


if __name__ == "__main__":
    main("kernels-tokenwise", cases, "token-wise kernels of one block, 3 frames at 704x1280, random inputs")
