"""The lean runtime: opens a bundle and streams video, without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sanawm_runtime.chunk import Chunk
    from sanawm_runtime.errors import BundleError, CameraError, Cancelled, EngineError, InputError, StreamClosed, StreamEnded, UserError
    from sanawm_runtime.live import Live, LiveStats
    from sanawm_runtime.stream import Stream
    from sanawm_runtime.world import World

# A test pins these names: a product may rely on them.
__all__ = [
    "BundleError",
    "CameraError",
    "Cancelled",
    "Chunk",
    "EngineError",
    "InputError",
    "Live",
    "LiveStats",
    "Stream",
    "StreamClosed",
    "StreamEnded",
    "UserError",
    "World",
]

_HOMES = {"World": "world", "Stream": "stream", "Chunk": "chunk", "Live": "live", "LiveStats": "live"}


def __getattr__(name: str) -> Any:
    # Loaded on first use, so that reading a bundle's manifest does not pay for the rest.
    if name not in __all__:
        raise AttributeError(f"module 'sanawm_runtime' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(f"sanawm_runtime.{_HOMES.get(name, 'errors')}"), name)
