"""Pinhole intrinsics.

Shapes: F pixel frames. A row is [fx fy cx cy] in pixels of the image it belongs to.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sanawm.camera.files import SUFFIXES, read_array
from sanawm.camera.poses import MAX_FRAMES
from sanawm.errors import CameraError

if TYPE_CHECKING:
    from sanawm.camera.image import CropGeometry

# The official pipeline refuses estimated intrinsics outside this open interval; beyond it they are usually for another image size.
MIN_FOV_DEGREES, MAX_FOV_DEGREES = 25.0, 120.0

# A common phone or game camera; other serving stacks for SANA-WM assume the same.
DEFAULT_FOV_DEGREES = 70.0

# Skew and stray entries of K relative to fx: far above float32 rounding, far below a pixel's effect across an image.
MATRIX_TOLERANCE = 1e-4


def load_intrinsics(source: str | os.PathLike[str], frames: int, image_size: tuple[int, int] | None = None) -> NDArray[np.float64]:
    """Read and check intrinsics for `frames` pixel frames.

    source: the text 'fx,fy,cx,cy', or a .npy, .json or .txt file of shape (4,), (3, 3), (P, 4) or (P, 3, 3), in pixels of the input image.
    image_size: (width, height) of the input image; given, the field of view is checked too.
    Returns (frames, 4) float64. Raises CameraError.
    """
    name = os.fspath(source)
    values: ArrayLike
    if isinstance(source, str) and "," in source and Path(source).suffix.lower() not in SUFFIXES:
        label = f"intrinsics '{source}'"
        try:
            values = [float(word) for word in source.split(",")]
        except ValueError as error:
            raise CameraError(f"{label}: expected four numbers fx,fy,cx,cy in pixels of the input image; correct the text") from error
    else:
        label = name
        values = read_array(name)
    intrinsics = normalise_intrinsics(values, frames, source=label)
    if image_size is not None:
        check_field_of_view(intrinsics, *image_size, source=label)
    return intrinsics


def normalise_intrinsics(values: ArrayLike, frames: int, source: str = "intrinsics") -> NDArray[np.float64]:
    """Bring any of the four accepted shapes to one row a frame.

    values: (4,), (3, 3), (P, 4) or (P, 3, 3). One camera is repeated; a longer sequence loses its end; a shorter one is resampled linearly
    in time with both ends kept. Returns (frames, 4) float64 [fx fy cx cy]. Raises CameraError for another shape, values that are not
    finite, focal lengths that are not positive, or matrices with skew.
    """
    if not 1 <= frames <= MAX_FRAMES:
        raise CameraError(f"{source}: expected 1 to {MAX_FRAMES:,} frames, found {frames:,}; ask for another length")
    try:
        array = np.asarray(values)
        if array.dtype.kind not in "fiu":
            raise ValueError(f"values of type {array.dtype}")
        array = array.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise CameraError(f"{source}: expected real numbers, found {error}; pass fx, fy, cx, cy") from error
    if array.shape in ((4,), (3, 3)):
        array = array[None]
    if array.shape[1:] not in ((4,), (3, 3)) or not len(array):
        raise CameraError(f"{source}: expected shape (4,), (3, 3), (F, 4) or (F, 3, 3), found {np.shape(values)}; pass fx, fy, cx, cy or K")
    finite = np.isfinite(array).all(axis=tuple(range(1, array.ndim)))
    if not finite.all():
        raise CameraError(f"{source}, frame {int(np.argmin(finite))}: a value is not finite (NaN or infinity); repair the intrinsics")
    rows = _from_matrices(array, source) if array.ndim == 3 else array
    bad = (rows[:, :2] <= 0).any(axis=1)
    if bad.any():
        frame = int(np.argmax(bad))
        raise CameraError(
            f"{source}, frame {frame}: expected positive focal lengths, found fx={rows[frame, 0]:g} fy={rows[frame, 1]:g}; "
            "the order is fx, fy, cx, cy in pixels"
        )
    return _fit_time(rows, frames)


def _from_matrices(matrices: NDArray[np.float64], source: str) -> NDArray[np.float64]:
    """[fx fy cx cy] of (F, 3, 3) matrices K = [[fx 0 cx] [0 fy cy] [0 0 1]]."""
    focal = np.abs(matrices[:, 0, 0])
    stray = np.maximum(np.abs(matrices[:, 0, 1]), np.abs(matrices[:, 1, 0])) > MATRIX_TOLERANCE * focal
    last = np.abs(matrices[:, 2] - [0, 0, 1]).max(axis=1) > MATRIX_TOLERANCE
    if (stray | last).any():
        frame = int(np.argmax(stray | last))
        what = "the last row is not 0 0 1" if last[frame] else "it has skew, which the model does not know"
        raise CameraError(f"{source}, frame {frame}: expected K = [[fx 0 cx] [0 fy cy] [0 0 1]], but {what}; undistort or normalise K")
    return np.stack([matrices[:, 0, 0], matrices[:, 1, 1], matrices[:, 0, 2], matrices[:, 1, 2]], axis=1)


def _fit_time(rows: NDArray[np.float64], frames: int) -> NDArray[np.float64]:
    if len(rows) >= frames:
        return rows[:frames].copy()
    if len(rows) == 1:
        return np.repeat(rows, frames, axis=0)
    old, new = np.linspace(0, 1, len(rows)), np.linspace(0, 1, frames)
    return np.stack([np.interp(new, old, rows[:, column]) for column in range(4)], axis=1)


def field_of_view(intrinsics: NDArray[np.float64], width: int, height: int) -> NDArray[np.float64]:
    """Horizontal and vertical field of view in degrees, (F, 2), of intrinsics (F, 4) over an image of that many pixels."""
    return np.degrees(2 * np.arctan(np.array([width, height]) / 2 / intrinsics[:, :2]))


def check_field_of_view(intrinsics: NDArray[np.float64], width: int, height: int, source: str = "intrinsics") -> None:
    """Refuse intrinsics (F, 4) whose field of view over a width x height image is not between 25 and 120 degrees. Raises CameraError."""
    degrees = field_of_view(intrinsics, width, height)
    bad = ~((degrees > MIN_FOV_DEGREES) & (degrees < MAX_FOV_DEGREES)).all(axis=1)
    if bad.any():
        frame = int(np.argmax(bad))
        raise CameraError(
            f"{source}, frame {frame}: a field of view of {degrees[frame, 0]:.1f} x {degrees[frame, 1]:.1f} degrees is outside "
            f"{MIN_FOV_DEGREES:g} to {MAX_FOV_DEGREES:g}; fx, fy, cx, cy must be in pixels of the {width}x{height} input image"
        )


def default_intrinsics(width: int, height: int, fov_degrees: float = DEFAULT_FOV_DEGREES) -> NDArray[np.float64]:
    """Intrinsics (4,) float64 of a camera with square pixels, a centred principal point and that horizontal field of view.

    A guess for users who have none: the official pipeline estimates them from the image with Pi3X instead, and errors of the guess show as
    wrong parallax. Raises CameraError when either field of view leaves the accepted range.
    """
    if not MIN_FOV_DEGREES < fov_degrees < MAX_FOV_DEGREES:
        raise CameraError(
            f"expected a field of view between {MIN_FOV_DEGREES:g} and {MAX_FOV_DEGREES:g} degrees, found {fov_degrees:g}; choose another"
        )
    focal = width / 2 / math.tan(math.radians(fov_degrees) / 2)
    intrinsics = np.array([focal, focal, width / 2, height / 2])
    check_field_of_view(intrinsics[None], width, height, source=f"default intrinsics of {fov_degrees:g} degrees")
    return intrinsics


def adjust_for_resize_crop(intrinsics: NDArray[np.float64], geometry: CropGeometry) -> NDArray[np.float64]:
    """Intrinsics of the resized and cropped image from those of the source image.

    intrinsics: (..., 4). Returns the same shape, float64: focal lengths and principal point scale with the resize, the crop moves the
    principal point.
    """
    scale_x = geometry.resized[0] / geometry.source[0]
    scale_y = geometry.resized[1] / geometry.source[1]
    left, top = geometry.offset
    return np.asarray(intrinsics, dtype=np.float64) * [scale_x, scale_y, scale_x, scale_y] - [0, 0, left, top]
