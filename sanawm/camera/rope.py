"""Rotary tables for time, rows and columns.

Shapes: T latent frames, h rows, w columns.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sanawm.config import DiTConfig


class RopeTable(NamedTuple):
    """Cosines and sines, (positions, pairs) float32 each."""

    cos: NDArray[np.float32]
    sin: NDArray[np.float32]


def rope_time(frame_indices: ArrayLike, config: DiTConfig) -> RopeTable:
    """Rotations of the time pairs at absolute latent frame indices.

    frame_indices: (T,) integers. Returns cos and sin, (T, t_pairs) float32, of angle t * theta ** (-m / t_pairs). Angles are computed in
    float64 for the frames at hand instead of looked up, so a stream has no longest length and frame 100,000 is as exact as frame 1.
    """
    return _table(frame_indices, config.rope_pairs[0], config.rope_theta)


def rope_grid(config: DiTConfig) -> tuple[RopeTable, RopeTable]:
    """Rotations of the row and column pairs of the latent grid: tables of (h, side_pairs) and (w, side_pairs), float32."""
    _, row_pairs, column_pairs = config.rope_pairs
    return _table(np.arange(config.height), row_pairs, config.rope_theta), _table(np.arange(config.width), column_pairs, config.rope_theta)


def _table(positions: ArrayLike, pairs: int, theta: float) -> RopeTable:
    frequencies = theta ** (-np.arange(pairs) / pairs)
    angles = np.asarray(positions, dtype=np.float64)[:, None] * frequencies
    return RopeTable(np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32))
