"""Ranges in NVIDIA's profilers around the stages of a chunk, where the nvtx package is installed."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

_COLOURS = {"denoise": 0x2E5C9E, "commit": 0x7AA6D2, "decode": 0xE28C34, "camera": 0x56967E}
_OTHER = 0x969EAA


@functools.cache
def _library() -> Any:
    try:
        import nvtx
    except ImportError:
        return None
    return nvtx


def mark(name: str) -> AbstractContextManager[Any]:
    """A range named after a stage in the domain "sanawm", seen by Nsight Systems; nothing without the nvtx package."""
    library = _library()
    return nullcontext() if library is None else library.annotate(name, color=_COLOURS.get(name, _OTHER), domain="sanawm")
