"""Compilation of one kernel variant to a cubin, without a GPU.

Triton is imported inside the functions: a process that interprets kernels cannot compile them, so builds run in processes of their own.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import tempfile
from collections.abc import Mapping
from typing import Any

from sanawm_kernels.aot import elf
from sanawm_kernels.aot.spec import KernelVariant, block_of

# Part of every cache key: raise it when the way of compiling changes.
RECIPE = 3
# Pointers that Triton appends to every kernel's parameters; null, as no kernel here asks for such memory.
HIDDEN = ("global_scratch", "profile_scratch")
# What the cubin does not say and a cache entry keeps beside it.
FACTS = ("shared_bytes", "descriptors")
# Bytes of dynamic shared memory a block may ask for, by compute capability (CUDA C++ Programming Guide, compute capabilities).
SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 103: 232448, 120: 101376, 121: 101376}
# Architectures on which a hot kernel may not spill.
NO_SPILLS = (90, 120)


class CompileError(Exception):
    """A variant that does not compile, or whose code does not fit its target."""


def load(path: str) -> Any:
    """The kernel at `module:function`."""
    module, name = path.split(":")
    return getattr(importlib.import_module(module), name)


def _compilable(variant: KernelVariant) -> Any:
    import triton

    kernel = load(variant.kernel)
    if not isinstance(kernel, triton.JITFunction):
        raise CompileError(f"{variant.kernel} is not a compilable Triton kernel; unset TRITON_INTERPRET before the first import")
    known, given = set(kernel.arg_names), set(variant.signature) | set(variant.constexprs)
    if known != given:
        raise CompileError(f"{variant.name}: parameters given and taken differ in {', '.join(sorted(known ^ given))}")
    return kernel


def options(variant: KernelVariant, ptx_version: int | None) -> dict[str, Any]:
    """Compiler options of a variant; `ptx_version` 87 makes code that older drivers load (None: the compiler's newest)."""
    # Contraction into fused multiply-adds is asked for, because the default differs between Triton versions.
    chosen = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, "enable_fp_fusion": True, **variant.options}
    return chosen if ptx_version is None else {**chosen, "ptx_version": ptx_version}


def cache_key(variant: KernelVariant, target: int, ptx_version: int | None) -> str:
    """SHA-256 over everything the code depends on: the kernel's source and all it calls, types, constants, options, compiler, target."""
    import triton

    facts = {
        "recipe": RECIPE, "source": _compilable(variant).cache_key, "signature": dict(variant.signature), "constants": _plain(variant.constexprs),
        "options": _plain(options(variant, ptx_version)), "triton": triton.__version__, "target": target,
    }  # fmt: skip
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _plain(values: Any) -> dict[str, Any]:
    """Constants as JSON: numbers, text, truth values and None as they are, anything else (a Triton dtype) by its name."""
    return {name: value if isinstance(value, (int, float, str, bool, type(None))) else str(value) for name, value in values.items()}


def compile_variant(variant: KernelVariant, target: int, ptx_version: int | None = None) -> tuple[bytes, dict[str, Any]]:
    """Cubin of `variant` for compute capability `target`, and its index entry.

    Raises CompileError if it does not compile, needs more shared memory than the target has, is for another architecture than asked, or spills
    where it must not. The same inputs give the same bytes, wherever and whenever they are compiled: file names and lines are left out.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    kernel = _compilable(variant)
    source = source_of(variant, kernel)
    # Triton's own cache is left empty and unused: it knows nothing of the switches below.
    with tempfile.TemporaryDirectory(prefix="sanawm-triton-") as scratch, triton.knobs.cache.scope(), triton.knobs.compilation.scope():
        triton.knobs.cache.dir = scratch
        triton.knobs.compilation.disable_line_info = True
        try:
            built = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options(variant, ptx_version))
        except Exception as error:
            raise CompileError(f"{variant.name} for sm_{target}: {type(error).__name__}: {error}") from error
    cubin: bytes = built.asm["cubin"]
    if built.metadata.global_scratch_size:
        raise CompileError(f"{variant.name}: asks for {built.metadata.global_scratch_size} bytes of scratch memory, which launchers do not give")
    described = [name for name in kernel.arg_names if block_of(variant.signature.get(name, ""))]
    boxes = built.metadata.tensordesc_meta or [] if described else []
    descriptors = [{"argument": name, "box": list(box["block_size"]), "swizzle": box["swizzle"]} for name, box in zip(described, boxes, strict=True)]
    entry = describe(variant, kernel.arg_names, cubin, {"shared_bytes": int(built.metadata.shared), "descriptors": descriptors})
    _check(variant, entry, target)
    return cubin, entry


def source_of(variant: KernelVariant, kernel: Any) -> Any:
    """What Triton compiles: a kernel in its own language, or in Gluon, where descriptors say how blocks lie in shared memory."""
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

    gluon = isinstance(kernel, GluonJITFunction)
    signature, aligned = {}, {}
    for position, name in enumerate(kernel.arg_names):
        entry = variant.signature.get(name, "constexpr")
        if (described := block_of(entry)) is not None:
            signature[name] = f"{entry[:-1]},{block_layout(*described)!r}>" if gluon else entry
            continue
        signature[name], _, promise = entry.partition(":")
        if promise:
            aligned[(position,)] = [["tt.divisibility", int(promise)]]
    constants = {(kernel.arg_names.index(name),): value for name, value in variant.constexprs.items()}
    return (GluonASTSource if gluon else ASTSource)(kernel, signature, constants, aligned)


def block_layout(kind: str, shape: tuple[int, ...]) -> Any:
    """Where the elements of a Gluon kernel's blocks lie in shared memory: as matrix instructions and the tensor memory accelerator want them."""
    from triton.experimental.gluon import language as gl

    element = {"bf16": gl.bfloat16, "fp16": gl.float16, "fp32": gl.float32, "fp8e4nv": gl.float8e4nv}[kind]
    return gl.NVMMASharedLayout.get_default_for(list(shape), element)


def parameters_of(entry: str) -> int:
    """Parameters of the code that stand for an argument: a descriptor is followed by its tensor's sizes and strides."""
    described = block_of(entry)
    return 1 if described is None else 1 + 2 * len(described[1])


def describe(variant: KernelVariant, order: list[str], cubin: bytes, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Index entry of a compiled variant: what a launcher needs, `FACTS` among it, and what the ELF says.

    descriptors: for each argument that is one, in order, the box that one instruction copies and its swizzle (CUtensorMapSwizzle).
    """
    code = elf.read(cubin)
    arguments = [{"name": name, "type": variant.signature[name]} for name in order if name in variant.signature]
    return {
        "name": variant.name,
        "kernel": variant.kernel,
        "entry": code.entry,
        "arch": f"sm_{code.arch}",
        "arguments": arguments,
        "hidden": list(HIDDEN[: len(code.parameters) - sum(parameters_of(a["type"]) for a in arguments)]),
        "parameters": [list(parameter) for parameter in code.parameters],
        "constants": _plain(variant.constexprs),
        "grid": list(variant.grid),
        "grid_sizes": list(variant.grid_sizes),
        "num_warps": code.threads // 32,
        "num_ctas": int(variant.options.get("num_ctas", 1)),
        **{name: facts[name] for name in FACTS},
        "registers": code.registers,
        "spill_bytes": code.stack_bytes,
        "spill_reason": variant.spill_reason,
        "sha256": hashlib.sha256(cubin).hexdigest(),
    }


def _check(variant: KernelVariant, entry: dict[str, Any], target: int) -> None:
    if entry["arch"] != f"sm_{target}":
        raise CompileError(f"{variant.name}: expected code for sm_{target}, the compiler made code for {entry['arch']}")
    wanted, found = sum(parameters_of(a["type"]) for a in entry["arguments"]), len(entry["parameters"])
    if found != wanted + len(HIDDEN):
        raise CompileError(f"{variant.name}: expected {wanted} parameters and {len(HIDDEN)} hidden, found {found}")
    if entry["shared_bytes"] > SHARED_LIMIT[target]:
        raise CompileError(f"{variant.name}: needs {entry['shared_bytes']} bytes of shared memory, sm_{target} has {SHARED_LIMIT[target]}")
    if variant.hot and target in NO_SPILLS and entry["spill_bytes"] and not variant.spill_reason:
        raise CompileError(f"{variant.name}: spills {entry['spill_bytes']} bytes a thread on sm_{target}; tune it, or write its spill_reason")


def in_worker(variant: KernelVariant, target: int, ptx_version: int | None, cache: str | None) -> tuple[bytes, dict[str, Any], bool]:
    """`compile_variant` through the cache directory; the last value says whether the cache had it."""
    path = None if cache is None else os.path.join(cache, (key := cache_key(variant, target, ptx_version))[:2], key)
    if path is not None and (found := _cached(path)) is not None:
        cubin, facts = found
        entry = describe(variant, _compilable(variant).arg_names, cubin, facts)
        _check(variant, entry, target)
        return cubin, entry, True
    cubin, entry = compile_variant(variant, target, ptx_version)
    if path is not None:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=os.path.dirname(path))
        with os.fdopen(handle, "wb") as file:
            file.write(json.dumps({name: entry[name] for name in ("sha256", *FACTS)}).encode() + b"\n" + cubin)
        os.replace(temporary, path)
    return cubin, entry, False


def _cached(path: str) -> tuple[bytes, dict[str, Any]] | None:
    """Cubin and facts of a cache entry; None if there is none or it is damaged."""
    try:
        with open(path, "rb") as file:
            head, cubin = file.readline(), file.read()
        facts = json.loads(head)
        whole = hashlib.sha256(cubin).hexdigest() == facts["sha256"]
        known = {name: facts[name] for name in FACTS}
    except (FileNotFoundError, ValueError, KeyError):
        return None
    return (cubin, known) if whole else None


def start_worker() -> None:
    """Prepare a new process for compiling: never interpreted, interrupts left to the parent."""
    import signal

    os.environ.pop("TRITON_INTERPRET", None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
