"""Distances between a reference and what approximates it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor


def sqnr(reference: Tensor, approximation: Tensor) -> float:
    """Signal to quantization noise in dB, 10 log10(|a|^2 / |a - b|^2); infinite for equal tensors."""
    noise = float((reference.double() - approximation.double()).square().sum())
    signal = float(reference.double().square().sum())
    return decibel(signal, noise)


def decibel(signal: float, noise: float) -> float:
    """10 log10(signal / noise) of two energies; infinite without noise, minus infinite without signal."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine of the angle between two tensors taken as vectors."""
    x, y = a.double().flatten(), b.double().flatten()
    return float(x @ y / (x.norm() * y.norm()).clamp_min(1e-300))


def slope(values: Sequence[float]) -> float:
    """Least-squares slope of values over their index; 0 for fewer than two. Values that are not finite give NaN."""
    if len(values) < 2:
        return 0.0
    if not np.isfinite(values).all():
        return math.nan
    return float(np.polyfit(np.arange(len(values)), np.asarray(values, dtype=np.float64), 1)[0])
