"""Camera-to-world pose files.

Shapes: F pixel frames. A pose is a 4x4 camera-to-world matrix with OpenCV axes: +x right, +y down, +z forward.
"""

from __future__ import annotations

import os
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sanawm.camera.files import read_array
from sanawm.errors import CameraError

# 104 minutes at 16 fps. A bound keeps a mistyped length from filling the memory.
MAX_FRAMES = 100_000

# Largest entry of |R R^T - I|. Rotations rounded to float16 or to four decimals stay below 8e-4; a scale of 1.001 already gives 2e-3.
ROTATION_TOLERANCE = 1e-3

# Rounded text files; the row is set to 0 0 0 1 afterwards.
LAST_ROW_TOLERANCE = 1e-5

# float32, which the model receives, resolves a tenth of a unit at this distance.
MAX_TRANSLATION = 1e6


def load_poses(path: str | os.PathLike[str]) -> NDArray[np.float64]:
    """Read and check a camera path.

    The file is .npy, .json (nested lists) or .txt (16 or 12 numbers a row) and holds (F, 4, 4) or (F, 3, 4) matrices, row-major, float.
    Returns (F, 4, 4) float64, last rows exactly 0 0 0 1. Raises CameraError naming the file and the first bad frame.
    """
    return check_poses(read_array(path), source=str(path))


def check_poses(poses: ArrayLike, source: str = "the camera path", first_frame: int = 0) -> NDArray[np.float64]:
    """Check poses that came from a file or a caller.

    poses: (F, 4, 4), (F, 3, 4), (F, 16) or (F, 12), real. `first_frame` is the number of poses[0] in messages.
    Returns a copy, (F, 4, 4) float64, last rows exactly 0 0 0 1. Raises CameraError.
    """
    c2w = _as_matrices(poses, source)
    if fault := _first_fault(c2w):
        frame, sentence = fault
        raise CameraError(f"{source}, frame {first_frame + frame}: {sentence}")
    c2w[:, 3] = [0, 0, 0, 1]
    return c2w


def _first_fault(c2w: NDArray[np.float64]) -> tuple[int, str] | None:
    """The first frame that is not a rigid motion, and what is wrong with it."""
    rotation, translation = c2w[:, :3, :3], c2w[:, :3, 3]
    # Values that are not finite pass through the arithmetic below and are named first.
    with np.errstate(all="ignore"):
        gram_error = np.abs(rotation @ rotation.transpose(0, 2, 1) - np.eye(3)).max(axis=(1, 2))
        good = np.stack(
            [
                np.isfinite(c2w).all(axis=(1, 2)),
                np.abs(c2w[:, 3] - np.array([0, 0, 0, 1])).max(axis=1) <= LAST_ROW_TOLERANCE,
                np.abs(translation).max(axis=1) <= MAX_TRANSLATION,
                gram_error <= ROTATION_TOLERANCE,
                np.linalg.det(rotation) > 0,
            ]
        )
        lengths = np.linalg.norm(rotation, axis=2)
    if good.all():
        return None
    frame = int(np.argmin(good.all(axis=0)))
    sentences = (
        "the pose has a value that is not finite (NaN or infinity); repair the path",
        f"expected the last row 0 0 0 1, found {_row(c2w[frame, 3])}; matrices must be row-major with the translation in the last column",
        f"the translation {_row(translation[frame])} is too large for float32; keep the path within {MAX_TRANSLATION:g} units",
        f"the left 3x3 block is not a rotation (its rows have lengths {_row(lengths[frame])}, and R times its transpose differs from the "
        f"identity by {gram_error[frame]:.2g}, at most {ROTATION_TOLERANCE:g}); orthonormalise the rotations and remove any scale",
        "the left 3x3 block is a reflection (determinant -1); convert to right-handed OpenCV axes",
    )
    return frame, sentences[int(np.argmin(good[:, frame]))]


def _row(values: NDArray[np.float64]) -> str:
    return " ".join(f"{value:.4g}" for value in values)


def _as_matrices(poses: ArrayLike, source: str) -> NDArray[np.float64]:
    try:
        array = np.asarray(poses)
        if array.dtype.kind not in "fiu":
            raise ValueError(f"values of type {array.dtype}")
        array = array.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise CameraError(f"{source}: expected (F, 4, 4) real matrices, found {error}; pass a float array") from error
    shape = array.shape
    if array.ndim not in (2, 3) or shape[1:] not in ((4, 4), (3, 4), (16,), (12,)):
        remedy = "a single pose needs a leading frame axis" if shape in ((4, 4), (3, 4)) else "convert the path"
        raise CameraError(
            f"{source}: expected camera-to-world matrices (F, 4, 4) or (F, 3, 4), or 16 or 12 numbers a row, found {shape}; {remedy}"
        )
    if not 1 <= shape[0] <= MAX_FRAMES:
        raise CameraError(f"{source}: expected 1 to {MAX_FRAMES:,} frames, found {shape[0]:,}; shorten or fill the path")
    c2w = np.zeros((shape[0], 4, 4))
    c2w[:, 3, 3] = 1
    rows = array.reshape(shape[0], -1, 4)
    c2w[:, : rows.shape[1]] = rows
    return c2w


def relative_to_first(c2w: ArrayLike) -> NDArray[np.float64]:
    """Poses seen from the first one: T_k <- inverse(T_0) T_k.

    c2w: (F, 4, 4). Returns (F, 4, 4) float64, frame 0 exactly the identity. The scale of translations is kept. Raises CameraError for
    another shape.
    """
    poses = np.asarray(c2w, dtype=np.float64)
    if poses.ndim != 3 or poses.shape[1:] != (4, 4) or not len(poses):
        raise CameraError(f"expected poses of shape (F, 4, 4), found {poses.shape}; load them with load_poses")
    relative = relative_to(poses[0], poses)
    relative[0] = np.eye(4)
    return relative


def relative_to(origin: NDArray[np.float64], c2w: NDArray[np.float64]) -> NDArray[np.float64]:
    """inverse(origin) @ c2w for origin (4, 4) and c2w (F, 4, 4), float64, without building the inverse.

    Written in elementwise steps: a pose's result then does not depend on how many others are computed with it, bit for bit, which
    chunked streaming relies on. Differences of translations come first, so a path far from the origin loses nothing.
    """
    relative = np.zeros_like(c2w)
    relative[:, 3, 3] = 1
    columns = c2w[:, :3].copy()
    columns[:, :, 3] -= origin[:3, 3]
    for row in range(3):
        relative[:, row] = origin[0, row] * columns[:, 0] + origin[1, row] * columns[:, 1] + origin[2, row] * columns[:, 2]
    return relative


def fit_length(
    poses: NDArray[np.float64], frames: int, policy: Literal["error", "trim"] = "error", source: str = "the camera path"
) -> NDArray[np.float64]:
    """The poses of exactly `frames` pixel frames.

    poses: (P, 4, 4). With P == frames they are returned as they are; a longer path is an error by default and loses its end under
    policy 'trim'; a shorter one is always an error, since motion is never invented. Raises CameraError naming both numbers.
    """
    if policy not in ("error", "trim"):
        raise CameraError(f"unknown length policy '{policy}'; choose 'error' or 'trim'")
    if frames < 1:
        raise CameraError(f"{frames} frames were asked for; ask for at least 1")
    count = len(poses)
    if count < frames:
        raise CameraError(f"{source} has {count} poses and {frames} frames were asked for; ask for at most {count} or extend the path")
    if count > frames and policy == "error":
        raise CameraError(f"{source} has {count} poses and {frames} frames were asked for; ask for {count} or trim the path to {frames}")
    return poses[:frames]
