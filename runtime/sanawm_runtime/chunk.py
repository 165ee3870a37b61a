"""What one step of a stream produces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Chunk:
    """Frames of one step.

    frames (F, H, W, 3) uint8 RGB; latents (1, C, T, h, w) float32, normalised; poses (F, 4, 4) float64 as given; seconds spent in each stage,
    and `waited_s` waiting for the engine before. `start` is the number of the first frame in its stream. `run` counts how often the model's
    time axis was begun anew. `last` is true if no other chunk can follow. A chunk is a DLPack producer of its frames, without a copy:
    `torch.from_dlpack(chunk)`.
    """

    index: int
    frames: NDArray[np.uint8]
    latents: NDArray[np.float32]
    poses: NDArray[np.float64]
    seconds: dict[str, float]
    waited_s: float = 0.0
    start: int = 0
    run: int = 0
    last: bool = False

    def __dlpack__(self, **options: Any) -> Any:
        return self.frames.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.frames.__dlpack_device__()


def chunk_noise(seed: int, chunk: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Standard normal noise of a chunk, from a counter generator keyed by (seed, chunk): any chunk can be drawn alone."""
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, chunk], np.uint64)))
    return generator.standard_normal(shape, np.float32)
