"""Scratch memory of the gated delta network's kernels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Shapes = dict[str, tuple[tuple[int, ...], str]]


def scratch(batch: int, heads: int, frames: int, tokens: int, head_dim: int, precision: str, settings: Mapping[str, Any]) -> Shapes:
    """Shape and dtype of every scratch buffer of one block, by kernel argument.

    tokens: per frame. settings: the `summarize` tuning row's, for SPLITS.
    Buffers with a leading 2 or 3 hold the camera branch first, then the main branch, then its normaliser. Only the exact modes have float32
    of token size.
    """
    BH, N, D, splits = batch * heads, frames * tokens, head_dim, settings["SPLITS"]
    rows = ((batch, N, heads * D), "float16" if precision == "bf16" else "float32")
    return {
        "main_keys": rows,
        "plain_keys": rows,
        "camera_keys": rows,
        "camera_values": rows,
        "growth": ((batch, N, heads), "float32"),
        "q_scale": ((2, batch, N), "float32"),
        "gram": ((3, BH, frames, splits, D, D), "float32"),
        "update": ((2, BH, frames, splits, D, D), "float32"),
        "column": ((BH, frames, splits, D), "float32"),
        "inflation": ((BH, frames, splits), "float32"),
        "decay_sums": ((BH, frames, splits), "float32"),
        "applied": ((2, BH, frames, D, D), "float16" if precision == "bf16" else "float32"),
        "applied_scale": ((2, BH, frames, D), "float32"),
        "applied_z": ((BH, frames, D), "float32"),
    }
