"""Scratch memory of the gated delta network's kernels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Shapes = dict[str, tuple[tuple[int, ...], str]]


def scratch(batch: int, heads: int, frames: int, tokens: int, head_dim: int, dtype: str, precision: str, settings: Mapping[str, Any]) -> Shapes:
    """Shape and dtype of every scratch buffer of one block, by kernel argument.

    tokens: per frame. dtype: of the projections ("bfloat16" or "float32"). settings: the `summarize` tuning row's, for SPLITS and STORE_KEYS.
    Buffers with a leading 2 or 3 hold the camera branch first, then the main branch, then its normaliser. None is float32 of token size
    unless the projections are.
    """
    BH, N, D, splits = batch * heads, frames * tokens, head_dim, settings["SPLITS"]
    keys = (2, batch, N, heads * D) if settings["STORE_KEYS"] else (1,)
    return {
        "keys": (keys, "float16" if dtype == "bfloat16" else "float32"),
        "q_scale": ((2, batch, N), "float32"),
        "k_scale": ((2, batch, N), "float32"),
        "gram": ((3, BH, frames, splits, D, D), "float32"),
        "update": ((2, BH, frames, splits, D, D), "float32"),
        "column": ((BH, frames, splits, D), "float32"),
        "inflation": ((BH, frames, splits), "float32"),
        "applied": ((2, BH, frames, D, D), "float16" if precision == "bf16" else "float32"),
        "applied_scale": ((2, BH, frames, D), "float32"),
        "applied_z": ((BH, frames, D), "float32"),
    }
