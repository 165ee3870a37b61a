"""World-to-ray matrices of the camera branch, the reference for the model's own.

Shapes: T latent frames, h rows, w columns, S = h * w tokens a frame in row-major order.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sanawm.errors import CameraError

# Floor of a length before division, as in the published model.
_EPSILON = 1e-6


def pixel_rays(intrinsics: NDArray[np.float64], h: int, w: int) -> NDArray[np.float64]:
    """Directions ((x - cx) / fx, (y - cy) / fy, 1) in camera axes, (F, h, w, 3) float64, not normalised.

    intrinsics: (F, 4) in units of the h x w grid. Coordinates are integers: no half-pixel offset, as the model was trained.
    """
    fx, fy, cx, cy = intrinsics.T[:, :, None, None]
    rays = np.ones((len(intrinsics), h, w, 3))
    rays[..., 0] = (np.arange(w) - cx) / fx
    rays[..., 1] = (np.arange(h)[:, None] - cy) / fy
    return rays


def rotate(c2w: NDArray[np.float64], rays: NDArray[np.float64]) -> NDArray[np.float64]:
    """Camera directions (F, h, w, 3) in world axes, by the rotations of c2w (F, 4, 4).

    Elementwise steps, so that a frame's result does not depend on the frames computed with it, bit for bit.
    """
    columns = c2w[:, None, None, :3, :3]
    return columns[..., 0] * rays[..., 0:1] + columns[..., 1] * rays[..., 1:2] + columns[..., 2] * rays[..., 2:3]


def ray_matrices(camera_conditions: ArrayLike, h: int, w: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """P, which takes world coordinates to each token's ray coordinates, and its inverse (SANA-WM paper arXiv 2605.15178, UCPE).

    camera_conditions: (T, 20), per latent frame a row-major camera-to-world matrix and fx fy cx cy in latent pixels. The ray is the z axis;
    x is the camera's y axis crossed with it. Returns P and P^-1, each (T, S, 4, 4) float64; a ray that is not a number gets the identity.
    Raises CameraError for another shape.
    """
    conditions = np.asarray(camera_conditions, dtype=np.float64)
    if conditions.ndim != 2 or conditions.shape[1] != 20:
        raise CameraError(f"expected camera conditions of shape (T, 20), found {conditions.shape}; make them with camera_conditions()[0]")
    c2w, intrinsics = conditions[:, :16].reshape(-1, 4, 4), conditions[:, 16:]
    world = rotate(c2w, _normalize(pixel_rays(intrinsics, h, w)))
    z = _normalize(world)
    x = _normalize(np.cross(np.broadcast_to(c2w[:, None, None, :3, 1], z.shape), z))
    y = _normalize(np.cross(z, x))
    axes = np.stack([x, y, z], axis=-2)
    P = np.zeros((*z.shape[:3], 4, 4))
    P[..., :3, :3] = axes
    P[..., :3, 3] = -(axes @ c2w[:, None, None, :3, 3, None])[..., 0]
    P[..., 3, 3] = 1
    P[np.isnan(world).any(axis=-1)] = np.eye(4)
    P = P.reshape(len(c2w), h * w, 4, 4)
    return P, invert_rigid(P)


def invert_rigid(matrices: NDArray[np.float64]) -> NDArray[np.float64]:
    """Inverse of rigid motions (..., 4, 4) through the transpose of their rotation."""
    transposed = np.swapaxes(matrices[..., :3, :3], -1, -2)
    inverse = np.zeros_like(matrices)
    inverse[..., :3, :3] = transposed
    inverse[..., :3, 3] = -(transposed @ matrices[..., :3, 3, None])[..., 0]
    inverse[..., 3, 3] = 1
    return inverse


def _normalize(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), _EPSILON)
