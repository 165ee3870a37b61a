"""What must hold of the transformer whatever its weights, exactly, in float64."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sanawm.config import DiTConfig
from sanawm.model.dit import BlockState, ChunkState, SanaWM
from sanawm.model.sampler import camera_features

SMALL = DiTConfig(
    in_channels=4, hidden=32, depth=2, softmax_every=2, head_dim=16, cross_heads=2, caption_channels=8, text_tokens=5, height=2, width=3
)
SEEDS = st.integers(0, 2**16)
# Sums of a few hundred terms of size one in float64; a float32 step anywhere gives 1e-7.
EXACT = 1e-11

quick = settings(max_examples=12, deadline=None)


@pytest.fixture(scope="module")
def model_of(make_model: Any) -> Any:
    """model_of(config, seed): one of three float64 transformers, kept."""
    return functools.cache(lambda config, seed: make_model(config, seed, torch.float64))


def inputs(model_of: Any, make_clip: Any, seed: int, frames: int, config: DiTConfig = SMALL) -> tuple[SanaWM, Any]:
    """A transformer and a float64 clip for it."""
    return model_of(config, seed % 3), make_clip(config, frames, seed, torch.float64)


def evaluate(model: SanaWM, clip: Any, timestep: Tensor, start: int = 0, end: int | None = None, **options: Any) -> tuple[Tensor, ChunkState]:
    """Velocity and state of latent frames [start, end) of a clip."""
    end = clip.latents.shape[2] if end is None else end
    camera = camera_features(model, clip.camera, clip.plucker, start, end)
    with torch.no_grad():
        return model(clip.latents[:, :, start:end], timestep[:, start:end], clip.features(model), camera, **options)


def timesteps(frames: int, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 1001, (1, frames)).astype(np.float32))


def states_equal(a: ChunkState, b: ChunkState, tolerance: float) -> None:
    for left, right in zip(a, b, strict=True):
        ours, theirs = left.tensors(), right.tensors()
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], atol=tolerance, rtol=0)


def empty_state(config: DiTConfig) -> ChunkState:
    """The state before the first frame, written out: zeros, and no keys."""
    C, H, D, S = config.hidden, config.heads, config.head_dim, config.tokens_per_frame

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(1, *shape, dtype=torch.float64)

    def block(index: int) -> BlockState:
        if config.is_softmax(index):
            return BlockState(zeros(S, C), **{name: zeros(0, H, D) for name in ("k", "v", "cam_k", "cam_v")})
        tail = zeros(config.conv_kernel - 1, S, C)
        return BlockState(zeros(S, C), s=zeros(H, D, D), z=zeros(H, D), s_cam=zeros(H, D, D), k_tail=tail, cam_tail=tail)

    return tuple(block(i) for i in range(config.depth))


@quick
@given(SEEDS, st.integers(1, 6))
def test_one_chunk_from_an_empty_state_is_dense(model_of: Any, make_clip: Any, seed: int, frames: int) -> None:
    model, clip = inputs(model_of, make_clip, seed, frames)
    row = timesteps(frames, seed)
    dense, after = evaluate(model, clip, row)
    streamed, after_streamed = evaluate(model, clip, row, past=[empty_state(SMALL)])
    torch.testing.assert_close(streamed, dense, atol=EXACT, rtol=0)
    states_equal(after_streamed, after, EXACT)


@quick
@given(SEEDS, st.lists(st.integers(1, 4), min_size=1, max_size=4), st.booleans(), st.booleans())
def test_streaming_with_every_chunk_cached_is_block_causal(
    model_of: Any, make_clip: Any, seed: int, chunks: list[int], clamp: bool, carry: bool
) -> None:
    config = replace(SMALL, rms_clamp=clamp, camera_conv_tail=carry)
    frames = sum(chunks)
    model, clip = inputs(model_of, make_clip, seed, frames, config)
    row = timesteps(frames, seed)
    dense, after = evaluate(model, clip, row, chunks=chunks)
    assert dense is not None
    past: list[ChunkState] = []
    start = 0
    for length in chunks:
        velocity, state = evaluate(model, clip, row, start, start + length, past=past)
        torch.testing.assert_close(velocity, dense[:, :, start : start + length], atol=EXACT, rtol=0)
        past.append(state)
        start += length
    last, whole = past[-1], after
    for i, (left, right) in enumerate(zip(last, whole, strict=True)):
        if not config.is_softmax(i):
            states_equal((left,), (right,), EXACT)
        else:
            tokens = chunks[-1] * config.tokens_per_frame
            newest = {name: t[:, -tokens:] for name, t in right.tensors().items() if name != "ffn_tail"}
            states_equal((left,), (replace(right, **newest),), EXACT)


@quick
@given(SEEDS, st.lists(st.integers(1, 3), min_size=2, max_size=4), st.data())
def test_no_chunk_sees_a_later_one(model_of: Any, make_clip: Any, seed: int, chunks: list[int], data: st.DataObject) -> None:
    model, clip = inputs(model_of, make_clip, seed, sum(chunks))
    row = timesteps(sum(chunks), seed)
    changed = data.draw(st.integers(1, len(chunks) - 1), "changed chunk")
    start = sum(chunks[:changed])
    before, _ = evaluate(model, clip, row, chunks=chunks)
    latents = clip.latents.clone()
    latents[:, :, start + chunks[changed] - 1] += 1
    after, _ = evaluate(model, replace(clip, latents=latents), row, chunks=chunks)
    torch.testing.assert_close(after[:, :, :start], before[:, :, :start], atol=0, rtol=0)
    # Within its chunk every frame sees the last one, and so does every later chunk.
    moved = (after - before).abs().amax((0, 1, 3, 4))[start:]
    assert (moved > 1e-6).all()


@quick
@given(SEEDS, st.integers(1, 4))
def test_states_are_read_only(model_of: Any, make_clip: Any, seed: int, frames: int) -> None:
    model, clip = inputs(model_of, make_clip, seed, 3 + frames)
    row = timesteps(3 + frames, seed)
    _, past = evaluate(model, clip, row, 0, 3, commit=True)
    kept = [{name: t.clone() for name, t in block.tensors().items()} for block in past]
    versions = [{name: t._version for name, t in block.tensors().items()} for block in past]
    evaluate(model, clip, row, 3, past=[past])
    evaluate(model, clip, row, 3, past=[past], commit=True)
    for block, values, version in zip(past, kept, versions, strict=True):
        for name, tensor in block.tensors().items():
            assert torch.equal(tensor, values[name]) and tensor._version == version[name]


@pytest.mark.parametrize("frames", [3, 4])
def test_the_clean_pass_leaves_the_state_of_a_whole_forward(model_of: Any, make_clip: Any, frames: int) -> None:
    model, clip = inputs(model_of, make_clip, 5, frames + 3)
    row = torch.zeros(1, frames + 3)
    past: list[ChunkState] = []
    for start, end in ((0, frames), (frames, frames + 3)):
        velocity, whole = evaluate(model, clip, row, start, end, past=past)
        nothing, committed = evaluate(model, clip, row, start, end, past=past, commit=True)
        assert nothing is None and velocity is not None
        states_equal(committed, whole, 0)
        past = [committed]


def motion(seed: int) -> np.ndarray:
    """A random rigid motion of about ten units."""
    rng = np.random.default_rng(seed)
    q, r = np.linalg.qr(rng.normal(size=(3, 3)))
    q *= np.sign(np.diag(r))
    q[:, 0] *= np.linalg.det(q)
    out = np.eye(4)
    out[:3, :3], out[:3, 3] = q, rng.normal(size=3) * 5
    return out


@quick
@given(SEEDS)
def test_moving_the_world_leaves_a_softmax_block_alone(model_of: Any, make_clip: Any, make_path: Any, seed: int) -> None:
    def change(softmax_every: int, clamp: bool) -> float:
        config = replace(SMALL, depth=1, softmax_every=softmax_every, rms_clamp=clamp)
        model, clip = inputs(model_of, make_clip, seed, 4, config)
        # Packed poses are float32, and their rotations orthonormal to 1e-7 only.
        poses = make_path(25, seed)[::8]
        velocities = []
        for path in (poses, motion(seed) @ poses):
            camera = clip.camera.clone()
            camera[..., :16] = torch.from_numpy(path).reshape(1, 4, 16)
            velocities.append(evaluate(model, replace(clip, camera=camera), timesteps(4, seed))[0])
        before, after = velocities
        return float((after - before).abs().max())

    # Float64 arithmetic on translations of about ten units.
    assert change(1, False) < 1e-10
    # The clamp measures transformed vectors, and the delta rule their inner products: neither is the same in another frame.
    assert change(1, True) > 1e-4 and change(2, False) > 1e-4


def test_text_beyond_the_mask_does_not_matter(model_of: Any, make_clip: Any) -> None:
    model, clip = inputs(model_of, make_clip, 1, 3)
    mask = torch.tensor([[True, True, True, False, False]])
    text = clip.text.clone()
    text[:, 3:] += 5
    row = timesteps(3, 1)
    base, _ = evaluate(model, replace(clip, mask=mask), row)
    padded, _ = evaluate(model, replace(clip, mask=mask, text=text), row)
    seen, _ = evaluate(model, replace(clip, mask=~mask | mask, text=text), row)
    assert torch.equal(padded, base) and (seen - base).abs().max() > 1e-3


def test_the_timestep_is_truncated(model_of: Any, make_clip: Any) -> None:
    model, clip = inputs(model_of, make_clip, 2, 3)
    whole, part, next_one = (evaluate(model, clip, torch.full((1, 3), t))[0] for t in (998.0, 998.9999, 999.0))
    assert torch.equal(whole, part) and not torch.equal(whole, next_one)


def test_each_frame_has_its_own_timestep(model_of: Any, make_clip: Any) -> None:
    """Modulation is a row a frame: another t on the last frame of a chunk-by-chunk clip leaves the frames before it alone."""
    model, clip = inputs(model_of, make_clip, 3, 3)
    row = torch.tensor([[0.0, 500.0, 500.0]])
    other = torch.tensor([[0.0, 500.0, 900.0]])
    before, _ = evaluate(model, clip, row, chunks=(1, 1, 1))
    after, _ = evaluate(model, clip, other, chunks=(1, 1, 1))
    assert torch.equal(before[:, :, :2], after[:, :, :2]) and (before[:, :, 2] - after[:, :, 2]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [((1, 4, 3, 2, 4), {}, "latent grid of 2x3, found 2x4"), ((1, 4, 3, 2, 3), {"chunks": (2, 2)}, "must sum to the 3 frames")],
)
def test_wrong_shapes(shape: tuple[int, ...], options: dict[str, Any], message: str, make_model: Any, make_clip: Any) -> None:
    model, clip = make_model(SMALL), make_clip(SMALL, 3)
    camera = camera_features(model, clip.camera, clip.plucker, 0, 3)
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(shape), torch.zeros(1, 3), clip.features(model), camera, **options)
