"""bfloat16 in numpy, which has no such dtype: values are carried as float32 and stored as uint16 bits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def to_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round float32 to bfloat16, nearest even; NaN stays NaN. Same shape, uint16."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16).astype(np.uint16)
    # ascontiguousarray makes an array of one out of a scalar.
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).reshape(np.shape(values))


def from_bits(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """bfloat16 bits to float32, exact. Same shape."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def round_to(values: NDArray[np.float32], dtype: str) -> NDArray[np.float32]:
    """float32 values rounded to what `dtype` ("float32" or "bfloat16") can hold."""
    return from_bits(to_bits(values)) if dtype == "bfloat16" else values
