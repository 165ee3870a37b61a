"""Intrinsics: shapes, files, time, field of view, crop."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sanawm.camera import adjust_for_resize_crop, check_field_of_view, default_intrinsics, load_intrinsics, normalise_intrinsics
from sanawm.camera.image import CropGeometry
from sanawm.camera.intrinsics import field_of_view
from sanawm.errors import CameraError

ROW = [800.0, 820.0, 640.0, 350.0]
K = [[800.0, 0, 640], [0, 820, 350], [0, 0, 1]]
SHAPES = {"(4,)": ROW, "(3,3)": K, "(F,4)": [ROW] * 5, "(F,3,3)": [K] * 5}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("suffix", ["npy", "json"])
def test_four_shapes_from_files(tmp_path, shape, suffix):
    file = tmp_path / f"intrinsics.{suffix}"
    if suffix == "npy":
        np.save(file, np.array(SHAPES[shape], dtype=np.float32))
    else:
        file.write_text(json.dumps(SHAPES[shape]))
    for frames in (1, 5, 9):
        rows = load_intrinsics(file, frames)
        assert rows.dtype == np.float64
        np.testing.assert_array_equal(rows, [ROW] * frames)


@pytest.mark.parametrize("text", ["800,820,640,350", " 800, 8.2e2 , 640.0, 350 "])
def test_text(text):
    np.testing.assert_array_equal(load_intrinsics(text, 3), [ROW] * 3)


@pytest.mark.parametrize("content", ["800 820 640 350\n", "800 0 640\n0 820 350\n0 0 1\n"])
def test_txt_file(tmp_path, content):
    (tmp_path / "k.txt").write_text(content)
    np.testing.assert_array_equal(load_intrinsics(str(tmp_path / "k.txt"), 2), [ROW] * 2)


def test_a_file_name_with_a_comma_is_a_file(tmp_path):
    np.save(tmp_path / "take 1, final.npy", ROW)
    np.testing.assert_array_equal(load_intrinsics(str(tmp_path / "take 1, final.npy"), 1), [ROW])


def test_longer_sequences_lose_their_end():
    rows = np.array(ROW) + np.arange(7)[:, None]
    np.testing.assert_array_equal(normalise_intrinsics(rows, 3), rows[:3])


def test_shorter_sequences_are_resampled_in_time():
    zoom = np.array([ROW, [1000, 1000, 600, 340]])
    rows = normalise_intrinsics(zoom, 5)
    np.testing.assert_array_equal(rows[[0, 4]], zoom)
    np.testing.assert_allclose(rows[2], zoom.mean(axis=0), rtol=1e-15)
    np.testing.assert_allclose(np.diff(rows, axis=0), np.tile((zoom[1] - zoom[0]) / 4, (4, 1)), rtol=1e-12)


@given(st.integers(2, 9), st.integers(1, 30))
def test_resampling_a_straight_line_gives_the_line(count, frames):
    old = np.linspace(0, 1, count)[:, None]
    rows = normalise_intrinsics(np.array(ROW) * (1 + old), frames)
    expected = np.linspace(0, 1, frames) if frames > count else old[:frames, 0]
    # Two roundings of a linear interpolation in float64.
    np.testing.assert_allclose(rows, np.array(ROW) * (1 + expected[:, None]), rtol=1e-14)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([800, 820, 640], r"expected shape \(4,\).*found \(3,\)"),
        (np.zeros((0, 4)), r"found \(0, 4\)"),
        (np.ones((2, 3, 4)), r"found \(2, 3, 4\)"),
        (np.ones(()), r"found \(\)"),
        ([ROW, [800, np.nan, 640, 350]], "frame 1: a value is not finite"),
        ([ROW, ROW, [800, 820, np.inf, 350]], "frame 2: a value is not finite"),
        ([K, np.full((3, 3), np.nan)], "frame 1: a value is not finite"),
        ([0, 820, 640, 350], "frame 0: expected positive focal lengths, found fx=0"),
        ([ROW, [800, -820, 640, 350]], "frame 1: expected positive focal lengths, found fx=800 fy=-820"),
        ([[800, 5, 640], [0, 820, 350], [0, 0, 1]], "frame 0: .*skew"),
        ([K, [[800, 0, 0], [0, 820, 0], [640, 350, 1]]], "frame 1: .*last row is not 0 0 1"),
        (["a", "b", "c", "d"], "expected real numbers"),
        ([[1, 2], [3]], "expected real numbers"),
    ],
)
def test_bad_values(values, message):
    with pytest.raises(CameraError, match=message) as error:
        normalise_intrinsics(values, 5, source="k.npy")
    assert str(error.value).startswith("k.npy")


@pytest.mark.parametrize(
    ("text", "message"),
    [("800,820,640", r"found \(3,\)"), ("800,x,640,350", "four numbers fx,fy,cx,cy"), ("800,nan,640,350", "not finite")],
)
def test_bad_text(text, message):
    with pytest.raises(CameraError, match=message) as error:
        load_intrinsics(text, 5)
    assert f"'{text}'" in str(error.value)


def test_bad_file(tmp_path):
    with pytest.raises(CameraError, match="cannot be read"):
        load_intrinsics(tmp_path / "none.npy", 5)
    with pytest.raises(CameraError, match=r"expected a \.npy, \.json or \.txt file"):
        load_intrinsics("800", 5)


@pytest.mark.parametrize("frames", [0, -3, 10**9])
def test_bad_length(frames):
    with pytest.raises(CameraError, match="expected 1 to 100,000 frames"):
        normalise_intrinsics(ROW, frames)


@pytest.mark.filterwarnings("error")
def test_field_of_view_of_a_right_angle_and_of_none():
    assert (field_of_view(np.full((1, 4), 1.7e308), 1280, 704) < 1e-300).all()
    np.testing.assert_allclose(field_of_view(np.array([[640.0, 352.0, 0, 0]]), 1280, 704), [[90, 90]], rtol=1e-14)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([0.8, 0.8, 0.5, 0.5], r"frame 1: a field of view of 179\.\d x .* must be in pixels of the 1280x704 input image"),
        ([8000, 8000, 640, 352], r"a field of view of 9\.1 x 5\.0 degrees is outside 25 to 120"),
        ([640, 2000, 640, 352], r"90\.0 x 20\.0"),
    ],
)
def test_implausible_field_of_view(tmp_path, row, message):
    np.save(tmp_path / "k.npy", [ROW, row])
    with pytest.raises(CameraError, match=message):
        load_intrinsics(tmp_path / "k.npy", 2, image_size=(1280, 704))
    load_intrinsics(tmp_path / "k.npy", 1, image_size=(1280, 704))


def test_default_intrinsics():
    row = default_intrinsics(1280, 704, 90)
    np.testing.assert_allclose(row, [640, 640, 640, 352], rtol=1e-14)
    check_field_of_view(default_intrinsics(1280, 704)[None], 1280, 704)
    for fov in (25, 120, 0, np.nan):
        with pytest.raises(CameraError, match="between 25 and 120 degrees"):
            default_intrinsics(1280, 704, fov)
    with pytest.raises(CameraError, match="default intrinsics of 70 degrees"):
        default_intrinsics(1280, 100)


@given(st.floats(-2, 2), st.floats(-2, 2), st.floats(0.1, 5))
def test_crop_keeps_where_points_project(x, y, z):
    """A point's pixel in the source, carried through resize and crop, is where the adjusted intrinsics put it."""
    geometry = CropGeometry(source=(1691, 930), resized=(1284, 706), offset=(2, 1))
    source = np.array(ROW)[:2] * [x, y] / z + np.array(ROW)[2:]
    carried = source * [1284 / 1691, 706 / 930] - [2, 1]
    adjusted = adjust_for_resize_crop(np.array([ROW]), geometry)[0]
    # Rounding of pixel positions up to 1e5 in float64.
    np.testing.assert_allclose(adjusted[:2] * [x, y] / z + adjusted[2:], carried, atol=1e-9)


def test_crop_leaves_its_argument_alone():
    rows = np.array([ROW])
    adjust_for_resize_crop(rows, CropGeometry((100, 100), (200, 200), (7, 9)))
    np.testing.assert_array_equal(rows, [ROW])
