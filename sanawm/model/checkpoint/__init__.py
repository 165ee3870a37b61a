"""Checkpoints: the published layouts, exact checks against the tensor tables, and synthetic ones."""

from sanawm.model.checkpoint.checkpoint import Checkpoint, open_checkpoint

__all__ = ["Checkpoint", "open_checkpoint"]
