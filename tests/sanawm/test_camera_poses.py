"""Pose files, relative poses, length policies."""

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sanawm.camera import check_poses, fit_length, load_poses, relative_to_first
from sanawm.camera.poses import MAX_FRAMES
from sanawm.errors import CameraError


def random_path(seed: int, frames: int) -> np.ndarray:
    """Random rigid motions, (frames, 4, 4) float64."""
    rng = np.random.default_rng(seed)
    rotation, upper = np.linalg.qr(rng.normal(size=(frames, 3, 3)))
    rotation *= np.sign(np.einsum("fii->fi", upper))[:, None]
    rotation[:, :, 0] *= np.linalg.det(rotation)[:, None]
    c2w = np.tile(np.eye(4), (frames, 1, 1))
    c2w[:, :3, :3] = rotation
    c2w[:, :3, 3] = rng.normal(size=(frames, 3)) * 5
    return c2w


@pytest.fixture
def path():
    return random_path(0, 9)


@pytest.mark.parametrize("rows", [4, 3])
@pytest.mark.parametrize("dtype", ["float64", "float32", ">f4"])
def test_npy(tmp_path, path, rows, dtype):
    file = tmp_path / "camera.npy"
    np.save(file, path[:, :rows].astype(dtype))
    loaded = load_poses(file)
    assert loaded.dtype == np.float64 and loaded.shape == (9, 4, 4)
    assert (loaded[:, 3] == [0, 0, 0, 1]).all()
    np.testing.assert_array_equal(loaded[:, :3], path[:, :3].astype(dtype))


def test_fortran_order_npy_keeps_its_matrices(tmp_path, path):
    np.save(tmp_path / "camera.npy", np.asfortranarray(path))
    np.testing.assert_array_equal(load_poses(tmp_path / "camera.npy"), path)


@pytest.mark.parametrize("rows", [4, 3])
def test_json(tmp_path, path, rows):
    file = tmp_path / "camera.json"
    file.write_text(json.dumps(path[:, :rows].tolist()))
    np.testing.assert_array_equal(load_poses(file), path)


@pytest.mark.parametrize("numbers", [16, 12])
@pytest.mark.parametrize("separator", [" ", ", "])
def test_txt(tmp_path, path, numbers, separator):
    file = tmp_path / "camera.txt"
    rows = [separator.join(repr(float(x)) for x in pose.ravel()[:numbers]) for pose in path]
    file.write_text("# a comment\n\n" + "\n".join(rows) + "\n")
    np.testing.assert_array_equal(load_poses(file), path)


def test_rounded_rotations_are_accepted(path):
    check_poses(path.astype(np.float16))
    check_poses(path.round(4))


def _set(frame, index, value):
    def change(path):
        path[(frame, *index)] = value
        return path

    return change


def _rotations(change):
    def apply(path):
        path[4:, :3, :3] = change(path[4:, :3, :3])
        return path

    return apply


BAD_POSES = {
    "nan": (_set(3, (0, 1), np.nan), r"frame 3: .*not finite"),
    "infinite": (_set(5, (2, 3), -np.inf), r"frame 5: .*not finite"),
    "transposed": (lambda p: p.transpose(0, 2, 1), r"frame 0: expected the last row 0 0 0 1, found .*last column"),
    "last row": (_set(2, (3, 3), 2.0), r"frame 2: expected the last row 0 0 0 1, found 0 0 0 2"),
    "far": (_set(6, (0, 3), 1e9), r"frame 6: the translation .*1e\+09.* too large"),
    "scaled": (_rotations(lambda r: 2 * r), r"frame 4: .*not a rotation.*lengths 2 2 2.*differs from the identity by 3"),
    "slightly scaled": (_rotations(lambda r: 1.001 * r), r"frame 4: .*not a rotation"),
    "sheared": (_rotations(lambda r: r @ [[1, 0.1, 0], [0, 1, 0], [0, 0, 1]]), r"frame 4: .*not a rotation"),
    "mirrored": (_rotations(lambda r: r * [1, 1, -1]), r"frame 4: .*reflection"),
    "huge": (_rotations(lambda r: r * 1e200), r"frame 4: .*not a rotation"),
    "zero": (_rotations(lambda r: r * 0), r"frame 4: .*not a rotation"),
}


@pytest.mark.parametrize("name", BAD_POSES)
def test_bad_pose_names_file_and_frame(tmp_path, path, name):
    change, message = BAD_POSES[name]
    file = tmp_path / "camera.npy"
    np.save(file, change(path))
    with pytest.raises(CameraError, match=message) as error:
        load_poses(file)
    assert str(error.value).startswith(str(file))


def test_the_first_bad_frame_is_named_whatever_is_wrong_with_later_ones(path):
    path[7] = np.nan
    path[2, :3, :3] *= 3
    with pytest.raises(CameraError, match=r"frame 2: .*not a rotation"):
        check_poses(path)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((4, 4), r"found \(4, 4\); a single pose needs a leading frame axis"),
        ((9, 4, 3), r"found \(9, 4, 3\)"),
        ((9, 19), r"found \(9, 19\)"),
        ((1, 9, 4, 4), r"found \(1, 9, 4, 4\)"),
        ((), r"found \(\)"),
        ((0, 4, 4), "1 to 100,000 frames, found 0"),
        ((MAX_FRAMES + 1, 12), "1 to 100,000 frames, found 100,001"),
    ],
)
def test_bad_shape(tmp_path, shape, message):
    np.save(tmp_path / "camera.npy", np.zeros(shape, dtype=np.float16))
    with pytest.raises(CameraError, match=message):
        load_poses(tmp_path / "camera.npy")


@pytest.mark.parametrize("values", [np.ones((2, 4, 4), dtype=complex), np.ones((2, 4, 4), dtype=bool), np.full((2, 4, 4), "1")])
def test_values_that_are_not_real_numbers(tmp_path, values):
    np.save(tmp_path / "camera.npy", values)
    with pytest.raises(CameraError, match="expected real numbers"):
        load_poses(tmp_path / "camera.npy")
    with pytest.raises(CameraError, match="real matrices, found values of type"):
        check_poses(values)


def test_ragged_poses():
    with pytest.raises(CameraError, match="real matrices"):
        check_poses([[1.0, 2.0], [3.0]])


class _Exploit:
    def __reduce__(self):
        return (open, ("/nonexistent/pwned", "w"))


def test_a_pickle_is_refused_without_being_run(tmp_path):
    file = tmp_path / "camera.npy"
    np.save(file, np.array([_Exploit()], dtype=object), allow_pickle=True)
    with pytest.raises(CameraError, match=r"not a plain .npy array"):
        load_poses(file)


def test_an_archive_is_refused(tmp_path, path):
    np.savez(tmp_path / "camera.npz", poses=path)
    (tmp_path / "camera.npz").rename(tmp_path / "camera.npy")
    with pytest.raises(CameraError, match="found an archive"):
        load_poses(tmp_path / "camera.npy")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("frames", [10**12, 2**62, 2**63 - 1])
def test_a_header_that_promises_terabytes_is_refused(tmp_path, frames):
    file = tmp_path / "camera.npy"
    with file.open("wb") as stream:
        np.lib.format.write_array_header_1_0(stream, {"descr": "<f8", "fortran_order": False, "shape": (frames, 4, 4)})
        stream.write(bytes(128))
    with pytest.raises(CameraError, match=r"not a plain .npy array"):
        load_poses(file)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "[[1, 2", "not valid JSON"),
        ("a.json", '{"poses": []}', "expected a nested list of numbers, found a JSON dict"),
        ("a.json", "[[1, 2], [3]]", "different lengths"),
        ("a.json", '[["1"]]', "expected real numbers"),
        ("a.json", "[1" + "0" * 400 + "]", "expected real numbers"),
        ("a.json", "[" * 100_000, "nested too deeply|not valid JSON"),
        ("a.txt", "1 2 3\n4 5\n", "line 2: expected 3 numbers as in row 1, found 2"),
        ("a.txt", "1 2 3\n4 five 6\n", "line 2: expected numbers, found '4 five 6'"),
        ("a.txt", "", "found"),
        ("a.npz", "", r"expected a .npy, .json or .txt file, found '.npz'"),
        ("camera", "", "found 'no suffix'"),
    ],
)
def test_bad_text(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(CameraError, match=message):
        load_poses(tmp_path / name)


@pytest.mark.parametrize("name", ["a.json", "a.txt"])
def test_binary_in_a_text_file(tmp_path, name):
    (tmp_path / name).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CameraError, match=r"not a text file|not valid JSON"):
        load_poses(tmp_path / name)


def test_missing_file_and_directory(tmp_path):
    with pytest.raises(CameraError, match="cannot be read"):
        load_poses(tmp_path / "none.npy")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(CameraError, match="cannot be read"):
        load_poses(tmp_path / "folder.txt")


def test_a_file_too_large_is_refused_unread(tmp_path):
    file = tmp_path / "camera.npy"
    with file.open("wb") as stream:
        stream.truncate(2**30)
    with pytest.raises(CameraError, match="more than the 268,435,456"):
        load_poses(file)


@given(st.data())
def test_damaged_npy_never_raises_anything_else(tmp_path_factory, data):
    file = tmp_path_factory.getbasetemp() / "damaged.npy"
    np.save(file, random_path(1, 2))
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, 130))] = data.draw(st.integers(0, 255))
    file.write_bytes(content[: data.draw(st.sampled_from([len(content), 100, 10, 0]))])
    try:
        assert load_poses(file).shape[1:] == (4, 4)
    except CameraError as error:
        assert str(file) in str(error)


@given(st.integers(0, 2**32 - 1), st.integers(1, 12))
def test_relative_to_first(seed, frames):
    path = random_path(seed, frames)
    relative = relative_to_first(path)
    assert relative.dtype == np.float64
    np.testing.assert_array_equal(relative[0], np.eye(4))
    # float64 products of entries up to about 20: a few units in the last place.
    np.testing.assert_allclose(path[0] @ relative, path, atol=1e-12)


def test_relative_poses_do_not_depend_on_the_world_frame(path):
    moved = random_path(7, 1)[0] @ path
    # Rounding in float64 of coordinates up to about 20.
    np.testing.assert_allclose(relative_to_first(moved), relative_to_first(path), atol=1e-12)


def test_a_still_camera_far_away_stays_exactly_still():
    pose = random_path(3, 1)[0]
    pose[:3, 3] = [1e5, -1e5, 1e5]
    np.testing.assert_array_equal(relative_to_first(np.tile(pose, (3, 1, 1)))[:, :3, 3], 0)


@pytest.mark.parametrize("shape", [(4, 4), (0, 4, 4), (3, 3, 4)])
def test_relative_needs_poses(shape):
    with pytest.raises(CameraError, match="expected poses of shape"):
        relative_to_first(np.zeros(shape))


def test_fit_length(path):
    assert fit_length(path, 9) is not None
    np.testing.assert_array_equal(fit_length(path, 9), path)
    np.testing.assert_array_equal(fit_length(path, 5, "trim"), path[:5])
    with pytest.raises(CameraError, match=r"demo.npy has 9 poses and 5 frames were asked for; ask for 9 or trim the path to 5"):
        fit_length(path, 5, source="demo.npy")
    for policy in ("error", "trim"):
        with pytest.raises(CameraError, match="has 9 poses and 17 frames were asked for; ask for at most 9 or extend"):
            fit_length(path, 17, policy)
    with pytest.raises(CameraError, match="unknown length policy 'hold'"):
        fit_length(path, 17, "hold")  # type: ignore[arg-type]
    with pytest.raises(CameraError, match="at least 1"):
        fit_length(path, 0, "trim")


def test_the_package_imports_without_heavy_libraries():
    blocked = ["torch", "triton", "onnx", "onnxruntime", "transformers", "diffusers", "PIL", "scipy"]
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked})); import sanawm.camera as c; print(c.actions_to_poses('w-4').shape)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(5, 4, 4)"
