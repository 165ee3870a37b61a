"""Launch of a kernel variant on tensors, and the checks that wrappers share.

The variant that is compiled ahead of time is the one launched here: its constants, its grid rule, its warps.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from sanawm_kernels.aot.compile import block_layout
from sanawm_kernels.aot.spec import KernelVariant, block_of
from sanawm_kernels.tokenwise.plans import NATIVE_FP4

TYPE_NAMES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.uint8: "u8",
    torch.bool: "i8",
}


@cache
def _kernel(path: str) -> Any:
    module, name = path.split(":")
    return getattr(importlib.import_module(module), name)


def _described(kernel: Any, x: Tensor, kind: str, block: tuple[int, ...]) -> Any:
    """Descriptor of x in blocks of that shape; leading axes are one."""
    rows_of = x.view(-1, *x.shape[x.dim() - len(block) + 1 :]) if x.dim() > len(block) else x
    facts = (rows_of, list(rows_of.shape), list(rows_of.stride()), list(block))
    if isinstance(kernel, GluonJITFunction):
        return GluonDescriptor(*facts, block_layout(kind, block))
    return TensorDescriptor(*facts)


def launch(variant: KernelVariant, arguments: Mapping[str, Any], **grid_sizes: int) -> None:
    """Run `variant` on the current device. Of `arguments` those that its signature names are taken: kernels with descriptors need no strides."""
    if missing := sorted(set(variant.signature) - set(arguments)):
        raise TypeError(f"{variant.name}: {', '.join(missing)} not given")
    kernel = _kernel(variant.kernel)
    arguments = {name: arguments[name] for name in variant.signature}
    first = next(value for value in arguments.values() if isinstance(value, Tensor))
    if first.device.type == "cpu" and isinstance(kernel, triton.JITFunction):
        raise ValueError(
            f"{variant.name}: expected tensors on a GPU, found them on the CPU; move them, or set TRITON_INTERPRET=1 before the first import"
        )
    integers = {name: value for name, value in arguments.items() if isinstance(value, int)}
    grid = variant.launch_grid({**integers, **grid_sizes})
    for name, entry in variant.signature.items():
        if (described := block_of(entry)) is not None:
            arguments[name] = _described(kernel, arguments[name], *described)
    with torch.cuda.device_of(first):
        kernel[grid](**arguments, **variant.constexprs, num_warps=variant.num_warps, num_stages=variant.num_stages, **variant.options)


@cache
def target(device: torch.device) -> int:
    """Compute capability (major * 10 + minor) of a device; 0 for the CPU, where only the interpreter runs."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a device; 2 for the CPU, where persistent kernels still have more than one program."""
    count: int = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    return count


def native_fp4(device: torch.device) -> bool:
    """Whether the device has e2m1 conversion instructions."""
    return target(device) >= NATIVE_FP4


def type_name(x: Tensor, what: str, allowed: tuple[str, ...] = ("bf16", "fp16", "fp32")) -> str:
    """Triton's name of x's dtype; ValueError unless it is one of `allowed`."""
    name = TYPE_NAMES.get(x.dtype)
    if name not in allowed:
        raise ValueError(f"{what}: expected a dtype of {', '.join(allowed)}, found {x.dtype}")
    assert name is not None
    return name


def same(what: str, *tensors: Tensor | None) -> None:
    """ValueError unless all given tensors share dtype and device."""
    given = [t for t in tensors if t is not None]
    for t in given[1:]:
        if t.dtype != given[0].dtype or t.device != given[0].device:
            raise ValueError(
                f"{what}: expected tensors of one dtype and device, found {given[0].dtype} on {given[0].device} and {t.dtype} on {t.device}"
            )


def rows(x: Tensor, what: str) -> Tensor:
    """x (..., C) as (R, C) without a copy; ValueError where elements of a row are not adjacent or rows are not evenly spaced."""
    if x.dim() < 2 or x.stride(-1) != 1:
        raise ValueError(f"{what}: expected rows of adjacent elements, found shape {tuple(x.shape)} with strides {x.stride()}")
    try:
        return x.view(-1, x.shape[-1])
    except RuntimeError:
        raise ValueError(
            f"{what}: expected evenly spaced rows, found shape {tuple(x.shape)} with strides {x.stride()}; copy the tensor first"
        ) from None


def matching_rows(x: Tensor, shape: tuple[int, ...], what: str) -> Tensor:
    """`rows` of a tensor that must have `shape`."""
    if tuple(x.shape) != shape:
        raise ValueError(f"{what}: expected shape {shape}, found {tuple(x.shape)}")
    return rows(x, what)


def vector(x: Tensor, length: int, what: str) -> Tensor:
    """A contiguous (length,) tensor, as it is."""
    if tuple(x.shape) != (length,) or not x.is_contiguous():
        raise ValueError(f"{what}: expected a contiguous vector of {length}, found shape {tuple(x.shape)} with strides {x.stride()}")
    return x
