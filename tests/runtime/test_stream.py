"""Streams on the tiny bundle: what each chunk is, what decides it, and that torch computes the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from sanawm.camera import camera_conditions, chunk_plucker, default_intrinsics, relative_to_first, to_model_range
from sanawm.errors import CameraError
from sanawm.model.checkpoint import open_checkpoint
from sanawm.model.sampler import stream as torch_stream
from sanawm.model.vae import StreamingDecoder
from sanawm_export.build import open_prompt
from sanawm_export.parts import load_part
from sanawm_runtime import Chunk, World
from sanawm_runtime.stream import chunk_noise

FRAMES = [25, 24, 24, 24]
PROMPT = "a harbour at dawn"
# First latent, latents of each chunk, frames.
Video = tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    """A frame of the model's size."""
    y, x = np.mgrid[0:192, 0:320] / 320
    return (255 * np.stack([x, 0.5 + 0.5 * np.sin(9 * y), 1 - x * y], -1)).astype(np.uint8)


@pytest.fixture(scope="module")
def path(make_path: Callable[[int, int], np.ndarray]) -> np.ndarray:
    """Poses of four chunks that do not start at the identity."""
    whole = make_path(sum(FRAMES) + 10, 4)
    return whole[10:]


@pytest.fixture(scope="module")
def made(tiny_world: World, photo: np.ndarray, path: np.ndarray) -> list[Chunk]:
    """Four chunks, seed 7."""
    return list(tiny_world.start(photo, PROMPT, seed=7).generate(path))


def parts(path: np.ndarray) -> list[np.ndarray]:
    return np.split(path, np.cumsum(FRAMES)[:-1])


def same(a: Chunk, b: Chunk) -> bool:
    return a.frames.tobytes() == b.frames.tobytes() and a.latents.tobytes() == b.latents.tobytes()


def test_chunks(made: list[Chunk], path: np.ndarray, tiny_world: World) -> None:
    dit = tiny_world.config.dit
    assert [c.index for c in made] == [0, 1, 2, 3] and [len(c.frames) for c in made] == FRAMES
    for chunk, poses, latents in zip(made, parts(path), (4, 3, 3, 3), strict=True):
        assert chunk.frames.dtype == np.uint8 and chunk.frames.shape[1:] == (192, 320, 3)
        assert chunk.latents.dtype == np.float32 and chunk.latents.shape == (1, dit.in_channels, latents, dit.height, dit.width)
        assert np.isfinite(chunk.latents).all() and chunk.frames.std() > 1
        np.testing.assert_array_equal(chunk.poses, poses)
        assert set(chunk.seconds) == {"camera", "denoise", "commit", "decode"} and all(s > 0 for s in chunk.seconds.values())
    assert not same(made[1], made[2])


def test_a_stream_counts(tiny_world: World, photo: np.ndarray, path: np.ndarray) -> None:
    stream = tiny_world.start(photo, PROMPT)
    assert (stream.chunks_done, stream.frames_done, stream.poses_needed) == (0, 0, 25)
    stream.step(path[:25])
    assert (stream.chunks_done, stream.frames_done, stream.poses_needed) == (1, 25, 24)
    stream.step(path[25:49])
    assert (stream.chunks_done, stream.frames_done, stream.poses_needed) == (2, 49, 24)


def test_steps_are_generate_and_the_same_seed_the_same_bytes(tiny_world: World, photo: np.ndarray, path: np.ndarray, made: list[Chunk]) -> None:
    stream = tiny_world.start(photo, PROMPT, seed=7)
    assert all(same(stream.step(poses), chunk) for poses, chunk in zip(parts(path), made, strict=True))


def test_streams_do_not_mix(tiny_world: World, photo: np.ndarray, path: np.ndarray, made: list[Chunk]) -> None:
    """Two streams that take turns each give what they give alone."""
    one, other = tiny_world.start(photo, PROMPT, seed=7), tiny_world.start(photo[::-1], "night", seed=8)
    for poses, chunk in zip(parts(path)[:3], made):
        assert same(one.step(poses), chunk)
        other.step(poses)


@pytest.mark.parametrize("what", ["seed", "prompt", "image", "path", "intrinsics", "fov"])
def test_what_decides_a_chunk(what: str, tiny_world: World, photo: np.ndarray, path: np.ndarray, made: list[Chunk]) -> None:
    changes: dict[str, dict[str, Any]] = {
        "seed": {"seed": 8},
        "intrinsics": {"intrinsics": "100,100,160,96"},
        "fov": {"fov_degrees": 100.0},
    }
    options = {"seed": 7} | changes.get(what, {})
    image, prompt = (photo[:, ::-1] if what == "image" else photo), ("a desert" if what == "prompt" else PROMPT)
    poses = path[:25].copy()
    if what == "path":
        poses[24, 0, 3] += 0.1
    found = tiny_world.start(image, prompt, **options).step(poses)
    assert not same(found, made[0])
    # More than rounding: the prompt, too, moves the picture.
    assert np.abs(found.latents - made[0].latents).max() > 1e-3


def test_the_whole_path_may_move(tiny_world: World, photo: np.ndarray, path: np.ndarray, made: list[Chunk]) -> None:
    """Poses count relative to the stream's first one."""
    turn = np.array([[0.0, 0, 1, 5], [0, 1, 0, -3], [-1, 0, 0, 2], [0, 0, 0, 1]])
    moved = list(tiny_world.start(photo, PROMPT, seed=7).generate((turn @ path)[:49]))
    for chunk, expected in zip(moved, made):
        # Relative poses differ in the last bit, and float32 inputs by 6e-8.
        np.testing.assert_allclose(chunk.latents, expected.latents, atol=1e-4)


def test_noise_of_a_chunk() -> None:
    shape = (1, 16, 3, 6, 10)
    draws = {(seed, chunk): chunk_noise(seed, chunk, shape) for seed in (0, 1, 2**64 - 1) for chunk in range(3)}
    assert all(np.array_equal(x, chunk_noise(*key, shape)) and x.dtype == np.float32 for key, x in draws.items())
    flat = np.stack([x.ravel() for x in draws.values()]).astype(np.float64)
    # 25,920 independent draws: five standard errors of mean, deviation and correlation.
    assert abs(flat.mean()) < 5 / 161 and abs(flat.std() - 1) < 5 / 228
    assert np.abs(np.corrcoef(flat) - np.eye(9)).max() < 5 / 54


@pytest.fixture(scope="module")
def torch_video(tiny_checkpoint: Path, photo: np.ndarray, path: np.ndarray) -> Video:
    """The torch text encoder, VAE and sampler on the stream's own noise and poses: first latent, latents of each chunk, frames."""
    checkpoint = open_checkpoint(tiny_checkpoint)
    world = checkpoint.world
    text, vae, dit = (cast(Any, load_part(checkpoint, name, torch.float32)) for name in ("text", "vae", "dit"))
    relative = relative_to_first(path)
    intrinsics = default_intrinsics(320, 192)
    with torch.no_grad():
        embedding, mask = text(*map(torch.from_numpy, open_prompt(checkpoint).encode(PROMPT)))
        first = vae.encode_mode(torch.from_numpy(to_model_range(photo)))
        grid = (world.dit.height, world.dit.width)
        noise = torch.cat([torch.from_numpy(chunk_noise(7, i, (1, world.dit.in_channels, n, *grid))) for i, n in enumerate((4, 3, 3, 3))], 2)
        noise[:, :, :1] = first
        camera, plucker = (torch.from_numpy(make(relative, intrinsics, world)) for make in (camera_conditions, chunk_plucker))
        latents = [step.latents for step in torch_stream(dit, noise, dit.encode_text(embedding, mask), camera, plucker, world.stream)]
        frames = torch.cat(list(StreamingDecoder(vae).segments(torch.cat(latents, 2))), 2)
    return first, latents, frames


def test_torch_makes_the_same_latents(made: list[Chunk], torch_video: Video) -> None:
    first, latents, _ = torch_video
    np.testing.assert_allclose(made[0].latents[:, :, 0], first[:, :, 0].numpy(), atol=2e-5 * float(first.abs().max()))
    for chunk, expected in zip(made, latents, strict=True):
        # Both in float32 with other kernels.
        assert np.abs(chunk.latents - expected.numpy()).max() <= 2e-5 * float(expected.abs().max())


def test_torch_makes_the_same_frames(made: list[Chunk], torch_video: Video) -> None:
    expected = ((torch_video[2][0].permute(1, 2, 3, 0) + 1) * 127.5).clamp(0, 255).numpy()
    found = np.concatenate([c.frames for c in made])
    assert found.shape == expected.shape == (97, 192, 320, 3)
    # The nearest level, but for what the latents' difference moves over a half.
    assert np.abs(found - expected).max() <= 0.51


BAD_PATHS: list[tuple[Callable[[np.ndarray], np.ndarray], str]] = [
    (lambda p: p[:-1], r"chunk 1 takes 24 poses \(P, 4, 4\), found shape \(23, 4, 4\)"),
    (lambda p: np.concatenate([p, p[-1:]]), r"found shape \(25, 4, 4\)"),
    (lambda p: p[:, :2], r"\(24, 2, 4\)"),
    (lambda p: p.reshape(-1, 16), r"found shape \(24, 16\)"),
    (lambda p: np.where(np.arange(24)[:, None, None] == 9, np.nan, p), "frame 34: the pose has a value that is not finite"),
    (lambda p: p @ np.diag([2.0, 1, 1, 1]), "the left 3x3 block is not a rotation"),
    (lambda p: p @ np.diag([-1.0, 1, 1, 1]), "frame 25: the left 3x3 block is a reflection"),
]


def test_a_wrong_path_changes_nothing(tiny_world: World, photo: np.ndarray, path: np.ndarray, made: list[Chunk]) -> None:
    stream = tiny_world.start(photo, PROMPT, seed=7)
    stream.step(path[:25])
    for spoil, message in BAD_PATHS:
        with pytest.raises(CameraError, match=message):
            stream.step(spoil(path[25:49]))
        assert stream.frames_done == 25
    assert same(stream.step(path[25:49]), made[1])


@pytest.mark.parametrize("count", [24, 26, 48, 50])
def test_a_trajectory_of_another_length(count: int, tiny_world: World, photo: np.ndarray, path: np.ndarray) -> None:
    with pytest.raises(CameraError, match=rf"expected 25 \+ 24k poses, found {count}"):
        list(tiny_world.start(photo, PROMPT).generate(path[:count]))


def test_held_keys(tiny_world: World, photo: np.ndarray) -> None:
    """Held keys are the poses that the integrator makes of them."""
    from sanawm.camera import ActionIntegrator

    driven, mirror = ActionIntegrator(), ActionIntegrator()
    held = tiny_world.start(photo, PROMPT, seed=7)
    chunks = [held.hold("w", driven), held.hold("wd", driven)]
    poses = [mirror.pose.copy()] + [mirror.step(keys).copy() for keys in ["w"] * 24 + ["wd"] * 24]
    walked = tiny_world.start(photo, PROMPT, seed=7).generate(np.stack(poses))
    assert all(same(a, b) for a, b in zip(chunks, walked, strict=True))
    assert np.abs(chunks[1].poses[-1] - np.eye(4)).max() > 0.1
