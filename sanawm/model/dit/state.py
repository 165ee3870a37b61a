"""What a finished chunk leaves behind for later chunks."""

from __future__ import annotations

from dataclasses import dataclass, fields

from torch import Tensor


@dataclass(frozen=True)
class BlockState:
    """State of one transformer block after the clean pass over a chunk of n tokens (T frames of S tokens).

    GDN blocks: s (B, H, D, D) value x key, z (B, H, D), s_cam (B, H, D, D), all in at least float32; k_tail and cam_tail (B, 3, S, C), the
    last raw key frames of the main and camera short convolutions. Softmax blocks: k, v, cam_k, cam_v (B, n, H, D), normalised and
    position-encoded. Both: ffn_tail (B, S, C), the last frame of the FFN's spatial output.
    """

    ffn_tail: Tensor
    s: Tensor | None = None
    z: Tensor | None = None
    s_cam: Tensor | None = None
    k_tail: Tensor | None = None
    cam_tail: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    cam_k: Tensor | None = None
    cam_v: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are present, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}


# One BlockState a block.
ChunkState = tuple[BlockState, ...]
