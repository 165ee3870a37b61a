"""The diffusion transformer: dense, block-causal, and streaming with explicit state."""

from sanawm.model.dit.features import CameraFeatures, TextFeatures
from sanawm.model.dit.model import SanaWM
from sanawm.model.dit.state import BlockState, ChunkState

__all__ = ["BlockState", "CameraFeatures", "ChunkState", "SanaWM", "TextFeatures"]
