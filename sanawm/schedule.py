"""Chunk grid, attention windows and noise schedules; arrays may be numpy or torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from sanawm.config import StreamConfig
from sanawm.errors import InputError

TRAIN_STEPS = 1000


@dataclass(frozen=True)
class Chunk:
    """Latent frames [start, end) of a stream. `kind` picks the compiled program: first, second or steady."""

    index: int
    start: int
    end: int

    @property
    def frames(self) -> int:
        return self.end - self.start

    @property
    def kind(self) -> str:
        return ("first", "second", "steady")[min(self.index, 2)]


def first_chunk_frames(latent_frames: int, chunk_frames: int = 3) -> int:
    """Frames of chunk 0, which takes the remainder: 4 when latent_frames is 3k + 1."""
    if latent_frames < 1:
        raise InputError(f"a clip needs at least one latent frame, found {latent_frames}")
    return min(latent_frames, chunk_frames + latent_frames % chunk_frames)


def chunk_grid(latent_frames: int, chunk_frames: int = 3) -> list[Chunk]:
    """Chunks of a clip: 121 latent frames -> [0, 4), [4, 7), ..., [118, 121)."""
    end = first_chunk_frames(latent_frames, chunk_frames)
    chunks = [Chunk(0, 0, end)]
    while end < latent_frames:
        chunks.append(Chunk(len(chunks), end, end + chunk_frames))
        end += chunk_frames
    return chunks


def window(chunk: int, cached_chunks: int = 2, sink: bool = True) -> list[int]:
    """Indices of the chunks whose keys chunk `chunk` attends to besides its own, oldest first.

    With a sink, {0, chunk-1} at the default two cached chunks; without, the last `cached_chunks`; -1 keeps all.
    """
    past = list(range(chunk))
    if cached_chunks < 0 or len(past) <= cached_chunks:
        return past
    if sink:
        recent = past[len(past) - (cached_chunks - 1) :] if cached_chunks > 1 else []
        return [0, *(i for i in recent if i)]
    return past[len(past) - cached_chunks :] if cached_chunks else []


def latent_frames(pixel_frames: int) -> int:
    """Latent frames of a clip of 8k + 1 pixel frames."""
    if pixel_frames < 1 or (pixel_frames - 1) % 8:
        lower = max(pixel_frames - 1, 0) // 8 * 8 + 1
        raise InputError(f"the number of frames must be 8k + 1, found {pixel_frames}; use {lower} or {lower + 8}")
    return (pixel_frames - 1) // 8 + 1


def pixel_frames(latents: int) -> int:
    """Pixel frames that `latents` latent frames decode to: the first gives one, each later one eight."""
    return 8 * (latents - 1) + 1


def timestep_row(timestep: int, chunk: Chunk) -> np.ndarray:
    """(1, T) float32 timesteps of a chunk; the clip's very first latent frame is clean and always sees 0."""
    row = np.full((1, chunk.frames), float(timestep), np.float32)
    if chunk.start == 0:
        row[0, 0] = 0.0
    return row


def step_sizes(stream: StreamConfig) -> list[float]:
    """sigma - sigma_next of each denoising step."""
    return [a - b for a, b in zip(stream.sigmas[:-1], stream.sigmas[1:])]


def euler_step(latents: Any, velocity: Any, size: float, chunk: Chunk) -> Any:
    """x - (sigma - sigma_next) * v on (B, C, T, h, w) arrays of one kind; the clip's first frame stays bit-identical. A new array."""
    updated = latents - size * velocity
    if chunk.start == 0:
        updated[:, :, 0] = latents[:, :, 0]
    return updated


def bidirectional_sigmas(steps: int = 60, shift: float = 9.8) -> np.ndarray:
    """(steps + 1,) float32 sigmas of the teacher's flow-match Euler sampler, ending in 0; the shift acts twice at the lower end."""
    if steps < 1:
        raise InputError(f"the sampler needs at least one step, found {steps}")
    raw = (np.arange(1, TRAIN_STEPS + 1, dtype=np.float32) / np.float32(TRAIN_STEPS))[::-1]
    trained = shift * raw / (1 + (shift - 1) * raw)
    u = np.linspace(float(trained[0]) * TRAIN_STEPS, float(trained[-1]) * TRAIN_STEPS, steps) / TRAIN_STEPS
    sigmas = shift * u / (1 + (shift - 1) * u)
    return np.append(sigmas, 0.0).astype(np.float32)
