"""Rotary tables and ray matrices."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sanawm.camera import camera_conditions, ray_matrices, relative_to_first, rope_grid, rope_time
from sanawm.camera.rays import invert_rigid
from sanawm.config import DiTConfig, tiny_config
from sanawm.errors import CameraError

FULL, TINY = DiTConfig(), tiny_config()


def test_rope_shapes():
    time = rope_time(range(7), FULL)
    rows, columns = rope_grid(FULL)
    assert time.cos.shape == time.sin.shape == (7, 20)
    assert rows.cos.shape == rows.sin.shape == (22, 18) and columns.cos.shape == columns.sin.shape == (40, 18)
    assert all(part.dtype == np.float32 for table in (time, rows, columns) for part in table)
    assert rope_time([3], TINY.dit).cos.shape == (1, TINY.dit.rope_pairs[0])


@given(st.integers(0, 10**6), st.integers(0, 19))
def test_rope_time_is_the_formula(frame, pair):
    table = rope_time([frame], FULL)
    angle = frame * 10000.0 ** (-pair / 20)
    # One rounding to float32; the angle itself is good to 1e6 * 2e-16.
    assert abs(table.cos[0, pair] - math.cos(angle)) < 1e-7 and abs(table.sin[0, pair] - math.sin(angle)) < 1e-7


def test_rope_grid_is_the_formula():
    rows, columns = rope_grid(FULL)
    for table, positions in ((rows, 22), (columns, 40)):
        angles = np.outer(np.arange(positions), [10000.0 ** (-m / 18) for m in range(18)])
        # One rounding to float32.
        np.testing.assert_allclose(table.cos + 1j * table.sin, np.exp(1j * angles), atol=1e-7)


@given(st.integers(0, 5000), st.integers(1, 9))
def test_a_chunk_of_the_table_is_the_table_of_a_chunk(start, count):
    whole, part = rope_time(np.arange(start + count), FULL), rope_time(np.arange(start, start + count), FULL)
    assert whole.cos[start:].tobytes() == part.cos.tobytes() and whole.sin[start:].tobytes() == part.sin.tobytes()


def conditions(seed: int, frames: int = 3) -> np.ndarray:
    """Camera conditions of a random rigid path in float64, (frames, 20), on the tiny grid."""
    rng = np.random.default_rng(seed)
    rotation, upper = np.linalg.qr(rng.normal(size=(frames, 3, 3)))
    rotation *= np.sign(np.einsum("fii->fi", upper))[:, None]
    rotation[:, :, 0] *= np.linalg.det(rotation)[:, None]
    c2w = np.tile(np.eye(4), (frames, 1, 1))
    c2w[:, :3, :3], c2w[:, :3, 3] = rotation, rng.normal(size=(frames, 3)) * 10
    return np.concatenate([c2w.reshape(frames, 16), rng.uniform([4, 4, 0, 0], [12, 12, 9, 5], (frames, 4))], axis=1)


@given(st.integers(0, 2**32 - 1))
def test_ray_matrices_are_rigid_and_inverse(seed):
    P, inverse = ray_matrices(conditions(seed), 6, 10)
    assert P.shape == inverse.shape == (3, 60, 4, 4) and P.dtype == np.float64
    # float64 arithmetic on translations up to about 40.
    np.testing.assert_allclose(P @ inverse, np.broadcast_to(np.eye(4), P.shape), atol=1e-12)
    np.testing.assert_allclose(np.linalg.det(P[..., :3, :3]), 1, atol=1e-12)


@given(st.integers(0, 2**32 - 1))
def test_ray_coordinates(seed):
    """The camera's centre goes to the origin, points on a pixel's ray to the z axis, and x is level with the camera."""
    given_conditions = conditions(seed)
    P, _ = ray_matrices(given_conditions, 6, 10)
    for t, row in enumerate(given_conditions):
        c2w, (fx, fy, cx, cy) = row[:16].reshape(4, 4), row[16:]
        for y, x in ((0, 0), (3, 7), (5, 9)):
            world = c2w @ [2 * (x - cx) / fx, 2 * (y - cy) / fy, 2, 1]
            local = P[t, y * 10 + x] @ world
            # float64 arithmetic on coordinates up to about 40.
            np.testing.assert_allclose(local[:2], 0, atol=1e-12)
            assert local[2] > 0
            np.testing.assert_allclose(P[t, y * 10 + x] @ c2w[:, 3], [0, 0, 0, 1], atol=1e-12)
            np.testing.assert_allclose(P[t, y * 10 + x, 0, :3] @ c2w[:3, 1], 0, atol=1e-12)


def test_moving_the_world_moves_the_matrices_with_it():
    given_conditions = conditions(1)
    motion = conditions(2, 1)[0, :16].reshape(4, 4)
    moved = given_conditions.copy()
    moved[:, :16] = (motion @ given_conditions[:, :16].reshape(-1, 4, 4)).reshape(-1, 16)
    # float64 arithmetic on translations up to about 40.
    np.testing.assert_allclose(ray_matrices(moved, 6, 10)[0] @ motion, ray_matrices(given_conditions, 6, 10)[0], atol=1e-12)


def test_the_ray_through_the_principal_point_is_the_camera():
    c2w = np.tile(np.eye(4), (9, 1, 1))
    c2w[:, 2, 3] = np.arange(9) * 0.025
    packed = camera_conditions(relative_to_first(c2w), [160.0, 160.0, 160.0, 96.0], TINY)[0]
    P, inverse = ray_matrices(packed, 6, 10)
    centre = 3 * 10 + 5
    np.testing.assert_array_equal(P[0, centre], np.eye(4))
    # The conditions are float32: 0.2 is off by 3e-9.
    np.testing.assert_allclose(inverse[1, centre], c2w[8], atol=1e-8)


def test_a_ray_that_is_not_a_number_gets_the_identity():
    broken = conditions(3)
    broken[1, 16] = np.nan
    P, inverse = ray_matrices(broken, 6, 10)
    np.testing.assert_array_equal(P[1], np.broadcast_to(np.eye(4), (60, 4, 4)))
    np.testing.assert_array_equal(inverse[1], P[1])
    np.testing.assert_array_equal(P[[0, 2]], ray_matrices(conditions(3), 6, 10)[0][[0, 2]])


def test_inverse_of_rigid_motions():
    c2w = conditions(4, 5)[:, :16].reshape(5, 4, 4)
    # float64 LU on translations up to about 30.
    np.testing.assert_allclose(invert_rigid(c2w), np.linalg.inv(c2w), atol=1e-12)


@pytest.mark.parametrize("shape", [(20,), (3, 19), (1, 3, 20)])
def test_bad_conditions(shape):
    with pytest.raises(CameraError, match=r"expected camera conditions of shape \(T, 20\)"):
        ray_matrices(np.zeros(shape), 6, 10)
