"""Triton's interpreter with exact low-precision arithmetic, for tests on a CPU.

As shipped (3.6 to 3.9) the interpreter truncates float32 to bfloat16, loses carries when it rounds to e4m3, multiplies the raw bits of bfloat16
operands, and does not know block-scaled products. Inside `exact()` those operations follow IEEE rounding, so that kernels run with the dtypes they
have on a GPU. Nothing else of the interpreter is touched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np
import torch
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

from sanawm_kernels.quant.triton import ROUND_PAIR

NARROW: dict[Any, Any] = {tl.bfloat16: ml_dtypes.bfloat16, tl.float8e4nv: ml_dtypes.float8_e4m3fn}
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def _values(handle: Any) -> np.ndarray:
    """Numbers of a handle, whose narrow floats are stored as integers."""
    narrow = NARROW.get(handle.dtype.scalar)
    return handle.data if narrow is None else np.ascontiguousarray(handle.data).view(narrow)


def _cast(handle: Any, dtype: Any) -> Any:
    target = NARROW.get(dtype.scalar)
    values = _values(handle)
    if target is None:
        return interpreter.TensorHandle(values.astype(interpreter._get_np_dtype(dtype)), dtype.scalar)
    values = values.astype(np.float32)
    if dtype.scalar == tl.float8e4nv:
        values = np.clip(values, -448, 448)  # cvt.rn.satfinite
    return interpreter.TensorHandle(values.astype(target).view(interpreter._get_np_dtype(dtype)), dtype.scalar)


def _scaled(handle: Any, scale: Any, packed: bool, axis: int) -> np.ndarray:
    values = _values(handle).astype(np.float32)
    if packed:
        pair = np.stack((E2M1[handle.data & 0xF], E2M1[handle.data >> 4]), axis + 1)
        values = pair.reshape(*(n * 2 if i == axis else n for i, n in enumerate(handle.data.shape)))
    if scale is None:
        return values
    factors = np.ascontiguousarray(scale.data).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    factors = factors if axis == 1 else factors.T
    return values * np.repeat(factors, values.shape[axis] // factors.shape[axis], axis)


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill what the enclosed code allocates with NaN (integers: the largest value), so that an element a kernel forgets shows up."""
    settings: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = fill


@contextmanager
def exact() -> Iterator[None]:
    """Run the enclosed launches with exact bfloat16, e4m3 and NVFP4 arithmetic (products and sums in float64, rounded once to float32)."""
    builder = interpreter.InterpreterBuilder
    plain_cast = builder.cast_impl

    def cast_impl(self: Any, src: Any, dst: Any) -> Any:
        narrow = src.dtype.scalar in NARROW or dst.scalar in NARROW
        return _cast(src, dst) if narrow else plain_cast(self, src, dst)

    def fp_to_fp(self: Any, src: Any, dst: Any, rounding: Any) -> Any:
        return _cast(src, dst)

    def inline_asm(self: Any, text: str, constraints: str, values: list[Any], types: list[Any], is_pure: bool, pack: int) -> Any:
        if text != ROUND_PAIR.value:
            raise NotImplementedError(f"the interpreter does not know these instructions:\n{text}")
        results = [_cast(_cast(values[0], tl.bfloat16), tl.float32)]
        return SimpleNamespace(get_result=results.__getitem__)

    def dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        total = _values(a).astype(np.float64) @ _values(b).astype(np.float64) + d.data
        return interpreter.TensorHandle(total.astype(d.data.dtype), d.dtype.scalar)

    def dot_scaled(
        self: Any, a: Any, a_scale: Any, a_format: Any, b: Any, b_scale: Any, b_format: Any, fast: bool, a_pack: bool, b_pack: bool, d: Any
    ) -> Any:
        left, right = _scaled(a, a_scale, "E2M1" in str(a_format), 1), _scaled(b, b_scale, "E2M1" in str(b_format), 0)
        total = left.astype(np.float64) @ right.astype(np.float64) + d.data
        return interpreter.TensorHandle(total.astype(np.float32), d.dtype.scalar)

    plain_scaled = TritonSemantic.dot_scaled

    def dot_scaled_formats(self: Any, *args: Any) -> Any:
        # The interpreter hands the formats over as plain strings, which its own front end does not expect.
        return plain_scaled(self, *(tl.constexpr(a) if isinstance(a, str) else a for a in args))

    with (
        mock.patch.object(TritonSemantic, "dot_scaled", dot_scaled_formats),
        mock.patch.object(builder, "cast_impl", cast_impl),
        mock.patch.object(builder, "create_fp_to_fp", fp_to_fp),
        mock.patch.object(builder, "create_inline_asm", inline_asm, create=True),
        mock.patch.object(builder, "create_dot", dot),
        mock.patch.object(builder, "create_dot_scaled", dot_scaled, create=True),
    ):
        yield
