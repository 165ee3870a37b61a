"""The lean runtime: opens a bundle and streams video, without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sanawm_runtime.stream import Chunk, Stream
    from sanawm_runtime.world import World

__all__ = ["Chunk", "Stream", "World"]

_HOMES = {"World": "world", "Stream": "stream", "Chunk": "stream"}


def __getattr__(name: str) -> Any:
    # Loaded on first use, so that reading a bundle's manifest does not pay for the rest.
    if name not in _HOMES:
        raise AttributeError(f"module 'sanawm_runtime' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(f"sanawm_runtime.{_HOMES[name]}"), name)
