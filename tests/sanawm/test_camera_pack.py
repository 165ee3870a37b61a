"""Camera conditions and Plücker maps: layout, whole clip against chunks."""

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sanawm.camera import CameraPacker, camera_conditions, chunk_plucker, frames_to_snap, latent_frames, relative_to_first
from sanawm.config import WorldConfig, tiny_config
from sanawm.errors import CameraError, InputError

TINY = tiny_config()
ROW = np.array([200.0, 190.0, 160.0, 96.0])


def smooth_path(seed: int, frames: int) -> np.ndarray:
    """A wandering camera that does not start at the identity, (frames, 4, 4) float64."""
    rng = np.random.default_rng(seed)
    c2w = np.tile(np.eye(4), (frames, 1, 1))
    angles = rng.normal(size=3) + np.cumsum(rng.normal(size=(frames, 3)) * 0.02, axis=0)
    for pose, (a, b, c) in zip(c2w, angles):
        about_x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
        about_y = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
        about_z = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
        pose[:3, :3] = about_z @ about_y @ about_x
    c2w[:, :3, 3] = rng.normal(size=3) * 3 + np.cumsum(rng.normal(size=(frames, 3)) * 0.05, axis=0)
    return c2w


def changing_intrinsics(seed: int, frames: int) -> np.ndarray:
    return ROW * (1 + 0.1 * np.random.default_rng(seed).random((frames, 4)))


def test_layout_of_conditions():
    relative, rows = relative_to_first(smooth_path(0, 17)), changing_intrinsics(0, 17)
    conditions = camera_conditions(relative, rows, TINY)
    assert conditions.shape == (1, 3, 20) and conditions.dtype == np.float32
    np.testing.assert_array_equal(conditions[0, 0, :16], np.eye(4).ravel())
    for latent, pixel in enumerate((0, 8, 16)):
        np.testing.assert_array_equal(conditions[0, latent, :16], relative[pixel].ravel().astype(np.float32))
        # Latent pixels are 32 image pixels.
        np.testing.assert_array_equal(conditions[0, latent, 16:], (rows[pixel] / 32).astype(np.float32))


def test_layout_of_plucker():
    """Every number against the definition, one ray at a time."""
    relative, rows = relative_to_first(smooth_path(1, 17)), changing_intrinsics(1, 17)
    maps = chunk_plucker(relative, rows, TINY)
    assert maps.shape == (1, 48, 3, 6, 10) and maps.dtype == np.float32 and maps.flags.c_contiguous
    frames = [range(0, 8), range(1, 9), range(9, 17)]
    for latent, j, y, x in [(0, 0, 0, 0), (0, 7, 5, 9), (1, 0, 3, 4), (1, 7, 0, 9), (2, 3, 5, 0), (2, 7, 2, 2)]:
        pixel = frames[latent][j]
        fx, fy, cx, cy = rows[pixel] / 32
        direction = relative[pixel, :3, :3] @ [(x - cx) / fx, (y - cy) / fy, 1]
        direction /= np.linalg.norm(direction)
        moment = np.cross(relative[pixel, :3, 3], direction)
        # One float32 rounding of values up to about 3.
        np.testing.assert_allclose(maps[0, 6 * j : 6 * j + 6, latent, y, x], [*direction, *moment], atol=2e-7)


def test_one_frame_repeats_itself():
    maps = chunk_plucker(np.eye(4)[None], ROW, TINY)
    assert maps.shape == (1, 48, 1, 6, 10)
    for j in range(8):
        np.testing.assert_array_equal(maps[0, 6 * j : 6 * j + 6], maps[0, :6])
    np.testing.assert_array_equal(maps[0, 3:6], 0)


def test_official_sizes():
    relative = relative_to_first(smooth_path(2, 25))
    row = [800.0, 800.0, 640.0, 352.0]
    conditions, maps = camera_conditions(relative, row, WorldConfig()), chunk_plucker(relative, row, WorldConfig())
    assert conditions.shape == (1, 4, 20) and maps.shape == (1, 48, 4, 22, 40)
    np.testing.assert_array_equal(conditions[0, :, 16:], [[800 * 40 / 1280, 800 * 22 / 704, 20, 11]] * 4)
    # The principal point is a grid point: its ray is the camera's z axis.
    np.testing.assert_allclose(maps[0, 42:45, :, 11, 20].T[1:], relative[8::8, :3, 2], atol=1e-7)


@given(st.integers(0, 2**32 - 1))
def test_directions_have_length_one_and_moments_are_orthogonal(seed):
    maps = chunk_plucker(relative_to_first(smooth_path(seed, 9)), changing_intrinsics(seed, 9), TINY)
    rays = maps[0].reshape(8, 6, 2, 6, 10).astype(float)
    direction, moment = rays[:, :3], rays[:, 3:]
    # float32 rounding of components up to one, and of moments up to a few units.
    np.testing.assert_allclose((direction**2).sum(axis=1), 1, atol=4e-7)
    np.testing.assert_allclose((direction * moment).sum(axis=1), 0, atol=2e-6)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 5), min_size=0, max_size=6), st.integers(2, 6), st.booleans())
def test_any_chunking_gives_the_same_bits(seed, later, first, constant):
    frames = 8 * (first + sum(later) - 1) + 1
    path, rows = smooth_path(seed, frames), changing_intrinsics(seed, frames)
    if constant:
        rows[:] = ROW
    packer, done = CameraPacker(TINY), 0
    conditions: list[np.ndarray] = []
    maps: list[np.ndarray] = []
    for index, latents in enumerate([first, *later]):
        count = CameraPacker.poses_needed(latents, first=index == 0)
        chunk = packer.push(path[done : done + count], ROW if constant else rows[done : done + count])
        assert chunk.first_frame == sum(a.shape[1] for a in conditions)
        conditions.append(chunk.camera_conditions)
        maps.append(chunk.chunk_plucker)
        done += count
    assert done == frames == packer.frames
    relative = relative_to_first(path)
    assert np.concatenate(conditions, axis=1).tobytes() == camera_conditions(relative, rows, TINY).tobytes()
    assert np.concatenate(maps, axis=2).tobytes() == chunk_plucker(relative, rows, TINY).tobytes()


def test_the_packer_keeps_one_pose_however_long_the_stream():
    packer, path = CameraPacker(TINY), smooth_path(4, 24)

    def held():
        return sum(sys.getsizeof(value) + getattr(value, "nbytes", 0) for value in vars(packer).values())

    packer.push(path[:17], ROW)
    after_one = held()
    for _ in range(50):
        packer.push(path, ROW)
    assert held() == after_one and packer.frames == 17 + 50 * 24
    # Not a view that would keep the first chunk's poses alive.
    assert packer._origin.base is None
    # The origin is a copy, so the caller's buffer can be reused.
    path[:] = 0
    np.testing.assert_array_equal(packer._origin, smooth_path(4, 24)[0])


def test_bad_chunks_leave_the_packer_as_it_was():
    packer, path = CameraPacker(TINY), smooth_path(5, 41)
    with pytest.raises(CameraError, match=r"expected 8\(n - 1\) \+ 1 poses for a first chunk of n latent frames, found 16"):
        packer.push(path[:16], ROW)
    packer.push(path[:17], ROW)
    with pytest.raises(CameraError, match=r"expected 8n poses for a later chunk of n latent frames, found 17"):
        packer.push(path[17:34], ROW)
    broken = path[17:25].copy()
    broken[3, 0, 0] = np.nan
    with pytest.raises(CameraError, match=r"streamed camera path, frame 20: .*not finite"):
        packer.push(broken, ROW)
    with pytest.raises(CameraError, match=r"expected intrinsics of shape \(4,\) or \(8, 4\) for 8 poses, found \(7, 4\)"):
        packer.push(path[17:25], np.tile(ROW, (7, 1)))
    assert packer.frames == 17
    chunk = packer.push(path[17:41], ROW)
    assert chunk.camera_conditions.tobytes() == camera_conditions(relative_to_first(path), ROW, TINY)[:, 3:].tobytes()


def test_a_single_pose_is_a_whole_clip():
    packer, path = CameraPacker(TINY), smooth_path(6, 9)
    chunk = packer.push(path[:1], ROW)
    assert chunk.chunk_plucker.tobytes() == chunk_plucker(np.eye(4)[None], ROW, TINY).tobytes()
    with pytest.raises(CameraError, match="cannot be continued"):
        packer.push(path[1:], ROW)


@pytest.mark.parametrize("pack", [camera_conditions, chunk_plucker])
def test_bad_clips(pack):
    path = smooth_path(7, 17)
    with pytest.raises(CameraError, match="must start at the identity"):
        pack(path, ROW, TINY)
    relative = relative_to_first(path)
    with pytest.raises(CameraError, match=r"expected 8k \+ 1 pixel frames, found 16; use 9 or 17"):
        pack(relative[:16], ROW, TINY)
    with pytest.raises(CameraError, match=r"for 17 poses, found \(16, 4\)"):
        pack(relative, np.tile(ROW, (16, 1)), TINY)
    with pytest.raises(CameraError, match="positive focal"):
        pack(relative, -ROW, TINY)
    relative[9, 0, 0] = np.inf
    with pytest.raises(CameraError, match=r"frame 9: .*not finite"):
        pack(relative, ROW, TINY)


def test_latent_frames():
    assert [latent_frames(f) for f in (1, 9, 161, 241, 321, 961)] == [1, 2, 21, 31, 41, 121]
    for bad in (0, -7, 8, 326):
        with pytest.raises(CameraError, match="8k"):
            latent_frames(bad)


def test_snapping():
    assert [frames_to_snap(f, "bidirectional") for f in (1, 4, 5, 6, 161, 165, 326)] == [1, 1, 9, 9, 161, 169, 329]
    assert [frames_to_snap(f, "streaming") for f in (1, 25, 36, 37, 241, 961, 960)] == [25, 25, 25, 49, 241, 961, 961]
    assert frames_to_snap(326, "bidirectional", upper_bound=326) == 321
    assert frames_to_snap(326, "streaming", upper_bound=326) == 313
    with pytest.raises(InputError, match="expected at least 25 frames for the streaming sampler, found 24"):
        frames_to_snap(241, "streaming", upper_bound=24)
    with pytest.raises(InputError, match="at least 1 frame, found 0"):
        frames_to_snap(0, "streaming")
    with pytest.raises(InputError, match="unknown sampler"):
        frames_to_snap(9, "both")  # type: ignore[arg-type]


@given(st.integers(1, 5000), st.sampled_from(["bidirectional", "streaming"]), st.one_of(st.none(), st.integers(25, 5000)))
def test_snapping_gives_the_nearest_length_in_reach(frames, kind, bound):
    stride = {"bidirectional": 8, "streaming": 24}[kind]
    allowed = range(1 if kind == "bidirectional" else 25, (bound or 6000) + 1, stride)
    snapped = frames_to_snap(frames, kind, bound)
    assert snapped in allowed and abs(snapped - frames) == min(abs(a - frames) for a in allowed)
