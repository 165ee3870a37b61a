"""Samplers in torch: distilled self-forcing, and the teacher's bidirectional and chunk-causal flow Euler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from sanawm.camera.rope import rope_time
from sanawm.config import StreamConfig
from sanawm.model.dit.features import CameraFeatures, TextFeatures
from sanawm.model.dit.model import SanaWM
from sanawm.model.dit.state import ChunkState
from sanawm.schedule import Chunk, bidirectional_sigmas, chunk_grid, euler_step, step_sizes, timestep_row, window


@dataclass(frozen=True)
class StreamStep:
    """What one chunk produced: its final latents (B, C_in, T, h, w), the velocity of each denoising step, and the state of the clean pass."""

    chunk: Chunk
    latents: Tensor
    velocities: tuple[Tensor, ...]
    state: ChunkState


def camera_features(model: SanaWM, camera_BT20: Tensor, plucker: Tensor, start: int, end: int) -> CameraFeatures:
    """Features of latent frames [start, end) from the whole clip's camera_conditions and chunk_plucker."""
    cos, sin = rope_time(np.arange(start, end), model.config)
    device = camera_BT20.device
    tables = (torch.from_numpy(t).to(device) for t in (cos, sin))
    return model.encode_camera(camera_BT20[:, start:end], plucker[:, :, start:end], *tables)


def sink_of(state: ChunkState) -> ChunkState:
    """The sink's part that stays in the window: attention keys and values, nothing that only its neighbour needs."""
    return tuple(replace(b, s=None, z=None, s_cam=None, k_tail=None, cam_tail=None) for b in state)


@torch.no_grad()
def stream(
    model: SanaWM, noise: Tensor, text: TextFeatures, camera_BT20: Tensor, plucker: Tensor, config: StreamConfig | None = None
) -> Iterator[StreamStep]:
    """Distilled self-forcing sampler, one chunk at a time.

    noise (B, C_in, T, h, w) with frame 0 already the clean first latent; its dtype is the dtype latents are rounded to after every step.
    Four denoising steps read the cached state, then a clean pass at t = 0 writes it. States outside the window are dropped.
    """
    config = config or StreamConfig()
    states: dict[int, ChunkState] = {}
    for chunk in chunk_grid(noise.shape[2], config.chunk_frames):
        camera = camera_features(model, camera_BT20, plucker, chunk.start, chunk.end)
        past = [states[i] for i in window(chunk.index, config.cached_chunks, config.sink)]
        x = noise[:, :, chunk.start : chunk.end].clone()
        velocities = []
        for timestep, size in zip(config.timesteps, step_sizes(config)):
            row = torch.from_numpy(timestep_row(timestep, chunk)).to(x.device).expand(x.shape[0], -1)
            velocity, _ = model(x, row, text, camera, past=past)
            velocities.append(velocity)
            x = euler_step(x.float() if x.dtype != torch.float64 else x, velocity.to(torch.promote_types(x.dtype, torch.float32)), size, chunk)
            x = x.to(noise.dtype)
        clean = torch.zeros(x.shape[0], chunk.frames, device=x.device)
        _, state = model(x, clean, text, camera, past=past, commit=True)
        states = {i: states[i] for i in window(chunk.index + 1, config.cached_chunks, config.sink) if i in states}
        for i in states:
            if i < chunk.index:
                states[i] = sink_of(states[i])
        states[chunk.index] = state
        yield StreamStep(chunk, x, tuple(velocities), state)


@torch.no_grad()
def bidirectional(
    model: SanaWM,
    noise: Tensor,
    text: TextFeatures,
    camera: CameraFeatures,
    *,
    negative: TextFeatures | None = None,
    guidance: float = 5.0,
    steps: int = 60,
    shift: float = 9.8,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """The teacher's flow Euler sampler with classifier-free guidance over the whole clip.

    noise (1, C_in, T, h, w) with frame 0 the clean first latent. The model embeds truncated timesteps, the update uses the exact sigmas in
    float32 and rounds to noise's dtype each step. `negative` is needed when guidance is not 1.
    """
    if guidance != 1.0 and negative is None:
        raise ValueError("guidance other than 1 needs the negative prompt's features")
    sigmas = bidirectional_sigmas(steps, shift)
    mask_dtype = getattr(torch, model.config.condition_mask_dtype)
    T = noise.shape[2]
    keep = torch.zeros(T, dtype=mask_dtype, device=noise.device)
    keep[0] = 1
    x = noise.clone()
    for i in range(steps):
        sigma, sigma_next = float(sigmas[i]), float(sigmas[i + 1])
        row = torch.full((1, T), sigma * 1000, device=x.device)
        row[0, 0] = 0
        velocity, _ = model(x, row, text, camera)
        if negative is not None and guidance != 1.0:
            unconditional, _ = model(x, row, negative, camera)
            velocity = unconditional.float() + guidance * (velocity.float() - unconditional.float())
        stepped = (x.float() - (sigma - sigma_next) * velocity.float()).to(x.dtype)
        # In bfloat16 the comparison rounds sigma - 1e-6 up to 1 at the first steps, which leaves every frame where it was.
        moves = torch.tensor(sigma - 1e-6, dtype=mask_dtype, device=x.device) < 1 - keep
        x = torch.where(moves[None, None, :, None, None], stepped, x)
        if progress:
            progress(i + 1, steps)
    return x


@torch.no_grad()
def chunk_causal(
    model: SanaWM,
    noise: Tensor,
    text: TextFeatures,
    camera_BT20: Tensor,
    plucker: Tensor,
    *,
    negative: TextFeatures | None = None,
    guidance: float = 5.0,
    steps: int = 60,
    shift: float = 9.8,
    chunk_frames: int = 3,
) -> Tensor:
    """The intermediate teacher's staggered sampler: chunk i starts at global step int(i * steps / chunks) and finished chunks stay at t = 0.

    Only the prefix of chunks already started is evaluated, densely, with block-causal masks. Arguments as in `bidirectional` and `stream`.
    """
    if guidance != 1.0 and negative is None:
        raise ValueError("guidance other than 1 needs the negative prompt's features")
    sigmas = bidirectional_sigmas(steps, shift)
    grid = chunk_grid(noise.shape[2], chunk_frames)
    starts = [int(c.index * steps / len(grid)) for c in grid]
    x = noise.clone()
    for step in range(starts[-1] + steps):
        active = [c for c, s in zip(grid, starts) if s <= step]
        end = active[-1].end
        level = [min(step - starts[c.index], steps) for c in active]
        row = torch.cat([torch.full((1, c.frames), float(sigmas[n]) * 1000, device=x.device) for c, n in zip(active, level)], 1)
        row[0, 0] = 0
        camera = camera_features(model, camera_BT20, plucker, 0, end)
        lengths = [c.frames for c in active]
        velocity, _ = model(x[:, :, :end], row, text, camera, chunks=lengths)
        if negative is not None and guidance != 1.0:
            unconditional, _ = model(x[:, :, :end], row, negative, camera, chunks=lengths)
            velocity = unconditional.float() + guidance * (velocity.float() - unconditional.float())
        for c, n in zip(active, level):
            if n < steps:
                size = float(sigmas[n]) - float(sigmas[n + 1])
                part = x[:, :, c.start : c.end].float()
                x[:, :, c.start : c.end] = euler_step(part, velocity[:, :, c.start : c.end].float(), size, c).to(x.dtype)
    return x
