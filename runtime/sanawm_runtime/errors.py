"""Every exception that the runtime raises on purpose."""

from __future__ import annotations

from sanawm.errors import BundleError, CameraError, EngineError, InputError, UserError

__all__ = ["BundleError", "CameraError", "Cancelled", "EngineError", "InputError", "StreamClosed", "StreamEnded", "UserError"]


class Cancelled(UserError):
    """A step or a start was given up because another thread asked for it; the stream is as it was before."""


class StreamEnded(InputError):
    """The model's time axis has no room for another chunk."""


class StreamClosed(UserError):
    """A stream, or its world, was closed."""
