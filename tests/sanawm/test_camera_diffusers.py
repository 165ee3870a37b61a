"""The camera package against diffusers' utilities, live."""

import numpy as np
import pytest
import torch
from diffusers.models.transformers.transformer_sana_wm import SanaWMRotaryPosEmbed, _invert_SE3, _process_camera_conditions_ucpe
from diffusers.pipelines.sana_wm import cam_utils
from diffusers.pipelines.sana_wm.image_processor import SanaWMImageProcessor
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sanawm.camera import (
    actions_to_poses,
    adjust_for_resize_crop,
    camera_conditions,
    chunk_plucker,
    frames_to_snap,
    ray_matrices,
    relative_to_first,
    resize_and_crop,
    rope_grid,
    rope_time,
    to_model_range,
)
from sanawm.config import DiTConfig, WorldConfig

ACTION = "w-20,jw-15,dl-10,none-2,kiw-3,ia-30"


STEPS = st.tuples(st.sampled_from(["w", "sa", "dj", "il", "k", "wdil", "none", "wasdijkl"]), st.integers(1, 90))


@given(st.lists(STEPS, min_size=1, max_size=4))
def test_actions(steps):
    text = ",".join(f"{keys}-{frames}" for keys, frames in steps)
    # float32 rounding of positions up to 18 units; both integrate in float64.
    np.testing.assert_allclose(actions_to_poses(text, "diffusers-0.42"), cam_utils.action_string_to_c2w(text), atol=1e-6)


def test_may_release_differs_by_its_epsilon_alone():
    may, diffusers = actions_to_poses(ACTION, "official-2026-05"), cam_utils.action_string_to_c2w(ACTION)
    np.testing.assert_array_equal(may[:, :3, :3], diffusers[:, :3, :3])
    # At most a millionth of the distance over the cosine of the pitch, and float32 rounding.
    np.testing.assert_allclose(may[:, :3, 3], diffusers[:, :3, 3], atol=4e-6)


@pytest.fixture
def clip():
    """Poses that do not start at the identity, and changing intrinsics, of 81 frames at 704x1280."""
    path = cam_utils.action_string_to_c2w(ACTION).astype(np.float64)
    first = cam_utils.action_string_to_c2w("ild-20")[-1].astype(np.float64)
    rows = np.array([900.0, 880.0, 650.0, 340.0]) * (1 + np.linspace(0, 0.2, 81)[:, None])
    return first @ path, rows


def test_camera_inputs(clip):
    path, rows = clip
    theirs = cam_utils.prepare_camera(path, rows, target_size=(704, 1280), vae_stride=(8, 32, 32))
    relative = relative_to_first(path)
    # diffusers works in float32 throughout: a few roundings of coordinates up to 3.
    np.testing.assert_allclose(camera_conditions(relative, rows, WorldConfig())[0], theirs["raymap"].numpy(), atol=2e-6)
    np.testing.assert_allclose(chunk_plucker(relative, rows, WorldConfig())[0], theirs["chunk_plucker"].numpy(), atol=4e-6)


def test_ray_matrices(clip):
    path, rows = clip
    conditions = camera_conditions(relative_to_first(path), rows, WorldConfig())
    P, inverse = ray_matrices(conditions[0], 22, 40)
    theirs, _ = _process_camera_conditions_ucpe(torch.from_numpy(conditions).double(), 1, (11, 22, 40), (1, 1, 1))
    theirs = theirs.reshape(11, 880, 4, 4)
    # Both in float64; theirs goes through a field of view in degrees.
    np.testing.assert_allclose(P, theirs.numpy(), atol=1e-12)
    np.testing.assert_allclose(inverse, _invert_SE3(theirs).numpy(), atol=1e-12)


def test_rope():
    theirs = SanaWMRotaryPosEmbed(112, (1, 1, 1), 1024)((4, 22, 40))[0, 0].reshape(4, 22, 40, 56).numpy()
    config = DiTConfig()
    time, (rows, columns) = rope_time(range(4), config), rope_grid(config)
    # Their frequencies are float32, so angles up to 39 are off by a few 1e-6.
    np.testing.assert_allclose((time.cos + 1j * time.sin), theirs[:, 0, 0, :20], atol=5e-6)
    np.testing.assert_allclose((rows.cos + 1j * rows.sin), theirs[0, :, 0, 20:38], atol=5e-6)
    np.testing.assert_allclose((columns.cos + 1j * columns.sin), theirs[0, 0, :, 38:], atol=5e-6)


@pytest.mark.parametrize("size", [(169, 93), (167, 94), (100, 30), (30, 100), (64, 35), (320, 192)])
def test_image_and_intrinsics(size):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    row = np.array([[120.0, 130.0, 80.0, 45.0]])
    pixels, adjusted = SanaWMImageProcessor().preprocess_with_intrinsics(picture, row, 192, 320)
    ours, geometry = resize_and_crop(picture, 192, 320)
    # The same float32 operations on the same bytes.
    np.testing.assert_array_equal(to_model_range(ours)[:, :, 0], pixels.numpy())
    np.testing.assert_allclose(adjust_for_resize_crop(row, geometry), adjusted, rtol=1e-14)


@given(st.integers(1, 2000))
def test_snapping(frames):
    assert frames_to_snap(frames, "bidirectional") == cam_utils.snap_num_frames(frames)
    assert frames_to_snap(max(frames, 25), "streaming") == cam_utils.snap_num_frames(max(frames, 25), 24)
