"""Chunk grid, windows, and noise schedules, against the published lists and diffusers' scheduler."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st

from sanawm.config import StreamConfig
from sanawm.errors import InputError
from sanawm.schedule import (
    Chunk,
    bidirectional_sigmas,
    chunk_grid,
    euler_step,
    first_chunk_frames,
    latent_frames,
    pixel_frames,
    step_sizes,
    timestep_row,
    window,
)

# The integers that the released teacher embeds in its sixty steps.
TEACHER_TIMESTEPS = """
1000 998 996 994 992 990 988 986 984 982 979 977 974 972 969 966 963 960 957 954 950 947 943 939 935 931 926 922 917 911 906 900 894 887 880 873
865 856 847 837 827 816 803 790 776 760 743 723 702 679 652 622 588 548 503 449 385 307 210 87
"""


def test_the_minute_has_forty_chunks() -> None:
    grid = chunk_grid(121)
    assert len(grid) == 40 and (grid[0].start, grid[0].end) == (0, 4) and (grid[1].start, grid[1].end) == (4, 7)
    assert (grid[-1].start, grid[-1].end) == (118, 121)
    assert [c.kind for c in grid[:4]] == ["first", "second", "steady", "steady"] and {c.kind for c in grid[2:]} == {"steady"}


@given(st.integers(1, 400), st.integers(1, 6))
def test_chunks_tile_the_clip(frames: int, size: int) -> None:
    grid = chunk_grid(frames, size)
    assert [c.index for c in grid] == list(range(len(grid)))
    assert grid[0].start == 0 and grid[-1].end == frames and all(a.end == b.start for a, b in pairwise(grid))
    assert all(c.frames == size for c in grid[1:])
    # Chunk 0 takes the remainder, at most 2 * size - 1 frames.
    assert grid[0].frames == first_chunk_frames(frames, size) == (frames if frames <= size else size + frames % size)


@pytest.mark.parametrize(("frames", "first"), [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (6, 3), (7, 4), (8, 5), (9, 3), (31, 4), (120, 3), (122, 5)])
def test_first_chunk(frames: int, first: int) -> None:
    assert first_chunk_frames(frames) == first


def test_window_of_the_release() -> None:
    assert [window(c) for c in range(5)] == [[], [0], [0, 1], [0, 2], [0, 3]]
    assert [window(c, sink=False) for c in range(5)] == [[], [0], [0, 1], [1, 2], [2, 3]]
    assert window(4, -1) == [0, 1, 2, 3] and window(5, 3) == [0, 3, 4] and window(5, 3, False) == [2, 3, 4]
    assert window(5, 1) == [0] and window(5, 1, False) == [4] and window(3, 0, False) == []


@given(st.integers(0, 60), st.integers(1, 8), st.booleans())
def test_windows_are_bounded_and_in_order(chunk: int, cached: int, sink: bool) -> None:
    found = window(chunk, cached, sink)
    assert found == sorted(set(found)) and len(found) == min(chunk, cached) and all(0 <= i < chunk for i in found)
    if chunk and sink:
        assert found[0] == 0
    if chunk and (cached > 1 or not sink):
        assert found[-1] == chunk - 1


@given(st.integers(1, 2000))
def test_latent_and_pixel_frames(latents: int) -> None:
    assert latent_frames(pixel_frames(latents)) == latents


@pytest.mark.parametrize(("pixels", "latents"), [(1, 1), (9, 2), (161, 21), (241, 31), (961, 121)])
def test_published_lengths(pixels: int, latents: int) -> None:
    assert latent_frames(pixels) == latents and pixel_frames(latents) == pixels


@pytest.mark.parametrize(("pixels", "hint"), [(0, "use 1 or 9"), (-3, "use 1 or 9"), (24, "use 17 or 25"), (960, "use 953 or 961")])
def test_lengths_that_do_not_exist(pixels: int, hint: str) -> None:
    with pytest.raises(InputError, match=rf"8k \+ 1, found {pixels}; {hint}"):
        latent_frames(pixels)


def test_an_empty_clip() -> None:
    with pytest.raises(InputError, match="at least one latent frame, found 0"):
        chunk_grid(0)
    with pytest.raises(InputError, match="at least one step, found 0"):
        bidirectional_sigmas(0)


def test_distilled_schedule_is_exact() -> None:
    stream = StreamConfig()
    assert stream.timesteps == (1000, 960, 889, 727) and stream.sigmas == (1.0, 0.96, 0.889, 0.727, 0.0)
    # Shift 8 of 1, 3/4, 1/2, 1/4, in thousandths.
    assert [round(1000 * 8 * u / (1 + 7 * u)) for u in (1, 0.75, 0.5, 0.25)] == list(stream.timesteps)
    sizes = step_sizes(stream)
    assert sizes == [1.0 - 0.96, 0.96 - 0.889, 0.889 - 0.727, 0.727]
    assert sum(sizes) == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize("timestep", [1000, 960, 889, 727, 0])
def test_timesteps_survive_their_dtype(timestep: int) -> None:
    first, later = timestep_row(timestep, Chunk(0, 0, 4)), timestep_row(timestep, Chunk(3, 10, 13))
    assert first.dtype == later.dtype == np.float32
    assert first.tolist() == [[0, timestep, timestep, timestep]] and later.tolist() == [[timestep] * 3]
    assert np.trunc(later).astype(int).tolist() == [[timestep] * 3]


def test_teacher_schedule_is_diffusers() -> None:
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=9.8)
    scheduler.set_timesteps(60)
    ours = bidirectional_sigmas(60, 9.8)
    assert ours.dtype == np.float32 and ours.shape == (61,) and ours[0] == 1 and ours[-1] == 0
    # One rounding to float32 of numbers below one.
    np.testing.assert_allclose(ours, scheduler.sigmas.numpy(), atol=6e-8, rtol=0)
    assert np.trunc(ours[:-1] * np.float32(1000)).astype(int).tolist() == [int(t) for t in scheduler.timesteps]


def test_teacher_timesteps_are_the_published_ones() -> None:
    sigmas = bidirectional_sigmas()
    assert np.trunc(sigmas[:-1] * np.float32(1000)).astype(int).tolist() == list(map(int, TEACHER_TIMESTEPS.split()))
    published = [1000, 998.2611, 996.4681, 994.6185, 385.1021, 307.1765, 210.5840, 87.7046]
    # The list is printed with four decimals.
    np.testing.assert_allclose(1000 * sigmas[[0, 1, 2, 3, 56, 57, 58, 59]], published, atol=1e-4, rtol=0)


@given(st.integers(2, 100), st.floats(1, 12))
def test_other_teacher_schedules_are_diffusers_too(steps: int, shift: float) -> None:
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    # diffusers keeps float32 at some steps where this does not.
    np.testing.assert_allclose(bidirectional_sigmas(steps, shift), scheduler.sigmas.numpy(), atol=3e-7, rtol=0)


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_euler_step(library: str) -> None:
    rng = np.random.default_rng(0)
    x, v = (rng.normal(size=(1, 2, 4, 2, 2)).astype(np.float32) for _ in range(2))
    latents, velocity = (x, v) if library == "numpy" else (torch.from_numpy(x.copy()), torch.from_numpy(v))
    before = np.array(latents)
    later, first = euler_step(latents, velocity, 0.25, Chunk(2, 7, 11)), euler_step(latents, velocity, 0.25, Chunk(0, 0, 4))
    np.testing.assert_array_equal(np.asarray(later), x - np.float32(0.25) * v)
    np.testing.assert_array_equal(np.asarray(first)[:, :, 1:], np.asarray(later)[:, :, 1:])
    assert np.asarray(first)[:, :, 0].tobytes() == x[:, :, 0].tobytes()
    np.testing.assert_array_equal(np.array(latents), before)
