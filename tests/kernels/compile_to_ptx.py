"""Compiles kernel variants in a process without the interpreter and reports on their code.

Standard input: a list of {"package", "name", "target", "find"}; standard output: the same list with "count" (how often each text of "find" occurs in
the PTX), "spills" (bytes of local memory a thread), "registers" and "shared" (bytes).
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from sanawm_kernels.aot import elf
from sanawm_kernels.aot.compile import load, options, source_of
from sanawm_kernels.aot.spec import KernelVariant, ModelSizes


def find(package: str, name: str, target: int) -> KernelVariant:
    variants = importlib.import_module(f"sanawm_kernels.{package}.variants").variants(ModelSizes(), target)
    return next(v for v in variants if v.name == name)


def report(variant: KernelVariant, target: int, texts: list[str]) -> dict[str, Any]:
    source = source_of(variant, load(variant.kernel))
    built = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options(variant, None))
    code = elf.read(built.asm["cubin"])
    ptx = built.asm["ptx"]
    return {
        "count": [ptx.count(t) for t in texts],
        "spills": code.stack_bytes,
        "reason": variant.spill_reason,
        "registers": code.registers,
        "shared": int(built.metadata.shared),
    }


if __name__ == "__main__":
    requests = json.load(sys.stdin)
    for request in requests:
        request |= report(find(request["package"], request["name"], request["target"]), request["target"], request["find"])
    json.dump(requests, sys.stdout)
